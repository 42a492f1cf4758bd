"""The synchronisation of shared behind the last local steps of a round, on a thread of its own.

τ steps before the end a copy of each worker's shared part takes part in it, and the worker goes on training.
At the end what the others have found is added to where it is now: `v += new − sent`; so nothing that was
learnt is lost. (Streaming DiLoCo, arXiv 2501.18512, lets an exchange take some steps.) Pool blocks, which go
to another worker, are synchronised when all steps are done; of `resist` they are the smaller part.

The copies live in host memory, pinned where a GPU is used; there the thread queues on a stream of its own.
While it runs nobody else may communicate.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.errors import LostRankError, RunError
from resist_ds.memory import host_bytes, one_line_when_out
from resist_ds.nets.subnet import StateLayout
from resist_ds.protocol.partition import Partition
from resist_ds.protocol.sync import Synchroniser

NOT_NEGATIVE = "exp_avg_sq"  # of an optimizer's state: what adding a difference must not spoil


class Overlap:
    """What of this rank's workers takes part, and the thread that synchronises it.

    Args:
        state: of a worker's vector.
        travel: whether optimizer state takes part.

    Attributes:
        shared: {worker: shared part} as it was synchronised: at the end of such a round the global model's.
        dropped: workers whose round did not count when it began, on all ranks.
        seconds: that the last exchange took; waited: that its copies took and its end was waited for.
    """

    def __init__(self, comm: Comm, sync: Synchroniser, state: StateLayout, *, travel: bool):
        self._comm = comm
        self._sync = sync
        self._state = state
        self._length = state.shared.exchanged(travel)
        self.shared: dict[int, Tensor] = {}
        self._sent: dict[int, Tensor] = {}
        self._spoilt: list[int] = []
        self.dropped: frozenset[int] = frozenset()
        self.seconds = self.waited = self._taking = 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(comm.device) if comm.device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """Host memory of the copies."""
        return sum(host_bytes(t) for copies in (self.shared, self._sent) for t in copies.values())

    @property
    def running(self) -> bool:
        return self._thread is not None

    def take(self, worker: int, vector: Tensor, spoilt: bool) -> None:
        """Copy what takes part of a worker.

        Args:
            spoilt: its round does not count; the vector is that of the round's start.
        """
        start = time.perf_counter()
        if worker not in self.shared:
            for kept, size in ((self.shared, self._state.shared.numel), (self._sent, self._length)):
                pinned = self._stream is not None
                kept[worker] = torch.empty(size, dtype=vector.dtype, pin_memory=pinned)
        for kept in (self.shared, self._sent):
            kept[worker].copy_(vector[: len(kept[worker])], non_blocking=True)
        self._taking += time.perf_counter() - start
        if spoilt:
            self._spoilt.append(worker)

    def begin(self, now: Partition, then: Partition, *, skip: bool, error: Exception | None = None) -> None:
        """Start the exchange, when all of this rank's workers are taken. Collective: all ranks.

        Args:
            now, then: deals of this round and of the next.
            skip: spoilt workers are left out; otherwise nothing is exchanged where there is one.
            error: why this rank cannot take part: then nobody does, and all raise it in `wait`.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._comm.device))
        spoilt, self._spoilt = self._spoilt, []

        def work() -> list[int]:
            if error is not None:
                raise error
            return spoilt

        self._error = None
        self._thread = threading.Thread(target=self._run, args=(now, then, work, skip), daemon=True)
        self._thread.start()

    def _run(self, now: Partition, then: Partition, work: Callable[[], list[int]], skip: bool) -> None:
        """The thread. Collective: all ranks."""
        queue: AbstractContextManager[object] = nullcontext()
        begun, rank = False, self._comm.rank
        try:
            if self._stream is not None:
                torch.cuda.set_device(self._comm.device)
                queue = torch.cuda.stream(self._stream)
            with torch.no_grad(), queue:
                self.dropped = frozenset(w for workers in self._comm.collect(work) for w in workers)
                if self.dropped and not skip:
                    return
                begun, start = True, time.perf_counter()
                with one_line_when_out(self._comm.device, rank):
                    self._sync.aggregate(self.shared, now, self.dropped, self._sync.shared)
                    self._sync.hand_off(self.shared, now, then, self._sync.shared)
                    if self._stream is not None:
                        self._stream.synchronize()
                self.seconds = time.perf_counter() - start
        except BaseException as error:
            self._error = error
            if begun and not isinstance(error, RunError):
                self._error = RunError(f"rank {rank}: an exchange broke off: {type(error).__name__}: {error}")
                self._error.__cause__ = error
            if begun and isinstance(self._error, RunError) and not isinstance(error, LostRankError):
                self._error.alone = True  # the others stand in it, and learn of this rank by its end

    def wait(self) -> None:
        """Wait for the exchange's end; raises what went wrong in it, on all ranks."""
        if self._thread is None:
            return
        start = time.perf_counter()
        self._thread.join()
        self.waited, self._taking = self._taking + time.perf_counter() - start, 0.0
        self._thread = None
        if self._error is not None:
            raise self._error

    def shared_parts(self, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Views of what takes part of shared."""
        return {worker: vector[: self._length] for worker, vector in vectors.items()}

    def finish(
        self, vectors: Mapping[int, Tensor], now: Partition, then: Partition, lost: frozenset[int]
    ) -> None:
        """Synchronise pool blocks, and put into shared what was found of it. Collective: all ranks.

        Args:
            vectors: of this rank's workers; of a lost one that of the round's start.
            now, then: deals of this round and of the next.
            lost: workers whose round does not count, or no longer.
        """
        self._sync.aggregate(vectors, now, lost, self._sync.blocks)
        self._sync.hand_off(vectors, now, then, self._sync.blocks)
        for worker, vector in vectors.items():
            self._add(vector, self.shared[worker], None if worker in lost else self._sent[worker])

    def _add(self, vector: Tensor, new: Tensor, sent: Tensor | None) -> None:
        """Add what was found to where a worker's shared part is now; without `sent` take it as it is."""
        chunk = self._sync.chunk
        for lo in range(0, self._length, chunk):
            part, found = vector[lo : min(lo + chunk, self._length)], new[lo : lo + chunk]
            if sent is None:
                part.copy_(found[: len(part)], non_blocking=True)
            else:
                change = found[: len(part)].to(part.device, non_blocking=True)
                part += change - sent[lo : lo + len(part)].to(part.device, non_blocking=True)
        shared = self._state.shared
        if NOT_NEGATIVE in shared.state.vectors and self._length > shared.parameters:
            row = 1 + shared.state.vectors.index(NOT_NEGATIVE)
            vector.narrow(0, row * shared.parameters, shared.parameters).clamp_(min=0)

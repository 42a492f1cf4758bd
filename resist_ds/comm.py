"""Everything that communicates, and the only importer of deepspeed.comm; with rendezvous.py, of
torch.distributed.

Two back ends stand side by side: gloo for tensors in host memory, NCCL for tensors on GPUs. Exchanges
go over NCCL where every rank has a GPU of its own, else over gloo with their buffers in host memory
(several ranks on one GPU, which NCCL refuses; CPU runs). No process group is made during training.

A rank that is gone is noticed by gloo at once, as its connection closes; by NCCL not at all. So nobody waits
for NCCL before gloo has told that all ranks have come to the same exchange, and then not for ever.
"""

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from resist_ds.errors import LostRankError, RunError, UserError
from resist_ds.launcher import Launch
from resist_ds.rendezvous import Identity, lack, meet, places

T = TypeVar("T")

PATIENCE = 300.0  # seconds for what NCCL carries once all ranks have come: a transit buffer, or a pool block
SPIN = 0.001  # seconds in which the end of a transfer is looked for without a pause
PAUSE = 0.0002  # seconds between two looks from then on


class Ledger(Counter[str]):
    """Bytes that this rank really put into exchange buffers for another rank, by kind of exchange."""


class Comm:
    """This process's place among the ranks, and the collectives that the protocol uses.

    Attributes:
        rank, size: r and R.
        local_rank, local_size: the same on this machine, as counted when all have met; a launcher's
            LOCAL_RANK only says which of the visible GPUs to take.
        machine: this one's name, and what tells it from others of that name.
        device: where this rank computes.
        lack: why not every rank has a GPU of its own, in words, where some have one; else None.
        buffer_device: where exchange buffers live; the device, or the host where gloo carries them.
        ledger: bytes sent to other ranks.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), init_method: str | None = None):
        """Join the job that the launcher's environment describes. Collective: all ranks.

        A job of one rank joins nobody, and listens nowhere.

        Args:
            timeout: how long a collective waits for the others.
            init_method: rendezvous URL; default: the launcher's MASTER_ADDR and MASTER_PORT.
        """
        launch = Launch.read(os.environ)
        self.rank, self.size = launch.rank, launch.size
        self.local_rank, self.local_size = launch.local_rank, launch.local_size
        self.ledger = Ledger()
        self._teams: dict[int, Team] = {}
        gpus = torch.cuda.device_count()
        self.device = torch.device("cuda", self.local_rank % gpus) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(self.device)
        if self.size > 1:
            if torch.distributed.is_initialized():
                raise UserError(
                    "this process is in a process group already: make ResIST before Accelerator or "
                    "init_process_group"
                )
            # Imported first: with a group that is older than DeepSpeed, Python's own end (train.py has none)
            # meets gloo's running threads and aborts.
            dist = deepspeed_comm()
            try:
                torch.distributed.init_process_group(
                    "cpu:gloo,cuda:nccl" if gpus else "gloo",
                    init_method=init_method,
                    store=None if init_method else meet(launch, timeout),
                    timeout=timeout,
                    rank=self.rank,
                    world_size=self.size,
                )
            except RuntimeError as error:
                if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error).lower():
                    raise
                raise RunError(
                    f"rank {self.rank} cannot reach the other ranks ({_in_short(error)}): open the ports "
                    "between the machines, and name their network: GLOO_SOCKET_IFNAME (docs/multi-node.md)"
                ) from error
            dist.init_distributed(auto_mpi_discovery=False, verbose=False)  # takes the group over
        identity = Identity.of(self.device)
        self.machine = identity.machine
        found = places(self.gather(identity))
        self.local_rank, self.local_size = found[self.rank].local_rank, found[self.rank].local_size
        self.lack = lack(found)
        self.buffer_device = torch.device("cpu") if self.lack else self.device
        if self.backend == "nccl":
            # NCCL's first operation must be everyone's; in an exchange some ranks may have nothing to move.
            one = torch.zeros(1, device=self.device)
            with self.others():
                self._finish([torch.distributed.all_reduce(one, async_op=True)])

    def team(self, size: int, apart: bool = False) -> "Team":
        """This rank's team, of so many consecutive ranks; the same one each time.

        Args:
            size: G, of which R is a multiple.
            apart: whether an exchange of all ranks may run while a team's share a step. The first call says.
        """
        if size not in self._teams:
            self._teams[size] = Team(self, size, apart)
        return self._teams[size]

    @property
    def backend(self) -> str:
        """What carries the exchanges."""
        if self.size == 1:
            return "none"
        return "nccl" if self.buffer_device.type == "cuda" else "gloo"

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        """An uninitialised exchange buffer [numel] for data like `like`; beside it where nothing is sent."""
        device = self.buffer_device if self.size > 1 else like.device
        pinned = device.type == "cpu" and self.device.type == "cuda"
        return torch.empty(numel, dtype=like.dtype, device=device, pin_memory=pinned)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], kind: str
    ) -> None:
        """Send and receive contiguous tensors, (tensor, other rank) each, all at once.

        Collective: all ranks, also those with nothing to move; messages from one rank to another arrive in
        their order.
        """
        if not sends and not receives and self.backend != "nccl":
            return
        dist = deepspeed_comm()
        operations = []
        for operation, messages in ((dist.irecv, receives), (dist.isend, sends)):
            tags: Counter[int] = Counter()
            for tensor, rank in messages:
                assert rank != self.rank and tensor.is_contiguous()
                operations.append(dist.P2POp(operation, tensor, rank, tag=tags[rank]))
                tags[rank] += 1
        self.ledger[kind] += sum(tensor.nbytes for tensor, _ in sends)
        with self.others():
            self._finish(dist.batch_isend_irecv(operations) if operations else [])

    def broadcast(self, tensor: Tensor, root: int, kind: str) -> Callable[[], object]:
        """Start sending `tensor` from `root` to all ranks; returns the wait. Collective: all ranks, both."""
        if self.size == 1:
            return lambda: None
        if self.rank == root:
            self.ledger[kind] += (self.size - 1) * tensor.nbytes
        with self.others():
            work = deepspeed_comm().broadcast(tensor, root, async_op=True)
        return self.others()(lambda: self._finish([work]))

    def gather_rows(self, rows: Tensor, kind: str) -> Tensor:
        """Stack every rank's [n, …] rows, rank-major, on the device or in host memory, as exchanges go.

        Collective: all ranks, equal shapes.
        """
        if self.size == 1:
            return rows
        rows = rows.to(self.buffer_device).contiguous()
        self.ledger[kind] += (self.size - 1) * rows.nbytes
        gathered = [torch.empty_like(rows) for _ in range(self.size)]
        with self.others():
            deepspeed_comm().all_gather(gathered, rows)
        return torch.cat(gathered)

    def gather(self, value: T) -> list[T]:
        """Every rank's (small, picklable) value, by rank. Collective: all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self.others():
                deepspeed_comm().all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks. Collective: all ranks."""
        self.gather(None)

    def agree(self, work: Callable[[], T]) -> T:
        """Run `work`; if it failed on any rank, fail on all with that rank's error. Collective: all ranks.

        So what can fail on one rank (a folder that is not there, an image that cannot be read) leaves
        no other waiting in a collective. The error of the lowest failing rank is raised everywhere.
        """
        done: list[T] = []
        self.collect(lambda: done.append(work()))
        return done[0]

    def collect(self, work: Callable[[], T]) -> list[T]:
        """`agree`, and every rank's (small, picklable) result, by rank. Collective: all ranks."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as e:
            if isinstance(e, RunError) and e.alone:  # the others stand elsewhere, and cannot be told
                raise
            error = e
        errors, results = zip(*self.gather((self._portable(error), result)), strict=True)
        failed = [e for e in errors if e is not None]
        if failed:
            if error is not None and not isinstance(error, RunError):
                raise error  # a defect: this rank shows where
            raise failed[0]
        return list(results)

    def close(self) -> None:
        """Leave the job. Collective: all ranks."""
        if torch.distributed.is_initialized():  # on one rank too: FSDP2 and DeepSpeed want a group
            torch.distributed.destroy_process_group()

    def _finish(self, works: Sequence[Any]) -> None:
        """Wait until operations that all ranks have begun are done. Collective: all ranks, over NCCL.

        (Where NCCL itself reports an error, torch's watchdog ends the process, within a second.)
        """
        over_nccl = self.backend == "nccl"
        if over_nccl:
            torch.distributed.all_reduce(torch.zeros(1))  # over gloo: all have come, or it says who has not
        for work in works:
            work.wait()  # over NCCL only the stream waits for it
        if not over_nccl:
            return
        start = time.monotonic()
        while not all(work.is_completed() for work in works):
            waited = time.monotonic() - start
            if waited > PATIENCE:
                stuck = RunError(
                    f"rank {self.rank}: an exchange over NCCL that all ranks have come to has not ended in "
                    f"{PATIENCE:g} s: another rank hangs or has ended in it; NCCL_DEBUG=WARN says more"
                )
                stuck.alone = True
                raise stuck
            if waited > SPIN:
                time.sleep(PAUSE)

    def _portable(self, error: Exception | None) -> RunError | None:
        """An error of any class as one that every rank can unpickle."""
        if error is None or isinstance(error, RunError):
            return error
        return RunError(f"rank {self.rank} failed with {type(error).__name__}: {error}")

    @contextmanager
    def others(self) -> Iterator[None]:
        """A collective: one line when another rank is gone (killed, out of memory), and no traceback."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            lost = LostRankError(
                f"rank {self.rank} lost another rank, whose own message or exit says why ({_in_short(error)})"
            )
            lost.alone = (
                self.local_rank == 0
            )  # on every machine one says so: rank 0's may be the one that is gone
            raise lost from error


class Team:
    """G consecutive ranks that share each step of a net, and the process group in which they do.

    Attributes:
        size, lane: G, and this rank's place among them.
        ranks: all of them, in the order of their lanes.
    """

    def __init__(self, comm: Comm, size: int, apart: bool = False):
        assert comm.size % size == 0, (comm.size, size)
        self.size, self.lane = size, comm.rank % size
        first = comm.rank - self.lane
        self.ranks = tuple(range(first, first + size))
        self._comm = comm
        self._apart = apart and size > 1

    @cached_property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """Theirs, which training libraries are given; None: that of all the ranks that there are.

        Collective: all ranks, at first use, which comes before training.
        """
        ranks, size = self._comm.size, self.size
        if size == ranks and not self._apart:  # apart: two threads' operations in one group have no order
            return None
        groups = [torch.distributed.new_group([*range(r, r + size)]) for r in range(0, ranks, size)]
        mine = groups[self.ranks[0] // size]
        assert isinstance(mine, torch.distributed.ProcessGroup)
        return mine

    def gather(self, value: T) -> list[T]:
        """Every lane's (small, picklable) value. Collective: the team's ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._comm.others():
                deepspeed_comm().all_gather_object(values, value, group=self.group)
        return values


def _in_short(error: RuntimeError) -> str:
    """gloo's words without its source line, the peer's address and the advice that follow."""
    said = re.search(r"(?<=\] )[^.\[]+\b", str(error))
    return said.group() if said else type(error).__name__


@cache
def deepspeed_comm() -> Any:
    """deepspeed.comm, imported on first use: a run on one rank does not wait for it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it warns
    import deepspeed.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if os.environ["DS_ACCELERATOR"] == "cpu":
        # Its shared-memory op for CPUs costs a 40 s compile at the first start and is not needed here. On a
        # GPU it is not looked for, and a look at this list makes DeepSpeed try to build all its ops.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed.comm

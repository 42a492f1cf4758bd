"""Loader processes: they decode images while the rank trains, and say so when they cannot.

What they have decoded waits in shared memory (on Linux /dev/shm, which is 64 MB in a container of Docker's).
"""

import errno
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from resist_ds.data.pixels import reason
from resist_ds.errors import DataError, UserError

AHEAD = 2  # batches per process that are read before they are due, whatever tasks they are cut into
_SHARED = "/dev/shm"
Loaded = tuple[Tensor, dict[int, str]]  # images uint8 [B, 3, S, S]; {row: why it could not be read}


def load(
    read: Dataset[Any], tasks: Iterable[Any], processes: int, pin: bool, per_batch: int = 1
) -> Iterator[Loaded]:
    """What `read[task]` returns for each task, in order; `processes` do it (0: the caller).

    `read` returns a DataError where raising it in a loader process would bury its line in a traceback.

    Args:
        pin: whether images come in page-locked memory.
        per_batch: tasks that a batch is cut into.

    Errors: DataError, in one line; also if a process has ended, or what it had read was lost on its way.
    """
    loader = DataLoader(
        read,
        sampler=tasks,
        batch_size=None,  # a task is read as one
        collate_fn=_unchanged,
        num_workers=processes,
        prefetch_factor=AHEAD * per_batch if processes else None,
        pin_memory=pin,
        multiprocessing_context=_Context() if processes else None,
        worker_init_fn=_belong_to_the_rank,
        generator=torch.Generator(),  # else it would draw a seed, which nobody uses, from the global one
    )
    try:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, unreadable = batch
            yield images, unreadable
    except (RuntimeError, OSError, EOFError) as error:  # a process was killed, mostly for its memory
        raise DataError(f"a loader process ended ({reason(error)}): {_remedy(error)}") from None


@dataclass(frozen=True)
class Stream:
    """What loader processes read in one go.

    Attributes:
        size: bytes of a batch.
        batches: that there are.
    """

    size: int
    batches: float = math.inf

    def waiting(self, processes: int) -> int:
        """Bytes that may wait in shared memory, for one rank."""
        # Those ahead, the one that was delivered last, and the next one, in its parts, while that is held.
        return int(min(AHEAD * processes + 2, self.batches)) * self.size if processes else 0


def check_shared_memory(processes: int, streams: Sequence[Stream], ranks: int) -> None:
    """Compare what all ranks of this machine need with what is free, before any of them has begun.

    Args:
        processes: loader processes of a rank.
        streams: that are open at the same time.

    Errors: UserError, with what to type.
    """
    try:
        system = os.statvfs(_SHARED)
    except OSError:  # another system, which has no limit of its own
        return
    free = system.f_bavail * system.f_frsize
    needed = [ranks * sum(stream.waiting(n) for stream in streams) for n in range(processes + 1)]
    if needed[-1] <= free:
        return
    fits = max(n for n, size in enumerate(needed) if size <= free)
    raise UserError(
        f"loader processes ({processes} per rank) need up to {_mb(needed[-1])} MB of shared memory on this "
        f"machine, and {_SHARED} has {free // 10**6} MB free: type --data_workers {fits}"
        f"{' or fewer' if fits else ''}, or give it more (docker run --shm-size {_mb(2 * needed[-1])}m)"
    )


def _mb(size: int) -> int:
    return -(-size // 10**6)


def _remedy(error: BaseException) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "shared memory" in str(error):
        return f"give {_SHARED} more room (docker run --shm-size), or type a smaller --data_workers"
    return "try fewer --data_workers"


def _unchanged(batch: object) -> object:
    return batch


class _Results(Queue):
    """A queue whose receiver is told what could not be sent.

    A queue's thread would print a traceback and drop the batch, for which the rank would wait for ever.
    """

    def _on_queue_feeder_error(self, error: Exception, item: Any) -> None:
        for left in glob(f"{_SHARED}/torch_{os.getpid()}_*"):  # which torch leaves where it finds no room
            with suppress(OSError):
                os.unlink(left)
        if isinstance(item, tuple) and not isinstance(item[1], DataError):
            said = f"a batch was lost on its way from a loader process ({reason(error)}): {_remedy(error)}"
            self.put((item[0], DataError(said)))
        elif get_worker_info() is not None:  # not even a line gets through; the rank notices an end
            os._exit(1)


class _Context(ForkServerContext):
    """How loader processes start: forked, but from a server that holds this module and nothing else.

    A fork of the rank itself would inherit the locks of the threads of gloo, NCCL and CUDA without the
    threads, and may wait on one for ever. Spawning each process is as safe, but imports torch once for each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(["resist_ds.data.loader_server", "__main__", "resist_ds.data.images"])

    def Queue(self, maxsize: int = 0) -> Any:
        return _Results(maxsize, ctx=self.get_context())


def _belong_to_the_rank(process: int) -> None:
    """Ctrl-C, and deepspeed's launcher, reach all processes; the rank needs these to end its round.

    torch would look at the server that forked this process, which lives as long as its children do.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)

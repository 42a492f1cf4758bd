"""Starts ranks: one process each, forked from this one, which has imported everything once.

A rank starts in milliseconds instead of 5 s, and every call gets fresh ones, so that peaks of memory are a
single run's. That needs a process here which never computes and never touches a GPU: OpenMP's threads and a
CUDA context do not survive a fork. Whatever ends a call (a failure, a time-out, Ctrl-C, SIGTERM) ends its
ranks, and they watch for the death of this process themselves.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn, Protocol

from resist_ds.errors import RunError, UserError

_CONTEXT = multiprocessing.get_context("fork")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # that end a run
_GRACE = 2.0  # seconds in which the other ranks may say more of a failure
# The failure that explains the others comes first; the rest are ranks that have lost a peer.
_KINDS = ("typed", "defect", "died", "run")


_stopped: RunError | None = None


def stop(error: RunError) -> NoReturn:
    """From a signal handler: end all ranks and raise `error` in `run`.

    At once, or within a second where Python drops what a handler raises (in a callback, for instance).
    """
    global _stopped
    _stopped = error
    raise error


class Network(Protocol):
    """Where ranks live, if not simply on this machine."""

    environment: dict[str, str]

    def enter(self, rank: int) -> None: ...


def warm() -> None:
    """Import what a rank needs; some seconds."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not open it
    for name in ("resist_ds.trainer", "resist_ds.engines.parallel", "torch.distributed._tools.mem_tracker"):
        importlib.import_module(name)
    from resist_ds import comm

    comm.deepspeed_comm()


def run(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    network: Network | None = None,
    log: Path | None = None,
    timeout: float = 3600,
) -> list[Any]:
    """Call `function(comm, *args)` on `size` fresh ranks; returns what each returned, by rank.

    Args:
        network: where the ranks live; default: this machine's own network.
        log: folder for what the ranks print, `rank0.log` and so on; default: it is dropped.
        timeout: seconds after which ranks that have not returned are killed.

    Raises:
        UserError: what a rank's `UserError` says.
        RunError: a rank failed, died or hung; the message is one line and names it.
    """
    processes: list[BaseProcess] = []
    receivers: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                receiver, sender = _CONTEXT.Pipe(duplex=False)
                receivers.append(receiver)
                job = (function, rank, size, f"{folder}/rendezvous", network, log, sender, args)
                processes.append(_CONTEXT.Process(target=_life, args=job))  # a daemon has no loader processes
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the callbacks of a fork drop exceptions
                processes[-1].start()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                sender.close()  # before the next fork: a rank's death then closes its pipe
            results = _results(processes, receivers, time.monotonic() + timeout)
            for process in processes:
                process.join(10)  # until it has left the process group in good order
            return results
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _results(processes: list[BaseProcess], receivers: list[Connection], deadline: float) -> list[Any]:
    """What every rank sends; raises as `run` does."""
    waiting: dict[Any, int] = {receiver: rank for rank, receiver in enumerate(receivers)}
    results: dict[int, Any] = {}
    failures: list[tuple[str, str]] = []
    while waiting:
        ready = wait(list(waiting), max(0.0, min(1.0, deadline - time.monotonic())))
        if _stopped is not None:
            raise _stopped
        if not ready and time.monotonic() >= deadline:
            break
        for receiver in ready:
            rank = waiting.pop(receiver)
            try:
                kind, value = receivers[rank].recv()
            except EOFError:
                processes[rank].join(1)
                kind, value = "died", f"rank {rank} died with exit code {processes[rank].exitcode}"
            if kind == "done":
                results[rank] = value
            else:
                failures.append((kind, value))
                deadline = min(deadline, time.monotonic() + _GRACE)
    if failures:
        kind, said = min(failures, key=lambda failure: _KINDS.index(failure[0]))
        raise UserError(said) if kind == "typed" else RunError(said)
    if waiting:
        hung = ", ".join(map(str, sorted(waiting.values())))
        raise RunError(f"rank {hung} of {len(processes)} did not return in time and was killed")
    return [results[rank] for rank in range(len(processes))]


def _life(
    function: Callable[..., Any],
    rank: int,
    size: int,
    store: str,
    network: Network | None,
    log: Path | None,
    sender: Connection,
    args: tuple[Any, ...],
) -> None:
    """One rank, from its first line to its result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that started us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        if network is not None:
            network.enter(rank)  # before there is a thread or a socket, which would stay behind
            os.environ |= network.environment
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _redirect(os.devnull if log is None else log / f"rank{rank}.log")
        if size > 1:  # one rank is started as by plain python, without a launcher's variables
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        from resist_ds.comm import Comm

        comm = Comm(init_method=f"file://{store}")
        sender.send(("done", function(comm, *args)))
    except RunError as error:
        traceback.print_exc()
        sender.send(("typed" if isinstance(error, UserError) else "run", str(error)))
    except BaseException as error:
        traceback.print_exc()
        said = " ".join(str(error).split())
        sender.send(("defect", f"rank {rank} failed with {type(error).__name__}: {said}"))
    else:
        comm.close()


def _redirect(path: str | Path) -> None:
    """Send this process's output, libraries' own writes too, into a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

"""Being asked to stop: SIGTERM, SIGINT, and the end of the launcher that started this rank.

A request is remembered until the round is over; the ranks then agree on it, save and leave. If that takes
longer than the grace, or a second signal comes, or training has not begun, the process ends at once: what
is on disk is whole at any moment. All this happens in a thread of its own, since the main thread may stand
in a collective or a long operation, in which Python runs no signal handler.

Launchers: torchrun, and accelerate with several ranks, pass signals on; a single-process accelerate and
deepspeed's outer process just end, which counts as SIGTERM. A rank whose launcher passes signals on and is
gone without a word was orphaned by force and ends at once.

Those above a rank are looked up when its imports are done, and one that has ended by then has left no trace.
So whoever starts a launcher may name its process, and others that the run must not outlive, in the variable
RESIST_DS_LAUNCHERS: numbers with spaces between. `tools/trial.py` does, for the agent of a sweep.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import psutil

from resist_ds import scratch
from resist_ds.launcher import Launch

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds in which a second signal is the same request, from the terminal and from the launcher
LOOK = 0.5  # seconds between looks at the launcher
LAUNCHERS = (
    "accelerate",
    "deepspeed",
    "torchrun",
    "wandb",
    "accelerate.commands.launch",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
)


class Signals:
    """Watches for requests to stop, from entering to leaving the context.

    Args:
        grace: seconds from the request to the forced end.
        launch: whether a launcher has started this rank; only rank 0 says anything.
        parent: pid of the process that has started this one, if it may have ended since.

    Attributes:
        received: the signal that asked, or None.
    """

    def __init__(self, grace: float, launch: Launch, parent: int | None = None):
        self.received: signal.Signals | None = None
        self._grace = grace
        self._launch = launch
        self._parent = parent or os.getppid()
        self._since = 0.0
        self._stands = "training had not begun"  # what an end now means
        self._deferred = False
        self._done = threading.Event()
        self._before: dict[int, Any] = {}

    def defer(self) -> None:
        """From now on a request waits for the end of the round."""
        self._deferred, self._stands = True, "what the round trained is lost"

    def saved(self) -> None:
        """All is on the disk: from now on nothing is worth waiting for."""
        self._deferred, self._stands = False, "the checkpoint is complete"

    def __enter__(self) -> "Signals":
        named = _named()
        if (self._launch.launched and os.getppid() != self._parent) or None in named:
            self._orphaned()
        ended = Signals._launcher_ended
        self._launchers = _launchers(self._launch.launched) + [
            (process, ended) for process in named if process is not None
        ]
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        # A handler in Python runs when the main thread gets to it; the byte in the pipe comes at once.
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, _noted)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        os.write(self._write, b"\0")  # wakes the thread
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        while not self._done.is_set():
            if select.select([self._read], [], [], LOOK)[0]:
                for number in os.read(self._read, 64):
                    if number in SIGNALS:
                        self._request(signal.Signals(number))
            for launcher, gone in self._launchers:
                if not _runs(launcher):
                    gone(self)
            if self.received and time.monotonic() - self._since > self._grace:
                self._leave(f"it took longer than --grace {self._grace:g}: {self._stands}")

    def _request(self, signum: signal.Signals) -> None:
        if self.received is None:
            self.received, self._since = signum, time.monotonic()
            if not self._deferred:
                self._leave(self._stands)
        elif time.monotonic() - self._since > ECHO:
            self._leave(f"a second signal came: {self._stands}")

    def _launcher_ended(self) -> None:
        if self.received is None:
            self._request(signal.SIGTERM)

    def _orphaned(self) -> None:
        scratch.remove()
        os._exit(128 + signal.SIGKILL)

    def _leave(self, why: str) -> None:
        assert self.received is not None
        if self._launch.rank == 0:  # not by print: the main thread may hold the stream's lock
            with suppress(OSError):  # of a pipe whose reader is gone: Ctrl-C ends `| tee log` too
                os.write(sys.stderr.fileno(), f"error: stopped by {self.received.name}; {why}\n".encode())
        scratch.remove()
        os._exit(128 + self.received)


def _noted(signum: int, frame: object) -> None:
    """Nothing: the thread has read of it."""


def _launchers(launched: bool) -> list[tuple[psutil.Process, Callable[[Signals], None]]]:
    """The launchers above this process, nearest first, and what their end means."""
    found: list[tuple[psutil.Process, Callable[[Signals], None]]] = []
    try:
        parents = psutil.Process().parents()
    except (psutil.Error, OSError):  # without /proc, say: then nobody is watched
        return []
    if parents and launched:  # whoever it is, it has made us a rank
        found.append((parents.pop(0), Signals._orphaned))
    for parent in parents:
        if not _is_launcher(parent):
            break
        found.append((parent, Signals._launcher_ended))
    return found


def _named() -> list[psutil.Process | None]:
    """The processes in RESIST_DS_LAUNCHERS; None for one that has ended."""
    named: list[psutil.Process | None] = []
    for pid in os.environ.get("RESIST_DS_LAUNCHERS", "").split():
        try:
            process = psutil.Process(int(pid))
            # One that is younger than this rank has only got the number of one that has ended.
            named.append(
                process
                if _runs(process) and process.create_time() <= psutil.Process().create_time()
                else None
            )
        except (ValueError, psutil.NoSuchProcess):
            named.append(None)
        except (psutil.Error, OSError):  # it cannot be asked after, so it is not watched
            continue
    return named


def _is_launcher(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except (psutil.Error, OSError):
        return False
    # python /bin/torchrun …, python -m torch.distributed.run …, python -u -m deepspeed.launcher.launch …
    return any(os.path.basename(word) in LAUNCHERS for word in command[:4]) and "python" in command[0]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, OSError):  # nobody can say, and a run does not end for that
        return True

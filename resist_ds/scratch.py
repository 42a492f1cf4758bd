"""A place of this process's own for temporary files, which is gone when the process is.

A rank ends at once, without its libraries' own clean-up, which may wait for a server or for ranks that are
gone. So wandb would leave two folders at every start, Python the sockets of loader processes, and torch's
compiler an empty cache. What SIGKILL leaves, the next start of the same user takes away.
"""

import fcntl
import getpass
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "resist_ds-rank-"
YOUNG = 60.0  # seconds; a folder may not be locked yet

_folder: Path | None = None
_lock = -1


def use(*, compiles: bool) -> None:
    """From now on `tempfile` makes everything there. (Without a place for it, things stay as they are.)

    Args:
        compiles: torch's compiler is used: its cache stays where it is shared by all runs.
    """
    global _folder, _lock
    with suppress(OSError):
        shared = Path(tempfile.gettempdir())
        if compiles:  # torch's own default
            cache = shared / f"torchinductor_{getpass.getuser()}"
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        _sweep(shared)
        _folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        tempfile.tempdir = str(_folder)
        _lock = os.open(_folder, os.O_RDONLY)
        fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does


def remove() -> None:
    """Take it away; the process is about to end."""
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = tempfile.tempdir = None


def _sweep(shared: Path) -> None:
    """Take away the folders of processes that were killed."""
    for left in shared.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's; or gone meanwhile; or its process runs
            if time.time() - left.stat().st_mtime < YOUNG or left.stat().st_uid != os.getuid():
                continue
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)

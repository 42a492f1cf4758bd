"""Reading files of disks and file servers that fail now and then: tried again, and then said in one line.

What cannot be read may well be sound, so that nobody may go on as if it were damaged or not there. No
communication; imports no torch.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from resist_ds.errors import UnreadableError

T = TypeVar("T")

PAUSES = (0.1, 0.5, 2.0)  # seconds before another attempt
# No attempt changes these; all others may pass (a server that restarts, a handle that is stale).
_LASTING = {errno.EACCES, errno.EPERM}
# What these say is of the tree: the file is not there, or no file.
_OF_THE_TREE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def patiently(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns; an error that may pass is waited for.

    Args:
        path: what is read, for the message.

    Raises:
        OSError: of those that say that the file is not there, or no file.
        UnreadableError: any other; the file may be sound.
    """
    for attempt, pause in enumerate((*PAUSES, None), 1):
        try:
            return read()
        except OSError as error:
            if error.errno in _OF_THE_TREE:
                raise
            if error.errno not in _LASTING and pause is not None:
                time.sleep(pause)
                continue
            tried = f", {attempt} times in a row" if attempt > 1 else ""
            raise UnreadableError(
                f"{path} cannot be read ({error.strerror or type(error).__name__}{tried}): it may be sound, "
                "so see to its disk or file server, and start again"
            ) from None
    raise AssertionError


def status(path: Path) -> os.stat_result | None:
    """Of what is at `path`, or None where nothing is. (`Path.exists` takes some errors for a no.)

    Raises:
        UnreadableError: it cannot be told, or a link is there that leads nowhere (to a disk not mounted).
    """
    try:
        return patiently(path, lambda: os.stat(path))
    except OSError:
        if path.is_symlink():
            raise UnreadableError(
                f"{path} is a link to {os.readlink(path)}, where nothing can be found: mount what it is on, "
                "or remove the link"
            ) from None
        return None


def names(path: Path) -> list[str]:
    """Of what is in a folder. Errors are those of `patiently`."""
    return patiently(path, lambda: os.listdir(path))


def content(path: Path) -> bytes:
    """A file's bytes. Errors are those of `patiently`."""
    return patiently(path, path.read_bytes)

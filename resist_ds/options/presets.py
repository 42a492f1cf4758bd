"""The presets that ship with the package, and the file that a name on the command line means.

In a checkout they are in `ds_configs/` beside the package, in an installed wheel in `resist_ds/ds_configs/`.
Imports no torch.
"""

import errno
import os
import stat
from pathlib import Path

from resist_ds.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
PRESETS = next((p for p in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if p.is_dir()), _PACKAGE)
_LARGEST = 1 << 20  # bytes; options take a few thousand


def find(name: str, suffix: str) -> Path:
    """The file that was typed; where there is none, the shipped preset of that name, if there is one.

    Args:
        name: a path, or of a preset: `demo`, `demo.yaml`, `ds_configs/demo.yaml`.
        suffix: that a preset's name may lack.
    """
    typed = Path(name).expanduser()
    if (typed.exists() and not typed.is_dir()) or typed.parent not in (Path("."), Path("ds_configs")):
        return typed
    shipped = PRESETS / (typed.name if typed.suffix else f"{typed.name}{suffix}")
    return shipped if shipped.is_file() else typed


def contents(option: str, name: str, suffix: str) -> bytes:
    """The bytes of the file that `--option name` means.

    Raises:
        UserError: it cannot be read, or is no file of options: a device that never ends, or a pipe, which
            only one of the ranks could read.
    """
    try:
        path = find(name, suffix)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"--{option} {name} is a pipe or a device: type a file, which every rank can read"
            )
        if status.st_size > _LARGEST:
            raise UserError(f"--{option} {name} has {status.st_size:,} bytes: that is no file of options")
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte, a home of nobody's
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--{option} {name} cannot be read: {' '.join(str(reason).split())}") from None

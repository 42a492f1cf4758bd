"""The presets that ship with the package, and the file that a name on the command line means.

In a checkout they are in `ds_configs/` beside the package, in an installed wheel in `resist_ds/ds_configs/`.
Imports no torch.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
PRESETS = next((p for p in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if p.is_dir()), _PACKAGE)


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

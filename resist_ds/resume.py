"""Going on from a checkpoint: which one, and whether its run is this run."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resist_ds.checkpoint import Checkpoint, State, newest_first
from resist_ds.comm import Comm
from resist_ds.config import SHAPING, Config
from resist_ds.errors import DamagedError, RunError, UserError
from resist_ds.folder import RunFolder
from resist_ds.storage import MANIFEST

_NOT_TO_CHANGE = ("model", "num_classes")  # a checkpoint's tensors have the shapes that these give them


@dataclass(frozen=True)
class Choice:
    """What rank 0 has chosen.

    Attributes:
        path: of the checkpoint, or None.
        seal: hash of its manifest, by which the other ranks know that they see the same one.
        remarks: what the user should know about the choice.
    """

    path: Path | None = None
    seal: str = ""
    remarks: tuple[str, ...] = ()


def choose(comm: Comm, config: Config, folder: RunFolder) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The checkpoint that `--resume` means, verified, and remarks about it. Collective: all ranks."""
    choice = comm.collect(lambda: _choose(config, folder) if comm.rank == 0 else Choice())[0]
    path = choice.path
    if path is None:
        return None, choice.remarks

    def see() -> Checkpoint:
        if _seal(path) != choice.seal:
            raise RunError(
                f"rank {comm.rank} does not see the checkpoint {path} of rank 0: it must be on a file "
                "system that all machines share"
            )
        return Checkpoint(path)

    return comm.agree(see), choice.remarks


def _choose(config: Config, folder: RunFolder) -> Choice:
    if config.resume == "never":
        return Choice()
    there = newest_first(folder.checkpoints)
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        Checkpoint.verified(path).close()
        if path.resolve() in [other.resolve() for other in there[1:]]:  # a later auto would take the newest
            raise UserError(
                f"--resume {config.resume}: {there[0]} is newer; type --resume auto, or another --output_dir "
                "to branch off"
            )
        return Choice(path, _seal(path))
    remarks: list[str] = []
    for path in there:
        try:
            Checkpoint.verified(path).close()
            return Choice(path, _seal(path), tuple(remarks))
        except DamagedError as error:
            remarks.append(f"{error}; trying the checkpoint before it")
    if remarks:
        remarks.append("no checkpoint is sound: starting afresh")
    return Choice(remarks=tuple(remarks))


def check(config: Mapping[str, Any], overridden: tuple[str, ...], state: State, train_size: int) -> None:
    """Refuse to go on with other options than the checkpoint's run had, field by field.

    Args:
        config: this run's options, with values in place of nulls.

    Raises:
        UserError: an option that shapes training differs and `--override` does not name it.
    """
    different = [name for name in SHAPING if config[name] != state.config[name]]
    for name in _NOT_TO_CHANGE:
        if name in different:
            raise UserError(
                f"--{name} is {config[name]}, and the checkpoint's is {state.config[name]}: type that, "
                "or start from an export of it, by --from_pretrained"
            )
    refused = [name for name in different if name not in overridden]
    if refused:
        fields = ", ".join(f"--{n} is {_shown(config[n])} and was {_shown(state.config[n])}" for n in refused)
        raise UserError(
            f"the checkpoint's run had other options: {fields}; type the old ones, or --override "
            f"{','.join((*overridden, *refused))}"
        )
    if train_size != state.train_size and "dataset" not in overridden:
        raise UserError(
            f"the training set has {train_size} images, and {state.train_size} in the checkpoint's run: "
            "type the old --data_dir, or --override dataset"
        )


def _shown(value: object) -> object:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _seal(path: Path) -> str:
    try:
        return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return ""

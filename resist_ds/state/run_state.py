"""What of a checkpoint is no tensor: `state.json`, its fields and its version. No communication."""

import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import UnionType
from typing import Any

from resist_ds import __version__
from resist_ds.data.order import Position
from resist_ds.errors import DamagedError, OtherVersionError
from resist_ds.options.config import Config
from resist_ds.state import storage

FORMAT = 1
STATE = "state.json"
_OPTIMIZER = {"vectors", "counter"}  # what a state says of the optimizer

# Of this machine or of this start of the run, and nobody else's business.
_PRIVATE = (
    *("data_dir", "output_dir", "from_pretrained", "deepspeed_config"),
    *("resume", "override", "wandb_project", "run_name"),
)


@dataclass(frozen=True)
class State:
    """Everything of a checkpoint that is no tensor; `state.json`.

    Attributes:
        round, step, samples, epoch, offset: the `Position` from which the run goes on.
        train_size: images of the training set.
        workers, slots, pool: W, K and P.
        test_scale: K/P of the round trained last.
        statistics_round: the round after which BatchNorm's statistics were estimated, or None.
        dtype: of the parameters.
        optimizer: what is kept per parameter, as in `OptimizerState`.
        loss_scales: state of each worker's loss scaler under fp16.
        totals: what the run's records carry on: bytes sent, accuracies, rounds dropped.
        cpu_threads: per rank; on a CPU the last bits depend on it.
        config, config_hash: all options but those of this machine, and their hash.
    """

    round: int
    step: int
    samples: int
    epoch: int
    offset: int
    train_size: int
    model: str
    num_classes: int
    workers: int
    slots: int
    pool: int
    test_scale: float
    statistics_round: int | None
    dtype: str
    optimizer: dict[str, Any]
    loss_scales: list[dict[str, float]] | None
    totals: dict[str, Any]
    cpu_threads: int
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def position(self) -> Position:
        return Position(self.round, self.step, self.samples, self.epoch, self.offset)

    @classmethod
    def read(cls, folder: Path) -> "State":
        """
        Raises:
            DamagedError: it is no state of a run.
            OtherVersionError: it is, but of a version that keeps other things.
        """
        path = folder / STATE
        content = storage.read_json(path)
        if not isinstance(content, dict) or not content.keys() & {"format", "versions"}:
            raise DamagedError(f"{path} is no state of a run")
        check_version(path, content)
        try:
            state = cls(**content)
            sound = _is_of_types(state) and config_hash(state.config) == state.config_hash
        except TypeError as error:
            raise DamagedError(f"{path} is no state of a run: {error}") from None
        if not sound:
            raise DamagedError(f"{path} is damaged: its fields do not fit each other")
        return state


def check_version(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `OtherVersionError` unless a state is of our format and has the fields of this version."""
    if content.get("format") != FORMAT:
        what = f"of format {content['format']!r}" if "format" in content else "of no format that it names"
        raise OtherVersionError(
            f"{path} is {what}, written by {_writer(content)}, and this version of resist_ds, {__version__}, "
            f"reads {FORMAT}"
        )
    vectors = content.get("optimizer")
    parts = ((content, {field.name for field in fields(State)}, ""), (vectors, _OPTIMIZER, "optimizer."))
    for found, expected, prefix in parts:
        if not isinstance(found, dict):
            continue
        for word, odd in (("lacks", expected - found.keys()), ("has", found.keys() - expected)):
            if odd:
                listed = ", ".join(f"{prefix}{name}" for name in sorted(map(str, odd)))
                raise OtherVersionError(
                    f"{path} {word} {listed}, unlike those of this version of resist_ds, {__version__}: "
                    f"it was written by {_writer(content)}"
                )


def _writer(content: Mapping[str, Any]) -> str:
    """The version that wrote a state."""
    known = content.get("versions")
    version = known.get("resist_ds") if isinstance(known, dict) else None
    return f"resist_ds {version}" if isinstance(version, str) else "another version"


def _is_of_types(state: State) -> bool:
    """Whether the fields hold what their annotations say."""
    hints = typing.get_type_hints(State)
    for field in fields(State):
        kinds = typing.get_args(hints[field.name]) if isinstance(hints[field.name], UnionType) else ()
        allowed = tuple(typing.get_origin(kind) or kind for kind in kinds or (hints[field.name],))
        if not isinstance(getattr(state, field.name), (*allowed, int) if float in allowed else allowed):
            return False
    return True


def config_to_keep(config: Config) -> dict[str, Any]:
    """The options that go into a checkpoint."""
    return {name: value for name, value in config.to_dict().items() if name not in _PRIVATE}


def config_hash(config: Mapping[str, Any]) -> str:
    """A hash of the options that a checkpoint keeps."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the packages that decide about numbers."""
    return {"resist_ds": __version__} | {n: version(n) for n in ("torch", "timm", "deepspeed", "safetensors")}

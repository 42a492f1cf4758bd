"""What a run begins from: nothing, a file of weights, or a checkpoint; and whether that is this run's."""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.data.order import Position
from resist_ds.errors import DamagedError, OtherVersionError, RunError, UnreadableError, UserError
from resist_ds.files import content, status
from resist_ds.nets import timm_weights
from resist_ds.nets.blueprint import Blueprint, Statistics
from resist_ds.nets.initial import Initialisation, Source
from resist_ds.nets.pretrained import Pretrained
from resist_ds.nets.subnet import OptimizerState
from resist_ds.options.config import FIELDS, PLANNED, SHAPING, Config
from resist_ds.options.option import TIMM
from resist_ds.state.checkpoint import WORKERS, Checkpoint, newest_first
from resist_ds.state.folder import RunFolder
from resist_ds.state.run_state import State
from resist_ds.state.storage import MANIFEST

_ALONE = {"error": "its rounding errors", "shared": "its last steps on shared"}
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


class Start:
    """What `--resume` and `--from_pretrained` mean for this run. Collective: all ranks.

    Attributes:
        folder, state: of the checkpoint that the run goes on from, or None.
        here: whether that is in the run's own folder, so that its records are continued.
        position: where the run begins.
        weights: the file of `--from_pretrained`, once `source` has opened it, or None.
        remarks: what the user should know.
    """

    def __init__(self, comm: Comm, config: Config, folder: RunFolder):
        """Choose the checkpoint and open it. Collective: all ranks."""
        choice = comm.collect(lambda: _choose(config, folder) if comm.rank == 0 else Choice())[0]
        self._config = config
        self._run_folder = folder
        self._checkpoint = comm.agree(lambda: _see(comm.rank, choice)) if choice.path else None
        self._pretrained: Pretrained | None = None
        self.weights: Path | None = None
        self.folder = choice.path
        self.state = self._checkpoint.state if self._checkpoint else None
        self.here = choice.path is not None and folder.holds(choice.path)
        self.position = self.state.position if self.state else Position()
        self.remarks = list(choice.remarks)

    def threads(self, local_ranks: int) -> int:
        """CPU threads per rank: what was asked for, the resumed run's, or a share of the cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = self._config.cpu_threads or max(1, cores // local_ranks)
        before = self.state.cpu_threads if self.state else threads
        if not self._config.cpu_threads and before <= cores:
            threads = before
        if threads != before:
            self.remarks.append(
                f"{threads} CPU threads per rank and not {before}: last bits will differ on a CPU"
            )
        return threads

    def workers(self, ranks: int, team_size: int) -> int:
        """W: what was asked for, the resumed run's, or one per team. Raises `UserError` if it is below T."""
        asked, before = self._config.workers, self.state.workers if self.state else None
        strategy = self._config.strategy
        if self._config.way.lockstep:
            if (asked or ranks) != ranks:
                raise UserError(
                    f"--strategy {strategy} has one worker per rank: type --workers {ranks}, or start "
                    f"{asked} ranks"
                )
            return ranks
        if strategy == "stochastic_depth":
            if (asked or ranks) != 1 or ranks != 1:
                raise UserError(
                    "--strategy stochastic_depth has one worker: type --workers 1, and start one rank"
                )
            return 1
        teams = ranks // team_size
        workers = asked or before or (teams if teams > 1 else 4)
        if workers < teams:
            whose = "" if asked else " of the checkpoint"
            many = f"{teams} ranks" if team_size == 1 else f"{teams} teams of {team_size} ranks"
            raise UserError(
                f"--workers {workers}{whose} is less than the {many}: "
                f"type --workers {teams} or more, or start fewer ranks"
            )
        return workers

    def check(self, options: Mapping[str, Any], train_size: int) -> None:
        """Refuse to go on with other options than the checkpoint's run had, field by field.

        Args:
            options: this run's, with the data set's values in place of nulls.

        Raises:
            UserError: an option that shapes training differs and `--override` does not name it.
        """
        if self._checkpoint is not None:
            _check(options, self._config.overridden, self._checkpoint.state, train_size)
            unknown = sorted(self._checkpoint.state.config.keys() - {*FIELDS, "scheduler"})
            if unknown:  # of a later version, or one that has gone
                said = ", ".join(f"{name} ({self._checkpoint.state.config[name]})" for name in unknown)
                self.remarks.append(f"the checkpoint's run had options that are unknown here: {said}")
            if OptimizerState.carried(self._config).kinds - self._checkpoint.optimizer.kinds:
                self.remarks.append("optimizer state that the checkpoint lacks starts at zero")

    def source(self, blueprint: Blueprint, scale: float) -> Source:
        """The workers' first values.

        Args:
            scale: K/P of the first round.
        """
        config = self._config
        if self._checkpoint:
            return self._checkpoint
        if not config.from_pretrained:
            return Initialisation(blueprint, config.seed)
        if config.from_pretrained == TIMM:
            path = timm_weights.find(config.model)
        else:
            path = Path(config.from_pretrained).expanduser()
        self._pretrained = Pretrained(path, blueprint, config.seed, scale)
        self.weights = path
        self.remarks.extend(self._pretrained.remarks)
        return self._pretrained

    def fetch(self, comm: Comm) -> None:
        """Let one rank per machine fetch timm's weights, where that is asked for. Collective: all ranks."""
        config = self._config
        if config.from_pretrained == TIMM and config.download and not self._checkpoint:
            comm.agree(lambda: timm_weights.fetch(config.model) if comm.local_rank == 0 else None)

    def statistics(self, blueprint: Blueprint, dtype: torch.dtype) -> Statistics:
        """BatchNorm's statistics until the first evaluation: the checkpoint's, or timm's initial ones."""
        if self._checkpoint:
            return self._checkpoint.statistics()
        sizes = dict(blueprint.norms)
        return {
            n: (torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype)) for n, size in sizes.items()
        }

    def kept(self, mine: Sequence[int], workers: int) -> Iterator[tuple[int, str, Tensor]]:
        """(worker, "error" or "shared", values) of what each worker held alone, as `checkpoint` has it.

        Nothing where this run's workers are others, or have no place for it; then a remark says so.

        Args:
            mine: the workers that are asked for, of W.
        """
        checkpoint, config = self._checkpoint, self._config
        if checkpoint is None:
            return
        same_order = checkpoint.state.config.get("channels_last") == config.channels_last
        alike = checkpoint.state.workers == workers and same_order
        same_state = checkpoint.optimizer == OptimizerState.carried(config)
        fits = {
            "error": alike and config.wire == "compact",
            "shared": alike and config.overlap_steps > 0 and same_state,
        }
        if lost := [_ALONE[kind] for kind in checkpoint.kept if not fits[kind]]:
            self.remarks.append(
                f"what each of the checkpoint's {checkpoint.state.workers} workers held alone is dropped: "
                f"{' and '.join(lost)}"
            )
        for worker in mine:
            for kind in (kind for kind in checkpoint.kept if fits[kind]):
                yield worker, kind, checkpoint.tensor(WORKERS, f"{worker}.{kind}")

    def make_way(self) -> None:
        """On rank 0: records that will be written again are cut, an earlier run's files are set aside.

        Raises:
            UserError: the folder cannot be written to.
            UnreadableError: it cannot be told what is there.
        """
        folder = self._run_folder
        try:
            if self.here:
                place = folder.set_aside_after(self.position.round)
                newer = place is not None and (place / folder.checkpoints.name).exists()
                what = "checkpoints that are not sound" if newer else "records with lines that are none"
            else:
                place, what = folder.set_aside(), "the records and checkpoints of an earlier run"
            if place:
                self.remarks.append(f"{what} are now in {place}")
        except OSError as error:  # a full disk, say
            raise UserError(
                f"--output_dir {folder.path} cannot be written to ({error.strerror}): type another folder"
            ) from None

    def close(self) -> None:
        """Close the files that were read."""
        for source in (self._checkpoint, self._pretrained):
            if source:
                source.close()


def _see(rank: int, choice: Choice) -> Checkpoint:
    """Open the checkpoint that rank 0 has verified, if this rank sees the same one."""
    assert choice.path is not None
    if not choice.seal or _seal(choice.path) != choice.seal:
        raise RunError(
            f"rank {rank} does not see the checkpoint {choice.path} of rank 0: it must be on a file system "
            "that all machines share"
        )
    return Checkpoint(choice.path)


def _choose(config: Config, folder: RunFolder) -> Choice:
    if config.resume == "never":
        return Choice()
    there = newest_first(folder.checkpoints)
    if config.resume == "auto":
        return _newest_sound(there)
    path = Path(config.resume).expanduser()
    found = status(path)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise UserError(f"--resume {path}: no such folder; type never, auto or the folder of a checkpoint")
    inside = newest_first(path) or newest_first(path / "checkpoints")
    if inside:
        raise UserError(f"--resume {path} holds checkpoints: type one of them, --resume {inside[0]}")
    Checkpoint.verified(path).close()
    if path.resolve() in [other.resolve() for other in there[1:]]:  # a later auto would take the newest
        raise UserError(
            f"--resume {config.resume}: {there[0]} is newer; type --resume auto, or another --output_dir "
            "to branch off"
        )
    return Choice(path, _seal(path))


def _newest_sound(there: list[Path]) -> Choice:
    """What `--resume auto` takes: only a damaged checkpoint is passed over, and never the last one.

    Raises:
        OtherVersionError, UnreadableError: one that may be sound would be passed over.
        UserError: none is sound; to start afresh unasked would be to lose what was trained.
    """
    damaged: list[DamagedError] = []
    for path in there:
        without = f"to go on without it move {path} away, to start afresh type --resume never"
        try:
            Checkpoint.verified(path).close()
            seal = _seal(path)
        except DamagedError as error:
            damaged.append(error)
        except OtherVersionError as error:
            raise OtherVersionError(f"{error}: go on with that version; {without}") from None
        except UnreadableError as error:
            raise UnreadableError(f"{error}; {without}") from None
        else:
            return Choice(path, seal, tuple(f"{e}; trying the checkpoint before it" for e in damaged))
    if damaged:
        others = f", and {len(damaged) - 1} before it are not sound either" if damaged[1:] else ""
        raise UserError(
            f"--resume auto finds no sound checkpoint: {damaged[0]}{others}; to start afresh type --resume "
            "never, which sets aside what is there"
        )
    return Choice()


def _check(config: Mapping[str, Any], overridden: tuple[str, ...], state: State, train_size: int) -> None:
    # An option that a checkpoint does not know came later: its run had what is now the default.
    shaping = SHAPING + (PLANNED if config["overlap_steps"] else ())
    before = {name: state.config.get(name, Config.default(name)) for name in shaping}
    different = [name for name in shaping if config[name] != before[name]]
    for name in _NOT_TO_CHANGE:
        if name in different:
            raise UserError(
                f"--{name} is {config[name]}, and the checkpoint's is {before[name]}: type that, "
                "or start from an export of it, by --from_pretrained"
            )
    if config["scheduler"] != state.config.get("scheduler") and "schedule" not in overridden:
        raise UserError(
            "the DeepSpeed file has another scheduler than that of the checkpoint's run: write the old one, "
            f"or type --override {','.join((*overridden, 'schedule'))}"
        )
    refused = [name for name in different if name not in overridden]
    if refused:
        fields = ", ".join(f"--{n} is {_shown(config[n])} and was {_shown(before[n])}" for n in refused)
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
    """Hash of a checkpoint's manifest, or nothing where none is. Raises `UnreadableError`."""
    try:
        return hashlib.sha256(content(path / MANIFEST)).hexdigest()
    except OSError:
        return ""

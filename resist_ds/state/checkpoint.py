"""The checkpoint format: a global model in pieces, as a Hugging Face-style sharded safetensors model.

    round-000040/                                the state at the start of round 40
      model-0000r-of-0000R.safetensors           timm's names; each tensor once; rank r's workers own them
      model.safetensors.index.json               {timm name: file}
      optimizer-0000r-of-0000R.safetensors       "<timm name>.momentum_buffer" and the like
      optimizer.safetensors.index.json
      workers-0000r-of-0000R.safetensors         "<worker>.<kind>": what each of rank r's workers held alone
      workers.safetensors.index.json             (these two where there is something in them)
      state.json                                 where the run is, and what shapes it
      manifest.json                              size and sha256 of every file

A worker alone may hold two things, flat vectors as they lie in its part of shared: `error`, what rounding has
taken so far on the compact wire; and `shared`, where it has gone on being trained while the exchange ran
(`--overlap_steps`): of shared the model and the optimizer state are then what all workers agreed on.

What is read here was checked first: every byte, then every name, shape and type. No communication.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from resist_ds.errors import DamagedError, OtherVersionError, UserError
from resist_ds.files import names, status
from resist_ds.nets.blueprint import Blueprint, Statistics
from resist_ds.nets.initial import Piece
from resist_ds.nets.subnet import OptimizerState, PartLayout
from resist_ds.state import storage
from resist_ds.state.run_state import FORMAT, STATE, State, check_version, versions
from resist_ds.state.storage import Spec

WORKERS = "workers"
GROUPS = ("model", "optimizer", WORKERS)


def folder_name(round: int) -> str:
    """Of the checkpoint that holds the state at the start of `round`."""
    return f"round-{round:06d}"


def round_of(folder: Path) -> int | None:
    """The round that a checkpoint's name speaks of, or None."""
    found = re.fullmatch(r"round-(\d{6,})", folder.name)
    return int(found.group(1)) if found else None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sound or not; none where there is no folder. Raises `UnreadableError`."""
    if status(folder) is None:
        return []
    try:
        found = [folder / name for name in names(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        (path for path in found if round_of(path) is not None),
        key=lambda path: round_of(path) or 0,
        reverse=True,
    )


def shard_name(group: str, rank: int, size: int) -> str:
    """Of a rank's file, numbered from 1 as Hugging Face does it; `group` is one of `GROUPS`."""
    return f"{group}-{rank + 1:05d}-of-{size:05d}.safetensors"


def index_name(group: str) -> str:
    return f"{group}.safetensors.index.json"


def statistics_names(norm: str) -> tuple[str, str, str]:
    """timm's names of a BatchNorm's buffers."""
    return f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.num_batches_tracked"


def all_specs(
    blueprint: Blueprint, dtype: torch.dtype, optimizer: OptimizerState
) -> dict[str, dict[str, Spec]]:
    """Type and shape of every tensor of a whole checkpoint: {group: {name: spec}}."""
    shapes = blueprint.shapes
    model = {name: Spec(dtype, shape) for name, shape in shapes.items()}
    for norm, channels in blueprint.norms:
        mean, variance, count = statistics_names(norm)
        model |= {mean: Spec(dtype, (channels,)), variance: Spec(dtype, (channels,))}
        model[count] = Spec(torch.int64, ())
    state = {f"{n}.{kind}": Spec(dtype, shape) for n, shape in shapes.items() for kind in optimizer.vectors}
    if optimizer.counter:
        state |= {f"{name}.{optimizer.counter}": Spec(dtype, ()) for name in shapes}
    return {"model": model, "optimizer": state}


def specs_of_workers(
    blueprint: Blueprint, dtype: torch.dtype, optimizer: OptimizerState, workers: int, kinds: Iterable[str]
) -> dict[str, Spec]:
    """Type and shape of what each worker holds alone, of these kinds: {"<worker>.<kind>": spec}."""
    shared = PartLayout(blueprint.shared, optimizer)
    of = {"error": Spec(torch.float32, (shared.matrices,)), "shared": Spec(dtype, (shared.numel,))}
    return {f"{worker}.{kind}": of[kind] for worker in range(workers) for kind in sorted(kinds)}


class Checkpoint:
    """A checkpoint to read from. It is also a source of the workers' initial values.

    Args:
        folder: whose bytes have been checked; use `verified` if nobody has.

    Raises:
        DamagedError: what the checks of bytes cannot see: an index or a shard that is not this model's.
        UnreadableError: a file cannot be read; so with all that reads here.
        OtherVersionError: it is sound, and this version cannot read it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = State.read(folder)
        self.optimizer = OptimizerState(
            tuple(self.state.optimizer["vectors"]), self.state.optimizer["counter"]
        )
        self._files = ExitStack()
        self._open: dict[str, Any] = {}

    @classmethod
    def verified(cls, folder: Path) -> "Checkpoint":
        """Open a checkpoint after a look at every byte, name, shape and type.

        Raises:
            DamagedError: it is not as it was written.
            OtherVersionError: it is, by another version.
            UserError: the folder is that of a run, or of its checkpoints.
        """
        inside = newest_first(folder) or newest_first(folder / "checkpoints")
        if inside:
            raise UserError(f"{folder} holds checkpoints: type one of them, {inside[0]}")
        try:
            files = storage.check_sealed(folder)
        except DamagedError:
            _check_unsealed(folder)
            raise
        checkpoint = cls(folder)
        named = round_of(folder)
        if named is not None and named != checkpoint.state.round:
            raise DamagedError(
                f"{folder / STATE} is of round {checkpoint.state.round}, its folder is called {folder.name}"
            )
        used = {STATE}
        for group, expected in checkpoint.specs.items():
            used |= checkpoint._check_group(group, expected, files)
        for name in sorted(files.keys() - used):
            raise DamagedError(f"{folder / name} is part of no index")
        return checkpoint

    @cached_property
    def blueprint(self) -> Blueprint:
        try:
            return Blueprint(self.state.model, self.state.num_classes)
        except UserError as error:  # what is sealed is as it was written: timm's names have changed, say
            raise OtherVersionError(
                f"{self.folder / STATE}: {error} (It was written with {_with(self.state.versions)}, and here "
                f"are {_with(versions())})"
            ) from None

    @cached_property
    def specs(self) -> dict[str, dict[str, Spec]]:
        """{group: {name: type and shape}} that it must hold."""
        dtype = getattr(torch, self.state.dtype, None)
        if dtype not in storage.DTYPES:
            raise DamagedError(f"{self.folder / STATE}: {self.state.dtype!r} is no type of parameters")
        specs = all_specs(self.blueprint, dtype, self.optimizer)
        alone = specs_of_workers(self.blueprint, dtype, self.optimizer, self.state.workers, self.kept)
        return {**specs, WORKERS: alone}

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """Kinds of what each worker held alone: "error", "shared".

        Whether there are errors follows from the options; whether the last exchange ran behind local steps,
        the index says.
        """
        config = self.state.config
        kinds = []
        if config.get("wire") == "compact" and self.state.workers > 1:
            kinds.append("error")
        there = config.get("overlap_steps") and status(self.folder / index_name(WORKERS)) is not None
        if there and any(name.endswith(".shared") for name in self._index(WORKERS)["weight_map"]):
            kinds.append("shared")
        return tuple(kinds)

    def shared(self) -> Piece:
        """(timm name, {"parameter" or state name: tensor}) of the shared part, read one by one."""
        for name, _ in self.blueprint.shared:
            yield name, self._state_of(name)

    def block(self, block: int) -> Piece:
        """The same of a pool block, by the names inside it."""
        for name, _ in self.blueprint.block:
            yield name, self._state_of(self.blueprint.block_prefix(block) + name)

    def statistics(self) -> Statistics:
        """BatchNorm's statistics of the global model."""
        pairs = {norm: statistics_names(norm)[:2] for norm, _ in self.blueprint.norms}
        return {n: (self.tensor("model", m), self.tensor("model", v)) for n, (m, v) in pairs.items()}

    def tensor(self, group: str, name: str) -> Tensor:
        """One tensor, in host memory."""
        file = self._indexes[group][name]
        if file not in self._open:
            self._open[file] = self._files.enter_context(storage.open_safetensors(self.folder / file))
        try:
            return torch.from_numpy(self._open[file].get_tensor(name))
        except SafetensorError as error:  # another file than that which was checked
            raise DamagedError(f"{self.folder / file}: {error}") from None

    def close(self) -> None:
        """Close the files."""
        self._open.clear()
        self._files.close()

    def _state_of(self, name: str) -> dict[str, Tensor]:
        state = {k: self.tensor("optimizer", f"{name}.{k}") for k in self.optimizer.kinds}
        return {"parameter": self.tensor("model", name), **state}

    @cached_property
    def _indexes(self) -> dict[str, dict[str, str]]:
        """{group: {name: file}}."""
        return {group: self._index(group)["weight_map"] for group in GROUPS if self.specs[group]}

    def _index(self, group: str) -> dict[str, Any]:
        path = self.folder / index_name(group)
        content = storage.read_json(path)
        try:
            where = {str(name): str(file) for name, file in content["weight_map"].items()}
            return {"weight_map": where, "total_size": content["metadata"]["total_size"]}
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedError(f"{path} is no index: {type(error).__name__} {error}") from None

    def _check_group(
        self, group: str, expected: Mapping[str, Spec], sealed: Mapping[str, object]
    ) -> set[str]:
        """Compare a group's index and shards with what the model has; returns the files that it uses."""
        if not expected:
            return set()
        path = self.folder / index_name(group)
        index = self._index(group)
        size = sum(spec.nbytes for spec in expected.values())
        if index["total_size"] != size:
            raise DamagedError(
                f"{path}: total_size is {index['total_size']}, and the tensors have {size} bytes"
            )
        by_file: dict[str, set[str]] = {}
        for name, file in index["weight_map"].items():
            if name not in expected:
                raise DamagedError(f"{path} names {name}, which {_what(group, self.state)} does not have")
            if file not in sealed:
                raise DamagedError(
                    f"{path} says that {name} is in {file!r}, which is no file of this checkpoint"
                )
            by_file.setdefault(file, set()).add(name)
        for name in sorted(expected.keys() - index["weight_map"].keys()):
            raise DamagedError(f"{path} lacks {name}")
        for file, inside in by_file.items():
            found = storage.read_specs(self.folder / file)
            for name in sorted(found.keys() ^ inside):
                raise DamagedError(f"{self.folder / file} and {path.name} do not agree about {name}")
            for name, spec in found.items():
                if spec != expected[name]:
                    raise DamagedError(
                        f"{self.folder / file}: {name} is {_words(spec)}, and "
                        f"{_what(group, self.state)} has {_words(expected[name])}"
                    )
        return {path.name, *by_file}


def _check_unsealed(folder: Path) -> None:
    """Raise `OtherVersionError` where a folder that our seal does not fit is of another format.

    Another format may be sealed in another way. A manifest that is ours vouches for the rest: then a state of
    another format is a flipped bit.
    """
    try:
        storage.read_manifest(folder)
        return
    except DamagedError:
        pass
    try:
        content = storage.read_json(folder / STATE)
    except DamagedError:
        return
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        check_version(folder / STATE, content)


def _with(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {packages.get(name)}" for name in ("resist_ds", "timm"))


def _what(group: str, state: State) -> str:
    return f"a run of {state.workers} workers" if group == WORKERS else state.model


def _words(spec: Spec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')}{list(spec.shape)}"

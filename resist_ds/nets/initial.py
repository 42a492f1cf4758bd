"""Where the workers' first values come from: timm's initialisation, or a file of pretrained weights.

A source gives the global model piece by piece and tensor by tensor, so that nobody ever holds it whole.
(`checkpoint.Checkpoint` is the third source.)
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from resist_ds.errors import UserError
from resist_ds.nets.blueprint import Blueprint

Piece = Iterator[tuple[str, dict[str, Tensor]]]  # (name, {"parameter" or name of an optimizer state: tensor})
FOLDED = "residual_scale_folded"  # metadata of an exported file: "true" or "false"


class Source(Protocol):
    """What a worker's vector is filled from; optimizer state that it lacks starts at zero."""

    def shared(self) -> Piece:
        """The shared part, by timm's names."""

    def block(self, block: int) -> Piece:
        """A pool block, by the names inside it."""


class Initialisation:
    """timm's own initial values, which depend on (seed, piece) alone."""

    def __init__(self, blueprint: Blueprint, seed: int):
        self._blueprint = blueprint
        self._seed = seed

    def shared(self) -> Piece:
        return _parameters(self._blueprint.initial_shared(self._seed))

    def block(self, block: int) -> Piece:
        return _parameters(self._blueprint.initial_block(self._seed, block))


class Pretrained:
    """A safetensors file of plain timm weights: an export of ours, or anybody's.

    In such a file all pool blocks are active at once; in training only K of P are, and at test time each
    residual is scaled by K/P. So the branches are divided by K/P here, and the global model that training
    starts from is, at test time, the model in the file. Its BatchNorm statistics are not needed.

    Args:
        scale: K/P of the first round.

    Attributes:
        renewed: names of the parameters that start anew: a classifier of another size.

    Raises:
        UserError: the file cannot be read, or it is not of this model.
    """

    def __init__(self, path: Path, blueprint: Blueprint, seed: int, scale: float):
        self._blueprint = blueprint
        self._seed = seed
        self._files = ExitStack()
        try:
            self._file: Any = self._files.enter_context(safe_open(path, "pt"))
            there = {n: tuple(self._file.get_slice(n).get_shape()) for n in self._file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"--from_pretrained {path}: no such file") from None
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--from_pretrained {path} is no safetensors file: {reason}") from None
        folded = (self._file.metadata() or {}).get(FOLDED, "true") == "true"
        self._scale = scale if folded else 1.0
        expected = blueprint.shapes
        self.renewed = tuple(n for n in blueprint.head if there.get(n) != expected[n])
        for name, shape in expected.items():
            if name in self.renewed or there.get(name) == shape:
                continue
            has = f"{list(there[name])}, and" if name in there else "missing, and"
            raise UserError(
                f"--from_pretrained {path} is not of --model {blueprint.name}: "
                f"{name} is {has} the model has {list(shape)}"
            )
        if self.renewed and len(self.renewed) < len(blueprint.head):
            self.renewed = blueprint.head  # a bias without its weight would make no sense
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        for name in there.keys() - expected.keys():
            if not name.endswith(buffers):
                raise UserError(
                    f"--from_pretrained {path} is not of --model {blueprint.name}, which has no {name}"
                )

    def shared(self) -> Piece:
        fresh = self._blueprint.initial_shared(self._seed) if self.renewed else {}
        for name, _ in self._blueprint.shared:
            yield name, {"parameter": fresh[name] if name in self.renewed else self._file.get_tensor(name)}

    def block(self, block: int) -> Piece:
        for name, _ in self._blueprint.block:
            tensor = self._file.get_tensor(self._blueprint.block_prefix(block) + name).float()
            self._blueprint.fold({name: tensor}, 1 / self._scale)
            yield name, {"parameter": tensor}

    def close(self) -> None:
        """Close the file."""
        self._files.close()


def _parameters(values: Mapping[str, Tensor]) -> Piece:
    return ((name, {"parameter": value}) for name, value in values.items())

"""Where the workers' first values come from; here, timm's initialisation.

A source gives the global model piece by piece and tensor by tensor, so that nobody ever holds it whole. (The
others are a file of weights, `pretrained.Pretrained`, and a `checkpoint.Checkpoint`.)
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from resist_ds.nets.blueprint import Blueprint

Piece = Iterator[tuple[str, dict[str, Tensor]]]  # (name, {"parameter" or name of an optimizer state: tensor})


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


def _parameters(values: Mapping[str, Tensor]) -> Piece:
    return ((name, {"parameter": value}) for name, value in values.items())

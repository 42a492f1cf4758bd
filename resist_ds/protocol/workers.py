"""The workers that one rank plays, as the rest of the protocol sees them.

How they are trained is for `engines`, which has two kinds: workers that take turns in an engine, and a net
that is spread over all ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.initial import Initialisation, Source
from resist_ds.nets.subnet import StateDict, StateLayout, Subnet
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, Partition, spread


class RankWorkers(ABC):
    """What a rank holds of the global model.

    Args:
        deal: who holds what in the first round.
        source: of the initial values; default: timm's initialisation under the run's seed.
        steps: local steps that the run has already done.

    Attributes:
        layout: of each worker's vector.
        copies: bytes of host memory for round-start copies that exist for nothing else.
        idle: bytes of pinned host memory for workers that wait for their turn on a GPU.
    """

    copies = idle = 0

    def __init__(
        self,
        comm: Comm,
        layout: Layout,
        blueprint: Blueprint,
        config: Config,
        deal: Partition,
        source: Source | None = None,
        steps: int = 0,
    ):
        self._comm = comm
        self._ranks = layout
        self._blueprint = blueprint
        self._config = config
        self._source = source or Initialisation(blueprint, config.seed)
        self._steps = steps
        self.layout = StateLayout.of(blueprint, config, deal.slots)
        self._make(deal)

    @abstractmethod
    def _make(self, deal: Partition) -> None:
        """Make what needs no other rank; `connect` does the rest."""

    @abstractmethod
    def connect(self) -> None:
        """Make what all ranks make together. Collective: all ranks."""

    @property
    @abstractmethod
    def vectors(self) -> Mapping[int, Tensor]:
        """State vector of each of this rank's workers, for the exchanges."""

    @property
    def loss_scales(self) -> dict[int, dict[str, Any]]:
        """State of each worker's loss scaler; empty unless fp16 is used."""
        return {}

    @abstractmethod
    def for_evaluation(self, deal: Partition) -> tuple[Subnet, dict[int, Tensor]]:
        """A sub-ResNet with the shared part, and {worker: vector} laid out like it. Collective: all ranks."""

    @abstractmethod
    def owned(self, deal: Partition) -> StateDict:
        """The partitioned state dict: what this rank's workers own, by timm's names.

        Collective: all ranks.
        """

    @abstractmethod
    def resize(self, slots: int) -> None:
        """Go on with fewer slots, when warm-up ends: the first ones of each state are kept."""


def owned(
    blueprint: Blueprint,
    layout: StateLayout,
    vectors: Mapping[int, Tensor],
    deal: Partition,
    agreed: Mapping[int, Tensor] | None = None,
) -> StateDict:
    """What some workers own of the global model, as views of their vectors, by timm's names.

    A pool block belongs to its owner, and the shared tensors, which all workers hold, are spread so
    that all own about as much; every tensor of the global model is named on exactly one rank.

    Args:
        agreed: what all agreed on of shared, where `vectors` have gone on from there.
    """
    state: StateDict = {}
    shared, block = layout.shared, layout.block
    loads = [deal.owners.count(worker) * block.parameters for worker in range(deal.workers)]
    owner = spread({name: math.prod(shape) for name, shape in shared.shapes}, loads)
    for worker, vector in vectors.items():
        tensors = shared.tensors(layout.shared_part((agreed or vectors)[worker]))
        state |= {name: t for name, t in tensors.items() if owner[name] == worker}
        for slot, b in enumerate(deal.blocks[worker]):
            if deal.owners[b] == worker:
                tensors = block.tensors(layout.slot_part(vector, slot))
                state |= {blueprint.block_prefix(b) + name: t for name, t in tensors.items()}
    return state

"""The workers that one rank plays, as the rest of the protocol sees them.

How they are trained is for `engines`, which has two kinds: workers that take turns in an engine, and a net
that is spread over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.initial import Initialisation, Source
from resist_ds.nets.subnet import StateDict, StateLayout, Subnet
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, Partition
from resist_ds.protocol.team_shards import TeamShards
from resist_ds.protocol.writers import Writers


class Shown(NamedTuple):
    """What a rank shows of the global model, for an evaluation.

    Attributes:
        subnet: with the shared part in its place.
        vectors: {worker: vector} of those that this rank plays.
        layout: of these vectors; where lanes share it, each shows its rows.
    """

    subnet: Subnet
    vectors: Mapping[int, Tensor]
    layout: StateLayout


class RankWorkers(ABC):
    """What a rank holds of the global model.

    Args:
        deal: who holds what in the first round.
        source: of the initial values; default: timm's initialisation under the run's seed.
        steps: local steps that the run has already done.

    Attributes:
        layout: of each worker's vector, or of this lane's part of it.
        copies: bytes of host memory for round-start copies that exist for nothing else.
        idle: bytes of pinned host memory for workers that wait for their turn on a GPU.
        shards: what puts whole tensors together, where this rank holds its workers in part; else None.
    """

    copies = idle = 0
    shards: TeamShards | None = None

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
        inside = config.inside
        self._lane, self._lanes = layout.lane_of(comm.rank), layout.team_size
        self._shards = layout.team_size if inside and inside.spread else 1
        self.layout = StateLayout.of(blueprint, config, deal.slots, self._shards)
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
    def for_evaluation(self, deal: Partition) -> Shown:
        """What this rank shows of the global model. Collective: all ranks."""

    @abstractmethod
    def owned(self, deal: Partition, agreed: Mapping[int, Tensor] | None = None) -> StateDict:
        """The partitioned state dict: what this rank's workers own, by timm's names.

        Collective: all ranks.

        Args:
            agreed: what all agreed on of shared, where the vectors have gone on from there.
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
    lane: tuple[int, int] = (0, 1),
) -> StateDict:
    """What some workers own of the global model, as views of their vectors, by timm's names.

    Every tensor of the global model is named on exactly one rank.

    Args:
        agreed: what all agreed on of shared, where `vectors` have gone on from there.
        lane: this rank's place in its team, and G; all of a team hold the same vectors.
    """
    state: StateDict = {}
    index, lanes = lane
    writers = Writers(layout, deal, lanes)
    for worker, vector in vectors.items():
        tensors = layout.shared.tensors(layout.shared_part((agreed or vectors)[worker]))
        state |= {name: t for name, t in tensors.items() if writers.of_shared[name] == (worker, index)}
        for slot, b in enumerate(deal.blocks[worker]):
            if writers.of_block[b] == (worker, index):
                tensors = layout.block.tensors(layout.slot_part(vector, slot))
                state |= {blueprint.block_prefix(b) + name: t for name, t in tensors.items()}
    return state

"""Workers that lie in parts on the ranks of a team: FSDP2 or ZeRO shares each step of a sub-ResNet.

A rank holds its lane's rows of every tensor, in a vector like any other: along a lane it is synchronised like
a worker's own. FSDP2 computes with that very vector; DeepSpeed keeps masters of its own, which are loaded
from it and stored into it, and it lies in host memory.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from resist_ds.engines.workers import Workers
from resist_ds.memory import one_line_when_out
from resist_ds.nets.subnet import StateDict, StateLayout, Subnet
from resist_ds.protocol.partition import Partition
from resist_ds.protocol.team_shards import TeamShards
from resist_ds.protocol.workers import Shown


class ShardedWorkers(Workers):
    """The workers of this rank's team, of each of which it holds its lane's part."""

    def _make(self, deal: Partition) -> None:
        self._first = deal

    def connect(self) -> None:
        """Spread the net over the team, and fill this rank's part. Collective: all ranks."""
        self._prepare(self._first.slots)

        def placed() -> None:
            with one_line_when_out(self._comm.device, self._comm.rank):
                self._place(self._first)

        self._comm.agree(placed)

    def for_evaluation(self, deal: Partition) -> Shown:
        """The shared part whole; of the pool what this rank has. Collective: all ranks."""
        whole = replace(self.layout.whole().without_state(), slots=0)
        dtype, device = getattr(torch, self._config.dtype), self._comm.device
        vector = torch.zeros(whole.numel, dtype=dtype, device=device)
        first = next(iter(self.vectors.values()))
        assert self.shards is not None
        self.shards.shared(self.layout.shared_part(first), vector)
        return Shown(Subnet(self._blueprint, whole, self._config, device, vector), self.vectors, self.layout)

    def owned(self, deal: Partition, agreed: Mapping[int, Tensor] | None = None) -> StateDict:
        """What this rank writes of what its team's workers own, whole. Collective: all ranks."""
        assert self.shards is not None
        return self.shards.owned(self.vectors, deal, agreed)

    def _wrap(self) -> None:
        """Nothing: the engine is spread as it is made."""

    def _prepare(self, slots: int) -> None:
        """Make the engine for workers of so many slots. Collective: all ranks."""
        from resist_ds.engines.parallel import Inside  # which imports much that others do not need

        comm, blueprint, config = self._comm, self._blueprint, self._config
        inside = Inside.of(comm, config)
        self.layout = StateLayout.of(blueprint, config, slots, self._shards)
        self.shards = TeamShards(comm, self._ranks, blueprint, self.layout)
        self._in_place = None
        if config.team_strategy == "fsdp":
            from resist_ds.engines.fsdp import FSDPEngine

            self.engine = FSDPEngine(inside, blueprint, config, self.layout)
            self._in_place = self.engine.vector
            return
        from resist_ds.engines.zero import ZeroEngine

        self.engine = ZeroEngine(inside, blueprint, config, self.layout)

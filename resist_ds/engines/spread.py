"""A net that is spread over all ranks by FSDP2 or ZeRO: the baselines in which a worker spans the machine.

In training no rank has a vector of its own. Between rounds each rank gathers what a worker of `resist` would
hold, the shared part and its share of the pool, so that evaluation, checkpoints and exports are those of all
other strategies.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from resist_ds.engines.engine import Engine
from resist_ds.nets.initial import Piece
from resist_ds.nets.subnet import OptimizerState, StateDict, StateLayout, Subnet, Worker
from resist_ds.protocol.partition import Partition
from resist_ds.protocol.workers import RankWorkers, Shown, owned


class SpreadEngine(Engine, Protocol):
    """An engine of the whole net whose tensors lie in parts on all ranks."""

    def get(self, name: str, kind: str) -> Tensor:
        """A parameter, or its optimizer state of that kind, whole. Collective: all ranks."""

    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Put this rank's part of a value, which all ranks give whole, in its place."""


class SpreadNet(RankWorkers):
    """One net on all ranks, trained in lockstep: its one worker on this rank has no vector in training."""

    def _make(self, deal: Partition) -> None:
        nothing = torch.empty(0, dtype=getattr(torch, self._config.dtype))
        scaler = torch.amp.GradScaler(self._comm.device.type, enabled=False)
        self._worker = Worker(self._comm.rank, nothing, scaler)

    def connect(self) -> None:
        """Spread the net and fill it, tensor by tensor, from the source. Collective: all ranks."""
        self.engine: SpreadEngine = self._make_engine()
        self._fill("", self._source.shared())
        for block in range(self._blueprint.pool):
            self._fill(self._blueprint.block_prefix(block), self._source.block(block))

    def _fill(self, prefix: str, piece: Piece) -> None:
        """Put a piece in its place; what the source lacks starts at zero."""
        for name, tensors in piece:
            for kind in ("parameter", *OptimizerState.of(self._config).kinds):
                value = tensors.get(kind)
                if value is None:
                    value = torch.zeros((1,) if kind == "step" else tensors["parameter"].shape)
                self.engine.set(prefix + name, kind, value)

    @property
    def vectors(self) -> dict[int, Tensor]:
        """None: nothing is exchanged, all ranks hold the same at any time."""
        return {}

    def resize(self, slots: int) -> None:
        """Never: there are no warm-up rounds."""
        raise AssertionError(slots)

    def turns(self) -> Iterator[Worker]:
        """The one worker of this rank."""
        yield self._worker

    def for_evaluation(self, deal: Partition) -> Shown:
        """A sub-ResNet with the shared part, and this rank's share of the pool. Collective: all ranks."""
        layout, device = self.layout.without_state(), self._comm.device
        vector = self._gather(deal, layout, device, "eval")
        subnet = Subnet(self._blueprint, layout, self._config, device, vector)
        return Shown(subnet, {self._worker.index: vector}, layout)

    def owned(self, deal: Partition, agreed: Mapping[int, Tensor] | None = None) -> StateDict:
        """The partitioned state dict: this rank's share, gathered. Collective: all ranks."""
        vector = self._gather(deal, self.layout, torch.device("cpu"), "save")
        return owned(self._blueprint, self.layout, {self._worker.index: vector}, deal)

    def _gather(self, deal: Partition, layout: StateLayout, device: torch.device, why: str) -> Tensor:
        """What a worker of `resist` would hold under `deal`, in a new vector. Collective: all ranks.

        Args:
            layout: of the vector.
            why: under which the ledger counts it, as an all-gather.
        """
        comm, prefix = self._comm, self._blueprint.block_prefix
        dtype = getattr(torch, self._config.dtype)
        vector = torch.zeros(layout.numel, dtype=dtype, device=device)
        held = layout.shared.tensors(layout.shared_part(vector))
        for slot, block in enumerate(deal.blocks[self._worker.index]):
            part = layout.block.tensors(layout.slot_part(vector, slot))
            held |= {prefix(block) + name: tensors for name, tensors in part.items()}
        for name in self._blueprint.shapes:
            for kind in ("parameter", *sorted(layout.shared.state.kinds)):
                value = self.engine.get(name, kind)
                comm.ledger[why] += (comm.size - 1) * value.nbytes // comm.size
                if name in held:
                    held[name][kind].copy_(value.reshape(held[name][kind].shape))
        return vector

    def _make_engine(self) -> SpreadEngine:
        from resist_ds.engines.parallel import Inside  # which imports much that others do not need

        inside = Inside.of(self._comm, self._config)
        if self._config.strategy == "fsdp":
            from resist_ds.engines.fsdp import FSDPEngine

            layout = StateLayout.of(
                self._blueprint, self._config, self._blueprint.pool, lanes=self._comm.size
            )
            return FSDPEngine(inside, self._blueprint, self._config, layout)
        from resist_ds.engines.zero import ZeroEngine

        return ZeroEngine(inside, self._blueprint, self._config)

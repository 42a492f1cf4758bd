"""FSDP2's engine: a net whose parameters are spread over a team, or over all ranks (`--strategy fsdp`)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from resist_ds.engines.engine import TorchStep
from resist_ds.engines.parallel import Inside, place_shards, shard_fully, whole
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import is_finite, low_precision
from resist_ds.nets.shards import place
from resist_ds.nets.subnet import StateLayout, Worker, use_batch_statistics
from resist_ds.options.config import Config


class FSDPEngine(TorchStep):
    """A net under `fully_shard`, each residual block a unit of its own.

    A step is one of the team's ranks, on a part of the batch of each. Collective: the team.

    Attributes:
        vector: this rank's rows of all parameters and optimizer state, which are views of it.
    """

    def __init__(self, inside: Inside, blueprint: Blueprint, config: Config, layout: StateLayout):
        """Spread an empty net. Collective: the team.

        Args:
            layout: of what a lane has of it.
        """
        device, dtype = inside.comm.device, getattr(torch, config.dtype)
        net = blueprint.subnet(layout.slots).to(dtype)
        blocks = [part for part in net.modules() if type(part) in blueprint.family.branch_end]
        self._sharded = shard_fully(inside, net, blocks, low_precision(config))
        self.vector = torch.zeros(layout.numel, dtype=dtype, device=device)
        self._views = layout.tensors(self.vector, blueprint.block_prefix)
        self._tensors = place_shards(net, self._views)
        self._team = inside.team
        use_batch_statistics(net, like=self.vector[:0])
        if config.activation_checkpointing:
            net.set_grad_checkpointing()  # type: ignore[operator]
        net.train()
        parameters = list(net.parameters())
        super().__init__(net, parameters, optimizer_of(config, parameters, decorated=True), config)
        for tensors in self._tensors.values():
            state = {kind: tensor for kind, tensor in tensors.items() if kind != "parameter"}
            if state:  # beforehand, since a parameter without a gradient would never get it
                self.optimizer.state[tensors["parameter"]] = state

    def load(self, worker: Worker) -> None:
        if worker.vector is not self.vector:
            self.vector.copy_(worker.vector, non_blocking=True)

    def store(self, worker: Worker) -> None:
        if worker.vector is not self.vector:
            worker.vector.copy_(self.vector, non_blocking=True)

    def is_finite(self) -> bool:
        return is_finite(self.vector)

    def _micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    @torch.no_grad()
    def get(self, name: str, kind: str) -> Tensor:
        """A parameter, or its optimizer state of that kind, whole. Collective: the team."""
        return whole(self._tensors[name][kind].detach())

    @torch.no_grad()
    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Put this rank's part of a value, which all ranks give whole, in its place."""
        part = self._views[name][kind]
        if part.dim() == 0:
            part.fill_(value.item())
        else:
            shape = self._tensors[name][kind].shape
            place(value.to(part.device, part.dtype).reshape(shape), part, self._team.lane, self._team.size)

"""FSDP2's engine: one net, every parameter of it spread over all ranks (`--strategy fsdp`)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.engines.engine import TorchStep
from resist_ds.engines.parallel import local, shard_fully, share, whole
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import is_finite, low_precision
from resist_ds.nets.subnet import OptimizerState, Worker, use_batch_statistics
from resist_ds.options.config import Config


class FSDPEngine(TorchStep):
    """The whole net under `fully_shard`, each residual block a unit of its own.

    A step is one of all ranks, on a batch of each. Collective: all ranks.
    """

    def __init__(self, comm: Comm, blueprint: Blueprint, config: Config):
        """Spread an empty net. Collective: all ranks."""
        net = blueprint.subnet(blueprint.pool).to(getattr(torch, config.dtype))
        blocks = [part for part in net.modules() if type(part) in blueprint.family.branch_end]
        self._sharded = shard_fully(comm, net, blocks, low_precision(config))
        net.to_empty(device=comm.device)
        use_batch_statistics(net, like=torch.empty(0, dtype=getattr(torch, config.dtype), device=comm.device))
        if config.activation_checkpointing:
            net.set_grad_checkpointing()  # type: ignore[operator]
        net.train()
        self._named = dict(net.named_parameters())
        parameters = list(self._named.values())
        super().__init__(net, parameters, optimizer_of(config, parameters, decorated=True), config)
        state = OptimizerState.of(config)
        for parameter in self._parameters:
            kinds = self._optimizer.state[parameter] = {
                kind: torch.zeros_like(parameter) for kind in state.vectors
            }
            if state.counter:
                kinds[state.counter] = torch.zeros((), dtype=parameter.dtype, device=comm.device)

    def load(self, worker: Worker) -> None:
        """Nothing: the net is where it was."""

    def store(self, worker: Worker) -> None:
        """Nothing: it stays here."""

    def is_finite(self) -> bool:
        tensors = [local(p.detach()) for p in self._parameters]
        tensors += [local(t) for state in self._optimizer.state.values() for t in state.values()]
        return all(is_finite(tensor) for tensor in tensors if tensor.numel())

    def _micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        self._sharded.set_requires_gradient_sync(last)
        return nullcontext()

    @torch.no_grad()
    def get(self, name: str, kind: str) -> Tensor:
        """A parameter, or its optimizer state of that kind, whole. Collective: all ranks."""
        return whole(self._tensor(name, kind))

    @torch.no_grad()
    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Put this rank's part of a value, which all ranks give whole, in its place."""
        tensor = self._tensor(name, kind)
        value = value.to(device=tensor.device, dtype=tensor.dtype).reshape(tensor.shape)
        local(tensor).copy_(share(value, tensor))

    def _tensor(self, name: str, kind: str) -> Tensor:
        parameter = self._named[name]
        found = parameter.detach() if kind == "parameter" else self._optimizer.state[parameter][kind]
        assert isinstance(found, Tensor)
        return found

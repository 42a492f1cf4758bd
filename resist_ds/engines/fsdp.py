"""FSDP2's engine: one net, every parameter of it spread over all ranks (`--strategy fsdp`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.engines.engine import Score, autocast, is_finite, micro_batches
from resist_ds.engines.parallel import local, shard_fully, share, whole
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import OptimizerState, Worker, optimizer_of, use_batch_statistics
from resist_ds.options.config import Config


class FSDPEngine:
    """The whole net under `fully_shard`, each residual block a unit of its own. Collective: all ranks."""

    def __init__(self, comm: Comm, blueprint: Blueprint, config: Config):
        """Spread an empty net. Collective: all ranks."""
        self._config = config
        net = blueprint.subnet(blueprint.pool).to(getattr(torch, config.dtype))
        blocks = [part for part in net.modules() if type(part) in blueprint.family.branch_end]
        self._net = shard_fully(comm, net, blocks)
        net.to_empty(device=comm.device)
        use_batch_statistics(net, like=torch.empty(0, dtype=getattr(torch, config.dtype), device=comm.device))
        if config.activation_checkpointing:
            net.set_grad_checkpointing()  # type: ignore[operator]
        net.train()
        self._module = net
        self._parameters = dict(net.named_parameters())
        self._optimizer = optimizer_of(config, list(self._parameters.values()))
        state = OptimizerState.of(config)
        for parameter in self._parameters.values():
            kinds = self._optimizer.state[parameter] = {
                kind: torch.zeros_like(parameter) for kind in state.vectors
            }
            if state.counter:
                kinds[state.counter] = torch.zeros((), device=comm.device)

    def load(self, worker: Worker) -> None:
        """Nothing: the net is where it was."""

    def store(self, worker: Worker) -> None:
        """Nothing: it stays here."""

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One step of all ranks, on a batch of this rank's. Collective: all ranks."""
        config, optimizer = self._config, self._optimizer
        score = Score(x.device)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for x_part, y_part, last in micro_batches(x, y, config.accumulation_steps):
            self._net.set_requires_gradient_sync(last)
            with autocast(config, x.device):
                logits = self._module(x_part)
                loss = F.cross_entropy(logits, y_part, label_smoothing=config.label_smoothing)
            (loss / config.accumulation_steps).backward()
            score.add(logits, y_part, loss)
        if config.clip_grad:
            torch.nn.utils.clip_grad_norm_(self._parameters.values(), config.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return score.loss, score.right

    def is_finite(self) -> bool:
        tensors = [local(p.detach()) for p in self._parameters.values()]
        tensors += [local(t) for state in self._optimizer.state.values() for t in state.values()]
        return all(is_finite(tensor) for tensor in tensors if tensor.numel())

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
        parameter = self._parameters[name]
        found = parameter.detach() if kind == "parameter" else self._optimizer.state[parameter][kind]
        assert isinstance(found, Tensor)
        return found

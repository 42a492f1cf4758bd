"""DeepSpeed's engine: around a sub-ResNet, of a rank or a team, or around one net on all ranks (`zero1–3`).

The optimizer's fp32 masters are the state: they are what a worker's vector, or a lane's part of it, is loaded
into and stored from, and so what is averaged and handed on.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.comm import Ledger
from resist_ds.engines.deepspeed_options import engine_options
from resist_ds.engines.engine import Score, micro_batches
from resist_ds.engines.parallel import Inside, deepspeed_counted, deepspeed_engine, gather_rows
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import is_finite
from resist_ds.nets.shards import join, place
from resist_ds.nets.subnet import OptimizerState, StateLayout, Worker, use_batch_statistics
from resist_ds.options.config import Config


class ZeroEngine:
    """A net in a DeepSpeed engine.

    Attributes:
        stage: of ZeRO; 0 is DeepSpeed without it.
    """

    def __init__(
        self, inside: Inside, blueprint: Blueprint, config: Config, layout: StateLayout | None = None
    ):
        """Make the engine around an empty net. Collective: the team.

        Args:
            inside: the ranks that share it.
            layout: of the vectors of the workers that take turns in it; default: one net, and no vectors.
        """
        from deepspeed.utils import (  # takes seconds, after `deepspeed_comm` has set its environment
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        self._get_parameter, self._get_state = safe_get_full_fp32_param, safe_get_full_optimizer_state
        self._set_parameter, self._set_state = safe_set_full_fp32_param, safe_set_full_optimizer_state
        self._set_part, self._set_state_part = safe_set_local_fp32_param, safe_set_local_optimizer_state
        self._inside, self._comm = inside, inside.comm
        comm = inside.comm
        self._config = config
        self._layout = layout
        self._prefix = blueprint.block_prefix
        dtype = getattr(torch, config.dtype)
        net = (
            blueprint.subnet(layout.slots if layout else blueprint.pool)
            .to(dtype)
            .to_empty(device=comm.device)
        )
        for parameter in net.parameters():
            parameter.data.zero_()
        use_batch_statistics(net, like=torch.empty(0, dtype=dtype, device=comm.device))
        if config.activation_checkpointing:
            net.set_grad_checkpointing()  # type: ignore[operator]
        net.train()
        self._parameters = dict(net.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        optimizer = optimizer_of(config, list(self._parameters.values()), decorated=True)
        options = engine_options(config, inside.team.size)
        self.stage = int(options["zero_optimization"]["stage"])
        self._engine = deepspeed_engine(inside, net, optimizer, options)
        self._dtype = next(net.parameters()).dtype
        self._counter = OptimizerState.of(config).counter
        self._make_states()

    @torch.no_grad()
    def load(self, worker: Worker) -> None:
        """Make a worker's state the engine's. Collective: the team."""
        if not self._layout:
            return
        for name, tensors in self._layout.tensors(worker.vector, self._prefix).items():
            shape = self._shapes[name]
            for kind, part in tensors.items():
                if part.dim() == 0 or self._layout.block.lanes == 1:
                    self.set(name, kind, part)
                    continue
                value = torch.empty(shape, dtype=part.dtype, device=self._comm.device)
                join(gather_rows(self._inside, part), value)
                self.set(name, kind, value)

    @torch.no_grad()
    def store(self, worker: Worker) -> None:
        """Copy the masters and their optimizer state into the worker's vector. Collective: the team."""
        if not self._layout:
            return
        team, lanes = self._inside.team, self._layout.block.lanes
        with self._counted():
            for name, tensors in self._layout.tensors(worker.vector, self._prefix).items():
                for kind, part in tensors.items():
                    value = self.get(name, kind)
                    if part.dim() == 0 or lanes == 1:
                        part.copy_(value.reshape(part.shape))
                    else:
                        place(value.reshape(self._shapes[name]), part, team.lane, lanes)

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One local step, of all of the team. Collective: the team."""
        score = Score(x.device)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        with self._counted():
            for x_part, y_part, _ in micro_batches(x, y, self._config.accumulation_steps):
                logits = self._engine(x_part.to(self._dtype))
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = F.cross_entropy(logits, y_part, label_smoothing=self._config.label_smoothing)
                self._engine.backward(loss)  # divides it by the number of micro-batches
                score.add(logits, y_part, loss)
                self._engine.step()  # after the last of them
        # On a gradient that is Inf or NaN, DeepSpeed leaves the step out without a word.
        if getattr(self._engine.optimizer, "overflow", False):
            score.loss.fill_(torch.nan)
        return score.loss, score.right

    def is_finite(self) -> bool:
        base = self._base
        tensors = [p.detach() for group in base.param_groups for p in group["params"]]
        # stage 3 has its masters elsewhere between steps
        tensors += [p.detach() for p in getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", ())]
        tensors += [t for state in base.state.values() for t in state.values() if isinstance(t, Tensor)]
        return all(is_finite(tensor) for tensor in tensors if tensor.numel())

    @torch.no_grad()
    def get(self, name: str, kind: str) -> Tensor:
        """An fp32 master, or its optimizer state of that kind, whole. Collective: the engine's ranks."""
        parameter = self._parameters[name]
        if self.stage == 0:
            found = parameter.data if kind == "parameter" else self._base.state[parameter][kind]
        elif kind == "parameter":
            found = self._get_parameter(parameter)
        elif kind == self._counter:
            found = next(iter(self._base.state.values()))[kind]  # one for all in a flat partition
        else:
            found = self._get_state(parameter, kind)
        assert isinstance(found, Tensor), (name, kind)
        return found

    @torch.no_grad()
    def set(self, name: str, kind: str, value: Tensor) -> None:
        """Put a value, which all of the engine's ranks give whole, where they keep it."""
        parameter: Any = self._parameters[name]
        if self.stage == 0:
            tensor = self.get(name, kind)
            tensor.copy_(value.reshape(tensor.shape))
            return
        if kind == self._counter:  # one for all in a flat partition
            for state in self._base.state.values():
                state[kind].fill_(value.item())
            return
        value = value.to(self._comm.device, torch.float32).contiguous()
        if self.stage < 3:
            if kind == "parameter":
                self._set_parameter(parameter, value)
                parameter.data.copy_(value)  # the copy that the net computes with
            else:
                self._set_state(parameter, value, kind)
            return
        part = self._part(parameter, value)
        if kind == "parameter":
            self._set_part(parameter, part)
            parameter.ds_tensor.data.copy_(part)
            if parameter.data.numel() == value.numel():  # a small one, which stays whole everywhere
                parameter.data.copy_(value)
        else:
            self._set_state_part(parameter, part, kind)

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """What ZeRO 3 keeps of a value on this rank; the last ranks' is padded."""
        index, ranks = self._inside.team.lane, self._inside.team.size
        size = parameter.ds_tensor.numel()
        flat = F.pad(value.flatten(), (0, size * ranks - value.numel()))
        return flat[index * size : (index + 1) * size]

    @property
    def _base(self) -> torch.optim.Optimizer:
        """Torch's own optimizer, of the fp32 masters."""
        found = self._engine.optimizer
        return getattr(found, "optimizer", found)

    def _make_states(self) -> None:
        """A first step at learning rate 0: DeepSpeed makes optimizer states only then, and links them."""
        config, device = self._config, self._comm.device
        images = 2 * config.accumulation_steps  # the fewest that BatchNorm can train on
        size = max(config.img_size or 0, 64)
        x = torch.zeros(images, 3, size, size, dtype=torch.float32, device=device)
        x[:, :, 0, 0] = torch.arange(images, device=device)[:, None]
        sent = Ledger(self._comm.ledger)
        self.step(x, torch.zeros(images, dtype=torch.int64, device=device), rate=0.0)
        self._comm.ledger.clear()  # it is no step of the run
        self._comm.ledger.update(sent)

    def _counted(self) -> AbstractContextManager[None]:
        return deepspeed_counted(self._inside) if self._inside.team.size > 1 else nullcontext()

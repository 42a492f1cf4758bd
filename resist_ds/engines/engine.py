"""Engines: what makes a local step of a net. Torch's own is here; DeepSpeed's and FSDP2's have their modules.

An engine works on one net that stays where it is; the workers of a rank take turns in it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resist_ds.nets.precision import autocast, is_finite
from resist_ds.nets.subnet import Subnet, Worker
from resist_ds.options.config import Config
from resist_ds.protocol.partition import sample_partition


class Engine(Protocol):
    """What the workers of a rank train in, one after the other."""

    def load(self, worker: Worker) -> None:
        """Take a worker's state in."""

    def store(self, worker: Worker) -> None:
        """Put the state back into the worker's vector."""

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One local step on images [n, 3, …] and labels [n]; returns Σ loss (float64) and right answers."""

    def is_finite(self) -> bool:
        """Whether no weight and no optimizer state of this rank is NaN or Inf."""


def micro_batches(x: Tensor, y: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Equal cuts of a local step's batch, and whether each is the last one."""
    size = len(y) // parts
    for i, (x_part, y_part) in enumerate(zip(x.split(size), y.split(size), strict=True), start=1):
        yield x_part, y_part, i == parts


class Score:
    """Σ loss and right answers of a local step's micro-batches, on the device."""

    def __init__(self, device: torch.device):
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.right = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        self.loss += loss.detach() * len(y)
        self.right += (logits.argmax(1) == y).sum()


class TorchStep:
    """A local step by torch's own autograd and optimizer, whoever keeps the parameters.

    Attributes:
        forward: the module that is called.
        optimizer: over its parameters.
    """

    def __init__(
        self,
        forward: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: Config,
    ):
        self.forward = forward
        self._parameters = parameters
        self.optimizer = optimizer
        self._config = config
        self._scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=False)

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """One local step on images [n, 3, …] and labels [n]; returns Σ loss (float64) and right answers."""
        config, optimizer = self._config, self.optimizer
        score = Score(x.device)
        for group in optimizer.param_groups:
            group["lr"] = rate
        self._refresh()
        for x_part, y_part, last in micro_batches(x, y, config.accumulation_steps):
            with self._micro_batch(last):
                with autocast(config, x.device):
                    logits = self.forward(x_part)
                    loss = F.cross_entropy(logits, y_part, label_smoothing=config.label_smoothing)
                self._scaler.scale(loss / config.accumulation_steps).backward()
            self._collect()
            score.add(logits, y_part, loss)
        if config.clip_grad:
            self._scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self._parameters, config.clip_grad)
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return score.loss, score.right

    def _refresh(self) -> None:
        """Before a step: what the net computes with follows the parameters."""

    def _collect(self) -> None:
        """After each backward pass: all gradients come to the parameters."""

    def _micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch: ranks that average gradients do so behind the last one."""
        return nullcontext()


class TorchEngine(TorchStep):
    """Torch's own step, in place on the sub-ResNet's vector; DistributedDataParallel may stand around it."""

    def __init__(self, subnet: Subnet, config: Config):
        forward, weights = self._compiled(subnet.module, config), list(subnet.weights.values())
        super().__init__(forward, weights, subnet.optimizer, config)
        self.subnet = subnet

    def wrap(self, around: Callable[[nn.Module], nn.Module]) -> None:
        """Put `around` around the net, which is compiled with it: inside of it nothing could overlap."""
        self.forward = self._compiled(around(self.subnet.module), self._config)

    @staticmethod
    def _compiled(module: nn.Module, config: Config) -> nn.Module:
        if not config.compile:
            return module
        return torch.compile(module, mode=config.compile_mode)  # type: ignore[return-value]

    def load(self, worker: Worker) -> None:
        if worker.vector is not self.subnet.vector:
            self.subnet.vector.copy_(worker.vector, non_blocking=True)
        self._scaler = worker.scaler

    def store(self, worker: Worker) -> None:
        if worker.vector is not self.subnet.vector:
            worker.vector.copy_(self.subnet.vector, non_blocking=True)

    def is_finite(self) -> bool:
        return is_finite(self.subnet.vector)

    def _refresh(self) -> None:
        self.subnet.refresh()

    def _collect(self) -> None:
        self.subnet.collect()

    def _micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else getattr(self.forward, "no_sync", nullcontext)()


class RandomDepth(TorchEngine):
    """Stochastic depth: in each step K pool blocks drawn from (seed, step) run, and the others are skipped.

    One worker's counterpart of ResIST, with the same multiply-adds. ("Deep Networks with Stochastic Depth",
    Huang et al., 2016, with a fixed number of blocks a step; at test time residuals are scaled by K/P.)

    Args:
        blocks: the pool's, in order.
        slots: K.
        steps: local steps that the run has already done.
    """

    def __init__(self, subnet: Subnet, config: Config, blocks: list[nn.Module], slots: int, steps: int):
        super().__init__(subnet, config)
        self._blocks = blocks
        self._slots = slots
        self._steps = steps

    def step(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        pool = len(self._blocks)
        deals = -(-pool // self._slots)  # any number of workers that gives each of them K blocks
        deal = sample_partition(
            self._config.seed, self._steps, workers=deals, pool=pool, min_blocks=self._slots
        )
        skipped = [block for b, block in enumerate(self._blocks) if b not in deal.blocks[0]]
        for block in skipped:
            block.forward = _skipped  # of this one object: whoever calls it sees that, checkpointing too
        try:
            return super().step(x, y, rate)
        finally:
            for block in skipped:
                del block.forward
            self._steps += 1


def _skipped(x: Tensor) -> Tensor:
    return x

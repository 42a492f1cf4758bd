"""Local steps: what a worker does alone between two synchronisations (paper, section 3). No communication."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.config import Config
from resist_ds.subnet import Subnet
from resist_ds.workers import Worker


@dataclass(frozen=True)
class Tally:
    """What a worker's local steps came to; the loss is summed over the images (nats).

    Attributes:
        spoilt_at: index among these steps of the first whose loss was NaN or Inf, or None.
    """

    loss: float
    right: int
    images: int
    seconds: float
    spoilt_at: int | None = None


def learning_rate(config: Config, step: int, done: float) -> float:
    """Learning rate of local step `step` of a run, when the share `done` of its images has been seen.

    step: ÷10 at 50 % and 75 % of training, as in the authors' release; cosine: half a period down to 0.
    A linear warm-up from 1/lr_warmup_steps multiplies either.
    """
    factor = {
        "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
    }[config.schedule]
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    return config.lr * factor * warm


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass under `--mixed_precision`.

    Without its cache: that finds the cast of a weight by the tensor's identity, and evaluation puts one
    block after the other into the same tensors.
    """
    dtypes = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[config.mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def local_steps(
    subnet: Subnet,
    worker: Worker,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    rates: Sequence[float],
    config: Config,
) -> Tally:
    """Train one worker, whose state is in `subnet`, on its next batches.

    Args:
        rates: the learning rate of each of these local steps.
    """
    device = subnet.vector.device
    losses = torch.zeros(len(rates), dtype=torch.float64, device=device)
    right = torch.zeros((), dtype=torch.int64, device=device)
    images = 0
    start = time.perf_counter()
    parameters = list(subnet.module.parameters())
    for step, (x, y) in enumerate(islice(batches, len(rates))):
        for group in subnet.optimizer.param_groups:
            group["lr"] = rates[step]
        parts = config.accumulation_steps
        micro = len(y) // parts
        for i, (x_part, y_part) in enumerate(zip(x.split(micro), y.split(micro), strict=True), start=1):
            with subnet.without_averaging() if i < parts else nullcontext():
                with autocast(config, device):
                    logits = subnet.forward(x_part)
                    loss = F.cross_entropy(logits, y_part, label_smoothing=config.label_smoothing)
                worker.scaler.scale(loss / parts).backward()
            with torch.no_grad():
                losses[step] += loss.detach() * len(y_part)
                right += (logits.argmax(1) == y_part).sum()
        if config.clip_grad:
            worker.scaler.unscale_(subnet.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        worker.scaler.step(subnet.optimizer)
        worker.scaler.update()
        subnet.optimizer.zero_grad(set_to_none=True)
        images += len(y)
    each, right_total = losses.tolist(), int(right)  # waits for the device
    spoilt_at = next((step for step, loss in enumerate(each) if not math.isfinite(loss)), None)
    return Tally(sum(each), right_total, images, time.perf_counter() - start, spoilt_at)


def is_finite(vector: Tensor) -> bool:
    """Whether no element is NaN or Inf; without a copy of it."""
    low, high = torch.aminmax(vector)  # NaNs are propagated
    return bool(torch.isfinite(low) & torch.isfinite(high))

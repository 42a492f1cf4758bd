"""Local steps: what a worker does alone between two synchronisations (paper, section 3). No communication."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.engines.engine import Engine
from resist_ds.options.config import Config


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


def local_steps(engine: Engine, batches: Iterator[tuple[Tensor, Tensor]], *, rates: Sequence[float]) -> Tally:
    """Train the worker whose state is in `engine` on its next batches.

    Args:
        rates: the learning rate of each of these local steps.
    """
    losses: list[Tensor] = []
    rights: list[Tensor] = []
    images = 0
    start = time.perf_counter()
    for rate, (x, y) in zip(rates, batches, strict=False):
        loss, right = engine.step(x, y, rate)
        losses.append(loss)
        rights.append(right)
        images += len(y)
    each = torch.stack(losses).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    spoilt_at = next((step for step, loss in enumerate(each) if not math.isfinite(loss)), None)
    return Tally(sum(each), int(torch.stack(rights).sum()), images, seconds, spoilt_at)

"""Local steps: what a worker does alone between two synchronisations (paper, section 3). No communication."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.engines.engine import Engine


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

    def __add__(self, later: "Tally") -> "Tally":
        """Of these steps and of later ones of the same round; spoilt where these are."""
        return Tally(
            self.loss + later.loss,
            self.right + later.right,
            self.images + later.images,
            self.seconds + later.seconds,
            self.spoilt_at,
        )

    def beside(self, other: "Tally") -> "Tally":
        """Of a step that two ranks of a team share: images of both, at the same time."""
        spoilt = [tally.spoilt_at for tally in (self, other) if tally.spoilt_at is not None]
        return Tally(
            self.loss + other.loss,
            self.right + other.right,
            self.images + other.images,
            max(self.seconds, other.seconds),
            min(spoilt, default=None),
        )


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

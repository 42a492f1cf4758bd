"""The order of the data and every other random choice about it, as pure functions of their keys.

There is no generator and no state: a counter-based hash of (what for, seed, epoch, sample) decides. So two
workers agree without a word, any step can be looked up on its own, and the result is the same on every
machine, for every number of ranks and loader processes, and under every version of numpy and torch.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from resist_ds.errors import UserError

_MASK = 2**64 - 1


class Purpose(IntEnum):
    """The first key of every hash: choices with different purposes are independent of each other."""

    ORDER = 1  # the permutation of an epoch
    CROP = 2  # pad, crop and flip of small images
    RESIZED_CROP = 3  # random resized crop and flip of large ones
    DIGITS_SPLIT = 4  # which digits are the test set
    SYNTHETIC_PATTERN = 5
    SYNTHETIC_NOISE = 6


def keyed_hash(keys: tuple[int, ...], counters: np.ndarray) -> np.ndarray:
    """Independent uniform uint64 values, one for each of `counters` (integers of any shape), under `keys`.

    Each step is splitmix64's, a bijection of 64-bit words: equal keys give different values to different
    counters, so sorting by them is never a matter of ties.
    """
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = _splitmix64(state ^ np.uint64(key & _MASK))
    return _splitmix64(state ^ counters.astype(np.uint64))


def _splitmix64(x: np.ndarray) -> np.ndarray:
    # On arrays, not numpy scalars: their products wrap around in silence, as they must here.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Position:
    """Where in a run a round begins: what a checkpoint records, and what a resumed run starts from.

    Attributes:
        round, step: rounds, and local steps of each worker, that are done.
        samples: images that all workers together have seen.
        epoch, offset: the pass over the data, and how many samples of its permutation are dealt.
    """

    round: int = 0
    step: int = 0
    samples: int = 0
    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Order:
    """Which samples every worker sees at each of its local steps.

    In each epoch, one pass over the data by all workers together, one global permutation of the samples is
    dealt to the workers in batches: no sample comes twice, to the same worker or to another one. What is left
    when no full round of batches remains (fewer than workers × batch_size samples) is dropped; the next
    epoch's permutation leaves others out.

    A run that goes on, perhaps with another number of workers, deals the rest of `start`'s permutation first.

    Errors: UserError if the samples do not suffice for one batch per worker.
    """

    seed: int
    samples: int
    workers: int
    batch_size: int
    start: Position = Position()

    def __post_init__(self) -> None:
        if self.steps_per_epoch > 0:
            return
        needed = f"{self.workers} workers × --batch_size {self.batch_size} = {self.workers * self.batch_size}"
        if self.samples >= self.workers:
            remedy = f"--batch_size {self.samples // self.workers} or less, or fewer --workers"
        else:
            remedy = f"--workers {self.samples} or less" if self.samples else "another --data_dir"
        raise UserError(
            f"too few samples for one batch per worker: the training set has {self.samples}, and {needed}; "
            f"type {remedy}"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Local steps of each worker in one epoch."""
        return self.samples // (self.workers * self.batch_size)

    def batch(self, step: int, worker: int, lane: int = 0, lanes: int = 1) -> tuple[int, np.ndarray]:
        """(epoch, sample indices int64 [batch_size / lanes]) of a worker's local step; the run's first is 0.

        Args:
            lane, lanes: a place in the worker's team, and G: the batch is cut for its ranks, in their order.
        """
        assert step >= self.start.step and 0 <= worker < self.workers, (step, worker)
        epoch, offset = self._place(step)
        size = self.batch_size // lanes
        start = offset + worker * self.batch_size + lane * size
        # A copy, so that nobody holds a view of the cached permutation.
        return epoch, _permutation(self.seed, epoch, self.samples)[start : start + size].copy()

    def after(self, rounds: int, steps: int) -> Position:
        """Where the run is when `rounds` more than the start's are done, which have `steps` local steps."""
        samples = self.start.samples + steps * self.workers * self.batch_size
        step = self.start.step + steps
        return Position(self.start.round + rounds, step, samples, *self._place(step))

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, offset into its permutation) at which a local step begins."""
        each = self.workers * self.batch_size
        step -= self.start.step
        first = (self.samples - self.start.offset) // each  # steps that the start's epoch still has
        if step < first:
            return self.start.epoch, self.start.offset + step * each
        epoch, step = divmod(step - first, self.steps_per_epoch)
        return self.start.epoch + 1 + epoch, step * each


# Two entries: a rank that plays its workers in turn goes back over an epoch's end within a round.
@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    return np.argsort(keyed_hash((Purpose.ORDER, seed, epoch), np.arange(samples)))


def crop_and_flip(
    seed: int, epoch: int, samples: np.ndarray, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random crops of images that were padded by `pad` pixels on each side, for samples [B].

    Returns top and left (int64 [B], uniform in 0 … 2 pad) and flip (bool [B], half of them true).
    """
    bits = keyed_hash((Purpose.CROP, seed, epoch), samples)
    places = np.uint64(2 * pad + 1)
    # Separate 24-bit fields of the word, each scaled to the number of places.
    low, high, mask = np.uint64(24), np.uint64(48), np.uint64(2**24 - 1)
    top = ((bits & mask) * places) >> low
    left = (((bits >> low) & mask) * places) >> low
    return top.astype(np.int64), left.astype(np.int64), ((bits >> high) & np.uint64(1)).astype(bool)


def resized_crop(
    seed: int, epoch: int, sample: int, width: int, height: int
) -> tuple[tuple[int, int, int, int], bool]:
    """The usual random resized crop of ImageNet training, for one image of width × height pixels.

    Returns the box (left, top, right, bottom) in pixels and whether to flip. The box covers 8 to 100 % of the
    image at an aspect ratio of 3/4 to 4/3; where ten tries do not fit, it is the largest central one.
    """
    attempts = 10
    bits = keyed_hash((Purpose.RESIZED_CROP, seed, epoch, sample), np.arange(4 * attempts + 1))
    uniform = ((bits >> np.uint64(11)) * 2.0**-53).tolist()  # in [0, 1)
    flip = uniform.pop() < 0.5
    widest = 4 / 3
    for n in range(attempts):
        u_area, u_ratio, u_left, u_top = uniform[4 * n : 4 * n + 4]
        area = width * height * (0.08 + 0.92 * u_area)
        ratio = widest ** (2 * u_ratio - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_left * (width - w + 1)), int(u_top * (height - h + 1))
            return (left, top, left + w, top + h), flip
    w, h = min(width, round(height * widest)), min(height, round(width * widest))
    left, top = (width - w) // 2, (height - h) // 2
    return (left, top, left + w, top + h), flip

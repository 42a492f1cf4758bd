"""How many local steps each round of a run has, and so where the run is after it. No communication.

A pure function of the options and of where the run starts: all ranks agree on it without a word, and a run
that was interrupted has the rounds that it would have had.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from statistics import fmean, harmonic_mean

from resist_ds.data.order import Order, Position
from resist_ds.options.config import Config

# Where (α/lr)² is a whole number, as 5 / 0.1² is, its float may lie a hair below.
_HAIR = 1 + 1e-9


@dataclass(frozen=True)
class Timetable:
    """The rounds of a run, from where `order` starts to the end.

    All have `--local_steps`. With `--local_steps_max` they grow as the learning rate falls: see
    `local_steps_at`. How far the run is, is counted in what ends it, for that too: in images of
    `--epochs`, or in rounds.
    """

    config: Config
    order: Order

    @cached_property
    def rounds(self) -> int:
        """After which the run is complete, those before the start included."""
        config, start = self.config, self.order.start
        if config.rounds:
            return config.rounds
        if config.local_steps_max is None:
            left = self._wanted - start.samples
            return start.round + max(0, math.ceil(left / (config.local_steps * self._images)))
        return start.round + len(self._begins) - 1

    @property
    def mean(self) -> float:
        """Local steps of a round, over those to come; there must be one."""
        return self._begins[-1] / (self.rounds - self.order.start.round)

    @cached_property
    def end(self) -> Position:
        """Where the run is when it is complete."""
        return self.order.after(max(0, self.rounds - self.order.start.round), self._begins[-1])

    def local_steps(self, round: int) -> int:
        """ℓ: of each worker in a round to come."""
        index = round - self.order.start.round
        return self._begins[index + 1] - self._begins[index]

    def after(self, round: int) -> Position:
        """Where the run is when `round`, or all before the start, is done."""
        more = round + 1 - self.order.start.round
        assert more >= 0, (round, self.order.start)
        return self.order.after(more, self._begins[more])

    @property
    def _images(self) -> int:
        """That all workers together see in a local step."""
        return self.order.workers * self.order.batch_size

    @property
    def _wanted(self) -> Fraction:
        """Images after which the epochs are over."""
        return Fraction(str(self.config.epochs)) * self.order.samples

    @cached_property
    def _begins(self) -> Sequence[int]:
        """Local steps since the start when each round to come begins, and when the last one ends."""
        if self.config.local_steps_max is None:  # however many they are, they take no memory
            each, left = self.config.local_steps, max(0, self.rounds - self.order.start.round)
            return range(0, (left + 1) * each, each)
        return tuple(accumulate(self._by_rule(), initial=0))

    def _by_rule(self) -> Iterator[int]:
        """ℓ of each round to come, by the learning rate at its begin."""
        config, start = self.config, self.order.start
        if config.rounds:
            for round in range(start.round, config.rounds):
                yield local_steps_at(config, round / config.rounds)
            return
        wanted, samples = self._wanted, start.samples
        last, whole = math.ceil(wanted), float(wanted)
        while samples < last:
            steps = local_steps_at(config, samples / whole)
            yield steps
            samples += steps * self._images


def local_steps_at(config: Config, done: float) -> int:
    """ℓ of a round that begins when the share `done` of a run is done.

    The quadratic synchronisation rule (arXiv 2310.14423): ⌊(α/lr)²⌋, not below `--local_steps` nor above
    `--local_steps_max`. α is such that a round at the peak rate has `--local_steps`, and lr is that without
    the linear warm-up, so that the rounds of the warm-up are as long as those after it.
    """
    fewest, most = config.local_steps, config.local_steps_max
    if most is None:
        return fewest
    share = decay(config.schedule, done) ** 2  # (lr / peak)²
    if most * share <= fewest:  # nothing is left of the rate, perhaps
        return most
    return max(fewest, math.floor(_HAIR * fewest / share))


def mean_local_steps(config: Config) -> float:
    """ℓ in the mean over the rounds of a run that is so long that a round is a moment of it."""
    if config.local_steps_max is None:
        return config.local_steps
    moments = 1_000
    steps = [local_steps_at(config, (moment + 0.5) / moments) for moment in range(moments)]
    # The moments are as many rounds, or as many images, of which longer rounds have more.
    return fmean(steps) if config.rounds else harmonic_mean(steps)


def decay(schedule: str, done: float) -> float:
    """The learning rate over its peak, when the share `done` of a run is done.

    step: ÷10 at 50 % and 75 % of training, as in the authors' release; cosine: half a period down to 0.
    """
    factors = {
        "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
    }
    return factors[schedule]

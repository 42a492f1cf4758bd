"""What is still to run. Pure: the same records give the same answer.

Every arm has its own peak rate: the grid is tried with the first seed and the first length; where the best
stands at the grid's end, the next one beyond is tried too. The best then has all seeds, and all lengths.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.accuracy.arms import Arm
from tools.accuracy.records import Record, key

BEYOND = 2  # rates that an end of the grid may be moved by


@dataclass(frozen=True)
class Trial:
    """A run to make."""

    arm: Arm
    lr: float
    passes: float
    seed: int

    def key(self, design: "Design") -> tuple[object, ...]:
        return key(design.data, design.study | self.arm.options, self.lr, self.passes, self.seed)


@dataclass(frozen=True)
class Design:
    """What a study wants of every arm.

    Attributes:
        study: options that all runs have alike; data: what they train on, see `records.data_of`.
        rates: the grid, ascending; lengths: passes over the images, the first one that of the grid's runs.
        seeds: the first one that of the grid's runs.
    """

    study: dict[str, str]
    data: str
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    lengths: tuple[float, ...]
    seeds: tuple[int, ...]


def due(design: Design, records: Iterable[Record]) -> list[Trial]:
    """Runs that can be made now, the grid's first, then seed by seed: so an early end leaves comparisons."""
    accuracy = {record.key: _value(record) for record in records}
    tuning: list[Trial] = []
    later: list[tuple[int, int, Trial]] = []
    for arm in design.arms:
        lr = arm.lr
        if lr is None:
            tried = _grid(design, arm, accuracy)
            lacking = [t for t in tried if t.key(design) not in accuracy]
            if lacking:
                tuning += lacking
                continue
            lr = _best(design, tried, accuracy).lr
        for place, seed in enumerate(design.seeds):
            for length, passes in enumerate(design.lengths):
                trial = Trial(arm, lr, passes, seed)
                if trial.key(design) not in accuracy:
                    later.append((length, place, trial))
    found = tuning + [trial for *_, trial in sorted(later, key=lambda entry: entry[:2])]
    return list({trial.key(design): trial for trial in reversed(found)}.values())[::-1]  # each once


def _value(record: Record) -> float:
    return -1.0 if record.accuracy is None else record.accuracy


def _grid(design: Design, arm: Arm, accuracy: dict[tuple[object, ...], float]) -> list[Trial]:
    """The runs that decide on an arm's rate, as far as those that were made say."""
    rates: Sequence[float] = design.rates
    for _ in range(BEYOND):
        tried = [Trial(arm, lr, design.lengths[0], design.seeds[0]) for lr in rates]
        if len(rates) < 2 or any(t.key(design) not in accuracy for t in tried):
            return tried
        best = _best(design, tried, accuracy).lr
        if best == rates[-1]:
            rates = (*rates, _next(rates[-2], rates[-1]))
        elif best == rates[0]:
            rates = (_next(rates[1], rates[0]), *rates)
        else:
            break
    return [Trial(arm, lr, design.lengths[0], design.seeds[0]) for lr in rates]


def _next(last: float, end: float) -> float:
    """A step of a grid on, as it would be typed."""
    return float(f"{end * end / last:.6g}")


def _best(design: Design, tried: Sequence[Trial], accuracy: dict[tuple[object, ...], float]) -> Trial:
    """The most accurate, of equal ones that with the lower rate."""
    return max(tried, key=lambda trial: (accuracy[trial.key(design)], -trial.lr))

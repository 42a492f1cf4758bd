"""Records as Markdown: accuracy at equal images, multiply-adds and time; the rates that were tried."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tools.accuracy.records import Record, way

Cost = Callable[[Record], float]


@dataclass(frozen=True)
class Runs:
    """Runs that differ in their seed alone."""

    records: tuple[Record, ...]

    @property
    def any(self) -> Record:
        return self.records[0]

    @property
    def measured(self) -> Record | None:
        """One that has facts: that did not meet NaN or Inf."""
        return next((record for record in self.records if record.facts), None)

    @property
    def shares(self) -> list[float]:
        """Test accuracy of each, in %; 0 where it met NaN or Inf."""
        return [100 * (record.accuracy or 0.0) for record in self.records]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.shares)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, if there are several."""
        return statistics.stdev(self.shares) if len(self.records) > 1 else None

    @property
    def cell(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        return f"{self.mean:.2f}{spread} ({len(self.records)})"


def grouped(records: Sequence[Record]) -> dict[tuple[tuple[str, str], ...], list[Runs]]:
    """Runs of every way, by rate and length; the records of one study."""
    groups: dict[Any, dict[tuple[float, float], list[Record]]] = {}
    for record in records:
        groups.setdefault(way(record.options), {}).setdefault((record.lr, record.passes), []).append(record)
    return {
        name: [Runs(tuple(sorted(runs, key=lambda r: r.seed))) for _, runs in sorted(of.items())]
        for name, of in groups.items()
    }


def chosen(runs: Sequence[Runs]) -> list[Runs]:
    """Those at the way's rate, by length: of the rates with most seeds the most accurate one."""
    lr = max(runs, key=lambda each: (len(each.records), each.mean)).any.lr
    return sorted((each for each in runs if each.any.lr == lr), key=lambda each: each.any.passes)


def equal_images(records: Sequence[Record], share: Callable[[Record], float]) -> list[str]:
    """A row a way, a column a length."""
    lengths = sorted({record.passes for record in records})
    head = ["way", "rate", "active", "multiply-adds", *(f"{n:g} pass{'es' * (n != 1)}" for n in lengths)]
    rows = []
    for runs in by_accuracy(records):
        found = {each.any.passes: each.cell for each in runs}
        of = next((each.measured for each in runs if each.measured), None)
        active = cost = "–"
        if of is not None:  # else all met NaN or Inf
            depth = of.options["strategy"] == "stochastic_depth"
            held = of.options["min_blocks"] if depth else of.facts["K"]
            active, cost = f"{held} of {of.facts['P']}", f"{share(of):.2f}"
        first = runs[0].any
        row = [f"`{first.arm}`", f"{first.lr:g}", active, cost]
        rows.append([*row, *(found.get(passes, "–") for passes in lengths)])
    return markdown(head, rows)


def equal_cost(records: Sequence[Record], costs: Sequence[tuple[str, Cost]], passes: float) -> list[str]:
    """A column a cost: every way's accuracy for what the cheapest `resist` takes for so many passes.

    Returns:
        no lines where no `resist` was measured.
    """
    ways = measured_ways(records)
    points = [[(of, each.mean) for each in runs if (of := each.measured)] for runs in ways]
    ours = [of for runs in points for of, _ in runs if _is_measure(of, passes)]
    if not ours:
        return []
    head = ["way", *(name for name, _ in costs)]
    rows = [[f"`{runs[0].any.arm}`"] for runs in ways]
    for _, cost in costs:
        given = min(map(cost, ours))
        for row, runs in zip(rows, points, strict=True):
            row.append(_at([(cost(of), mean) for of, mean in runs], given))
    return markdown(head, rows)


def measured_ways(records: Sequence[Record]) -> list[list[Runs]]:
    """Ways of which something was measured, at their rates; without what was not."""
    ways = [[each for each in runs if each.measured] for runs in by_accuracy(records)]
    return [runs for runs in ways if runs]


def _is_measure(record: Record, passes: float) -> bool:
    return record.options["strategy"] == "resist" and record.passes == passes


def _at(points: list[tuple[float, float]], cost: float) -> str:
    """Accuracy at a cost: of a run, or between two, or a bound."""
    accuracy, side = accuracy_at(points, cost)
    return f"{side}{accuracy:.1f}"


def accuracy_at(points: Sequence[tuple[float, float]], cost: float) -> tuple[float, str]:
    """Accuracy at a cost, and which way it is a bound: "≤ ", "≥ " or "".

    Between two runs it is on the line between them over the cost's logarithm. For less than the cheapest run
    takes, that one's accuracy is a bound from above, for more than the dearest takes its is one from below.

    Args:
        points: (cost, accuracy) of whole runs, each with a schedule of its own.
    """
    points = sorted(points)
    if cost < points[0][0] * (1 - 1e-9):
        return points[0][1], "≤ "
    for (low, first), (high, second) in pairwise(points):
        if cost <= high * (1 + 1e-9):
            part = math.log(cost / low) / math.log(high / low)
            return first + part * (second - first), ""
    last_cost, last = points[-1]
    return last, "≥ " if cost > last_cost * (1 + 1e-9) else ""


def rates(records: Sequence[Record]) -> list[str]:
    """A row a way, a column a rate: accuracy at the number of passes for which most were tried."""
    tried = sorted({record.lr for record in records})
    rows = []
    for runs in grouped(records).values():
        by_length: dict[float, list[Runs]] = {}
        for each in runs:
            by_length.setdefault(each.any.passes, []).append(each)
        most = max(by_length.values(), key=len)
        found = {each.any.lr: each.cell for each in most}
        rows.append([f"`{most[0].any.arm}`", *(found.get(lr, "–") for lr in tried)])
    return markdown(["way", *(f"rate {lr:g}" for lr in tried)], rows)


def by_accuracy(records: Sequence[Record]) -> list[list[Runs]]:
    """Every way's runs at its rate, the ways by the mean of their longest."""
    ways = [chosen(runs) for runs in grouped(records).values()]
    return sorted(ways, key=lambda runs: -runs[-1].mean)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]

"""Accuracy against images, multiply-adds and time on several links, as one picture."""

from collections.abc import Sequence
from typing import Any

from tools.accuracy.records import Record
from tools.accuracy.tables import Cost, Runs, measured_ways

MARKS = "osD^vPX*"


def picture(records: Sequence[Record], costs: Sequence[tuple[str, Cost]]) -> Any:
    """A panel a cost, a line a way; every point is the mean of whole runs, its bar their standard deviation.

    Returns:
        a figure of matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ways = measured_ways(records)
    columns = 3
    rows = -(-len(costs) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.32 * -(-len(ways) // 3)), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for (title, cost), axes in zip(costs, panels.flat, strict=False):
        for number, runs in enumerate(ways):
            axes.errorbar(
                [cost(of) for each in runs if (of := each.measured)],
                [each.mean for each in runs],
                [each.spread or 0.0 for each in runs],
                marker=MARKS[number % len(MARKS)],
                markersize=4,
                capsize=2,
                linewidth=1.2,
                label=_label(runs),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(costs) :]:
        axes.set_axis_off()
    for line in panels[:, 0]:
        line.set_ylabel("test accuracy (%)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _label(runs: Sequence[Runs]) -> str:
    return f"{runs[0].any.arm} (rate {runs[0].any.lr:g})"

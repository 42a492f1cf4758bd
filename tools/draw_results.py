"""The README's picture of results, drawn from the tables of docs/RESULTS.md and from nothing else.

    python tools/draw_results.py                 # writes docs/results.png
    python tools/draw_results.py --output other.png

A test compares the figures that a picture was drawn from, which it carries, with those of the tables.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "RESULTS.md"
PICTURE = ROOT / "docs" / "results.png"

SIDE_BY_SIDE = "Strategies side by side"
ACCURACY = "Accuracy at equal samples"
WAYS = ("resist", "local_sgd", "ddp")
STUDIED = {  # rows of the study → what the picture calls them
    "`resist`, W = 2, travel": "resist\nW = 2",
    "`resist`, W = 4, travel": "resist\nW = 4",
    "`local_sgd`, W = 4, travel": "local_sgd\nW = 4",
    "`ddp`, 4 workers": "ddp\nW = 4",
}


@dataclass(frozen=True)
class Bar:
    """A figure and its spread, as a table has them."""

    name: str
    value: float
    low: float
    high: float


def section(text: str, heading: str) -> list[list[str]]:
    """The cells of a section's first table, row by row. Raises ValueError where there is none."""
    part = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split("|") for line in part.splitlines() if line.startswith("|")]
    if not rows:
        raise ValueError(f"{RESULTS} has no table under {heading!r}")
    return [[cell.strip() for cell in row] for row in rows]


def measured(text: str, row: str) -> list[Bar]:
    """One row of the strategies' table: `**median** [lowest … highest]`, or a median alone."""
    table = section(text, SIDE_BY_SIDE)
    (cells,) = [cells for cells in table if cells[0].startswith(row)]
    bars = []
    for name, cell in zip(WAYS, cells[1:], strict=False):
        found = re.match(r"\*\*([\d.,]+)\*\*(?: \[([\d.,]+) … ([\d.,]+)\])?", cell)
        if found is None:
            raise ValueError(f"{RESULTS}, {row!r}: {cell!r} is no figure")
        value, low, high = (float(part.replace(",", "")) if part else None for part in found.groups())
        assert value is not None
        bars.append(Bar(name, value, value if low is None else low, value if high is None else high))
    return bars


def studied(text: str) -> list[Bar]:
    """Test accuracy (%) with its standard deviation over the seeds."""
    cells = {row[0]: row[1] for row in section(text, ACCURACY)}
    bars = []
    for row, name in STUDIED.items():
        mean, deviation = (float(part) for part in cells[row].split("±"))
        bars.append(Bar(name, mean, mean - deviation, mean + deviation))
    return bars


def figures(text: str) -> dict[str, list[Bar]]:
    """{title of a panel: its bars}."""
    return {
        "images a second, 4 ranks\nbehind 1 Gbit/s": measured(text, "speed (samples/s)"),
        "MB a round of 50 steps,\nall ranks (log)": measured(text, "MB a round"),
        "peak memory of training,\nMiB a rank": measured(text, "peak memory above imports, training"),
        "test accuracy (%) at equal images,\n5 passes, nothing tuned": studied(text),
    }


def as_json(panels: dict[str, list[Bar]]) -> str:
    """What a picture carries of the figures that it shows."""
    return json.dumps({title: [asdict(bar) for bar in bars] for title, bars in panels.items()})


def draw(panels: dict[str, list[Bar]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"resist": "#1f77b4", "local_sgd": "#ff7f0e", "ddp": "#7f7f7f"}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.4), layout="constrained")
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        places = range(len(bars))
        errors = [[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]]
        drawn = axis.bar(
            places,
            [bar.value for bar in bars],
            yerr=errors,
            color=[colours[bar.name.split("\n")[0]] for bar in bars],
            capsize=4,
        )
        if "log" in title:
            axis.set_yscale("log")
        axis.bar_label(drawn, [f"{bar.value:,.{0 if bar.value >= 100 else 1}f}" for bar in bars], padding=3)
        axis.set_xticks(places, [bar.name for bar in bars], fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Description": as_json(panels)})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=PICTURE, help="the picture [docs/results.png]")
    given = parser.parse_args()
    try:
        draw(figures(RESULTS.read_text(encoding="utf-8")), given.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

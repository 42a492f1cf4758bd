"""The README's picture of results, drawn from docs/RESULTS.md's tables, docs/study.jsonl and nothing else.

    python tools/draw_results.py                 # writes docs/results.png
    python tools/draw_results.py --output other.png

A test compares the figures that a picture was drawn from, which it carries, with those there.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import UserError
from tools.accuracy.records import VARIED, Record, load
from tools.accuracy.tables import chosen, grouped

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "RESULTS.md"
RECORDS = ROOT / "docs" / "study.jsonl"
PICTURE = ROOT / "docs" / "results.png"

SIDE_BY_SIDE = "Strategies side by side"
WAYS = ("resist", "local_sgd", "ddp")
STUDY = {"model": "preact_resnet101_narrow", "passes": 5.0, "workers": 4}  # in float32
STUDIED: dict[str, dict[str, str]] = {  # what the picture calls a way → in what it differs from the study's
    "resist": {"strategy": "resist", "wire": "compact"},
    "local_sgd": {"strategy": "local_sgd"},
    "ddp": {"strategy": "ddp", "workers": "1", "batch_size": "256", "accumulation_steps": "4"},
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


def studied(found: Sequence[Record]) -> list[Bar]:
    """Test accuracy (%) of every way at its rate, with its standard deviation over the seeds."""
    bars = []
    for name, own in STUDIED.items():
        runs = [
            each
            for each in found
            if each.study["model"] == STUDY["model"]
            and "mixed_precision" not in each.study
            and each.passes == STUDY["passes"]
            and each.facts.get("workers") == STUDY["workers"]
            and {**each.study, **own} == {k: v for k, v in each.options.items() if k not in VARIED}
        ]
        if not runs:
            raise ValueError(f"{RECORDS} has no run of {name}")
        best = chosen(next(iter(grouped(runs).values())))[0]
        spread = best.spread or 0.0
        seeds = len(best.records)
        what = f"{name}\n({seeds} seed{'s' if seeds > 1 else ''})"
        bars.append(Bar(what, best.mean, best.mean - spread, best.mean + spread))
    return bars


def figures(text: str, found: Sequence[Record]) -> dict[str, list[Bar]]:
    """{title of a panel: its bars}, of the tables and the study's records."""
    return {
        "images a second, 4 ranks\nbehind 1 Gbit/s": measured(text, "speed (samples/s)"),
        "MB a round of 50 steps,\nall ranks (log)": measured(text, "MB a round"),
        "peak memory of training,\nMiB a rank": measured(text, "peak memory above imports, training"),
        "test accuracy (%) at equal images,\n5 passes, W = 4, each at its rate": studied(found),
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
        draw(figures(RESULTS.read_text(encoding="utf-8"), load(RECORDS)), given.output)
    except (OSError, ValueError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

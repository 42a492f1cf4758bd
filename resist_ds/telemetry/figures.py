"""Pictures of runs: accuracy against samples, time and bytes; memory; who trained which block when.

All figures come from the runs' metrics.jsonl, the deal of the blocks from the options that it records.
Matplotlib is imported where it is used: training does not need it.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from resist_ds.options.strategy import STRATEGIES
from resist_ds.protocol.partition import sample_partition

PHASES = ("local", "sync", "eval", "save")
# What says nothing of the experiment: two runs that differ in it are the same one, repeated.
INCIDENTAL = ("seed", "output_dir", "run_name", "wandb_project", "log_with", "progress", "resume", "override")


@dataclass(frozen=True)
class Run:
    """The records of a run.

    Attributes:
        evals: of every evaluation, with "seconds" since the start added.
        summary: the last record, with the "settings".
    """

    path: Path
    evals: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.summary["settings"]
        return found


def read(path: Path) -> Run:
    """A run's records. Raises `ValueError` where it has not ended."""
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{path} is no run: it has no metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    if not records or records[-1]["kind"] != "summary":
        raise ValueError(f"{path} has not ended: resume it with train.py --resume auto")
    times = accumulate(_seconds(record) for record in records[:-1])
    evals = [r | {"seconds": t} for r, t in zip(records[:-1], times, strict=True) if r["kind"] == "eval"]
    return Run(path, evals, records[-1])


def _seconds(record: dict[str, Any]) -> float:
    """What everybody waited for, one phase after the other."""
    front = record | {"perf/sync_s": record.get("perf/sync_exposed_s", record.get("perf/sync_s", 0.0))}
    return sum(front.get(f"perf/{phase}_s", 0.0) for phase in PHASES)


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """{label: runs of the same options but for the seed}; a label names what tells the groups apart."""
    by_options: dict[str, list[Run]] = {}
    for run in runs:
        options = {k: v for k, v in run.settings.items() if k not in INCIDENTAL}
        by_options.setdefault(json.dumps(options, sort_keys=True), []).append(run)
    groups = list(by_options.values())
    first = [group[0].settings for group in groups]
    telling = ["strategy", "W"]
    telling += [
        name
        for name in dict.fromkeys(name for settings in first for name in settings)
        if name not in (*INCIDENTAL, *telling, "workers", "R", "K", "backend", "cpu_threads", "versions")
        and any(settings.get(name) != first[0].get(name) for settings in first)
    ]

    def label(run: Run) -> str:
        strategy, workers, *others = (run.settings.get(name) for name in telling)
        said = [f"{name} {value}" for name, value in zip(telling[2:], others, strict=True)]
        return ", ".join([f"{strategy}, W = {workers}", *said])

    labels: dict[str, list[Run]] = {}
    for group in groups:
        labels.setdefault(label(group[0]), []).extend(group)
    return labels


def pictures(runs: list[Run]) -> dict[str, Any]:
    """{name: figure} of all that there is to see of some runs. Raises `ModuleNotFoundError`: matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # files, no window
    groups = grouped(runs)
    shown = min(runs, key=lambda run: run.settings["strategy"] != "resist")
    return {"accuracy": accuracy(groups), "memory": memory(groups), "blocks": blocks(shown)}


def pixels(figure: Any) -> np.ndarray:
    """A figure as [height, width, 3] bytes."""
    import matplotlib.pyplot as plt
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    plt.close(figure)  # it is not shown
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def accuracy(groups: dict[str, list[Run]]) -> Any:
    """Test accuracy against images seen, seconds and bytes sent."""
    import matplotlib.pyplot as plt

    axes_of: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("images seen", lambda record: record["samples_seen"]),
        ("seconds", lambda record: record["seconds"]),
        ("GB sent between ranks", lambda record: record["comm/bytes_total"] / 1e9),
    )
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    for panel, (title, where) in zip(panels, axes_of, strict=True):
        for label, runs in groups.items():
            points = list(zip(*(run.evals for run in runs), strict=False))  # the n-th evaluation of each run
            x = [statistics.fmean(map(where, point)) for point in points]
            shares = [[100 * record["eval/accuracy"] for record in point] for point in points]
            mean = [statistics.fmean(share) for share in shares]
            repeats = f" ({len(runs)} runs)" if len(runs) > 1 else ""
            (line,) = panel.plot(x, mean, marker="o", markersize=3, label=label + repeats)
            if len(runs) > 1:
                spread = [statistics.stdev(share) for share in shares]
                low, high = ([m + s * d for m, d in zip(mean, spread, strict=True)] for s in (-1, 1))
                panel.fill_between(x, low, high, alpha=0.2, color=line.get_color())
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
        if not any(where(record) for runs in groups.values() for run in runs for record in run.evals):
            panel.clear()  # on one rank
            panel.set_xlabel(f"{title}: none")
    panels[0].set_ylabel("test accuracy of the global model (%)")
    panels[0].legend(fontsize=8)
    return figure


def memory(groups: dict[str, list[Run]]) -> Any:
    """Peak memory of the largest rank, by phase; of a group the largest run."""
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(2 + 2 * len(groups), 4), layout="constrained")
    width = 0.8 / len(PHASES)
    for i, phase in enumerate(PHASES):
        peaks = [max(run.summary.get(f"mem/{phase}_gib", 0.0) for run in runs) for runs in groups.values()]
        panel.bar([g + i * width for g in range(len(groups))], peaks, width, label=phase)
    panel.set_xticks([g + 1.5 * width for g in range(len(groups))], list(groups), fontsize=8)
    device = next(iter(groups.values()))[0].settings["device"]
    panel.set_ylabel("peak GiB, " + ("allocated" if device == "cuda" else "resident, with the imports"))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def blocks(run: Run) -> Any:
    """Who owned which pool block in which round, by colour; a dot where several workers held it.

    The options are those at the run's end: with another W, earlier rounds were dealt otherwise.
    """
    import matplotlib.pyplot as plt

    settings = run.settings
    pool, workers, rounds = settings["P"], settings["W"], run.summary["round"]
    deals = []
    for round in range(rounds):
        least = STRATEGIES[settings["strategy"]].least_blocks(pool, settings["min_blocks"])
        least = pool if round < settings["warmup_rounds"] else least
        deals.append(sample_partition(settings["seed"], round, workers=workers, pool=pool, min_blocks=least))
    owners = [[deal.owners[block] for deal in deals] for block in range(pool)]
    shared = [(r, b) for r, deal in enumerate(deals) for b, h in enumerate(deal.holders) if len(h) > 1]
    figure, panel = plt.subplots(figsize=(10, 1.5 + 0.2 * pool), layout="constrained")
    image = panel.imshow(owners, aspect="auto", interpolation="nearest", cmap=plt.get_cmap("tab10", workers))
    image.set_clim(-0.5, workers - 0.5)
    if shared:
        x, y = zip(*shared, strict=True)
        panel.scatter(x, y, s=4, color="black", label="held by several workers")
        figure.legend(loc="outside upper right", fontsize=8)
    panel.set_xlabel("round (the first is 0)")
    panel.set_ylabel("pool block")
    panel.set_title(str(run.path), fontsize=8, loc="left")
    figure.colorbar(image, ticks=range(workers), label="worker that owns it")
    return figure

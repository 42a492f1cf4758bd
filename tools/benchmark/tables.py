"""From the raw figures of a comparison to medians, ratios and shares; to Markdown; to a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmark.asked import ONCE_A_ROUND

Raw = dict[str, Any]
Summary = dict[str, dict[str, dict[str, float | None]]]  # {strategy: {figure: {"median": …}}}


@dataclass(frozen=True)
class Figure:
    """A row of the report.

    Attributes:
        key: of a run's figures.
        scale: the unit shown, in the figure's own.
        more: whether more is better.
        limit: what it is a share of.
    """

    key: str
    title: str
    unit: str
    scale: float
    more: bool
    limit: str


FIGURES = (
    Figure("samples_per_s", "speed", "samples/s", 1, True, "bare loop and bare exchange"),
    Figure("local_step_s", "local step", "ms", 1e-3, False, "bare loop, same shape"),
    Figure("sync_s", "synchronisation", "ms", 1e-3, False, "bare exchange, same bytes"),
    Figure("bytes_step", "bytes a step", "MB", 1e6, False, "fewest moved"),
    Figure("bytes_round", "bytes a round", "MB", 1e6, False, "fewest moved"),
    Figure("peak_train_bytes", "peak memory, training", "MiB", 1 << 20, False, "fewest held"),
    Figure("peak_eval_bytes", "peak memory, evaluation", "MiB", 1 << 20, False, "fewest held"),
)
PICTURED = ("samples_per_s", "peak_train_bytes", "bytes_round")


def summarise(raw: Raw) -> Summary:
    """By strategy and figure: median, min and max over the repeats, ratio to the best baseline, limit, share.

    The best baseline is the best median among the strategies other than resist, figure by figure. A share is
    limit ÷ figure, or figure ÷ limit where more is better, so that 1 is the limit itself: the median of those
    of the repeats, each with the limit that was measured beside it. What is not there is None.
    """
    strategies: list[str] = raw["strategies"]
    values = {
        strategy: {figure.key: _values(raw, strategy, figure.key) for figure in FIGURES}
        for strategy in strategies
    }
    summary: Summary = {strategy: {} for strategy in strategies}
    for figure in FIGURES:
        medians = {s: statistics.median(of[figure.key]) for s, of in values.items() if of[figure.key]}
        baselines = [median for strategy, median in medians.items() if strategy != "resist" and median > 0]
        best = (max if figure.more else min)(baselines, default=None)
        for strategy in strategies:
            if strategy not in medians:
                summary[strategy][figure.key] = dict.fromkeys(
                    ("median", "min", "max", "ratio", "limit", "share")
                )
                continue
            median, of = medians[strategy], values[strategy][figure.key]
            limits = [limit_of(raw, run, figure.key) for run in raw["runs"] if run["strategy"] == strategy]
            known = [limit for limit in limits if limit is not None]
            pairs = zip(of, known, strict=False)
            shares = [value / limit if figure.more else limit / value for value, limit in pairs]
            summary[strategy][figure.key] = {
                "median": median,
                "min": min(of),
                "max": max(of),
                "ratio": None if best is None else median / best,
                "limit": statistics.median(known) if known else None,
                "share": statistics.median(shares) if shares else None,
            }
    return summary


def _values(raw: Raw, strategy: str, key: str) -> list[float]:
    """One per repeat; none for the synchronisation of a strategy whose steps contain it."""
    if key == "sync_s" and strategy not in ONCE_A_ROUND:
        return []
    return [run[key] for run in raw["runs"] if run["strategy"] == strategy]


def limit_of(raw: Raw, run: Raw, key: str) -> float | None:
    """What a run's figure could be at best, in the figure's own unit; None: not known."""
    strategy, loop = run["strategy"], run["bare"]["loop"]
    facts = raw["facts"]["strategies"][strategy]
    steps: int = raw["options"]["local_steps"]
    moved: int = facts["moved_bytes"][run["repeat"]]
    images = raw["workers"] * raw["options"]["batch_size"] * steps
    if strategy in ONCE_A_ROUND:
        seconds = steps * raw["workers_a_rank"] * loop + exchange_of(run)
    else:
        seconds = steps * max(loop, exchange_of(run))  # one may hide behind the other
    limits: dict[str, float | None] = {
        "samples_per_s": images / seconds,
        "local_step_s": loop,
        "sync_s": exchange_of(run),
        "bytes_step": moved / steps,
        "bytes_round": moved,
        "peak_train_bytes": facts["held_bytes"],
        "peak_eval_bytes": facts["held_bytes"],
    }
    return limits[key]


def exchange_of(run: Raw) -> float:
    """Seconds of a run's bare exchange, a round's or a step's: the faster of its forms."""
    return min(run["bare"][form] for form in ("all_reduce", "messages") if form in run["bare"])


def markdown(raw: Raw, summary: Summary) -> str:
    """The report."""
    options, facts = raw["options"], raw["facts"]
    repeats = f"{raw['repeats']} repeat" + ("s" if raw["repeats"] > 1 else "")
    rounds = f"{options['rounds']} round" + ("s, the first not counted" if options["rounds"] > 1 else "")
    lines = [
        f"# {options['model']}: {', '.join(raw['strategies'])}",
        "",
        f"{raw['workers']} workers on {raw['ranks']} ranks, batch {options['batch_size']} per worker, "
        f"{options['img_size'] or 32}² images, {rounds} of {options['local_steps']} local steps; {repeats}, "
        f"strategies in turn. {raw['device']}, {raw['cores']} cores, --cpu_threads {options['cpu_threads']}, "
        f"{raw['backend']}.",
        "",
        *_link_lines(raw),
        "Medians [lowest … highest]; × is the ratio to the best strategy other than resist; "
        "then the share of the limit, which is 100 %.",
        "",
    ]
    rows = [["", *raw["strategies"], "limit"], ["---"] * (len(raw["strategies"]) + 2)]
    for figure in FIGURES:
        cells = [_cell(figure, summary[strategy][figure.key]) for strategy in raw["strategies"]]
        rows.append([f"{figure.title} ({figure.unit})", *cells, figure.limit])
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "## Limits", ""]
    for strategy in raw["strategies"]:
        of = facts["strategies"][strategy]
        per = "a round" if strategy in ONCE_A_ROUND else "a step"
        held = f"{of['held_bytes'] / (1 << 20):.1f} MiB"
        runs = [run for run in raw["runs"] if run["strategy"] == strategy]
        loops = [statistics.median(run["bare"][name] for run in runs) for name in ("loop", "full_loop")]
        exchange = statistics.median(map(exchange_of, runs))
        lines.append(
            f"- {strategy}: {of['slots']} of {facts['pool']} pool blocks, {of['parameters'] / 1e6:.2f} M of "
            f"{facts['parameters'] / 1e6:.2f} M parameters. Multiply-adds {of['multiply_add_share']:.3f} of "
            f"the full net's (counted), bare loop {loops[0] / loops[1]:.3f} of the full net's "
            f"({1e3 * loops[0]:.1f} and {1e3 * loops[1]:.1f} ms a step), its local step "
            f"{_of(summary, strategy, 'local_step_s') / loops[1]:.3f}. Bare exchange "
            f"{1e3 * exchange:.1f} ms {per}. Fewest bytes: {held} held by a rank, "
            f"{statistics.median(of['moved_bytes']) / 1e6:.1f} MB moved a round."
        )
    lines += ["", "## Memory of a local step by category (rank 0, at its peak)", ""]
    for strategy, found in raw["memory_by_category"].items():
        said = found if isinstance(found, str) else _categories(found)
        lines.append(f"- {strategy}: {said}")
    lines += ["", "## What the figures are", "", *(f"- {note}" for note in _notes(raw)), ""]
    return "\n".join(lines)


def _of(summary: Summary, strategy: str, key: str) -> float:
    median = summary[strategy][key]["median"]
    assert median is not None
    return median


def _link_lines(raw: Raw) -> list[str]:
    link = raw["link"]
    if link is None:
        return []
    rates = link["mbit_per_s"]
    lines = [
        "Every rank in a network namespace of its own behind a link of "
        f"{link['bits_per_s'] / 1e6:,.0f} Mbit/s each way; measured with plain TCP, all ranks at once: "
        f"{min(rates):,.0f} … {max(rates):,.0f} Mbit/s."
    ]
    told = []
    for strategy in raw["strategies"]:
        runs = [run for run in raw["runs"] if run["strategy"] == strategy and run["bytes_total"]]
        wires = [run["bytes_wire"] / run["bytes_total"] for run in runs if run["bytes_wire"] is not None]
        told += [f"{strategy} {statistics.median(wires):.3f}"] if wires else []
    if told:
        lines.append(
            f"Bytes that left by the links over those of the ledgers, whole runs: {', '.join(told)}."
        )
    return [*lines, ""]


def _cell(figure: Figure, found: dict[str, float | None]) -> str:
    median, low, high = (found[key] for key in ("median", "min", "max"))
    if median is None or low is None or high is None:
        return "in its local step"
    text = f"**{_number(median / figure.scale)}**"
    if low < high:
        text += f" [{_number(low / figure.scale)} … {_number(high / figure.scale)}]"
    if found["ratio"] is not None:
        text += f" · ×{found['ratio']:.3f}"
    return text + (" · limit absent" if found["share"] is None else f" · {100 * found['share']:.1f} %")


def _number(value: float) -> str:
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"


def _categories(found: dict[str, int]) -> str:
    parts = [f"{name} {size / (1 << 20):.1f}" for name, size in found.items() if size and name != "Total"]
    return f"{found['Total'] / (1 << 20):.1f} MiB: {', '.join(parts)}"


def _notes(raw: Raw) -> list[str]:
    gpu = raw["device"] != "CPU"
    memory = (
        "peaks of memory are what torch allocated on the GPU"
        if gpu
        else "peaks of memory are those of the resident set over what the process held before the run, "
        f"{max(run['baseline_bytes'] for run in raw['runs']) / (1 << 20):.0f} MiB of imports"
    )
    notes = [
        "speed: images of all workers over seconds of local steps and synchronisation of the slowest rank; "
        "its limit is a bare loop over a plain net of the strategy's shape, on all ranks at once, then the "
        "bare exchange of the same bytes (where gradients are averaged at every step: the longer of the two)",
        f"{memory}; of the largest rank. The limit is parameters, gradients and optimizer state alone",
        "bytes between ranks as in the runs' ledgers; their limit is a ring all-reduce of what is averaged, "
        "and of partitioned blocks a direct hand-off",
        "a bare exchange is one all-reduce that moves as many bytes or, if that is faster, the same messages",
    ]
    return notes + [f"absent: {what}" for what in raw["absent"]]


def picture(raw: Raw, summary: Summary, path: Path) -> None:
    """Bars with their spread: speed, peak memory, bytes. Raises `ModuleNotFoundError` without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")  # files, no window
    import matplotlib.pyplot as plt

    strategies: Sequence[str] = raw["strategies"]
    figure, panels = plt.subplots(1, len(PICTURED), figsize=(12, 3.6), layout="constrained")
    for panel, key in zip(panels, PICTURED, strict=True):
        row = next(row for row in FIGURES if row.key == key)
        for place, strategy in enumerate(strategies):
            found = {k: None if v is None else v / row.scale for k, v in summary[strategy][key].items()}
            median, low, high = found["median"] or 0.0, found["min"] or 0.0, found["max"] or 0.0
            panel.bar(place, median, yerr=[[median - low], [high - median]], capsize=4)
            if found["limit"] is not None:
                panel.plot([place - 0.4, place + 0.4], [found["limit"]] * 2, "k--", linewidth=1)
        panel.set_xticks(range(len(strategies)), strategies)
        panel.set_title(f"{row.title} ({row.unit})", fontsize=10)
    figure.suptitle(f"{raw['options']['model']}, W = {raw['workers']}; dashed: the limit", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)

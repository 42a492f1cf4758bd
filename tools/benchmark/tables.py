"""From the raw figures of a comparison to medians, ratios and shares; to Markdown; to a picture."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmark.peers import PEERS

Raw = dict[str, Any]
Summary = dict[str, dict[str, dict[str, float | None]]]  # {strategy: {figure: {"median": …}}}


@dataclass(frozen=True)
class Figure:
    """A row of the report.

    Attributes:
        key: of a run's figures.
        scale: the unit shown, in the figure's own.
        more: whether more is better.
        limit: what it is a share of; "–": nothing.
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
    Figure("sync_exposed_s", "synchronisation, waited for", "ms", 1e-3, False, "–"),
    Figure("waited_share", "the same, of a round", "%", 0.01, False, "–"),
    Figure("bytes_step", "bytes a step", "MB", 1e6, False, "fewest moved"),
    Figure("bytes_round", "bytes a round", "MB", 1e6, False, "fewest moved"),
    Figure("peak_train_bytes", "peak memory, training", "MiB", 1 << 20, False, "fewest held"),
    Figure("peak_eval_bytes", "peak memory, evaluation", "MiB", 1 << 20, False, "fewest held"),
)
_SYNC = ("sync_s", "sync_exposed_s", "waited_share")
PICTURED = ("samples_per_s", "peak_train_bytes", "bytes_round")


def summarise(raw: Raw) -> Summary:
    """By strategy and figure: median, min and max over the repeats, ratio to the best baseline, limit, share.

    The best baseline is the best median among all but resist and its variants, figure by figure; where there
    are none, the first of those. A share is
    limit ÷ figure, or figure ÷ limit where more is better, so that 1 is the limit itself: the median of those
    of the repeats, each with the limit that was measured beside it. What is not there is None.
    """
    strategies: list[str] = raw["strategies"]
    values = {
        strategy: {figure.key: _values(raw, strategy, figure.key) for figure in FIGURES}
        for strategy in strategies
    }
    summary: Summary = {strategy: {} for strategy in strategies}
    others = _others(raw) or strategies[:1]
    for figure in FIGURES:
        medians = {s: statistics.median(of[figure.key]) for s, of in values.items() if of[figure.key]}
        baselines = [median for strategy, median in medians.items() if strategy in others and median > 0]
        best = (max if figure.more else min)(baselines, default=None)
        for strategy in strategies:
            if strategy not in medians:
                summary[strategy][figure.key] = dict.fromkeys(
                    ("median", "min", "max", "ratio", "limit", "share")
                )
                continue
            median, of = medians[strategy], values[strategy][figure.key]
            runs = [run for run in raw["runs"] if run["strategy"] == strategy]
            known = [limit for run in runs if (limit := limit_of(raw, run, figure.key)) is not None]
            pairs = zip(of, known, strict=True) if known else ()
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


def _others(raw: Raw) -> list[str]:
    """All but resist and its variants."""
    return [name for name in raw["strategies"] if raw["variants"][name]["strategy"] != "resist"]


def _values(raw: Raw, strategy: str, key: str) -> list[float]:
    """One per repeat; none for what is not known, as the synchronisation of one whose steps contain it."""
    if key in _SYNC and not raw["variants"][strategy]["once_a_round"]:
        return []
    values = [run[key] for run in raw["runs"] if run["strategy"] == strategy]
    return [value for value in values if value is not None]


def limit_of(raw: Raw, run: Raw, key: str) -> float | None:
    """What a run's figure could be at best, in the figure's own unit; None: not known."""
    if "bare" not in run:
        return None  # a peer's, or one of a comparison of teams
    strategy, loop, steps = run["strategy"], run["bare"]["loop"], run["steps"]
    facts, variant = raw["facts"]["strategies"][strategy], raw["variants"][strategy]
    options, moved = variant["options"], facts["moved_bytes"][run["repeat"]]
    images = options["workers"] * options["batch_size"] * steps
    if variant["once_a_round"]:
        blocks = facts["blocks_share"] * exchange_of(run)  # they follow when all steps are done
        hidden = options["overlap_steps"] * loop  # of a rank's last worker: then its exchange begins
        exposed = blocks + max(0.0, exchange_of(run) - blocks - hidden)
        seconds = steps * raw["workers_a_rank"] * loop + exposed
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
    return limits.get(key)


def _teams(raw: Raw) -> str:
    """How the ranks stand together, and what those do that know no teams."""
    size = raw["options"]["team_size"]
    if size == 1:
        return ""
    return f" in teams of {size} (without teams: a worker on every rank, the same images a step)"


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
        f"{raw['workers']} workers on {raw['ranks']} ranks{_teams(raw)}, "
        f"batch {options['batch_size']} per worker, "
        f"{options['img_size'] or 32}² images, {rounds} of {options['local_steps']} local steps; {repeats}, "
        f"strategies in turn. {raw['device']}, {raw['cores']} cores, --cpu_threads {options['cpu_threads']}, "
        f"{raw['backend']}.",
        "",
        *_link_lines(raw),
        f"Medians [lowest … highest]; × is the ratio to {_baseline(raw)}; "
        "then the share of the limit, which is 100 %.",
        "",
    ]
    rows = [["", *raw["strategies"], "limit"], ["---"] * (len(raw["strategies"]) + 2)]
    for figure in shown(summary):
        cells = [_cell(raw, figure, name, summary[name][figure.key]) for name in raw["strategies"]]
        rows.append([f"{figure.title} ({figure.unit})", *cells, figure.limit])
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "## Limits", ""]
    for strategy, of in facts["strategies"].items():
        per = "a round" if raw["variants"][strategy]["once_a_round"] else "a step"
        held = f"{of['held_bytes'] / (1 << 20):.1f} MiB"
        runs = [run for run in raw["runs"] if run["strategy"] == strategy]
        bare = "."
        if all("bare" in run for run in runs):
            loops = [statistics.median(run["bare"][name] for run in runs) for name in ("loop", "full_loop")]
            exchange = statistics.median(map(exchange_of, runs))
            bare = (
                f", bare loop {loops[0] / loops[1]:.3f} of the full net's "
                f"({1e3 * loops[0]:.1f} and {1e3 * loops[1]:.1f} ms a step), its local step "
                f"{_of(summary, strategy, 'local_step_s') / loops[1]:.3f}. Bare exchange "
                f"{1e3 * exchange:.1f} ms {per}."
            )
        lines.append(
            f"- {strategy}: {of['slots']} of {facts['pool']} pool blocks, {of['parameters'] / 1e6:.2f} M of "
            f"{facts['parameters'] / 1e6:.2f} M parameters. Multiply-adds {of['multiply_add_share']:.3f} of "
            f"the full net's (counted){bare} Fewest bytes: {held} held by a rank, "
            f"{statistics.median(of['moved_bytes']) / 1e6:.1f} MB moved a round."
        )
    lines += _peer_lines(raw)
    lines += ["", "## Memory of a local step by category (rank 0, at its peak)", ""]
    for strategy, found in raw["memory_by_category"].items():
        said = found if isinstance(found, str) else _categories(found)
        lines.append(f"- {strategy}: {said}")
    lines += ["", "## What the figures are", "", *(f"- {note}" for note in _notes(raw)), ""]
    return "\n".join(lines)


def shown(summary: Summary) -> list[Figure]:
    """The rows of the report: those that tell something of some strategy."""
    return [f for f in FIGURES if any(of[f.key]["median"] is not None for of in summary.values())]


def _baseline(raw: Raw) -> str:
    return "the best of those that are not resist" if _others(raw) else raw["strategies"][0]


def _peer_lines(raw: Raw) -> list[str]:
    """Each peer: what it is, its settings, and why it did not run."""
    lines: list[str] = []
    told = set()
    for name in raw["strategies"]:
        variant = raw["variants"][name]
        if not variant["peer"]:
            continue
        used = {key: variant["options"][key] for key in ("optimizer", "lr", "momentum", "cpu_threads")}
        settings = ", ".join(f"{key} {value}" for key, value in (variant["settings"] | used).items())
        runs = [run for run in raw["runs"] if run["strategy"] == name]
        package = f" ({runs[0]['package']})" if runs else ""
        says = "the same with other settings" if variant["peer"] in told else PEERS[variant["peer"]].says
        told.add(variant["peer"])
        line = f"- {name}{package}: {says}. Settings: {settings}."
        if name in raw["failed"]:
            line += f" **{'Left out from then on' if runs else 'Did not run'}: {raw['failed'][name]}.**"
        lines.append(line)
    return ["", "## Peers", "", *lines] if lines else []


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


def _cell(raw: Raw, figure: Figure, strategy: str, found: dict[str, float | None]) -> str:
    median, low, high = (found[key] for key in ("median", "min", "max"))
    if median is None or low is None or high is None:
        if strategy in raw["failed"] and figure is FIGURES[0]:
            return f"did not run: {raw['failed'][strategy]}".replace("|", "/")
        return "–" if raw["variants"][strategy]["once_a_round"] else "in its local step"
    text = f"**{_number(median / figure.scale)}**"
    if low < high:
        text += f" [{_number(low / figure.scale)} … {_number(high / figure.scale)}]"
    if found["ratio"] is not None:
        text += f" · ×{found['ratio']:.3f}"
    if found["share"] is not None:
        return text + f" · {100 * found['share']:.1f} %"
    return text + ("" if figure.limit == "–" or raw["variants"][strategy]["peer"] else " · limit absent")


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
        "speed: images of all workers over the seconds from the end of one round to that of another (of a "
        "single round: over local steps and synchronisation of the slowest rank); its limit is a bare loop "
        "over a plain net of the strategy's shape, on all ranks at once, then the bare exchange of the same "
        "bytes (where gradients are averaged at every step: the longer of the two)",
        f"{memory}; of the largest rank. The limit is parameters, gradients and optimizer state alone",
        "bytes between ranks as in the runs' ledgers; their limit is a ring all-reduce of what is averaged, "
        "and of partitioned blocks a direct hand-off",
        "a bare exchange is one all-reduce that moves as many bytes or, if that is faster, the same messages",
    ]
    if any(variant["peer"] for variant in raw["variants"].values()):
        notes += [
            "peers: the same images, net, batch, threads and optimizer of the local steps as local_sgd, in a "
            "loop as their documentation shows it; speed is over all rounds that count, local step the "
            "median of the steps in which ranks do not meet, what is waited for the rest of a round; bytes "
            "are those that left by the links of --link, headers included; no limits were measured for them"
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
        names = [name.replace(":", "\n") for name in strategies]
        panel.set_xticks(range(len(strategies)), names, fontsize=8, rotation=30 if len(names) > 4 else 0)
        panel.set_title(f"{row.title} ({row.unit})", fontsize=10)
    figure.suptitle(f"{raw['options']['model']}, W = {raw['workers']}; dashed: the limit", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)

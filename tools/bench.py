"""Benchmarks: strategies side by side, or what ResIST's own machinery costs. Starts its own ranks.

    python tools/bench.py --strategies resist,local_sgd,ddp --workers 2 --batch_size 2
    sudo python tools/bench.py --strategies resist,ddp --workers 4 --link 1gbit   # behind a slow network
    python tools/bench.py --strategies resist,resist:wire=compact,local_sgd --workers 2    # variants of one
    python tools/bench.py --strategies resist,ddp --workers 2 --team_size 2 --link 1gbit   # two nodes of two
    python tools/bench.py --strategies resist,torchft_diloco --workers 2      # and what others would pick
    python tools/bench.py --what local,sync,save --workers 2,4                    # ours against bare work
    python tools/bench.py --what data --workers 4 --batch_size 128 --img_size 224 # do the data keep up?
    python tools/bench.py --what step --workers 4 --batch_size 128 --mixed_precision bf16 --channels_last

Options of train.py mean the same here (--model, --batch_size, --local_steps, ...); those of one strategy
alone are typed with it, as resist:wire=compact:overlap_steps=2. The figures go to the screen and to
--output_dir: of strategies as JSON, Markdown and PNG, of the machinery as JSON.
"""

import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import RunError, Stopped, UserError
from tools.benchmark import ranks
from tools.benchmark.asked import Asked, cores, read
from tools.benchmark.link import Link

PACKAGES = ("torch", "timm", "deepspeed", "accelerate")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for what cannot be done as typed, 128 + the number of a signal that ended it."""
    for number in ranks.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's, a background job's
            signal.signal(number, _stop)
    try:
        asked = read(sys.argv[1:] if argv is None else argv, __doc__)
        if asked.variants:
            compare(asked, sys.argv if argv is None else ["tools/bench.py", *argv])
        else:
            machinery(asked)
    except RunError as error:
        prefix = "" if isinstance(error, Stopped) else "error: "
        print(f"{prefix}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _stop(number: int, _: FrameType | None) -> None:
    for other in ranks.SIGNALS:  # the end has begun: it must not be interrupted
        signal.signal(other, signal.SIG_IGN)
    ranks.stop(Stopped(f"stopped by {signal.Signals(number).name}; all ranks are ended", number))


def compare(asked: Asked, command: Sequence[str]) -> None:
    """Run the strategies in turn; print the report and save it."""
    ranks.warm()
    from tools.benchmark import compare, tables

    folder = _folder(asked.output_dir)
    each = asked.config.team_size
    assert isinstance(each, int)
    with Link(asked.ranks // each, asked.bits, each) if asked.bits else nullcontext() as network:
        plan = compare.Plan(
            config=asked.config,
            variants=asked.variants,
            ranks=asked.ranks,
            repeats=asked.repeats,
            network=network,
            folder=folder / "runs",
            timeout=asked.timeout,
        )
        measured = compare.measure(plan, say=lambda line: print(line, flush=True))
    raw = {
        **_surroundings(command),
        "strategies": [variant.name for variant in asked.variants],
        "variants": {variant.name: variant.facts() for variant in asked.variants},
        "workers": plan.workers,
        "ranks": plan.ranks,
        "workers_a_rank": plan.played,
        "repeats": plan.repeats,
        "seeds": [plan.config.seed + repeat for repeat in range(plan.repeats)],
        "options": asked.config.to_dict(),
        "device": measured["runs"][0]["device"],
        "backend": measured["runs"][0]["backend"],
        **measured,
    }
    summary = tables.summarise(raw)
    picture = folder / "bench.png"
    try:
        tables.picture(raw, summary, picture)
    except ModuleNotFoundError:
        raw["absent"].append("a picture, as matplotlib is not installed (pip install matplotlib)")
    if raw["device"] == "CPU":
        raw["absent"].append("figures of a GPU: none is here")
    if network is None:
        raw["absent"].append("a slow network: --link was not asked for")
    report = tables.markdown(raw, summary)
    (folder / "bench.md").write_text(report, encoding="utf-8")
    _write(folder / "bench.json", raw | {"summary": summary})
    print(f"\n{report}\n{folder}: bench.json, bench.md" + (", bench.png" if picture.exists() else ""))


def machinery(asked: Asked) -> None:
    """Ours against bare work, part by part."""
    ranks.warm()
    from tools.benchmark import delivery, micro, throughput

    folder = _folder(asked.output_dir)
    config = asked.config
    print(
        f"{config.model}, batch {config.batch_size}, {config.img_size or 32}², torch {version('torch')}, "
        f"{asked.repeats} interleaved repeats; seconds are medians [fastest … slowest]"
    )
    figures: dict[str, Any] = {**_surroundings(sys.argv), "options": config.to_dict()}
    for workers in asked.workers:
        for part in asked.parts:
            played, times = replace(config, workers=workers), (asked.repeats, asked.steps)
            if part == "data":
                found = delivery.measure(played, *times, photos=asked.photos)
            elif part == "step":
                found = throughput.measure(played, *times, modes=asked.modes)
            else:
                found = micro.measure(played, part, *times, folder=folder)
            figures[f"{part} W={workers}"] = found
            _write(folder / "machinery.json", figures)  # after each part: the next may be ended from outside


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {path} cannot be made ({error.strerror}): type another") from None
    return path.resolve()


def _surroundings(command: Sequence[str]) -> dict[str, Any]:
    return {
        "command": list(command),
        "date": time.strftime("%Y-%m-%d"),
        "cores": cores(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "absent": [],
    }


def _write(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""The accuracy study: test accuracy of every way to train one net, at equal samples, several seeds each.

    python tools/study.py --data_dir CIFAR --output_dir runs/study       # 30 runs; the same line goes on
    python tools/study.py --data_dir CIFAR --only resist-4-travel,ddp-4 --seeds 0 --epochs 1
    python tools/study.py --output_dir runs/study --report               # the table of what is there

CIFAR is an image folder (train/ and test/ with a folder per class). Every run is one `train.py` on one rank.
`ddp` is one worker with the batches of all, in as many micro-batches as workers: BatchNorm sees what it would
see on each of them, and gradients are averaged alike. `stochastic_depth` is one worker that runs, in every
step, as many pool blocks drawn at random as a worker of `resist` holds with the middle number of workers: the
same multiply-adds an image.

Options that this tool does not know go to every run: `--model preact_resnet101 --img_size 32 --lr 0.01`.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.telemetry.figures import read

ROOT = Path(__file__).resolve().parent.parent
# A narrow net with a deep section 3 (P = 8), small enough for a CPU. One peak rate for all: none was tuned.
DEFAULTS = {
    "model": "preact_resnet_small",
    "dataset": "imagefolder",
    "img_size": "24",
    "batch_size": "64",
    "local_steps": "20",
    "lr": "0.1",
    "schedule": "cosine",
    "lr_warmup_steps": "20",
    "data_workers": "0",
    "cpu_threads": "1",
    "checkpoint_every": "0",
    "keep": "1",
    "log_with": "none",
    "progress": "false",
}


@dataclass(frozen=True)
class Arm:
    """One way to train: its name and the options that make it."""

    name: str
    options: dict[str, str] = field(default_factory=dict)


def arms(batch_size: int, workers: tuple[int, ...], slots: int) -> list[Arm]:
    """All ways that are compared.

    Args:
        batch_size: images per worker and local step.
        workers: numbers of workers; the baselines have the middle one.
        slots: pool blocks that are active in a step of `stochastic_depth`.
    """
    middle = workers[len(workers) // 2]
    found = []
    for policy in ("travel", "reset"):
        for w in workers:
            options = {"workers": str(w), "optimizer_state": policy}
            found.append(Arm(f"resist-{w}-{policy}", options))
        options = {"strategy": "local_sgd", "workers": str(middle), "optimizer_state": policy}
        found.append(Arm(f"local_sgd-{middle}-{policy}", options))
    whole = {"batch_size": str(batch_size * middle), "accumulation_steps": str(middle)}
    found.append(Arm(f"ddp-{middle}", {"strategy": "ddp", "workers": "1", **whole}))
    depth = {"strategy": "stochastic_depth", "workers": "1", "min_blocks": str(slots)}
    found.append(Arm("stochastic_depth-1", depth))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, help="image folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/study"))
    parser.add_argument("--epochs", type=float, default=5.0, help="passes by all workers together [5]")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--workers", default="2,4,8")
    parser.add_argument("--only", help="names of runs without their seed, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--report", action="store_true", help="only the table of the runs that are there")
    given, others = parser.parse_known_args()
    try:
        if not given.report:
            run_all(given, others)
        print(report(given.output_dir))
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: a run ended with exit code {error.returncode}; its log says why", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run_all(given: argparse.Namespace, others: list[str]) -> None:
    """Run whatever is not there yet, seed by seed, so that an early end leaves whole comparisons."""
    if given.data_dir is None:
        raise ValueError("type --data_dir FOLDER, of images to train on (train/ and test/)")
    typed = [token for name, value in DEFAULTS.items() for token in (f"--{name}", value)] + others
    config = parse([*typed, "--data_dir", str(given.data_dir)])  # a wrong option answers now
    workers = tuple(int(w) for w in given.workers.split(","))
    chosen = arms(config.batch_size, workers, slots_of(config.model, workers[len(workers) // 2]))
    if given.only:
        known = {arm.name: arm for arm in chosen}
        unknown = [name for name in given.only.split(",") if name not in known]
        if unknown:
            raise ValueError(f"--only {unknown[0]}: type some of {','.join(known)}")
        chosen = [known[name] for name in given.only.split(",")]
    if not given.data_dir.is_dir():
        raise ValueError(f"--data_dir {given.data_dir}: no such folder")
    place: Path = given.output_dir
    place.mkdir(parents=True, exist_ok=True)

    def run(arm: Arm, seed: str) -> None:
        folder = place / f"{arm.name}-seed{seed}"
        if finished(folder):
            return
        options = {"data_dir": str(given.data_dir), "epochs": str(given.epochs), "eval_every": "0"}
        options |= {"output_dir": str(folder), "resume": "auto", "seed": seed, **arm.options}
        command = [sys.executable, str(ROOT / "train.py"), *typed]
        command += [token for name, value in options.items() for token in (f"--{name}", value)]
        with (place / f"{folder.name}.log").open("w") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            code = process.wait()
        if code:
            print(f"{folder.name}: exit code {code}, see {log.name}", file=sys.stderr, flush=True)
            raise subprocess.CalledProcessError(code, command)
        print(f"{folder.name}: {100 * read(folder).summary['eval/accuracy']:.2f} %", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        tasks = [pool.submit(run, arm, seed) for seed in given.seeds.split(",") for arm in chosen]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=True)
            raise


def slots_of(model: str, workers: int) -> int:
    """K of `resist` with so many workers."""
    from resist_ds.nets.blueprint import Blueprint
    from resist_ds.protocol.partition import slots_for

    return slots_for(workers, Blueprint(model, num_classes=10).pool, 0)


def finished(folder: Path) -> bool:
    try:
        read(folder)
    except ValueError:
        return False
    return True


def report(place: Path) -> str:
    """A Markdown table of all finished runs below `place`: mean and standard deviation over the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in sorted(path.parent for path in place.glob("*-seed*/metrics.jsonl")):
        if finished(folder):
            groups.setdefault(folder.name.rpartition("-seed")[0], []).append(read(folder).summary)
    if not groups:
        raise ValueError(f"{place} holds no finished run")
    lines = [
        "| way | test accuracy (%) | sd | runs | images seen | local steps each | pool blocks active |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in groups.items():
        shares = [100 * run["eval/accuracy"] for run in runs]
        spread = f"{statistics.stdev(shares):.2f}" if len(shares) > 1 else "–"
        settings = runs[0]["settings"]
        active = settings["min_blocks"] if settings["strategy"] == "stochastic_depth" else settings["K"]
        lines.append(
            f"| {name} | {statistics.fmean(shares):.2f} | {spread} | {len(runs)} | "
            f"{runs[0]['samples_seen']:,} | {runs[0]['global_step']:,} | {active} of {settings['P']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

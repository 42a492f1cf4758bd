"""The accuracy study: what every way to train a net reaches at equal images, multiply-adds and time.

    python tools/study.py --data_dir CIFAR --arms resist,resist:wire=compact,local_sgd,ddp --jobs 2
    python tools/study.py --data_dir CIFAR --passes 5,2.5,10 --jobs 2        # the whole study; hours
    python tools/study.py --report --picture study.png                       # tables of what is recorded

CIFAR is an image folder (train/ and test/ with a folder per class). An arm is a strategy and the options in
which it differs, as in tools/bench.py; `ddp` is one worker that takes the batches of all, `stochastic_depth`
one worker. Each has its own peak rate: the grid is tried with the first seed and the first number of passes,
and beyond its ends if the best stands there; then the best rate has all seeds and all passes. Every run is
one train.py on one rank and one thread; its line in --records says that it is done: the same command goes on.

Options that this tool does not know go to every run: `--model preact_resnet_small --batch_size 32`.
"""

import argparse
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import UserError
from resist_ds.forecast.units import BANDWIDTHS, SPEEDS, quantity
from resist_ds.options.command_line import parse
from tools.accuracy import arms, records, tables
from tools.accuracy.due import Design
from tools.accuracy.runs import Place, run_all
from tools.benchmark.variants import typed, word
from tools.plan import Parser

if TYPE_CHECKING:
    from tools.accuracy.costs import Device

# A net of the paper's shape, narrow enough for a CPU. Its rate is every arm's own.
STUDY = {
    "model": "preact_resnet101_narrow",
    "dataset": "imagefolder",
    "img_size": "24",
    "batch_size": "64",
    "workers": "4",
    "local_steps": "5",
    "schedule": "cosine",
    "lr_warmup_steps": "20",
    "channels_last": "true",
}


def asked(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own options, and those that go to every run; raises `UserError`."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, help="image folder")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/study"), help="of the runs [runs/study]"
    )
    parser.add_argument("--records", type=Path, help="what was measured [records.jsonl in --output_dir]")
    parser.add_argument("--arms", metavar="ARM,ARM,...", help="[the whole study's]")
    parser.add_argument("--rates", default="0.1,0.2,0.4,0.8", help="grid of peak rates [0.1,0.2,0.4,0.8]")
    parser.add_argument("--passes", default="5", help="over the images, by all workers together; several [5]")
    parser.add_argument("--seeds", default="0,1,2", help="[0,1,2]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--report", action="store_true", help="only the tables of what is recorded")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what is recorded")
    parser.add_argument("--only", type=int, metavar="N", help="report the N-th study of the records alone")
    parser.add_argument("--links", default="1gbit,10gbit,100gbit,2tbit", help="[1gbit,10gbit,100gbit,2tbit]")
    parser.add_argument("--flops", default="20tflops", help="that a device sustains, for times [20tflops]")
    return parser.parse_known_args(words)


def main() -> int:
    try:
        given, others = asked(sys.argv[1:])
        place = Place(given.output_dir, given.data_dir, given.records or given.output_dir / "records.jsonl")
        design = None if given.report else design_of(given, others)
        devices = devices_of(given)
        if design is not None:
            run_all(design, place, given.jobs, partial(print, flush=True))
        print(report(place.records, devices, given.picture, given.only))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(
            f"error: a run ended with exit code {error.returncode}: {error.cmd[0]} says why", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it was", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def design_of(given: argparse.Namespace, others: list[str]) -> Design:
    """What is asked for; raises `UserError`."""
    if given.data_dir is None:
        raise UserError("type --data_dir FOLDER, of images to train on (train/ and test/)")
    names = {word[2:].partition("=")[0].replace("-", "_") for word in others if word.startswith("--")}
    for name in sorted(names & {"lr", "epochs", "rounds", "seed"}):
        raise UserError(f"--{name} is every arm's own: type --rates, --passes or --seeds")
    for name in sorted(names & {*records.BESIDE, "config", "resume", "dataset"}):
        raise UserError(f"--{name} is the study's own: leave it out")
    config = parse([*typed(STUDY), *others, f"--data_dir={given.data_dir}"])
    if not given.data_dir.is_dir():
        raise UserError(f"--data_dir {given.data_dir}: no such folder")
    if given.jobs < 1:
        raise UserError(f"--jobs is {given.jobs}: type a number from 1")
    study = STUDY | {name: word(getattr(config, name)) for name in sorted(names)}
    from resist_ds.nets.blueprint import Blueprint  # after a mistake is answered

    seeds = numbers("--seeds", given.seeds, least=0)
    if any(seed != int(seed) for seed in seeds):
        raise UserError(f"--seeds is {given.seeds!r}: type whole numbers")
    return Design(
        study=study,
        data=records.data_of(given.data_dir),
        arms=arms.read_all(given.arms or arms.whole_study(), study, Blueprint(config.model, 10).pool),
        rates=tuple(sorted(numbers("--rates", given.rates))),
        lengths=numbers("--passes", given.passes),
        seeds=tuple(map(int, seeds)),
    )


def numbers(option: str, text: str, least: float = 1e-9) -> tuple[float, ...]:
    """Numbers that commas part; raises `UserError`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < least or len(set(found)) < len(found):
        raise UserError(f"{option} is {text!r}: type different numbers with commas between them")
    return found


def devices_of(given: argparse.Namespace) -> dict[str, "Device"]:
    """By link what a rank has; raises `UserError`."""
    from tools.accuracy.costs import Device

    check_picture(given.picture)
    speed = quantity("--flops", given.flops, SPEEDS)
    return {link: Device(speed, quantity("--links", link, BANDWIDTHS)) for link in given.links.split(",")}


def check_picture(path: Path | None) -> None:
    """Raises `UserError` for what would else be found when all runs are done."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--picture needs matplotlib: pip install 'resist-ds[plots]'")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--picture is {path}: type a name that ends in .png, .pdf or .svg")


def report(path: Path, devices: Mapping[str, "Device"], picture: Path | None, only: int | None = None) -> str:
    """The tables of all that is recorded, study by study; raises `UserError`.

    Args:
        picture: where to draw it; of the second study and those that follow with their numbers.
        only: number of the one study to report, from 1.
    """
    found = records.by_study(records.load(path))
    if not found:
        raise UserError(f"{path} holds no record of a run")
    if only is not None:
        if not 1 <= only <= len(found):
            raise UserError(f"--only is {only}: {path} holds studies 1 to {len(found)}")
        name = list(found)[only - 1]
        found = {name: found[name]}
    from tools.accuracy import costs

    passes = ("passes over the images", _passes)
    work = ("passes × share of multiply-adds", lambda record: record.passes * costs.share(record))
    times = [(f"predicted s at {link}", partial(_seconds, device)) for link, device in devices.items()]
    lines = []
    for number, (study, runs) in enumerate(found.items(), 1):
        lines += [f"### {study}", "", "Test accuracy (%), mean ± sd (runs), each way at its rate:", ""]
        lines += [*tables.equal_images(runs, costs.share), ""]
        for workers in sorted({record.facts["workers"] for record in runs if record.facts}):
            alike = [record for record in runs if record.facts.get("workers") == workers]
            for length in sorted({record.passes for record in alike}):
                if table := tables.equal_cost(alike, [passes, work, *times], length):
                    lines += [
                        f"On {workers} devices, for what the cheapest `resist` takes for {length:g} passes:"
                    ]
                    lines += ["", *table, ""]
        lines += ["Rates that were tried:", "", *tables.rates(runs), ""]
        if picture is not None:
            from tools.accuracy.pictures import picture as drawn

            place = picture if number == 1 else picture.with_stem(f"{picture.stem}-{number}")
            place.parent.mkdir(parents=True, exist_ok=True)
            of = {"Description": records.fingerprint(runs)} if place.suffix == ".png" else None
            drawn(runs, [passes, work, *times]).savefig(place, dpi=110, metadata=of)
    return "\n".join(lines)


def _passes(record: records.Record) -> float:
    return record.passes


def _seconds(device: "Device", record: records.Record) -> float:
    from tools.accuracy import costs

    return costs.seconds(record, device)


if __name__ == "__main__":
    sys.exit(main())

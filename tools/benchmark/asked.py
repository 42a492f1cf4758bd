"""What was typed to the benchmarks, checked. Imports no torch, so that a mistake is answered at once."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from tools.benchmark import link
from tools.benchmark.peers import PEERS
from tools.benchmark.variants import FIXED, Variant, read_all, typed

PARTS = ("local", "sync", "save", "data", "step")  # of the machinery
MODES: dict[str, Any] = {"eager": "default", "compiled": "default", "graphed": "reduce-overhead"}
"""Of a local step: their --compile_mode; only eager is without --compile."""
DEFAULTS = {
    "model": "preact_resnet101",
    "batch_size": 4,
    "local_steps": 50,
    "rounds": 2,
    "eval_batch_size": 32,
}


@dataclass(frozen=True)
class Asked:
    """What was typed, checked.

    Attributes:
        config: train.py's options, of every run.
        variants: to compare, or none: `parts` of the machinery are measured.
        workers: numbers of workers; of a comparison one.
        bits: a second of every rank's link, or None.
        photos: an image folder for what data take, or None: one is made.
        modes: in which a step is measured; none: all that the device has.
    """

    config: Config
    variants: tuple[Variant, ...]
    parts: tuple[str, ...]
    workers: tuple[int, ...]
    ranks: int
    bits: int | None
    repeats: int
    steps: int
    output_dir: Path
    timeout: float
    photos: Path | None
    modes: tuple[str, ...]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())} (--help lists the options)")


def read(argv: Sequence[str], doc: str | None = None) -> Asked:
    """What was typed, `doc` being the words of --help; raises `UserError`."""
    parser = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--strategies",
        metavar="A[:option=value]...,B,...",
        help=f"to be compared: of train.py's --strategy, or peers: {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--what", metavar="A,B,...", help=f"parts of the machinery, of {','.join(PARTS)} [all but step]"
    )
    parser.add_argument(
        "--workers", metavar="W", help="of a comparison; else several, separated by commas [2,4]"
    )
    parser.add_argument("--ranks", type=int, metavar="R", help="of a comparison [a worker's each]")
    parser.add_argument(
        "--link", metavar="RATE", help="a network of so much for each rank or team: 1gbit (root, Linux)"
    )
    parser.add_argument(
        "--data_dir", type=Path, help="image folder for --what data [one of its own, of noise]"
    )
    parser.add_argument(
        "--modes", metavar="A,B,...", help=f"of --what step: {','.join(MODES)} [all; on a CPU eager]"
    )
    parser.add_argument("--repeats", type=int, help="[3, or 7 of each part]")
    parser.add_argument("--steps", type=int, default=3, help="in a repeat of --what local, data, step [3]")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/bench"), help="for the figures [runs/bench]"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for one run [3600]")
    given, rest = parser.parse_known_args(argv)
    compared = given.strategies is not None
    if compared and given.what is not None:
        raise UserError("--what is not for a comparison: leave it or --strategies out")
    if not compared and (given.link or given.ranks):
        raise UserError(f"--{'link' if given.link else 'ranks'} is for a comparison: type --strategies too")
    parts = _parts(given.what)
    if given.data_dir is not None and (compared or "data" not in parts):
        raise UserError("--data_dir is for --what data: type that too, or leave it out")
    modes = tuple(given.modes.split(",")) if given.modes else ()
    if modes and (compared or "step" not in parts):
        raise UserError("--modes is for --what step: type that too, or leave it out")
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"--modes names {unknown[0]!r}: type some of {','.join(MODES)}")
    for name in ("repeats", "steps", "timeout"):
        if (value := getattr(given, name)) is not None and value <= 0:
            raise UserError(f"--{name} is {value}: type a number above 0")
    workers = _numbers(given.workers or ("" if compared else "2,4"))
    if compared and len(workers) != 1:
        raise UserError("--workers of a comparison is one number: type --workers 2, for instance")
    config = _config(rest)
    if config.team_size == "auto":
        raise UserError("--team_size auto is a machine's ranks, which all are here: type a number")
    ranks = config.team_size * (workers[0] if workers else 1) if given.ranks is None else given.ranks
    variants: tuple[Variant, ...] = ()
    if compared:
        threads = config.cpu_threads or max(1, cores() // max(1, ranks))
        config = replace(config, workers=workers[0], cpu_threads=threads)
        check(config, ranks)
        variants = read_all(given.strategies, config, ranks)
    return Asked(
        config=config,
        variants=variants,
        parts=parts,
        workers=workers,
        ranks=ranks,
        bits=_bits(given.link),
        repeats=given.repeats or (3 if compared else 7),
        steps=given.steps,
        output_dir=given.output_dir.expanduser(),
        timeout=given.timeout,
        photos=given.data_dir and given.data_dir.expanduser(),
        modes=modes,
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(map(int, text.split(","))) if text else ()
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise UserError(f"--workers is {text!r}: type a whole number, at least 1, or several by commas")
    return numbers


def _parts(text: str | None) -> tuple[str, ...]:
    parts = PARTS[:-1] if text is None else PARTS if text == "all" else tuple(str(text).split(","))
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--what is {part!r}: type some of {','.join(PARTS)}")
    return parts


def _bits(text: str | None) -> int | None:
    if text is None:
        return None
    bits = link.rate(text)
    link.check()
    return bits


def _config(rest: Sequence[str]) -> Config:
    """train.py's options, as it reads them."""
    config = parse([*typed(DEFAULTS | FIXED), *rest])
    for name, value in FIXED.items():
        if getattr(config, name) != value:
            what = "type --strategies" if name == "strategy" else f"here it is {typed({name: value})[0]}"
            raise UserError(f"--{name} is not for the benchmarks: {what}")
    return config


def check(config: Config, ranks: int) -> None:
    """Raises `UserError` where there is nothing to compare on so many ranks."""
    workers = config.workers or 0
    if workers < 2 or ranks < 2:
        name = "workers" if workers < 2 else "ranks"
        raise UserError(
            f"--{name} is {min(workers, ranks)}: a comparison needs 2 or more, which exchange something"
        )
    assert isinstance(config.team_size, int)
    if ranks > workers * config.team_size:
        most, whose = workers * config.team_size, f"--workers {workers}"
        whose += f" in teams of {config.team_size}" if config.team_size > 1 else ""
        raise UserError(f"--ranks {ranks} is more than {whose}: type at most {most}")
    if ranks % config.team_size:
        raise UserError(f"--ranks {ranks} are no teams of {config.team_size}: type a multiple of that")
    if config.batch_size % config.team_size:
        raise UserError(f"--batch_size must divide over a team: type a multiple of {config.team_size}")
    if config.rounds is None:
        raise UserError("--rounds is null: a comparison needs a number of rounds, for instance 3")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Predict memory, computation and bytes of a training run, and advise: in seconds, without GPU or data.

    python tools/plan.py preact_resnet101 --workers 2,4,8 --batch_size 128
    python tools/plan.py resnetv2_101 --workers 4,8 --batch_size 256 --memory 24gib --bandwidth 1gbit

    python tools/plan.py resnetv2_101 --workers 2,4 --batch_size 256 --team_size 8 --team_strategy fsdp

Compared are resist and local_sgd on both wires, ddp, and FSDP2 and ZeRO, with one worker per rank, each with
and without activation checkpointing. With --team_size G a worker has G ranks; ddp, FSDP2 and ZeRO then share
the same images over all W × G ranks. Options mean what they mean to train.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import UserError
from resist_ds.options.config import Config
from resist_ds.options.strategy import STRATEGIES

SHARED = tuple(name for name, way in STRATEGIES.items() if way.lockstep)

if TYPE_CHECKING:
    from resist_ds.forecast.plan import Plan, Prediction, Wire

FOOTNOTES = """\
All figures are predicted, for one rank with {plays}. MiB are 2^20 bytes, MB 10^6; M millions, G 10^9.
weights, grads, optim: training state. activ: what the forward pass leaves for the backward pass.
step: peak of a training step. sync: peak of a synchronisation, with {transit} of --transit_mib, which are
  allocated in the first one and kept: peak is the larger of sync and step + {transit}.
kept: beside a worker, for --wire compact and --overlap_steps: {kept}.
  What libraries take for themselves (workspaces, gaps between allocations) comes on top.
mul-adds: multiply-adds of a step, per rank; of full: the full net's without activation checkpointing.
MB/step, MB/round: sent by all ranks{inside}. comm s: its time a round, at {bandwidth} a {place}{exposed}.
resist, local_sgd, ddp: counted, on a step of tensors without storage and on the deals of {deals} rounds.
* by formula: FSDP2 with fully_shard on every residual block and the root; ZeRO with a second copy of the
  weights that a rank updates and the preset's bucket of gradients; one block fetched ahead."""


class Parser(argparse.ArgumentParser):
    """One line for a wrong call."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="as --model of train.py")
    parser.add_argument("--workers", required=True, metavar="W,W,...", help="numbers of workers to compare")
    parser.add_argument(
        "--batch_size", type=int, required=True, metavar="B", help="images per worker and step"
    )
    parser.add_argument("--img_size", type=int, metavar="N", help="pixels [32 for the CIFAR nets, else 224]")
    parser.add_argument("--num_classes", type=int, metavar="N", help="[10 for the CIFAR nets, else 1000]")
    parser.add_argument("--bandwidth", default="10gbit", help="of one rank's link [10gbit]")
    parser.add_argument("--memory", default="24gib", help="of one device [24gib]")
    parser.add_argument("--flops", help="that a device sustains in training, such as 10tflops [unknown]")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="that a step runs on [cuda]"
    )
    parser.add_argument(
        "--wire", default="exact,compact", metavar="WIRE,...", help="wires to compare [exact,compact]"
    )
    parser.add_argument("--team_size", type=int, default=1, metavar="G", help="ranks of a worker [1]")
    parser.add_argument(
        "--team_strategy", choices=SHARED, default="ddp", help="by which they share a step [ddp]"
    )
    for name, kind in (
        ("min_blocks", int),
        ("local_steps", int),
        ("overlap_steps", int),
        ("transit_mib", int),
    ):
        default = Config.default(name)
        parser.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=f"[{default}]")
    parser.add_argument("--local_steps_max", type=int, metavar="N", help="of rounds that grow [none do]")
    parser.add_argument(
        "--schedule", choices=("step", "cosine", "constant"), default="step", help="by which they grow [step]"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd", help="[sgd]")
    parser.add_argument("--optimizer_state", choices=("travel", "reset"), default="travel", help="[travel]")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="[no]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    return parser.parse_args(argv)


def workers_of(text: str) -> tuple[int, ...]:
    """`2,4,8`, ascending. Raises `UserError` where one is no whole number above 0."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in numbers):
        raise UserError(f"--workers is {text!r}: type whole numbers above 0, for instance 2,4,8")
    return tuple(sorted({int(part) for part in numbers}))


def wires_of(text: str) -> "tuple[Wire, ...]":
    """`exact,compact`, in this order. Raises `UserError` where one is no wire."""
    from resist_ds.forecast.plan import WIRES

    typed = {part.strip() for part in text.split(",")}
    if not typed <= set(WIRES):
        raise UserError(f"--wire is {text!r}: type exact, compact, or exact,compact")
    return tuple(wire for wire in WIRES if wire in typed)


def main() -> int:
    try:
        given = parse()
        made = plan(given)
        text = render(made, given)
        if given.json:
            given.json.write_text(json.dumps(record(made, given), indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: --json {given.json} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(text)
    return 0


def plan(given: argparse.Namespace) -> "Plan":
    """The predictions for what was typed. Raises `UserError`."""
    workers = workers_of(given.workers)
    shared = (
        "team_size",
        "team_strategy",
        "model",
        "batch_size",
        "min_blocks",
        "local_steps",
        "local_steps_max",
        "schedule",
        "overlap_steps",
        "transit_mib",
        "optimizer",
        "optimizer_state",
    )
    config = Config(**{name: getattr(given, name) for name in (*shared, "mixed_precision")})
    Config(img_size=given.img_size, num_classes=given.num_classes)  # checks them
    if config.batch_size % given.team_size:
        raise UserError(
            f"--batch_size {config.batch_size} cannot be divided over a team's {given.team_size} ranks: "
            f"type a multiple of {given.team_size}"
        )

    from resist_ds.forecast.plan import Plan, Question
    from resist_ds.forecast.units import BANDWIDTHS, MEMORIES, SPEEDS, quantity
    from resist_ds.nets.blueprint import (  # after parsing, so that a mistake answers at once
        CIFAR_NETS,
        Blueprint,
    )

    img_size, classes = (32, 10) if given.model in CIFAR_NETS else (224, 1000)
    bandwidth = quantity("--bandwidth", given.bandwidth, BANDWIDTHS)
    memory = quantity("--memory", given.memory, MEMORIES)
    speed = quantity("--flops", given.flops, SPEEDS) if given.flops else None
    blueprint = Blueprint(given.model, given.num_classes or classes)
    place = given.img_size or img_size, workers, bandwidth, memory, speed, given.device
    return Plan(Question(blueprint, config, *place, wires_of(given.wire)))


def render(plan: "Plan", given: argparse.Namespace) -> str:
    """All that is printed."""
    from resist_ds.engines.timetable import mean_local_steps
    from resist_ds.forecast.advice import advice
    from resist_ds.forecast.traffic import DEALS

    question, config = plan.question, plan.question.config
    blueprint = question.blueprint
    length = f"{config.local_steps} local steps a round"
    if config.local_steps_max is not None:
        length = (
            f"{config.local_steps} to {config.local_steps_max} local steps a round, "
            f"{mean_local_steps(config):.1f} in the mean by --schedule {config.schedule}"
        )
    tau = config.overlap_steps
    behind = f", shared's exchange behind the last {tau} of them" if tau else ""
    teams = f", teams of {config.team_size} ({config.team_strategy} inside)" if config.team_size != 1 else ""
    lines = [
        f"predicted for {blueprint.name}: {blueprint.parameters / 1e6:.2f} M parameters, a pool of "
        f"P = {blueprint.pool} blocks, {blueprint.num_classes} classes, "
        f"{question.img_size}×{question.img_size} pixels",
        f"{config.batch_size} images per worker and step, {length}{behind}{teams}, "
        f"{config.optimizer}, optimizer state: {config.optimizer_state}, "
        f"mixed precision: {config.mixed_precision}, {question.device}",
    ]
    for checkpointing in (False, True):
        chosen = [p for p in plan.predictions if p.activation_checkpointing == checkpointing]
        lines += [
            "",
            f"predicted {'with' if checkpointing else 'without'} activation checkpointing (MiB a rank)",
        ]
        lines.append(_table(chosen))
    words = {
        "transit": f"{max(p.transit for p in plan.predictions) / 2**20:,.0f} MiB",
        "kept": "in host memory" if question.device == "cuda" else "part of step and sync",
        "exposed": f";\n  exposed s: what of that is not hidden by --overlap_steps {tau}"
        if question.speed
        else "",
        "bandwidth": given.bandwidth,
        "plays": "one worker" if not teams else f"its part of one worker, which {given.team_size} play",
        "place": "team" if teams else "rank",
        "inside": "; inside: MB/round inside teams, which no slow link carries" if teams else "",
        "deals": DEALS,
    }
    lines += ["", FOOTNOTES.format(**words)]
    advised = advice(plan)
    lines += [
        "",
        f"predicted to suit --strategy resist with {given.memory} and {given.bandwidth} a rank:",
    ]
    if not advised:
        lines.append(f"  none: not even a batch of 2 fits in {given.memory}; type more --workers")
    for item in advised:
        value = str(item.value).lower()
        lines.append(f"  --{item.option} {value}: {item.reason}")
    return "\n".join(lines)


def record(plan: "Plan", given: argparse.Namespace) -> dict[str, Any]:
    """What --json writes."""
    from resist_ds.forecast.advice import advice

    return {
        "predicted": True,
        "options": {k: v for k, v in vars(given).items() if k != "json"},
        "parameters": plan.question.blueprint.parameters,
        "pool": plan.question.blueprint.pool,
        "img_size": plan.question.img_size,
        "num_classes": plan.question.blueprint.num_classes,
        "rows": [row(p) for p in plan.predictions],
        "advice": [asdict(item) for item in advice(plan)],
    }


def row(prediction: "Prediction") -> dict[str, Any]:
    """A prediction with its unit in each name."""
    from resist_ds.forecast.plan import by_formula

    plain = (
        "strategy",
        "wire",
        "sharing",
        "workers",
        "slots",
        "activation_checkpointing",
        "parameters",
        "multiply_adds",
        "share",
    )
    sent = ("sent_step", "sent_round", "sent_team")
    sizes = ("weights", "gradients", "optimizer", "activations", "step", "transit", "kept", "sync", "peak")
    return {
        **{name: getattr(prediction, name) for name in plain},
        **{f"{name}_bytes": getattr(prediction, name) for name in (*sizes, *sent)},
        "communication_s": prediction.communication,
        "exposed_s": prediction.exposed,
        "computation_s": prediction.computation,
        "by_formula": by_formula(prediction),
    }


def _table(predictions: "list[Prediction]") -> str:
    from resist_ds.forecast.plan import by_formula

    timed = predictions[0].computation is not None
    teams = any(p.sent_team for p in predictions)
    head = ["strategy", "wire", "W", "K", "params", "weights", "grads", "optim", "activ", "step", "sync"]
    head += ["peak", "kept", "mul-adds", "of full", "MB/step", "MB/round"]
    head += ["inside"] if teams else []
    head += ["comm s"]
    head += ["exposed s", "compute s"] if timed else []
    rows = [head]
    for p in predictions:
        sizes = (p.weights, p.gradients, p.optimizer, p.activations, p.step, p.sync, p.peak, p.kept)
        cells = [p.strategy + ("*" if by_formula(p) else ""), p.wire, str(p.workers), str(p.slots)]
        cells += [f"{p.parameters / 1e6:.2f} M"]
        cells += [f"{size / 2**20:,.0f}" if size else "-" for size in sizes]
        cells += [f"{p.multiply_adds / 1e9:,.1f} G", f"{100 * p.share:.0f} %"]
        cells += [f"{p.sent_step / 1e6:,.1f}", f"{p.sent_round / 1e6:,.1f}"]
        cells += [f"{p.sent_team / 1e6:,.1f}" if p.sent_team else "-"] if teams else []
        cells += [f"{p.communication:.3g}"]
        cells += [f"{seconds:.3g}" for seconds in (p.exposed, p.computation) if seconds is not None]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

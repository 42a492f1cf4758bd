"""Why a way of training reaches what it does: its workers and the global model, seen during a run.

    python tools/inside.py --data_dir CIFAR --records inside.jsonl --arms resist:lr=0.4,ddp:lr=0.8
    python tools/inside.py --records inside.jsonl --picture inside.png          # of what is recorded

Arms are those of tools/study.py, each with its rate; every one is run once, on one rank and one thread, and
looked at about twenty times: what the sub-ResNets make of images before and after a synchronisation and what
the global model does, how far the workers are from each other, and the norms of gradients. Options that this
tool does not know go to every run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import RunError, UserError
from resist_ds.nets import late
from resist_ds.options.command_line import parse
from tools.accuracy.due import Design, Trial
from tools.accuracy.records import BESIDE
from tools.accuracy.runs import folder_of, options_of
from tools.benchmark.variants import typed
from tools.plan import Parser
from tools.study import design_of

LOOKS = 20  # at a run

Seen = dict[str, Any]


def main() -> int:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, help="image folder; without it nothing is run")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/inside"), help="[runs/inside]")
    parser.add_argument("--records", type=Path, required=True, help="what was seen, a line a look")
    parser.add_argument("--arms", metavar="ARM,ARM,...", help="STRATEGY:lr=RATE[:option=value]...")
    parser.add_argument("--passes", default="5", help="over the images [5]")
    parser.add_argument("--seeds", metavar="SEED", default="0", help="[0]")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what is recorded")
    try:
        given, others = parser.parse_known_args()
        if given.data_dir is not None:
            design, found = trials(given, others)
            for trial in found:
                run(trial, design, given)
        elif others or given.arms:
            raise UserError("type --data_dir FOLDER, of images to train on (train/ and test/)")
        seen = load(given.records)
        print("\n".join(table(seen)))
        if given.picture is not None:
            draw(seen).savefig(given.picture, dpi=110)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def trials(given: argparse.Namespace, others: list[str]) -> tuple[Design, list[Trial]]:
    """The runs to look at; raises `UserError`."""
    if given.arms is None:
        raise UserError("type --arms ARM,ARM,..., as resist:lr=0.4,ddp:lr=0.8")
    given.rates, given.jobs = "1", 1
    design = design_of(given, others)
    for arm in design.arms:
        if arm.lr is None:
            raise UserError(f"--arms {arm.name}: type its rate too, as {arm.name}:lr=0.4")
    place = (design.lengths[0], design.seeds[0])
    return design, [Trial(arm, arm.lr, *place) for arm in design.arms if arm.lr is not None]


def run(trial: Trial, design: Design, given: argparse.Namespace) -> None:
    """Train one arm, and append what is seen of it to the records."""
    late.defer()
    folder = given.output_dir / folder_of(trial, design)
    place = {**BESIDE, "data_dir": str(given.data_dir), "output_dir": str(folder)}
    config = parse(typed({**options_of(trial, design), **place}))
    from resist_ds.comm import Comm
    from resist_ds.trainer import Trainer
    from tools.accuracy.inside import Inside

    trainer = Trainer(Comm(), config)

    def note(seen: Seen) -> None:
        line = {"arm": trial.arm.name, "seed": trial.seed, "model": config.model, **seen}
        with given.records.open("a") as file:
            file.write(json.dumps(line) + "\n")

    try:
        Inside(trainer, max(1, trainer.rounds // LOOKS), note)
        trainer.run()
    finally:
        trainer.folder.release()


def load(path: Path) -> dict[str, list[Seen]]:
    """What was seen of each arm; raises `UserError`."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found: dict[str, list[Seen]] = {}
        for line in lines:
            found.setdefault(line["arm"], []).append(line)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no records of this tool") from None
    if not found:
        raise UserError(f"{path} holds no records of this tool")
    return found


def table(seen: dict[str, list[Seen]]) -> list[str]:
    """Of every arm the middle of its run and its end, in Markdown."""
    head = ["way", "images", "distance between workers ÷ distance moved"]
    head += [f"{what}, {of}" for what in ("train loss", "test accuracy (%)") for of in LEVELS]
    rows = []
    for arm, looks in seen.items():
        for look in (looks[len(looks) // 2], looks[-1]):
            cells = [f"`{arm}`", f"{look['images']:,}", f"{look['apart'] / look['moved']:.2f}"]
            cells += [f"{look[of]['train loss']:.3f}" for of in LEVELS]
            cells += [f"{100 * look[of]['test accuracy']:.1f}" for of in LEVELS]
            rows.append(cells)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


LEVELS = {"alone": "sub-ResNets before", "averaged": "and after a synchronisation", "global": "global model"}


def draw(seen: dict[str, list[Seen]]) -> Any:
    """Four panels, a colour an arm; returns a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.6), layout="constrained")
    ((losses, apart), (gradients, scales)) = figure.subplots(2, 2)
    for colour, (arm, looks) in enumerate(seen.items()):
        colour, images = f"C{colour}", [look["images"] / 1000 for look in looks]
        for style, of in zip((":", "--", "-"), LEVELS, strict=True):
            losses.plot(images, [look[of]["train loss"] for look in looks], style, color=colour)
        if max(look["apart"] for look in looks) > 0:
            apart.plot(images, [look["apart"] / look["moved"] for look in looks], color=colour, label=arm)
        half = looks[len(looks) // 2]["gradients"]
        gradients.plot(list(half), list(half.values()), "o-", markersize=3, color=colour, label=arm)
        last = looks[-1]["scales"]
        scales.plot(
            [float(by) for by in last],
            [100 * row["test accuracy"] for row in last.values()],
            "o-", markersize=3, color=colour, label=arm,
        )  # fmt: skip
    losses.set(xlabel="thousand images", ylabel="loss on training images (nats)")
    losses.set_title("sub-ResNets before (dotted), after (dashed) a synchronisation; global model (line)")
    apart.set(xlabel="thousand images", ylabel="distance from the mean ÷ distance moved")
    apart.set_title("shared, at the end of a round")
    gradients.set(ylabel="norm")
    gradients.set_title("gradients in the middle of the run, by block")
    gradients.tick_params(axis="x", rotation=90)
    scales.set(xlabel="test scale ÷ (K/P)", ylabel="test accuracy (%)")
    scales.set_title("global model at the end, residuals of the pool scaled")
    for axes in (losses, apart, gradients, scales):
        axes.grid(alpha=0.3)
    scales.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())

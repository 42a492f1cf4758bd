"""Why a way of training reaches what it does: its workers and the global model, looked at during a run.

    python tools/inside.py --data_dir CIFAR --records inside.jsonl --arms resist:lr=0.4,ddp:lr=0.8
    python tools/inside.py --records inside.jsonl --picture inside.png          # of what is recorded

Arms are those of tools/study.py, each with its rate; every one is run once, on one rank and one thread, and
looked at about twenty times: what the workers' nets make of images before a synchronisation, what those of
the next deal do after it, what the global model does, how far the workers are apart, and the norms of
gradients. A run that has ended is a line in --records and is not repeated. Options that this tool does not
know go to every run.
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resist_ds.errors import RunError, UserError
from resist_ds.nets import late
from resist_ds.options.command_line import parse
from tools.accuracy.due import Design, Trial
from tools.accuracy.runs import beside, folder_of, options_of
from tools.accuracy.tables import markdown
from tools.benchmark.variants import typed
from tools.plan import Parser
from tools.study import check_picture, design_of

LOOKS = 20  # at a run
LEVELS = {"alone": "workers' nets", "next": "next deal's", "global": "global model"}

Seen = dict[str, Any]  # a run: its arm, key and looks


def main() -> int:
    late.defer()
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, help="image folder; without it nothing is run")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/inside"), help="[runs/inside]")
    parser.add_argument("--records", type=Path, required=True, help="what was seen, a line a run")
    parser.add_argument("--arms", metavar="ARM,ARM,...", help="STRATEGY:lr=RATE[:option=value]...")
    parser.add_argument("--passes", default="5", help="over the images [5]")
    parser.add_argument("--seed", dest="seeds", default="0", help="[0]")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what is recorded")
    parser.set_defaults(rates="1", jobs=1)
    try:
        given, others = parser.parse_known_args()
        check_picture(given.picture)
        if given.data_dir is not None:
            run_all(given, others)
        elif others or given.arms:
            raise UserError("type --data_dir FOLDER, of images to train on (train/ and test/)")
        seen = load(given.records)
        if not seen:
            raise UserError(f"{given.records} holds no record of a run")
        print("\n".join(table(seen)))
        if given.picture is not None:
            given.picture.parent.mkdir(parents=True, exist_ok=True)
            draw(seen).savefig(given.picture, dpi=110)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped: the same command repeats the run that had not ended", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def run_all(given: argparse.Namespace, others: list[str]) -> None:
    """Train and look into what is asked for and not yet recorded; raises `UserError` before any of it."""
    if given.arms is None:
        raise UserError("type --arms ARM,ARM,..., as resist:lr=0.4,ddp:lr=0.8")
    if any(word.partition("=")[0] == "--lr" for word in others):
        raise UserError("--lr is every arm's own: type it there, as --arms resist:lr=0.4")
    design = design_of(given, others)
    if len(design.lengths) > 1 or len(design.seeds) > 1:
        raise UserError("one number of --passes and one --seed at a time")
    runs = []
    for arm in design.arms:
        if arm.lr is None:
            raise UserError(f"--arms {arm.name}: type its rate too, as {arm.name}:lr=0.4")
        trial = Trial(arm, arm.lr, design.lengths[0], design.seeds[0])
        folder = given.output_dir / folder_of(trial, design)
        options = beside(options_of(trial, design), given.data_dir, folder)
        runs.append((trial, parse(typed(options))))
    from tools.accuracy.looks import check

    for _, config in runs:
        check(config)
    done = {run["key"] for run in load(given.records)}
    given.records.parent.mkdir(parents=True, exist_ok=True)
    for trial, config in runs:
        if key_of(trial, design) not in done:
            looks = look_into(config)
            line = {"arm": trial.arm.name, "key": key_of(trial, design), "looks": looks}
            with given.records.open("a") as file:
                file.write(json.dumps(line) + "\n")


def key_of(trial: Trial, design: Design) -> str:
    """What makes two runs the same one, in words."""
    data, *options, lr, passes, seed = trial.key(design)
    words = [f"{name} {value}" for name, value in options]  # type: ignore[misc]
    return ", ".join([*words, f"rate {lr}, {passes} passes, seed {seed}; {data}"])


def look_into(config: Any) -> list[dict[str, Any]]:
    """Train, and look about twenty times."""
    from resist_ds.comm import Comm
    from resist_ds.trainer import Trainer
    from tools.accuracy.looks import Looks

    trainer = Trainer(Comm(), config)
    looks: list[dict[str, Any]] = []
    try:
        Looks(trainer, max(1, round(trainer.rounds / LOOKS)), looks.append)
        trainer.run()
    finally:
        trainer.folder.release()
    return looks


def load(path: Path) -> list[Seen]:
    """What was seen, run by run; raises `UserError`."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert all(run["arm"] and run["key"] and run["looks"] for run in found)
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path} is no file of this tool's records") from None
    return found


def table(seen: list[Seen]) -> list[str]:
    """Of every run its middle and its end, in Markdown."""
    head = ["way", "images", "distance from the mean ÷ distance moved"]
    head += [f"{what}, {of}" for what in ("training loss", "test accuracy (%)") for of in LEVELS.values()]
    rows = []
    for run in seen:
        for look in (run["looks"][len(run["looks"]) // 2], run["looks"][-1]):
            cells = [f"`{run['arm']}`", f"{look['images']:,}", f"{look['apart'] / look['moved']:.2f}"]
            cells += [f"{look[of]['train loss']:.3f}" for of in LEVELS]
            cells += [f"{100 * look[of]['test accuracy']:.1f}" for of in LEVELS]
            rows.append(cells)
    return markdown(head, rows)


def draw(seen: list[Seen]) -> Any:
    """Four panels, a colour a run; returns a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.6), layout="constrained")
    ((losses, apart), (gradients, scales)) = figure.subplots(2, 2)
    for number, run in enumerate(seen):
        looks, how = run["looks"], {"color": f"C{number}", "label": run["arm"]}
        images = [look["images"] / 1000 for look in looks]
        for style, of in zip((":", "--", "-"), LEVELS, strict=True):
            losses.plot(images, [look[of]["train loss"] for look in looks], style, color=f"C{number}")
        if any(look["apart"] for look in looks):  # one worker is never apart
            apart.plot(images, [look["apart"] / look["moved"] for look in looks], **how)
        half = looks[len(looks) // 2]["gradients"]
        gradients.plot(list(half), list(half.values()), "o-", markersize=3, **how)
        last = looks[-1]["scales"]
        shares = [100 * row["test accuracy"] for row in last.values()]
        scales.plot([float(by) for by in last], shares, "o-", markersize=3, **how)
    losses.set(xlabel="thousand images", ylabel="loss on training images (nats)")
    losses.set_title("workers' nets (dotted), the next deal's (dashed),\nglobal model (line)")
    apart.set(xlabel="thousand images", ylabel="distance from the mean ÷ distance moved")
    apart.set_title("workers' shared parts at the end of a round")
    gradients.set(ylabel="norm")
    gradients.set_title("gradients in the middle of the run, by part of the net")
    gradients.tick_params(axis="x", rotation=90)
    scales.set(xlabel="test scale ÷ (K/P)", ylabel="test accuracy (%)")
    scales.set_title("global model at the end, the pool's residuals scaled")
    for axes in (losses, apart, gradients, scales):
        axes.grid(alpha=0.3)
    scales.legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())

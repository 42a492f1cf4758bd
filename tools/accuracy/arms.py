"""What is compared: an arm is a strategy and the options in which it differs from the study's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from resist_ds.options.strategy import STRATEGIES, Strategy
from tools.benchmark.variants import typed, word

ROUNDS = ("5", "10", "20", "50")  # local steps in them
WORKERS = ("2", "4", "8")
# What an arm cannot choose, since all have it alike or the study sets it.
COMMON = (
    *("model", "dataset", "data_dir", "img_size", "num_classes", "output_dir", "config", "strategy"),
    *("epochs", "rounds", "seed", "eval_every", "checkpoint_every", "resume"),
)
HAVE: dict[str, Callable[[Strategy], bool]] = {
    "min_blocks": lambda way: way.partitions,
    **dict.fromkeys(
        ("wire", "overlap_steps", "local_steps_max", "optimizer_state"), lambda way: way.averages
    ),
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as it was typed, `STRATEGY[:option=value]...`.
        options: of train.py, beside those that all have.
        workers: W, or of a strategy with one worker those whose batches it takes together.
    """

    name: str
    options: dict[str, str]
    workers: int

    @property
    def lr(self) -> float | None:
        """The peak rate that its name fixes, or None: the grid's best."""
        return float(self.options["lr"]) if "lr" in self.options else None


def whole_study() -> str:
    """The arms of the whole study, as they are typed."""
    names = []
    for workers in WORKERS:
        for steps in ROUNDS:
            ours = f"workers={workers}:local_steps={steps}"
            names += [f"resist:{ours}", f"resist:{ours}:wire=compact", f"local_sgd:{ours}"]
        names.append(f"ddp:workers={workers}")
    return ",".join([*names, "ddp:workers=1", "stochastic_depth:workers=4"])


def read_all(text: str, study: Mapping[str, str], pool: int) -> tuple[Arm, ...]:
    """The arms that `--arms` names; raises `UserError`.

    Args:
        study: the options of all.
    """
    arms = tuple(read(each.strip(), study, pool) for each in text.split(","))
    for arm in arms:
        if sum(other.name == arm.name for other in arms) > 1:
            raise UserError(f"--arms names {arm.name} twice: type each once")
    return arms


def read(text: str, study: Mapping[str, str], pool: int) -> Arm:
    """The arm that `STRATEGY[:option=value]...` names; raises `UserError`.

    `ddp` is one worker with the batches of all, in as many micro-batches as workers: BatchNorm sees what it
    would see on each of them, and gradients are averaged alike. `stochastic_depth` is one worker that runs,
    in every step, as many pool blocks drawn at random as a worker of `resist` holds: the same multiply-adds
    an image.
    """
    strategy, *rest = text.split(":")
    if strategy not in STRATEGIES or STRATEGIES[strategy].spread:
        known = [name for name, way in STRATEGIES.items() if not way.spread]
        raise UserError(f"--arms names {strategy!r}: type some of {', '.join(known)}")
    options = {}
    for each in rest:
        name, equals, value = each.partition("=")
        if not equals or name in COMMON or name not in Config.__dataclass_fields__ or name in options:
            raise UserError(f"--arms {text}: {each!r} is no option=value that one of several can have, once")
        options[name] = value
    given = {**study, **options}
    workers, batch, parts = (
        _number(text, name, given.get(name, default))
        for name, default in (("workers", 4), ("batch_size", 128), ("accumulation_steps", 1))
    )
    for name, has in HAVE.items():  # what is typed for all, and not for this one
        if name in study and name not in options and not has(STRATEGIES[strategy]):
            options[name] = word(Config.default(name))
    if strategy in ("ddp", "stochastic_depth"):
        options["workers"] = "1"
    if strategy == "ddp" and workers > 1:
        options |= {"batch_size": str(batch * workers), "accumulation_steps": str(parts * workers)}
    if strategy == "stochastic_depth" and "min_blocks" not in given:
        options["min_blocks"] = str(-(-pool // workers))
    options["strategy"] = strategy
    try:
        parse(typed({**study, "dataset": "synthetic", **options}))
    except UserError as error:
        raise UserError(f"--arms {text}: {error}") from None
    return Arm(text, options, workers)


def _number(text: str, name: str, value: object) -> int:
    if not str(value).isdigit() or int(str(value)) < 1:
        raise UserError(f"--arms {text}: its {name} is {value}: type a number from 1")
    return int(str(value))

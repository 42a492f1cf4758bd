"""What stands side by side in a comparison: strategies, variants of one strategy, peers. Imports no torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from resist_ds.options.strategy import STRATEGIES
from tools.benchmark.peers import PEERS

# Not what is measured: a small evaluation and one checkpoint end every run.
FIXED: dict[str, Any] = {
    "strategy": "resist",
    "dataset": "synthetic",
    "download": False,
    "num_classes": None,
    "warmup_rounds": 0,
    "local_steps_max": None,
    "eval_every": 0,
    "calibration_samples": 32,
    "checkpoint_every": 0,
    "checkpoint_minutes": None,
    "keep": 1,
    "resume": "never",
    "log_with": "none",
    "progress": False,
}
# What all have alike; of these, words that train.py knows besides its options.
COMMON = ("model", "workers", "seed", "output_dir", "config", "print_config", "local_rank", "deepspeed")
OF_PEERS = (  # the options of train.py that mean something to a peer
    *("batch_size", "local_steps", "rounds", "img_size", "augment", "cpu_threads"),
    *("optimizer", "lr", "momentum", "nesterov", "betas", "eps", "weight_decay"),
)
# Those that would change what a local step of ours costs, and not a peer's.
NOT_OF_PEERS = (
    *("mixed_precision", "dtype", "channels_last", "compile", "accumulation_steps"),
    *("activation_checkpointing", "label_smoothing", "clip_grad"),
)


@dataclass(frozen=True)
class Variant:
    """One of those that are compared.

    Attributes:
        name: as it was typed.
        config: its options; of a peer, those that mean something to it.
        peer: which of `PEERS` it is, or None: it is a strategy of ours.
        settings: a peer's own.
    """

    name: str
    config: Config
    peer: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Its name where colons and slashes must not be."""
        return re.sub(r"[^\w.=-]+", "-", self.name)

    @property
    def once_a_round(self) -> bool:
        """It trains alone and averages once a round; the others do at every step, with one worker a rank."""
        return not self.config.way.lockstep

    def facts(self) -> dict[str, Any]:
        """What the report must know of it."""
        return {
            "strategy": self.peer or self.config.strategy,
            "peer": self.peer,
            "settings": self.settings,
            "once_a_round": self.once_a_round,
            "options": self.config.to_dict(),
        }


def read_all(text: str, config: Config, ranks: int) -> tuple[Variant, ...]:
    """Those that `--strategies` names, `config` being the options of all; raises `UserError`."""
    variants = tuple(read(each.strip(), config, ranks) for each in text.split(","))
    if len({variant.file for variant in variants}) < len(variants):
        raise UserError("--strategies names one twice: type each once")
    if all(variant.peer for variant in variants):
        raise UserError("--strategies names peers alone: type a strategy of ours too, for instance resist")
    return variants


def read(text: str, config: Config, ranks: int) -> Variant:
    """The variant that `STRATEGY[:option=value]...` names; raises `UserError`."""
    name, *options = text.split(":")
    if name == "stochastic_depth":
        raise UserError("--strategies stochastic_depth has one worker, which exchanges nothing: leave it out")
    if name not in STRATEGIES and name not in PEERS:
        known = ", ".join([*STRATEGIES, *PEERS])
        raise UserError(f"--strategies names {name!r}: type some of {known}")
    if name in PEERS and config.team_size != 1:
        raise UserError(f"--strategies {name} knows no teams: leave it or --team_size out")
    played = (config.workers or 0) * _number(config.team_size)
    if (name in PEERS or STRATEGIES[name].lockstep) and ranks != played:
        raise UserError(
            f"--strategies {name} has one worker per rank: type --ranks {played}, or leave {name} out"
        )
    try:
        if name in PEERS:
            return _peer(text, name, options, config)
        return _without_teams(_ours(text, name, options, config), ranks)
    except UserError as error:
        raise UserError(f"--strategies {text}: {error}" if options else str(error)) from None


def _without_teams(variant: Variant, ranks: int) -> Variant:
    """A variant of ranks that are alone has a worker on each of them, on the same images a step."""
    config = variant.config
    workers = config.workers or 0
    if config.team_size != 1 or ranks <= workers:
        return variant
    cut = ranks // workers
    if config.batch_size % (cut * config.accumulation_steps):
        raise UserError(f"--batch_size {config.batch_size} must divide over {cut} ranks")
    return replace(variant, config=replace(config, workers=ranks, batch_size=config.batch_size // cut))


def _number(size: int | str) -> int:
    assert isinstance(size, int)
    return size


def _ours(text: str, name: str, options: Sequence[str], config: Config) -> Variant:
    config = _with(of_strategy(config, name), options)
    if config.overlap_steps and config.rounds:
        config = replace(config, rounds=config.rounds + 1)  # the last one does not: `counted.measured_rounds`
    return Variant(text, config)


def _peer(text: str, name: str, options: Sequence[str], config: Config) -> Variant:
    peer = PEERS[name]
    for option in NOT_OF_PEERS:
        if getattr(config, option) != Config.default(option):
            raise UserError(f"--{option} is not for {name}, nor for other peers: leave one of both out")
    settings, ours = dict(peer.settings), []
    for each in options:
        option, _, value = each.partition("=")
        if option in settings:
            settings[option] = _read_as(type(settings[option]), option, value)
        elif option in OF_PEERS:
            ours.append(each)
        else:
            known = ", ".join([*settings, *OF_PEERS])
            raise UserError(f"{option!r} is no option of it: type some of {known}")
    kept = {option: getattr(config, option) for option in (*FIXED, *COMMON[:4], *OF_PEERS)}
    config = _with(Config(**{**kept, "strategy": "local_sgd"}), ours)
    if wrong := peer.wrong(settings, config.local_steps):
        raise UserError(wrong)
    return Variant(text, config, name, settings)


def _read_as(kind: type, option: str, value: str) -> object:
    """A peer's setting, of the type of what its documentation recommends."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"{option} is {value!r}: type {words[kind]}") from None


def _with(config: Config, options: Sequence[str]) -> Config:
    """`config` with `option=value` of a variant, read as train.py reads them."""
    if not options:
        return config
    names = [each.partition("=")[0].replace("-", "_") for each in options]
    for name in names:
        if name in FIXED or name in COMMON:
            raise UserError(f"--{name} is not for one of several, which all have the same")
    if len(set(names)) < len(names):
        raise UserError("it names an option twice: type each once")
    base = {name: value for name, value in config.to_dict().items() if value != Config.default(name)}
    return parse([*typed(base), *(f"--{each}" for each in options)])


def typed(options: dict[str, Any]) -> list[str]:
    """Options as they are typed to train.py."""
    return [f"--{name}={word(value)}" for name, value in options.items()]


def word(value: object) -> str:
    """An option's value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def of_strategy(config: Config, strategy: str) -> Config:
    """The options of one strategy; those that are not for it have their defaults."""
    changed: dict[str, Any] = {"strategy": strategy}
    way = STRATEGIES[strategy]
    if not way.partitions:
        changed["min_blocks"] = 0
    if not (way.partitions or way.stage):
        changed["deepspeed_config"] = None
    if way.lockstep:
        changed["optimizer_state"] = Config.default("optimizer_state")
    if not way.averages:
        names = ("wire", "overlap_steps", "team_size", "team_strategy")
        changed |= {name: Config.default(name) for name in names}
    return replace(config, **changed)

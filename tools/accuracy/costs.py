"""What a run costs: multiply-adds, and the time that it would take on given devices and links. Predicted."""

from dataclasses import dataclass
from functools import cache

from resist_ds.forecast.traffic import sent_per_round, sent_per_step
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from tools.accuracy.records import Record
from tools.benchmark.counted import CLASSES, multiply_adds
from tools.benchmark.variants import typed

# A narrow net stands for one that nobody can train on a CPU: its time is that one's, at that one's size.
STANDS_FOR = {"preact_resnet101_narrow": ("preact_resnet101", 32)}


@dataclass(frozen=True)
class Device:
    """What a rank has.

    Attributes:
        speed: multiply-adds a second that it sustains; bandwidth: bytes a second of its link.
    """

    speed: float
    bandwidth: float


def share(record: Record) -> float:
    """Multiply-adds of an image, of those of the full net."""
    config, blueprint = _net(record, stands_for=False)
    return _work(config, blueprint, _slots(record, blueprint)) / _work(config, blueprint, blueprint.pool)


def seconds(record: Record, device: Device) -> float:
    """What the run would take with a device for each worker.

    A step takes its multiply-adds at the device's speed; an exchange its bytes, all links at once.
    `ddp` hides its exchange behind the backward pass as far as that goes: the longer of both counts, which is
    the best that it can do. So does `--overlap_steps`, behind its last steps, but for pool blocks.
    """
    config, blueprint = _net(record, stands_for=True)
    workers = int(record.facts["workers"])
    rounds, steps = int(record.facts["rounds"]), int(record.facts["steps"])
    step = _work(config, blueprint, _slots(record, blueprint)) / device.speed
    if config.strategy == "ddp":
        exchange = sent_per_step("ddp", blueprint, config, workers) / workers / device.bandwidth
        return steps * max(step, exchange)
    if workers == 1 or config.strategy == "stochastic_depth":
        return steps * step
    least = blueprint.pool if config.strategy == "local_sgd" else config.min_blocks
    exchange, front = (
        _sent(config.model, config, workers, least, alone) / workers / device.bandwidth
        for alone in (False, True)
    )
    hidden = min(exchange - front, config.overlap_steps * step)
    return steps * step + rounds * (exchange - hidden)


@cache
def _parsed(*words: str) -> Config:
    """Options that were typed; reading them takes a tenth of a second, and every cost asks."""
    return parse(words)


@cache
def _blueprint(model: str) -> Blueprint:
    return Blueprint(model, CLASSES)


def _net(record: Record, *, stands_for: bool) -> tuple[Config, Blueprint]:
    """The options of a worker's step, of one micro-batch, and the net."""
    options = {**record.options, "dataset": "synthetic"}  # the folder of another is nowhere
    if options["strategy"] == "ddp":  # of one worker, whose batch is that of all: a device has one of them
        batch = int(options["batch_size"]) // int(options.pop("accumulation_steps", "1"))
        options["batch_size"] = str(batch)
    if stands_for and options["model"] in STANDS_FOR:
        model, size = STANDS_FOR[options["model"]]
        options |= {"model": model, "img_size": str(size)}
    config = _parsed(*typed(options))
    return config, _blueprint(config.model)


def _slots(record: Record, blueprint: Blueprint) -> int:
    """Pool blocks that an image goes through in training."""
    if record.options["strategy"] == "stochastic_depth":
        return int(record.options["min_blocks"])
    return min(blueprint.pool, int(record.facts["K"]))


@cache
def _sent(model: str, config: Config, workers: int, least: int, blocks_alone: bool) -> float:
    """Bytes of a round, by all ranks."""
    return sent_per_round(_blueprint(model), config, workers, least, blocks_alone=blocks_alone)


@cache
def _counted(model: str, slots: int, batch: int, size: int) -> int:
    config = parse([f"--model={model}", f"--batch_size={batch}", f"--img_size={size}"])
    # Torch counts a multiplication and an addition.
    return multiply_adds(_blueprint(model), slots, config) // 2


def _work(config: Config, blueprint: Blueprint, slots: int) -> int:
    """Multiply-adds of a step, forwards and backwards."""
    return _counted(config.model, slots, config.batch_size, config.img_size or 32)

"""What a strategy will take, before anything runs: memory, multiply-adds, bytes; and advice. All predicted.

Figures of resist, local_sgd and ddp are counted: on the deals, and on a step with fake tensors
(`footprint`). Those of FSDP2 and ZeRO follow their published formulas, with FSDP2's `fully_shard` on every
residual block and on the root. One worker per rank everywhere. No communication.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import torch

from resist_ds.errors import UserError
from resist_ds.forecast.footprint import Device, Footprints, Usage, count_once
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout
from resist_ds.options import strategy as ways
from resist_ds.options.config import Config
from resist_ds.options.deepspeed_file import read
from resist_ds.options.presets import PRESETS
from resist_ds.protocol.partition import Layout, elements_sent, sample_partition, slots_for
from resist_ds.protocol.sync import MEAN_CHUNK

STRATEGIES = tuple(name for name in ways.STRATEGIES if name != "stochastic_depth")  # that has one worker
BY_FORMULA = tuple(name for name in STRATEGIES if ways.STRATEGIES[name].spread)
DEALS = 21  # whose hand-offs the bytes of a round are the mean of: rounds differ by what happens to stay

BANDWIDTHS = {"kbit": 125e0, "mbit": 125e3, "gbit": 125e6, "tbit": 125e9}  # bytes a second
MEMORIES = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 1e6, "gb": 1e9, "tb": 1e12}  # bytes
SPEEDS = {"gflops": 5e8, "tflops": 5e11, "pflops": 5e14}  # multiply-adds a second, two operations each

USABLE = 0.9  # share of the memory that the advice fills: workspaces and gaps of the allocator come on top
COMMUNICATION_SHARE = 0.1  # of a round's time that the advice allows for; and of ddp's bytes per image


def quantity(option: str, text: str, units: Mapping[str, float]) -> float:
    """`10gbit` in base units. Raises `UserError` where it is no positive number with one of the units."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)", text.strip().lower())
    value = float(found[1]) * units.get(found[2], 0) if found else 0.0
    if not 0 < value < math.inf:
        example = f"10{next(iter(units))}"
        raise UserError(
            f"{option} is {text!r}: type a number above 0 and a unit ({', '.join(units)}), such as {example}"
        )
    return value


@dataclass(frozen=True)
class Question:
    """What is to be predicted.

    Attributes:
        config: of it count what shapes a step or an exchange; batch_size is that of a worker.
        img_size: pixels.
        workers: the W to compare; each is R too.
        bandwidth: bytes a second that one rank can send.
        memory: bytes of a device.
        speed: multiply-adds a second that one device sustains in training, where the user knows it.
    """

    blueprint: Blueprint
    config: Config
    img_size: int
    workers: tuple[int, ...]
    bandwidth: float
    memory: float
    speed: float | None = None
    device: Device = "cuda"

    def __post_init__(self) -> None:
        pool = self.blueprint.pool
        if self.config.min_blocks > pool:
            raise UserError(
                f"--min_blocks {self.config.min_blocks} is more than {self.blueprint.name} has: "
                f"type at most {pool}, its pool blocks"
            )

    def slots(self, workers: int) -> int:
        """K of resist."""
        return slots_for(workers, self.blueprint.pool, self.config.min_blocks)


@dataclass(frozen=True)
class Prediction:
    """Of one strategy at one W, for one rank; bytes, where nothing else is said.

    Attributes:
        parameters: elements that a rank holds, replicas counted.
        weights, gradients, optimizer: of the training state; DeepSpeed's second copy of the weights counts
            as optimizer state.
        activations: what the forward pass leaves for the backward pass.
        step: peak of a training step.
        transit: the exchange buffer, which stays allocated beside the step after the first round.
        sync: peak of a synchronisation, `transit` in it; 0 where there is none.
        multiply_adds: of a step; share: of those of the full net without activation checkpointing.
        sent_step, sent_round: by all ranks together.
        communication, computation: seconds of a round, one after the other; None where the speed is unknown.
    """

    strategy: str
    workers: int
    slots: int
    activation_checkpointing: bool
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    step: int
    transit: int
    sync: int
    multiply_adds: int
    share: float
    sent_step: float
    sent_round: float
    communication: float
    computation: float | None

    @property
    def peak(self) -> int:
        """The most that a rank holds in a round."""
        return max(self.step + self.transit, self.sync)

    @property
    def training_state(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Advice:
    """A value of an option, and why."""

    option: str
    value: int | bool
    reason: str


# ------------------------------------------------------------------------------------------------------------
# Bytes


def sent_per_round(
    blueprint: Blueprint, config: Config, workers: int, min_blocks: int, where: Layout | None = None
) -> float:
    """Bytes of a synchronisation, by all ranks: the mean over the run's first rounds.

    Args:
        where: the workers are played; default: each on a rank of its own.
    """
    layout = StateLayout.of(blueprint, config, slots=1)
    travel = config.optimizer_state == "travel"
    deals = [
        sample_partition(config.seed, r, workers=workers, pool=blueprint.pool, min_blocks=min_blocks)
        for r in range(DEALS)
    ]
    block, shared = layout.block.exchanged(travel), layout.shared.exchanged(travel)
    where = where or Layout(workers, workers)
    return _itemsize(config) * fmean(
        elements_sent(now, then, where, block=block, shared=shared) for now, then in pairwise(deals)
    )


def sent_per_step(strategy: str, blueprint: Blueprint, config: Config, ranks: int) -> int:
    """Bytes of a step of a strategy that communicates in each, by all ranks: those of rings.

    A ring's all-gather or reduce-scatter of n bytes sends (R − 1)n over all ranks, its all-reduce twice that.
    """
    everything = blueprint.parameters * _itemsize(config)
    if strategy == "ddp":
        return ranks * (2 * (ranks - 1) * everything // ranks)  # as the ledger counts a bucket
    if strategy == "fsdp":
        root, *blocks = _units(blueprint, ranks)
        # The root's parameters stay from forward to backward; a block's are gathered for each.
        return (ranks - 1) * (2 * root + 3 * sum(blocks)) * _itemsize(config)
    # ZeRO-1, -2: DeepSpeed all-reduces buckets of gradients, and gathers the updated weights. ZeRO-3 gathers
    # in both passes, at most: what it keeps, or has not dropped yet, travels once.
    return (ranks - 1) * everything * 3


def _units(blueprint: Blueprint, ranks: int) -> list[int]:
    """Elements of the root and of each residual block under `fully_shard`.

    It cuts tensors along their first dimension and pads that to a multiple of R.
    """
    net = blueprint.subnet(blueprint.pool)
    blocks = [name for name, part in net.named_modules() if type(part) in blueprint.family.branch_end]
    sizes = dict.fromkeys(["", *blocks], 0)
    for name, shape in blueprint.shapes.items():
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
        sizes[unit] += -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
    return list(sizes.values())


def _itemsize(config: Config) -> int:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype.itemsize


# ------------------------------------------------------------------------------------------------------------
# Predictions


class Plan:
    """The answers to a question. Counting takes seconds; it is done once, here.

    Attributes:
        predictions: of every strategy and W, first without activation checkpointing, then with.
    """

    def __init__(self, question: Question):
        self.question = question
        least = min(map(question.slots, question.workers))
        self._footprints = {
            checkpointing: Footprints(
                question.blueprint,
                replace(question.config, activation_checkpointing=checkpointing),
                least,
                question.img_size,
                question.device,
            )
            for checkpointing in (False, True)
        }
        self.predictions = [
            self.predict(strategy, workers, activation_checkpointing=checkpointing)
            for checkpointing in (False, True)
            for strategy in STRATEGIES
            for workers in question.workers
        ]

    def predict(
        self,
        strategy: str,
        workers: int,
        *,
        slots: int | None = None,
        batch: int | None = None,
        activation_checkpointing: bool = False,
    ) -> Prediction:
        """One prediction.

        Args:
            slots: K of resist, if it is not what W and `--min_blocks` make it.
            batch: images per worker, if not `--batch_size`.
        """
        question, config, blueprint = self.question, self.question.config, self.question.blueprint
        batch = batch or config.batch_size
        if strategy != "resist":
            slots = blueprint.pool
        slots = slots or question.slots(workers)
        usage = self._footprints[activation_checkpointing].usage(slots, batch)
        full = self._footprints[False].usage(blueprint.pool, batch)

        memory = _memory(strategy, workers, slots, usage, blueprint, config)
        if strategy in ("resist", "local_sgd"):
            sent_round = sent_per_round(blueprint, config, workers, slots)
            sent_step = sent_round / config.local_steps
        else:
            sent_step = sent_per_step(strategy, blueprint, config, workers)
            sent_round = sent_step * config.local_steps
        seconds = None
        if question.speed:
            seconds = usage.multiply_adds * config.local_steps / question.speed
        return Prediction(
            strategy=strategy,
            workers=workers,
            slots=slots,
            activation_checkpointing=activation_checkpointing,
            parameters=ways.STRATEGIES[strategy].parameters_held(
                blueprint.parameters, blueprint.parameters_held(slots), workers
            ),
            **memory,
            multiply_adds=usage.multiply_adds,
            share=usage.multiply_adds / full.multiply_adds,
            sent_step=sent_step,
            sent_round=sent_round,
            communication=sent_round / workers / question.bandwidth,
            computation=seconds,
        )

    # --------------------------------------------------------------------------------------------------------
    # Advice

    def advice(self) -> list[Advice]:
        """Options of a resist run for the memory and the link, by simple rules; empty where nothing fits."""
        question, config, pool = self.question, self.question.config, self.question.blueprint.pool
        workers, asked = max(question.workers), config.batch_size
        fewest, room = question.slots(workers), USABLE * question.memory

        def needs(batch: int, checkpointing: bool, slots: int = fewest) -> int:
            return self.predict(
                "resist", workers, slots=slots, batch=batch, activation_checkpointing=checkpointing
            ).peak

        # A smaller batch is slow as well, and another optimization problem: checkpointing comes first.
        checkpointing = needs(asked, False) > room
        largest = _largest_power_of_two(lambda batch: needs(batch, checkpointing) <= room)
        if largest < 2:  # a single image has no batch statistics
            return []
        as_asked = needs(asked, checkpointing) <= room
        batch = asked if as_asked else largest
        slots = max(
            k for k in range(fewest, pool + 1) if k == fewest or needs(batch, checkpointing, k) <= room
        )
        if slots == pool:  # memory asks for no partition; so the link decides
            slots, depth = (
                fewest,
                f"all {pool} would fit too; K = {fewest} has the fewest bytes and multiply-adds",
            )
        else:
            depth = f"K = {slots} of {pool} is the most that fits: {_mib(needs(batch, checkpointing, slots))}"
        chosen = self.predict(
            "resist", workers, slots=slots, batch=batch, activation_checkpointing=checkpointing
        )
        steps, link = self._local_steps(chosen, batch)
        return [
            Advice("workers", workers, "the most asked for: most images a round, fewest blocks a worker"),
            Advice(
                "activation_checkpointing",
                checkpointing,
                f"without it {asked} images need {_mib(needs(asked, False))}; {_mib(room)} are counted on "
                f"({100 * USABLE:.0f} % of the memory)",
            ),
            Advice(
                "batch_size",
                batch,
                f"{'as asked' if as_asked else 'the largest power of two that fits'}: "
                f"{_mib(needs(batch, checkpointing))} at K = {fewest}, which has room for {largest}",
            ),
            Advice(
                "min_blocks",
                slots if slots > fewest else config.min_blocks,
                f"{depth}; sends {self._relative(workers, slots)} of local SGD's bytes",
            ),
            Advice("local_steps", steps, link),
        ]

    def _relative(self, workers: int, slots: int) -> str:
        blueprint, config = self.question.blueprint, self.question.config
        full = sent_per_round(blueprint, config, workers, blueprint.pool)
        share = sent_per_round(blueprint, config, workers, slots) / full if full else 1.0
        return f"{100 * share:.0f} %"

    def _local_steps(self, chosen: Prediction, batch: int) -> tuple[int, str]:
        """ℓ, and why."""
        question = self.question
        if chosen.computation is not None:
            step = chosen.computation / question.config.local_steps
            # c ≤ s(c + ℓt)
            steps = math.ceil((1 / COMMUNICATION_SHARE - 1) * chosen.communication / step)
            share = chosen.communication / (chosen.communication + max(1, steps) * step)
            why = (
                f"the fewest with at most {100 * COMMUNICATION_SHARE:.0f} % of a round's time for "
                f"communication: {100 * share:.1f} %"
            )
        else:
            ddp = sent_per_step("ddp", question.blueprint, question.config, chosen.workers)
            steps = math.ceil(chosen.sent_round / (COMMUNICATION_SHARE * ddp)) if ddp else 1
            each = chosen.sent_round / (chosen.workers * batch * max(1, steps))
            why = (
                f"the fewest that send at most {100 * COMMUNICATION_SHARE:.0f} % of ddp's bytes per image: "
                f"{each / 1e3:,.1f} kB each (with --flops: by time)"
            )
        return max(1, steps), why


def expected(
    blueprint: Blueprint,
    config: Config,
    slots: int,
    most: int,
    layout: Layout,
    img_size: int,
    device: Device,
) -> tuple[int, float]:
    """What a worker's step or exchange takes at its peak, and what all ranks send in a round, in bytes.

    Args:
        config: of a strategy that is predicted: without `--deepspeed_config`, not stochastic_depth.
        slots, most: K, of whose rounds the bytes are, and the most in any round, of which the memory is.
    """
    usage = count_once(blueprint, config, most, img_size, device)
    memory = _memory(config.strategy, layout.ranks, most, usage, blueprint, config)
    if config.way.lockstep:
        sent: float = config.local_steps * sent_per_step(config.strategy, blueprint, config, layout.ranks)
    else:
        sent = sent_per_round(blueprint, config, layout.workers, slots, layout)
    return max(memory["step"] + memory["transit"], memory["sync"]), sent


def _memory(
    strategy: str, ranks: int, slots: int, usage: Usage, blueprint: Blueprint, config: Config
) -> dict[str, int]:
    """The fields of a `Prediction` that are bytes of a rank."""
    layout, size = StateLayout.of(blueprint, config, slots), _itemsize(config)
    weights = (layout.shared.parameters + slots * layout.block.parameters) * size
    optimizer = layout.numel * size - weights
    transit = sync = 0
    if strategy in ("resist", "local_sgd"):
        travelling = layout.block.exchanged(config.optimizer_state == "travel")
        transit = max(min(config.transit_mib << 20, weights), travelling * size)
        sync = usage.state + transit + 8 * MEAN_CHUNK
    held = _held(strategy, ranks, weights, usage.gradients, optimizer)
    return {
        **dict(zip(("weights", "gradients", "optimizer"), held, strict=True)),
        "activations": usage.activations,
        "step": _peak(strategy, ranks, usage, sum(held), blueprint, config),
        "transit": transit,
        "sync": sync,
    }


def _peak(strategy: str, ranks: int, usage: Usage, held: int, blueprint: Blueprint, config: Config) -> int:
    """Bytes at the peak of a step, of which `held` are training state."""
    if strategy in ("resist", "local_sgd") or (strategy == "ddp" and ranks == 1):
        return usage.peak
    if strategy == "ddp":
        return usage.peak_with_kept_gradients
    gathered = 0
    if strategy in ("fsdp", "zero3") and ranks > 1:
        # whole: the root's weights and gradients, those of one block, and of the next that is fetched
        root, *blocks = _units(blueprint, ranks)
        gathered = (2 * root + 4 * max(blocks)) * _itemsize(config)
    return held + usage.passes + gathered + _bucket(strategy)


def _held(strategy: str, ranks: int, weights: int, gradients: int, optimizer: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer state) of a rank, in bytes, without what is gathered for a moment.

    DeepSpeed keeps its own copy of the weights that a rank updates, in float32 too.
    """

    def shard(size: int) -> int:
        return -(-size // ranks)

    return {
        "fsdp": (shard(weights), shard(gradients), shard(optimizer)),
        "zero1": (weights, gradients, shard(optimizer + weights)),
        "zero2": (weights, shard(gradients), shard(optimizer + weights)),
        "zero3": (shard(weights), shard(gradients), shard(optimizer + weights)),
    }.get(strategy, (weights, gradients, optimizer))


def _bucket(strategy: str) -> int:
    """Bytes of the buffer that the presets of ZeRO let DeepSpeed have for gradients on their way."""
    if not strategy.startswith("zero"):
        return 0
    zero = read(str(PRESETS / f"{strategy}.json"))["zero_optimization"]
    return 4 * int(zero["reduce_bucket_size"])


def _largest_power_of_two(fits: Callable[[int], bool]) -> int:
    """The largest power of two that fits; 0 where not even 1 does."""
    found = 0
    while fits(max(1, 2 * found)):
        found = max(1, 2 * found)
    return found


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"

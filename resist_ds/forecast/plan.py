"""What a strategy will take, before anything runs: memory, multiply-adds, bytes. All predicted.

Figures of resist, local_sgd and ddp are counted: on the deals (`traffic`), and on a step with fake tensors
(`footprint`). Those of FSDP2 and ZeRO follow their published formulas, with FSDP2's `fully_shard` on every
residual block and on the root. One worker per rank, or per team, everywhere. No communication.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from resist_ds.engines.timetable import mean_local_steps
from resist_ds.errors import UserError
from resist_ds.forecast.footprint import Device, Footprints, count_once
from resist_ds.forecast.memory import memory_of, sharers
from resist_ds.forecast.traffic import sent_inside, sent_per_round, sent_per_step
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options import strategy as ways
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, slots_for

STRATEGIES = tuple(name for name in ways.STRATEGIES if name != "stochastic_depth")  # that has one worker
Wire = Literal["exact", "compact"]
WIRES: tuple[Wire, ...] = ("exact", "compact")


@dataclass(frozen=True)
class Question:
    """What is to be predicted.

    Attributes:
        config: of it count what shapes a step or an exchange; batch_size is that of a worker. With teams of
            G ranks a worker has G of them, and a strategy in lockstep as many ranks, and the same images.
        img_size: pixels.
        workers: the W to compare; R is G times that.
        bandwidth: bytes a second that one rank, or the machine of a team, can send.
        memory: bytes of a device.
        speed: multiply-adds a second that one device sustains in training, where the user knows it.
        wires: to compare, for the strategies that synchronise once a round.
    """

    blueprint: Blueprint
    config: Config
    img_size: int
    workers: tuple[int, ...]
    bandwidth: float
    memory: float
    speed: float | None = None
    device: Device = "cuda"
    wires: tuple[Wire, ...] = WIRES

    def __post_init__(self) -> None:
        pool = self.blueprint.pool
        if self.config.min_blocks > pool:
            raise UserError(
                f"--min_blocks {self.config.min_blocks} is more than {self.blueprint.name} has: "
                f"type at most {pool}, its pool blocks"
            )

    @property
    def ranks_each(self) -> int:
        """G."""
        assert isinstance(self.config.team_size, int)
        return self.config.team_size

    def slots(self, workers: int) -> int:
        """K of resist."""
        return slots_for(workers, self.blueprint.pool, self.config.min_blocks)

    def wires_of(self, strategy: str, workers: int) -> tuple[Wire, ...]:
        """That make a difference: one worker has nobody to write to, and gradients travel as they are."""
        return self.wires if ways.STRATEGIES[strategy].averages and workers > 1 else ("exact",)


@dataclass(frozen=True)
class Prediction:
    """Of one strategy at one W on one wire, for one rank; bytes, where nothing else is said.

    Attributes:
        sharing: by which ranks share a step, all of them or a team's; None: each is alone.
        parameters: elements that a rank holds, replicas counted.
        weights, gradients, optimizer: of the training state; DeepSpeed's second copy of the weights counts
            as optimizer state.
        activations: what the forward pass leaves for the backward pass.
        step: peak of a training step.
        transit: the exchange buffer, which stays allocated beside the step after the first round.
        kept: beside a worker's state, for the wire and the overlap; in host memory where the device is a GPU,
            else part of `step` and `sync`.
        sync: peak of a synchronisation, `transit` in it; 0 where there is none.
        multiply_adds: of a step; share: of those of the full net without activation checkpointing.
        sent_step, sent_round: by all ranks together, but inside teams.
        sent_team: inside teams, in a round.
        communication, computation: seconds of a round.
        exposed: of communication the seconds that no step of `--overlap_steps` hides. Where the speed is
            unknown computation is None, and so is this.
    """

    strategy: str
    wire: Wire
    sharing: str | None
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
    kept: int
    sync: int
    multiply_adds: int
    share: float
    sent_step: float
    sent_round: float
    sent_team: float
    communication: float
    exposed: float | None
    computation: float | None

    @property
    def peak(self) -> int:
        """The most that a rank holds in a round."""
        return max(self.step + self.transit, self.sync)

    @property
    def training_state(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


def by_formula(prediction: Prediction) -> bool:
    """Whether its memory is that of published formulas, and not counted."""
    return prediction.sharing is not None and ways.STRATEGIES[prediction.sharing].spread


class Plan:
    """The answers to a question. Counting takes seconds; it is done once, here.

    Attributes:
        predictions: of every strategy and W, first without activation checkpointing, then with.
    """

    def __init__(self, question: Question):
        self.question = question
        least = min(map(question.slots, question.workers))
        self._footprints: dict[tuple[bool, bool], Footprints] = {}
        for checkpointing in (False, True):
            # How rounds end is not for ddp, and for no footprint.
            config = replace(
                question.config,
                activation_checkpointing=checkpointing,
                wire="exact",
                overlap_steps=0,
                local_steps_max=None,
                team_size=1,
                team_strategy="ddp",
            )
            place = (least, question.img_size, question.device)
            alone = Footprints(question.blueprint, replace(config, strategy="resist"), *place)
            lockstep = alone
            if config.mixed_precision != "no":  # without the low-precision copies of all weights
                lockstep = Footprints(question.blueprint, replace(config, strategy="ddp"), *place)
            self._footprints |= {(False, checkpointing): alone, (True, checkpointing): lockstep}
        self.predictions = [
            self.predict(strategy, workers, wire=wire, activation_checkpointing=checkpointing)
            for checkpointing in (False, True)
            for strategy in STRATEGIES
            for wire in WIRES
            for workers in question.workers
            if wire in question.wires_of(strategy, workers)
        ]

    def predict(
        self,
        strategy: str,
        workers: int,
        *,
        wire: Wire = "exact",
        slots: int | None = None,
        batch: int | None = None,
        activation_checkpointing: bool = False,
    ) -> Prediction:
        """One prediction.

        Args:
            wire: of a strategy that synchronises once a round.
            slots: K of resist, if it is not what W and `--min_blocks` make it.
            batch: images per worker, if not `--batch_size`.
        """
        question, blueprint = self.question, self.question.blueprint
        config = replace(question.config, wire="exact")
        if wire != "exact":  # which the strategy that was typed need not have
            config = replace(config, strategy=strategy, wire=wire)  # type: ignore[arg-type]
        team_size = question.ranks_each
        batch = (batch or config.batch_size) // team_size  # of a rank
        if strategy != "resist":
            slots = blueprint.pool
        slots = slots or question.slots(workers)
        lockstep = ways.STRATEGIES[strategy].lockstep
        places = workers * team_size if lockstep else workers  # that send
        together = lockstep or team_size > 1
        usage = self._footprints[together, activation_checkpointing].usage(slots, batch)
        full = self._footprints[together, False].usage(blueprint.pool, batch)

        memory = memory_of(strategy, places, slots, usage, blueprint, config, question.device)
        sharing, _ = sharers(strategy, places, config)
        steps = mean_local_steps(config)
        sent_team = 0.0
        if not lockstep:
            sent_round = sent_per_round(blueprint, config, workers, slots)
            sent_step = sent_round / steps
            sent_team = sent_inside(blueprint, config, workers, slots, steps)
        else:
            sent_step = sent_per_step(strategy, blueprint, config, places)
            sent_round = sent_step * steps
        communication = sent_round / places / question.bandwidth
        computation = exposed = None
        if question.speed:
            step = usage.multiply_adds / question.speed
            computation = steps * step
            behind = config.overlap_steps if ways.STRATEGIES[strategy].averages else 0
            front = communication
            if behind:
                blocks = sent_per_round(blueprint, config, workers, slots, blocks_alone=True)
                front = blocks / places / question.bandwidth
            exposed = front + max(0.0, communication - front - behind * step)
        parameters = blueprint.parameters_held(slots)
        if sharing and ways.STRATEGIES[sharing].spread_parameters:
            parameters = -(-parameters // (places if lockstep else team_size))
        return Prediction(
            strategy=strategy,
            wire=wire,
            sharing=sharing,
            workers=workers,
            slots=slots,
            activation_checkpointing=activation_checkpointing,
            parameters=parameters,
            **memory,
            multiply_adds=usage.multiply_adds,
            share=usage.multiply_adds / full.multiply_adds,
            sent_step=sent_step,
            sent_round=sent_round,
            sent_team=sent_team,
            communication=communication,
            exposed=exposed,
            computation=computation,
        )


class Expected(NamedTuple):
    """Of a run, in bytes.

    Attributes:
        peak: of what a worker's step or exchange takes.
        sent: by all ranks in a round, but inside teams; inside: that.
        kept: in host memory, by all of a rank's workers, for the wire and the overlap; 0 on a CPU, where it
            is in `peak`.
    """

    peak: int
    sent: float
    inside: float
    kept: int


def expected(
    blueprint: Blueprint,
    config: Config,
    slots: int,
    most: int,
    layout: Layout,
    img_size: int,
    device: Device,
) -> Expected:
    """What a run will take.

    Args:
        config: of a strategy that is predicted: without `--deepspeed_config`, not stochastic_depth.
        slots, most: K, of whose rounds the bytes are, and the most in any round, of which the memory is.
    """
    alone = replace(config, batch_size=config.batch_size // layout.team_size)
    usage = count_once(blueprint, alone, most, img_size, device)
    memory = memory_of(config.strategy, layout.workers, most, usage, blueprint, config, device)
    if config.way.lockstep:
        sent: float = config.local_steps * sent_per_step(config.strategy, blueprint, config, layout.ranks)
    else:
        sent = sent_per_round(blueprint, config, layout.workers, slots, layout)
    inside = sent_inside(blueprint, config, layout.workers, slots, config.local_steps)
    kept = memory["kept"] * len(layout.workers_of(0)) if device == "cuda" else 0
    return Expected(max(memory["step"] + memory["transit"], memory["sync"]), sent, inside, kept)

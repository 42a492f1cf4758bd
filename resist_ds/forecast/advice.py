"""Options of a resist run for a memory and a link, by simple rules over what `plan` predicts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from resist_ds.forecast.plan import Plan, Prediction, Question, Wire
from resist_ds.forecast.traffic import sent_per_round, sent_per_step

USABLE = 0.9  # share of the memory that the advice fills: workspaces and gaps of the allocator come on top
COMMUNICATION_SHARE = 0.1  # of a round's time that the advice allows for; and of ddp's bytes per image
OFTEN = 5  # local steps a round: what rarer rounds cost in accuracy, the wire should avoid


@dataclass(frozen=True)
class Advice:
    """A value of an option, and why."""

    option: str
    value: int | bool | str
    reason: str


def advice(plan: Plan) -> list[Advice]:
    """Options of a resist run for the memory and the link, by simple rules; empty where nothing fits."""
    question, config, pool = plan.question, plan.question.config, plan.question.blueprint.pool
    workers, asked = max(question.workers), config.batch_size
    fewest, room = question.slots(workers), USABLE * question.memory
    wires = question.wires_of("resist", workers)

    def needs(batch: int, checkpointing: bool, slots: int = fewest) -> int:
        return plan.predict(
            "resist",
            workers,
            wire=wires[-1],  # which keeps more
            slots=slots,
            batch=batch,
            activation_checkpointing=checkpointing,
        ).peak

    # A smaller batch is slow as well, and another optimization problem: checkpointing comes first.
    checkpointing = needs(asked, False) > room
    ranks = question.ranks_each
    largest = ranks * _largest_power_of_two(lambda each: needs(each * ranks, checkpointing) <= room)
    if largest < 2 * ranks:  # a single image has no batch statistics
        return []
    as_asked = needs(asked, checkpointing) <= room
    batch = asked if as_asked else largest
    slots = max(k for k in range(fewest, pool + 1) if k == fewest or needs(batch, checkpointing, k) <= room)
    if slots == pool:  # memory asks for no partition; so the link decides
        slots, depth = (
            fewest,
            f"all {pool} would fit too; K = {fewest} has the fewest bytes and multiply-adds",
        )
    else:
        depth = f"K = {slots} of {pool} is the most that fits: {_mib(needs(batch, checkpointing, slots))}"
    on_wires = [
        plan.predict(
            "resist", workers, wire=wire, slots=slots, batch=batch, activation_checkpointing=checkpointing
        )
        for wire in wires
    ]
    power = "power of two" if ranks == 1 else f"power of two for each of {ranks} ranks"
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
            f"{'as asked' if as_asked else f'the largest {power} that fits'}: "
            f"{_mib(needs(batch, checkpointing))} at K = {fewest}, which has room for {largest}",
        ),
        Advice(
            "min_blocks",
            slots if slots > fewest else config.min_blocks,
            f"{depth}; sends {_relative(question, workers, slots, wires[0])} of local SGD's bytes",
        ),
        *_for_the_link(question, on_wires, batch),
    ]


def _relative(question: Question, workers: int, slots: int, wire: Wire) -> str:
    blueprint, config = question.blueprint, replace(question.config, strategy="resist", wire=wire)
    full = sent_per_round(blueprint, config, workers, blueprint.pool)
    share = sent_per_round(blueprint, config, workers, slots) / full if full else 1.0
    return f"{100 * share:.0f} %"


def _for_the_link(question: Question, on_wires: list[Prediction], batch: int) -> list[Advice]:
    """The wire and ℓ: the exact wire, unless rounds must then be rarer than `OFTEN`.

    No overlap: what it costs in accuracy (RESULTS) is no question of bytes or time.

    Args:
        on_wires: what was chosen so far, on each wire that may be.
    """
    each_needs = [_fewest_steps(question, p) for p in on_wires]
    steps, chosen = each_needs[-1], on_wires[-1]
    wire = "the only one asked for"
    if len(on_wires) > 1:
        wire = f"exact needs --local_steps {each_needs[0]} for what compact needs {each_needs[-1]} for"
        if each_needs[0] <= OFTEN:
            steps, chosen = each_needs[0], on_wires[0]
            wire = f"{OFTEN} local steps a round, or fewer, are often enough"
    if question.speed is None:
        each = chosen.sent_round / (chosen.workers * batch * steps)
        link = (
            f"the fewest that send at most {100 * COMMUNICATION_SHARE:.0f} % of ddp's bytes per image: "
            f"{each / 1e3:,.1f} kB each (with --flops: by time)"
        )
    else:
        exchange = _exchange_in_steps(question, chosen)
        link = (
            f"the fewest with at most {100 * COMMUNICATION_SHARE:.0f} % of a round's time for "
            f"communication: {100 * exchange / (exchange + steps):.1f} %"
        )
    return [
        Advice("wire", chosen.wire, wire),
        Advice("local_steps", steps, link),
    ]


def _fewest_steps(question: Question, chosen: Prediction) -> int:
    """ℓ for which communication is small, of the time or, where that is unknown, of ddp's bytes."""
    if question.speed is not None:
        exchange = _exchange_in_steps(question, chosen)
        steps = math.ceil((1 / COMMUNICATION_SHARE - 1) * exchange)  # c ≤ s(c + ℓ)
    else:
        ranks = chosen.workers * question.ranks_each
        ddp = sent_per_step("ddp", question.blueprint, question.config, ranks)
        steps = math.ceil(chosen.sent_round / (COMMUNICATION_SHARE * ddp)) if ddp else 1
    return max(1 + question.config.overlap_steps, steps)


def _exchange_in_steps(question: Question, chosen: Prediction) -> float:
    """A round's communication, in local steps that take as long."""
    assert question.speed is not None
    return chosen.communication * question.speed / chosen.multiply_adds


def _largest_power_of_two(fits: Callable[[int], bool]) -> int:
    """The largest power of two that fits; 0 where not even 1 does."""
    found = 0
    while fits(max(1, 2 * found)):
        found = max(1, 2 * found)
    return found


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"

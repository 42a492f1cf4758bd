"""What is counted and not timed: multiply-adds, and the fewest bytes that must be held and moved."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from resist_ds.comm import Comm
from resist_ds.forecast.traffic import sent_per_round
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import OptimizerState, StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition, slots_for
from resist_ds.protocol.pieces import bytes_sent, groups_of

CLASSES = 10  # of the synthetic data


def facts(comm: Comm, configs: Mapping[str, Sequence[Config]]) -> dict[str, Any]:
    """Sizes, multiply-adds and fewest bytes of each strategy. No communication.

    Args:
        configs: by strategy, of each repeat.

    Returns:
        "pool", "parameters", and in "strategies" of each "slots", "parameters", "multiply_add_share" (of the
        full net's), "held_bytes" (`held_bytes`), "moved_bytes" (`moved_bytes`, of each repeat) and
        "blocks_share" (of those, that of pool blocks, which no local steps hide).
    """
    config = next(iter(configs.values()))[0]
    blueprint = Blueprint(config.model, CLASSES)
    found = {}
    for strategy, repeats in configs.items():
        config = repeats[0]
        full = multiply_adds(blueprint, blueprint.pool, config)  # of its batch and image size
        assert config.workers is not None
        slots = blueprint.pool
        if config.way.partitions:
            slots = slots_for(config.workers, blueprint.pool, config.min_blocks)
        found[strategy] = {
            "slots": slots,
            "parameters": blueprint.parameters_held(slots),
            "multiply_add_share": multiply_adds(blueprint, slots, config) / full,
            "held_bytes": held_bytes(blueprint, config, slots),
            "moved_bytes": [moved_bytes(blueprint, config) for config in repeats],
            "blocks_share": blocks_share(blueprint, config),
        }
    return {"pool": blueprint.pool, "parameters": blueprint.parameters, "strategies": found}


def multiply_adds(blueprint: Blueprint, slots: int, config: Config) -> int:
    """Floating-point operations of a local step with so many slots, by torch's counter, on no device."""
    net = blueprint.subnet(slots).train()
    side = config.img_size or 32
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(config.batch_size, 3, side, side, device="meta")).sum().backward()
    total: int = counter.get_total_flops()
    return total


def held_bytes(blueprint: Blueprint, config: Config, slots: int) -> int:
    """The fewest bytes of parameters, gradients and optimizer state that a rank, one of W, must hold."""
    assert config.workers is not None
    way, vectors = config.inside or config.way, len(OptimizerState.of(config).vectors)
    ranks = config.workers if config.way.lockstep else config.team_size
    assert isinstance(ranks, int)
    spread = (way.spread_parameters, way.spread_parameters or (way.stage or 0) >= 2, way.spread)
    parameters, gradients, state = (1 / ranks if is_spread else 1 for is_spread in spread)
    copies = parameters + gradients + state * vectors
    return math.ceil(blueprint.parameters_held(slots) * copies * _itemsize(config))


def moved_bytes(blueprint: Blueprint, config: Config) -> int:
    """The fewest bytes between the ranks, one worker each, in a round; mean over the measured rounds.

    Of gradients a ring all-reduce at every step. Of what is averaged once a round as much, for shared, and
    each pool block straight from its holders to its owner and on to its next holders, on the run's wire.
    """
    assert config.workers is not None and config.rounds is not None
    workers, itemsize, pool = config.workers, _itemsize(config), blueprint.pool
    if config.way.lockstep:
        return 2 * (workers - 1) * blueprint.parameters * config.local_steps * itemsize
    groups = groups_of(StateLayout.of(blueprint, config, slots=1), config, pool, workers)
    rounds, least = measured_rounds(config), config.least_blocks(pool)
    deals = [
        sample_partition(config.seed, r, workers=workers, pool=pool, min_blocks=least)
        for r in (*rounds, rounds.stop)
    ]
    alone = Layout(workers, workers)
    return round(fmean(bytes_sent(groups, now, then, alone, itemsize) for now, then in pairwise(deals)))


def blocks_share(blueprint: Blueprint, config: Config) -> float:
    """Of what is averaged once a round the share that pool blocks are, in bytes; 0 where nothing is."""
    assert config.workers is not None
    if not config.way.averages or config.workers == 1:
        return 0.0
    asked = blueprint, config, config.workers, config.least_blocks(blueprint.pool)
    return sent_per_round(*asked, blocks_alone=True) / sent_per_round(*asked)


def measured_rounds(config: Config) -> range:
    """The rounds of a run that count: the first of several is a warm-up.

    Nothing hides behind the last round's steps, as an evaluation follows. So a run that overlaps has a round
    more than was asked for (`variants.read`), which does not count.
    """
    assert config.rounds is not None
    rounds = config.rounds - bool(config.overlap_steps)
    return range(min(1, rounds - 1), rounds)


def _itemsize(config: Config) -> int:
    size: int = getattr(torch, config.dtype).itemsize
    return size

"""Bytes that all ranks will send: counted on the deals, or what rings send in each step. Predicted."""

import math
from itertools import pairwise
from statistics import fmean

from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout, itemsize
from resist_ds.options.config import Config
from resist_ds.options.strategy import STRATEGIES
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.protocol.pieces import bytes_sent, groups_of

DEALS = 21  # whose hand-offs the bytes of a round are the mean of: rounds differ by what happens to stay


def sent_per_round(
    blueprint: Blueprint,
    config: Config,
    workers: int,
    min_blocks: int,
    where: Layout | None = None,
    *,
    blocks_alone: bool = False,
) -> float:
    """Bytes of a synchronisation, by all ranks: the mean over the run's first rounds.

    Args:
        where: the workers are played; default: each on a rank of its own.
        blocks_alone: those of pool blocks, which no `--overlap_steps` hide.
    """
    groups = groups_of(StateLayout.of(blueprint, config, slots=1), config, blueprint.pool, workers)
    if blocks_alone:
        groups = tuple(group for group in groups if group.of == "blocks")
    deals = [
        sample_partition(config.seed, r, workers=workers, pool=blueprint.pool, min_blocks=min_blocks)
        for r in range(DEALS)
    ]
    where = where or Layout(workers, workers)
    size = itemsize(config)
    return fmean(bytes_sent(groups, now, then, where, size) for now, then in pairwise(deals))


def sent_inside(blueprint: Blueprint, config: Config, workers: int, slots: int, steps: float) -> float:
    """Bytes of a round that stay inside teams, by all ranks: those of its steps, and of what follows them.

    Args:
        config: whose teams there are; 0 where they are ranks.
        steps: ℓ.
    """
    ranks, way = config.team_size, config.team_strategy
    assert isinstance(ranks, int)
    if ranks == 1:
        return 0.0
    state = StateLayout.of(blueprint, config, slots)
    travel = config.optimizer_state == "travel"
    behind = 0
    if way == "ddp" and workers > 1:  # every lane brings its slice to the others
        behind = (state.shared.exchanged(travel) + slots * state.block.exchanged(travel)) * (ranks - 1)
    elif STRATEGIES[way].stage:  # masters are put together and cut, and the other way round
        behind = state.numel * (ranks - 1) * (2 if way == "zero3" else 3)
    each = steps * sent_per_step(way, blueprint, config, ranks, slots) + behind * itemsize(config)
    return workers * each


def sent_per_step(
    strategy: str, blueprint: Blueprint, config: Config, ranks: int, slots: int | None = None
) -> int:
    """Bytes of a step of a strategy that communicates in each, by all its ranks: those of rings.

    A ring's all-gather or reduce-scatter of n bytes sends (R − 1)n over all ranks, its all-reduce twice that.

    Args:
        slots: pool blocks of the net that they share; default: all.
    """
    slots = blueprint.pool if slots is None else slots
    everything = blueprint.parameters_held(slots) * itemsize(config)
    if strategy == "ddp":
        return ranks * (2 * (ranks - 1) * everything // ranks)  # as the ledger counts a bucket
    if strategy == "fsdp":
        root, *blocks = fsdp_units(blueprint, ranks, slots)
        # The root's parameters stay from forward to backward; a block's are gathered for each.
        gathers, sums = root + 2 * sum(blocks), root + sum(blocks)
        return (ranks - 1) * (gathers * gathered_itemsize(strategy, config) + sums * itemsize(config))
    # ZeRO-1, -2: DeepSpeed all-reduces buckets of gradients, and gathers the updated weights. ZeRO-3 gathers
    # in both passes, at most: what it keeps, or has not dropped yet, travels once.
    return (ranks - 1) * everything * 3


def gathered_itemsize(strategy: str, config: Config) -> int:
    """Bytes of an element of the weights that are gathered; gradients are summed in the weights' own type."""
    return 2 if strategy == "fsdp" and config.mixed_precision != "no" else itemsize(config)


def fsdp_units(blueprint: Blueprint, ranks: int, slots: int) -> list[int]:
    """Elements of the root and of each residual block of a net with so many pool blocks under `fully_shard`.

    It cuts tensors along their first dimension and pads that to a multiple of R.
    """
    net = blueprint.subnet(slots)
    blocks = [name for name, part in net.named_modules() if type(part) in blueprint.family.branch_end]
    sizes = dict.fromkeys(["", *blocks], 0)
    for name, shape in ((name, tuple(parameter.shape)) for name, parameter in net.named_parameters()):
        unit = next((block for block in blocks if name.startswith(f"{block}.")), "")
        sizes[unit] += -(-shape[0] // ranks) * ranks * math.prod(shape[1:])
    return list(sizes.values())

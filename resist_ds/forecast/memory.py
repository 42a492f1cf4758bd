"""Bytes that a rank will hold: training state, activations, peaks. Predicted.

Those of resist, local_sgd and ddp rest on a step with fake tensors (`footprint`); FSDP2's and ZeRO's on their
published formulas.
"""

from resist_ds.forecast.footprint import Device, Usage
from resist_ds.forecast.traffic import fsdp_units, gathered_itemsize
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout, itemsize
from resist_ds.options.config import Config
from resist_ds.options.json_file import read
from resist_ds.options.presets import PRESETS
from resist_ds.protocol.sync import MEAN_CHUNK


def memory_of(
    strategy: str, ranks: int, slots: int, usage: Usage, blueprint: Blueprint, config: Config, device: Device
) -> dict[str, int]:
    """The fields of a `Prediction` that are bytes of a rank."""
    layout, size = StateLayout.of(blueprint, config, slots), itemsize(config)
    weights = (layout.shared.parameters + slots * layout.block.parameters) * size
    optimizer = layout.numel * size - weights
    transit = sync = 0
    if strategy in ("resist", "local_sgd"):
        travelling = layout.block.exchanged(config.optimizer_state == "travel")
        transit = max(min(config.transit_mib << 20, weights), travelling * size)
        # averages are taken within the budget on a GPU
        sync = usage.state + transit + (8 * MEAN_CHUNK if device == "cpu" else 0)
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
        root, *blocks = fsdp_units(blueprint, ranks)
        gathered = (root + 2 * max(blocks)) * (gathered_itemsize(strategy, config) + itemsize(config))
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
    zero = read("deepspeed_config", str(PRESETS / f"{strategy}.json"))["zero_optimization"]
    return 4 * int(zero["reduce_bucket_size"])

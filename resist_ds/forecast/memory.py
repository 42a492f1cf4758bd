"""Bytes that a rank will hold: training state, activations, peaks. Predicted.

Those of resist, local_sgd and ddp rest on a step with fake tensors (`footprint`); FSDP2's and ZeRO's on their
published formulas.
"""

from resist_ds.forecast.footprint import Device, Usage
from resist_ds.forecast.traffic import fsdp_units, gathered_itemsize
from resist_ds.memory import pinned_bytes
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout, itemsize
from resist_ds.options.config import Config
from resist_ds.options.json_file import read
from resist_ds.options.presets import PRESETS
from resist_ds.options.strategy import STRATEGIES
from resist_ds.protocol.coded import CHUNK
from resist_ds.protocol.sync import MEAN_CHUNK

AVERAGING = 8 * MEAN_CHUNK  # bytes of a sum in float64, on a CPU
CODING = {
    "sgd": 16 * CHUNK,
    "adamw": 24 * CHUNK,
}  # of what is written or read at a time; second moments take more


def memory_of(
    strategy: str,
    workers: int,
    slots: int,
    usage: Usage,
    blueprint: Blueprint,
    config: Config,
    device: Device,
) -> dict[str, int]:
    """The fields of a `Prediction` that are bytes of a rank, which plays one worker, alone or in a team.

    Args:
        usage: of a step on what a rank has of the batch.
    """
    layout, size = StateLayout.of(blueprint, config, slots), itemsize(config)
    weights = (layout.shared.parameters + slots * layout.block.parameters) * size
    optimizer = layout.numel * size - weights
    sharing, ranks = sharers(strategy, workers, config)
    held = _held(sharing, ranks, weights, usage.gradients, optimizer)
    step = _peak(sharing, ranks, slots, usage, sum(held), blueprint, config)
    transit = kept = sync = 0
    if STRATEGIES[strategy].averages:
        travel = config.optimizer_state == "travel"
        state = usage.state
        if sharing and STRATEGIES[sharing].spread:  # a lane synchronises what it has
            layout = StateLayout.of(blueprint, config, slots, ranks)
            state = held[0] + held[2]
            weights = -(-weights // ranks)
        transit = max(min(config.transit_mib << 20, weights), layout.block.exchanged(travel) * size)
        kept = _kept(layout, workers, config, device)
        sync = state + transit
        if device == "cpu":  # on a GPU all this is in host memory, or within the budget
            working = CODING[config.optimizer] if config.wire == "compact" and workers > 1 else AVERAGING
            sync += kept + working
            step += kept + (working if config.overlap_steps else 0)
    return {
        **dict(zip(("weights", "gradients", "optimizer"), held, strict=True)),
        "activations": usage.activations,
        "step": step,
        "transit": transit,
        "kept": kept,
        "sync": sync,
    }


def sharers(strategy: str, workers: int, config: Config) -> tuple[str | None, int]:
    """By which strategy so many ranks share each step of a net; (None, 1): each rank is alone.

    Args:
        workers: W; of a strategy in lockstep, the ranks.
    """
    if STRATEGIES[strategy].lockstep:
        return strategy, workers
    assert isinstance(config.team_size, int)
    return (config.team_strategy, config.team_size) if config.team_size > 1 else (None, 1)


def _kept(layout: StateLayout, workers: int, config: Config, device: Device) -> int:
    """Host memory that a worker's `--wire compact` and `--overlap_steps` keep beside its vector, in bytes."""
    tensors = []
    if config.wire == "compact" and workers > 1:  # the reference and the errors, float32
        slices = config.team_size if config.inside and not config.inside.spread else 1
        assert isinstance(slices, int)
        tensors += [-(-4 * layout.shared.matrices // slices)] * 2
    if config.overlap_steps and workers > 1:  # of shared what takes part, and once more what was sent
        sent = layout.shared.exchanged(config.optimizer_state == "travel")
        tensors += [layout.shared.numel * itemsize(config), sent * itemsize(config)]
    return sum(map(pinned_bytes, tensors) if device == "cuda" else tensors)


def _peak(
    sharing: str | None,
    ranks: int,
    slots: int,
    usage: Usage,
    held: int,
    blueprint: Blueprint,
    config: Config,
) -> int:
    """Bytes at the peak of a step, of which `held` are training state."""
    if sharing is None or (sharing == "ddp" and ranks == 1):
        return usage.peak
    if sharing == "ddp":
        return usage.peak_with_kept_gradients
    gathered = 0
    if STRATEGIES[sharing].spread_parameters and ranks > 1:
        # whole: the root's weights and gradients, those of one block, and of the next that is fetched
        root, *blocks = fsdp_units(blueprint, ranks, slots)
        gathered = (root + 2 * max(blocks)) * (gathered_itemsize(sharing, config) + itemsize(config))
    return held + usage.passes + gathered + _bucket(sharing)


def _held(
    sharing: str | None, ranks: int, weights: int, gradients: int, optimizer: int
) -> tuple[int, int, int]:
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
    }.get(sharing or "", (weights, gradients, optimizer))


def _bucket(strategy: str) -> int:
    """Bytes of the buffer that the presets of ZeRO let DeepSpeed have for gradients on their way."""
    if not strategy.startswith("zero"):
        return 0
    zero = read("deepspeed_config", str(PRESETS / f"{strategy}.json"))["zero_optimization"]
    return 4 * int(zero["reduce_bucket_size"])

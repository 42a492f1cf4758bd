"""DeepSpeed's fields as facts: which are passed on, and what the others say where they ask for nothing.

Of what a file says of the others nothing can be honoured here; but most of it asks for nothing: it is off, or
what DeepSpeed does anyway. (DeepSpeed's own configuration classes know that too, but import torch. A test
compares them with this page.) Imports no torch.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from resist_ds.options.json_file import cut, shown

# Fields of zero_optimization that decide nothing but how DeepSpeed does it: type, least value.
ZERO_PASSED_ON: dict[str, tuple[type, int]] = {
    "allgather_bucket_size": (int, 0),
    "allgather_partitions": (bool, 0),
    "contiguous_gradients": (bool, 0),
    "ignore_unused_parameters": (bool, 0),
    "memory_efficient_linear": (bool, 0),
    "overlap_comm": (bool, 0),
    "reduce_bucket_size": (int, 1),
    "reduce_scatter": (bool, 0),
    "round_robin_gradients": (bool, 0),
    "stage3_max_live_parameters": (int, 0),
    "stage3_max_reuse_distance": (int, 0),
    "stage3_model_persistence_threshold": (int, 0),
    "stage3_param_persistence_threshold": (int, 0),
    "stage3_prefetch_bucket_size": (int, 0),
    "sub_group_size": (int, 0),
    "use_multi_rank_bucket_allreduce": (bool, 0),
}

# Whatever these say, nothing here depends on it.
_IDLE = frozenset(
    {
        # DeepSpeed's own checkpoints, which are never written: ours hold every weight whole, from any stage
        "checkpoint",
        "zero_optimization.elastic_checkpoint",
        "zero_optimization.gather_16bit_weights_on_model_save",
        "zero_optimization.load_from_fp32_weights",
        "zero_optimization.stage3_gather_16bit_weights_on_model_save",
        "zero_optimization.stage3_gather_fp16_weights_on_model_save",
        # its data loader, its timers, and what it warns of
        "dataloader_drop_last",
        "timers",
        "vocabulary_size",
        # which optimizers it allows: the engines are given torch's own, and what that takes
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "optimizer.params.foreach",
        "optimizer.params.fused",
        "optimizer.params.torch_adam",
        # the way to NVMe disks, which is refused where it is asked for; Superchips
        "aio",
        "zero_optimization.offload_optimizer.buffer_count",
        "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        "zero_optimization.offload_optimizer.fast_init",
        "zero_optimization.offload_optimizer.nvme_path",
        "zero_optimization.offload_optimizer.pipeline_read",
        "zero_optimization.offload_optimizer.pipeline_write",
        # what DeepSpeed never reads, though its examples have it
        "cuda_visible_devices",
        # what only counts where another field, which is refused, is on
        "activation_checkpointing.number_checkpoints",
        "compile.double_buffer",
        "compile.free_activation_threshold",
        "compile.keep_int_input_tensors",
        "compile.offload_activation_pin_memory",
        "pipeline.grad_partitioned",
        "pipeline.partition",
        "pipeline.pipe_partitioned",
        "seq_parallel_communication_data_type",
        "zero_optimization.cpu_offload_use_pin_memory",
    }
)

# What DeepSpeed does where the field is not written, unless that is false or null.
_DEFAULTS: dict[str, Any] = {
    "bf16.check_grad_overflow": True,
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1.0,
    "managed_gradient_accumulation": True,
    "optimizer.params.adam_w_mode": True,
    "optimizer.params.bias_correction": True,
    "optimizer.params.dampening": 0,
    "optimizer.params.fp32_optimizer_states": True,
    "pipeline.activation_checkpoint_interval": 0,
    "scheduler.params.last_batch_iteration": -1,
    "sequence_parallel_size": 1,
    "tensor_parallel.autotp_size": 0,
    "zero_optimization.compute_grad_norm": True,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.override_module_apply": True,
    "zero_optimization.stage3_module_granularity_threshold": 0,
    "zero_optimization.module_granularity_threshold": 0,
    "zero_optimization.zero_hpz_partition_size": 1,
}

# Sections that are off unless their `enabled` is true; 0.19 has dropped some of them.
_SWITCHED = frozenset(
    {
        *("amp", "autotuning", "comet", "comms_logger", "csv_monitor", "curriculum_learning"),
        *("data_efficiency", "eigenvalue", "elasticity", "flops_profiler", "fp16", "hybrid_engine", "nebula"),
        *("progressive_layer_drop", "tensorboard", "torch_autocast", "wandb"),
    }
)

# Sections of which each field that asks for something is named; of others it is enough to name them.
_BY_FIELD = frozenset(
    {
        *("activation_checkpointing", "bf16", "compile", "data_types", "optimizer", "pipeline"),
        *("tensor_parallel", "zero_optimization.offload_optimizer"),
    }
)

_INSTEAD = {
    "activation_checkpointing": "leave it out and type --activation_checkpointing",
    "amp": "write bf16 in its place",
    "bf16": "leave it out, since masters are fp32 and gradients are checked",
    "cpu_offload_param": "leave it out",
    "csv_monitor": "leave it out, since metrics.jsonl has the figures",
    "fp16": "write bf16, since its loss scale is no state of a worker",
    "max_grad_norm": "write gradient_clipping",
    "tensorboard": "leave it out and type --log_with tensorboard",
    "torch_autocast": "write bf16 in its place",
    "wall_clock_breakdown": "leave it out, since metrics.jsonl has the times",
    "wandb": "leave it out and type --log_with wandb",
}


def is_open(value: object) -> bool:
    """Whether a value leaves it to others: null, or "auto" as in other programs that take such files."""
    return value is None or value == "auto"


def asked_for(name: str, value: Any, known: tuple[str, ...] = ()) -> Iterator[str]:
    """What a field that is not honoured here asks for, as words for the user: nothing, most of the time.

    Args:
        name: of the field, with those of its sections: `tensorboard.enabled`.
        known: other fields beside it, one of which may have been meant.
    """
    if is_open(value) or name in _IDLE:
        return
    if name in _DEFAULTS:
        expected = _DEFAULTS[name]
        if (value.lower() if isinstance(value, str) else value) != expected:
            yield f"{name} {shown(value)} cannot be honoured: it is {shown(expected)} here"
    elif isinstance(value, dict) and ("enabled" in value or name in _SWITCHED):
        switch = value.get("enabled")
        if not is_open(switch) and not isinstance(switch, bool):
            yield f"{cut(name)}.enabled is {shown(switch)}: write true, false or auto"
        elif switch is True:
            yield _refused(name, known)
    elif isinstance(value, dict):
        inside = [words for key, inner in value.items() for words in asked_for(f"{name}.{key}", inner)]
        yield from inside if name in _BY_FIELD or not inside else [_refused(name, known)]
    elif value is not False and value != []:
        yield _refused(name, known)


def _refused(name: str, known: tuple[str, ...]) -> str:
    first, last = name.partition(".")[0], cut(name.rpartition(".")[2])
    instead = _INSTEAD.get(last) or _INSTEAD.get(first)
    near = difflib.get_close_matches(last, known, 1, cutoff=0.8)
    return f"{cut(name)} cannot be honoured: {instead or 'leave it out'}" + (
        f" (did you mean {near[0]}?)" if near and not instead else ""
    )

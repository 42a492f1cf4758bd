"""DeepSpeed's JSON files as people have them: what is accepted, what is refused, and in which words.

That engines do what a file says is tested in tests/engines/test_engines.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config


def written(folder: Path, content: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return str(path)


def refusal(folder: Path, content: object, *flags: str) -> str:
    with pytest.raises(UserError) as raised:
        parse(["--deepspeed_config", written(folder, content), *flags])
    said = str(raised.value)
    assert said.isprintable() and "ds.json" in said
    return said.replace(str(folder / "ds.json"), "FILE")


def auto_throughout(scheduler: str, *names: str) -> dict[str, Any]:
    """A template that leaves all to the program which reads it."""
    auto = "auto"
    return {
        "fp16": {"enabled": auto, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
        "bf16": {"enabled": auto},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": auto, "betas": auto, "eps": auto, "weight_decay": auto},
        },
        "scheduler": {"type": scheduler, "params": {name: auto for name in names}},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "overlap_comm": True,
            "reduce_bucket_size": 2e6,
            "allgather_bucket_size": auto,
        },
        **{f"gradient_{name}": auto for name in ("accumulation_steps", "clipping")},
        "train_batch_size": auto,
        "train_micro_batch_size_per_gpu": auto,
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }


def test_auto_throughout_changes_nothing_but_optimizer_and_schedule(tmp_path: Path) -> None:
    content = auto_throughout("WarmupLR", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "warmup_type")
    file = written(tmp_path, content)
    config = parse(["--deepspeed_config", file])
    expected = Config(optimizer="adamw", schedule="deepspeed", deepspeed_config=file)
    assert config == expected


OFF: dict[str, Any] = {
    # one field each, as the public files have them
    "activation_checkpointing": {
        "partition_activations": False,
        "cpu_checkpointing": False,
        "contiguous_memory_optimization": False,
        "number_checkpoints": None,
        "profile": False,
    },
    "aio": {"block_size": 1048576, "queue_depth": 8, "overlap_events": True},
    "amp": {"enabled": False, "opt_level": "O1"},
    "autotuning": {"enabled": False, "fast": True},
    "checkpoint": {"tag_validation": "Warn"},
    "comms_config": {"verbose": False},
    "comms_logger": {"enabled": False, "prof_all": True},
    "communication_data_type": None,
    "csv_monitor": {"enabled": False, "job_name": "x"},
    "data_efficiency": {"enabled": False, "seed": 1},
    "dump_state": False,
    "elasticity": {"enabled": False, "max_train_batch_size": 64},
    "flops_profiler": {"enabled": False, "profile_step": 1, "module_depth": -1, "detailed": True},
    "fp16": {"enabled": False, "initial_scale_power": 16, "min_loss_scale": 1, "auto_cast": True},
    "gradient_predivide_factor": 1.0,
    "hybrid_engine": {"max_out_tokens": 512},
    "memory_breakdown": "auto",
    "prescale_gradients": False,
    "sparse_gradients": False,
    "tensorboard": {"output_path": "x"},
    "wall_clock_breakdown": False,
    "wandb": {"enabled": False, "project": "x"},
    "zero_allow_untested_optimizer": False,
    "zero_force_ds_cpu_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "cpu_offload": False,
        "load_from_fp32_weights": True,
        "offload_optimizer": {"device": "none", "nvme_path": "/x", "ratio": 0.3},
        "offload_param": {"device": "none", "buffer_count": 5},
        "stage3_gather_16bit_weights_on_model_save": True,
        "zero_hpz_partition_size": 1,
        "zero_quantized_gradients": False,
        "zero_quantized_weights": False,
    },
}


def test_what_is_off_asks_for_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, OFF)
    assert parse(["--deepspeed_config", file]) == Config(mixed_precision="no", deepspeed_config=file)


ON: list[tuple[str, dict[str, Any], str]] = [
    ("amp", {"enabled": True}, "amp cannot be honoured: write bf16 in its place"),
    (
        "activation_checkpointing",
        {"partition_activations": True, "profile": False},
        "activation_checkpointing.partition_activations cannot be honoured: leave it out and type "
        "--activation_checkpointing",
    ),
    (
        "bf16",
        {"bf16_optimizer_states": True},
        "bf16.bf16_optimizer_states cannot be honoured: leave it out, since masters are fp32",
    ),
    ("comms_logger", {"enabled": "yes"}, 'comms_logger.enabled is "yes": write true, false or auto'),
    ("elasticity", {"enabled": True, "a": 1}, "elasticity cannot be honoured: leave it out"),
    ("fp16", {"enabled": True, "loss_scale": 0}, "fp16 cannot be honoured: write bf16, since its loss scale"),
    ("sparse_attention", {"mode": "fixed", "block": 16}, "sparse_attention cannot be honoured: leave it out"),
    ("wandb", {"enabled": True}, "wandb cannot be honoured: leave it out and type --log_with wandb"),
]


def test_all_that_cannot_be_honoured_is_named_at_once(tmp_path: Path) -> None:
    """In one line, in the file's order, with what is wrong with values and with flags."""
    more = {
        "gradient_acculation_steps": 2,
        "prescale_gradients": True,
        "gradient_predivide_factor": 8,
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 3,
            "cpu_offload_param": True,
            "offload_param": {"device": "nvme"},
            "reduce_bucket_size": 0,
            "zenflow": {"topk_ratio": 0.1, "update_interval": 4},
            "zero_quantized_weights": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "0.1", "betas": [0.9], "amsgrad": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": -1, "foo": 1}},
    }
    said = refusal(tmp_path, {name: value for name, value, _ in ON} | more)
    expected = [words for _, _, words in ON] + [
        "gradient_acculation_steps cannot be honoured: leave it out (did you mean gradient_accumulation_step",
        "prescale_gradients cannot be honoured: leave it out",
        "gradient_predivide_factor 8 cannot be honoured: it is 1.0 here",
        "wall_clock_breakdown cannot be honoured: leave it out, since metrics.jsonl has the times",
        "zero_optimization.cpu_offload_param cannot be honoured",
        'zero_optimization.offload_param.device "nvme" cannot be honoured: write none',
        "zero_optimization.reduce_bucket_size is 0: write a whole number of at least 1, or auto",
        "and 3 more",
    ]
    places = [said.index(words) for words in expected]
    assert places == sorted(places)
    said = refusal(tmp_path, {name: more[name] for name in ("optimizer", "scheduler")})
    assert said == (
        'FILE: optimizer.params.lr is "0.1": write a number, or auto; optimizer.params.betas is [0.9]: write '
        "two numbers, [0.9, 0.999], or auto; optimizer.params.amsgrad cannot be honoured: leave it out; "
        "scheduler.params.warmup_num_steps is -1: write a whole number of at least 0, or auto; "
        "scheduler.params.foo cannot be honoured: leave it out; scheduler.params.total_num_steps is missing: "
        "write a whole number, or auto"
    )


def test_all_flags_that_say_otherwise_are_named_at_once(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}
    said = refusal(
        tmp_path, content, "--clip_grad=1", "--betas=0.7,0.9", "--optimizer=adamw", "--dtype=float64"
    )
    assert said == (
        "FILE: gradient_clipping makes --clip_grad 0.5, and --clip_grad is 1.0: type one of the two; "
        "optimizer.params.betas makes --betas 0.8,0.9, and --betas is 0.7,0.9: type one of the two; "
        "DeepSpeed computes in float32: type --dtype float32"
    )


def test_rounds_do_not_grow_by_a_scheduler_of_the_file(tmp_path: Path) -> None:
    params = {"warmup_num_steps": 3}
    said = refusal(tmp_path, {"scheduler": {"type": "WarmupLR", "params": params}}, "--local_steps_max=99")
    assert said.startswith("--local_steps_max follows --schedule (FILE: scheduler.type) step or cosine")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"gradient_clipping": -1}, "--clip_grad (FILE: gradient_clipping) is -1.0: type a finite number"),
        (
            {"train_batch_size": 0},
            "--batch_size (FILE: train_batch_size) is 0: type a finite number, at least 1",
        ),
        (
            {"train_micro_batch_size_per_gpu": -1},
            "--batch_size (FILE: train_micro_batch_size_per_gpu × gradient_accumulation_steps) is -1: type",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1]}}},
            "--betas (FILE: optimizer.params.betas) is '0.9,1.0': type two numbers, at least 0 and below 1",
        ),
        (
            {"optimizer": {"type": "SGD", "params": {"momentum": 0, "nesterov": True}}},
            "--nesterov (FILE: optimizer.params.nesterov) is for --optimizer (FILE: optimizer.type) sgd and",
        ),
        (
            {"gradient_accumulation_steps": 3},
            "--accumulation_steps (FILE: gradient_accumulation_steps) must divide --batch_size",
        ),
        ({"scheduler": {"type": []}}, "FILE: scheduler.type is []: write one of WarmupLR"),
        ({"train_batch_size": 1e30}, "FILE: train_batch_size is 1e+30: write a whole number, or auto"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto": write 0, 1, 2 or 3'),
        (
            {"zero_optimization": {"max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            "stage3_max_live_parameters says what zero_optimization.stage3_max_live_parameters says too",
        ),
    ],
)
def test_what_is_wrong_with_a_value_names_its_field(
    content: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert words in refusal(tmp_path, content)


def test_an_engine_of_its_own_has_the_whole_batch(tmp_path: Path) -> None:
    """In `resist`; where all ranks share an engine, their number decides, which nobody knows yet."""
    content = {"train_batch_size": 64, "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}
    file = written(tmp_path, content)
    config = parse(["--deepspeed_config", file])
    assert (config.batch_size, config.accumulation_steps) == (64, 4)
    assert parse(["--deepspeed_config", file, "--strategy", "zero1"]).batch_size == Config.default(
        "batch_size"
    )


def test_old_names_are_understood(tmp_path: Path) -> None:
    content = {
        "bfloat16": {"enabled": True},
        "zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True},
    }
    assert parse(["--deepspeed_config", written(tmp_path, content)]).mixed_precision == "bf16"
    assert (
        parse(["--deepspeed_config", written(tmp_path, {"zero_optimization": False})]).mixed_precision == "no"
    )

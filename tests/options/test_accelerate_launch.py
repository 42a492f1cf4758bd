"""What `accelerate launch` was asked for is what is trained, or one line says which flag is missing.

The variables are those that the installed accelerate itself makes of a configuration file.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from resist_ds.errors import UserError
from resist_ds.options.accelerate_launch import check, on_cpu
from resist_ds.options.command_line import parse

# accelerate's own templates (examples/config_yaml_templates), and what `accelerate config` writes.
DEEPSPEED = {"distributed_type": "DEEPSPEED", "num_processes": 2}
FSDP = {
    "distributed_type": "FSDP",
    "num_processes": 2,
    "fsdp_config": {
        "fsdp_activation_checkpointing": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_forward_prefetch": False,
        "fsdp_offload_params": False,
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_sync_module_states": True,
        "fsdp_use_orig_params": True,
    },
}
MULTI = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "machine_rank": 0}
DYNAMO = MULTI | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}
ZERO = {
    "zero_stage": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
    "zero3_save_16bit_model": True,
}
FLAGS = "--strategy zero2 --accumulation_steps 4 --clip_grad 1.0"


def fsdp(**changed: Any) -> dict[str, Any]:
    return FSDP | {"fsdp_config": FSDP["fsdp_config"] | {f"fsdp_{name}": v for name, v in changed.items()}}


def dynamo(**changed: Any) -> dict[str, Any]:
    return MULTI | {"dynamo_config": {f"dynamo_{name}": value for name, value in changed.items()}}


def deepspeed(**changed: Any) -> dict[str, Any]:
    return DEEPSPEED | {"deepspeed_config": changed}


def parallel(**sizes: int) -> dict[str, Any]:
    config = {f"parallelism_config_{name}_size": size for name, size in sizes.items()}
    return fsdp(version=2) | {"parallelism_config": config}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else accelerate counts cores, and says so
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    (tmp_path / "copy.json").write_text('{ "zero_optimization" : { "stage" : 1 } }')
    return tmp_path


def variables(config: dict[str, Any], *flags: str) -> dict[str, str]:
    """What accelerate passes on to the program that it starts."""
    Path("accelerate.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE"} | config))
    words = ["--config_file", "accelerate.yaml", "--main_process_port", "0", *flags, "train.py"]
    given, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if given.use_deepspeed:
        given.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(given)[1]
    if given.multi_gpu or given.use_fsdp or given.use_megatron_lm:
        return prepare_multi_gpu_env(given)
    return prepare_simple_launcher_cmd_env(given)[1]


WISHES: dict[str, tuple[dict[str, Any], str, str]] = {  # config, what is answered, what grants it
    "a DeepSpeed file": (
        deepspeed(deepspeed_config_file="zero.json", zero3_init_flag=False),
        "DeepSpeed with zero.json: type --strategy zero1 --deepspeed_config zero.json",
        "--strategy zero1 --deepspeed_config copy.json",
    ),
    "the same, in each sub-ResNet": (
        deepspeed(deepspeed_config_file="zero.json"),
        "DeepSpeed with zero.json: type --strategy zero1 --deepspeed_config zero.json",
        "--deepspeed_config zero.json",
    ),
    "a DeepSpeed file that is not there": (
        deepspeed(deepspeed_config_file="nowhere.json"),
        "DeepSpeed with nowhere.json: type --deepspeed_config nowhere.json",
        "",
    ),
    "DeepSpeed's fields": (
        deepspeed(**ZERO),
        f"DeepSpeed's ZeRO 2, 4 accumulation steps, gradients clipped at 1.0: type {FLAGS}",
        FLAGS,
    ),
    "DeepSpeed by its default": (
        DEEPSPEED,
        "DeepSpeed's ZeRO 2: type --strategy zero2",
        "--strategy zero2",
    ),
    "DeepSpeed's stage 0": (
        deepspeed(zero_stage=0),
        "DeepSpeed's stage 0: type --strategy ddp",
        "--strategy ddp",
    ),
    "parameters elsewhere": (
        deepspeed(zero_stage=3, offload_param_device="cpu"),
        "parameters on cpu, which ResIST has not: write offload_param_device: none",
        "",
    ),
    "state elsewhere": (
        deepspeed(zero_stage=1, offload_optimizer_device="cpu"),
        "DeepSpeed's ZeRO 1, the optimizer's state on cpu: type --strategy zero1 --deepspeed_config FILE "
        "with zero_optimization.offload_optimizer.device in it",
        "",
    ),
    "FSDP": (FSDP, "FSDP: type --strategy fsdp", "--strategy fsdp"),
    "FSDP 2": (fsdp(version=2), "FSDP: type --strategy fsdp", "--strategy fsdp"),
    "FSDP as ZeRO 2": (
        fsdp(sharding_strategy="SHARD_GRAD_OP"),
        "FSDP's SHARD_GRAD_OP: type --strategy zero2",
        "--strategy zero2",
    ),
    "FSDP 2 as ZeRO 2": (
        fsdp(version=2, reshard_after_forward=False),
        "FSDP's SHARD_GRAD_OP: type --strategy zero2",
        "--strategy zero2",
    ),
    "FSDP in groups": (
        fsdp(sharding_strategy="HYBRID_SHARD"),
        "FSDP's HYBRID_SHARD, which ResIST has not: write fsdp_sharding_strategy: FULL_SHARD",
        "",
    ),
    "FSDP on the CPU": (
        fsdp(offload_params=True),
        "FSDP's parameters on the CPU, which ResIST has not: write fsdp_offload_params: false",
        "",
    ),
    "FSDP and recomputing": (
        fsdp(activation_checkpointing=True),
        "FSDP, activation checkpointing: type --strategy fsdp --activation_checkpointing true",
        "--strategy fsdp --activation_checkpointing true",
    ),
    "dynamo": (DYNAMO, "dynamo's INDUCTOR: type --compile true", "--compile true"),
    "another compiler": (
        dynamo(backend="EAGER"),
        "dynamo's EAGER, which ResIST has not: write dynamo_backend: INDUCTOR",
        "",
    ),
    "another mode": (
        dynamo(backend="INDUCTOR", mode="max-autotune", use_fullgraph=True),
        "dynamo's mode max-autotune, dynamo's use_fullgraph, which ResIST has not: write dynamo_mode: "
        "default, write dynamo_use_fullgraph: false",
        "",
    ),
    "tensors in parts": (
        parallel(dp_shard=1, tp=2),
        "tp_size 2, which ResIST has not: write parallelism_config_tp_size: 1",
        "",
    ),
}


@pytest.mark.parametrize("name", WISHES)
def test_what_no_option_says_is_answered_and_what_one_says_is_granted(name: str) -> None:
    config, answer, flags = WISHES[name]
    environment = variables(config)
    with pytest.raises(UserError) as error:
        check(parse([]), environment)
    assert str(error.value) == f"accelerate launch asks for {answer}"
    if flags:
        check(parse(flags.split()), environment)
        wrong = flags.replace("zero2", "zero1").replace("4", "2")
        if wrong != flags:  # something like it is not the same
            with pytest.raises(UserError, match="accelerate launch asks for"):
                check(parse(wrong.split()), environment)


@pytest.mark.parametrize(
    "config",
    [
        MULTI,
        MULTI | {"mixed_precision": "bf16"},
        {"distributed_type": "NO", "num_processes": 1},
        {"distributed_type": "NO", "num_processes": 1, "mixed_precision": "bf16"},
        dynamo(backend="NO", mode="max-autotune"),
        {"distributed_type": "NO", "num_processes": 1, "use_cpu": True},
    ],
)
def test_what_is_off_or_the_default_asks_for_nothing(config: dict[str, Any]) -> None:
    environment = variables(config)
    check(parse([]), environment)
    assert on_cpu(environment) == config.get("use_cpu", False)


def test_plain_python_asks_for_nothing() -> None:
    check(parse([]), {})
    assert not on_cpu({})


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("USE_MEGATRON_LM", "Megatron-LM, which ResIST has not: launch with --multi_gpu"),
        ("CPU_AFFINITY", "CPU affinity, which ResIST has not: launch without --enable_cpu_affinity"),
    ],
)
def test_what_accelerate_starts_only_with_other_packages(name: str, answer: str) -> None:
    with pytest.raises(UserError, match=f"^accelerate launch asks for {answer}$"):
        check(parse([]), {f"ACCELERATE_{name}": "true"})

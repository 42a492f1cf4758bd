"""What `accelerate launch` asks of the program that it starts, from its flags or its configuration file.

Programs with an `Accelerator` find these wishes in it. Here the options decide: a wish that an option says as
well is granted, what is off or accelerate's default asks for nothing, and any other is answered with the flag
to type, so that nobody trains something else than was asked for. (`--mixed_precision` alone is taken over: it
is that option's default.) Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resist_ds.errors import UserError
from resist_ds.options.json_file import read
from resist_ds.options.strategy import STRATEGIES

if TYPE_CHECKING:
    from resist_ds.options.config import Config

Environment = Mapping[str, str]


@dataclass(frozen=True)
class _Wish:
    """Something that was asked for and no option says.

    Attributes:
        what: in accelerate's words.
        flags: what to type for it, or nothing where there is nothing like it here.
        instead: what to write in accelerate's configuration then.
    """

    what: str
    flags: str = ""
    instead: str = ""


def check(config: Config, environment: Environment) -> None:
    """Raises `UserError`, of one line, where something else was asked for than the options say."""
    wishes = [wish for ask in _ASKED for wish in ask(config, environment)]
    strange = [wish for wish in wishes if not wish.flags]
    if strange:
        what, instead = (
            ", ".join(each) for each in zip(*((w.what, w.instead) for w in strange), strict=True)
        )
        raise UserError(f"accelerate launch asks for {what}, which ResIST has not: {instead}")
    if wishes:
        flags = " ".join(dict.fromkeys(wish.flags for wish in wishes))
        raise UserError(f"accelerate launch asks for {', '.join(wish.what for wish in wishes)}: type {flags}")


def on_cpu(environment: Environment) -> bool:
    """Whether `accelerate launch --cpu` has started this process, which is to leave GPUs alone."""
    return _true(environment, "ACCELERATE_USE_CPU")


def _deepspeed(config: Config, environment: Environment) -> Iterator[_Wish]:
    if not _true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return
    ours = _content(config.deepspeed_config)
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        theirs = _content(file)
        if not ours or ours != theirs:
            stage = _section(theirs, "zero_optimization").get("stage", 0)
            strategy = f"--strategy zero{stage} " if f"zero{stage}" in STRATEGIES else ""
            if strategy and config.sharing == f"zero{stage}":
                strategy = ""
            yield _Wish(f"DeepSpeed with {file}", f"{strategy}--deepspeed_config {file}")
    else:
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # accelerate's default
        zero = _section(ours, "zero_optimization")
        if stage == "0" and not (config.sharing == "ddp" or ours):
            yield _Wish("DeepSpeed's stage 0", "--strategy ddp")
        elif stage != "0" and f"zero{stage}" not in (config.sharing, f"zero{zero.get('stage')}"):
            yield _Wish(f"DeepSpeed's ZeRO {stage}", f"--strategy zero{stage}")
        place = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        if place != "none" and place != _section(zero, "offload_optimizer").get("device"):
            yield _Wish(
                f"the optimizer's state on {place}",
                "--deepspeed_config FILE with zero_optimization.offload_optimizer.device in it",
            )
        place = environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
        if place != "none":
            yield _Wish(f"parameters on {place}", instead="write offload_param_device: none")


def _steps(config: Config, environment: Environment) -> Iterator[_Wish]:
    """What accelerate passes on for DeepSpeed's sake."""
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "none", "None", "1") and steps != str(config.accumulation_steps):
        yield _Wish(f"{steps} accumulation steps", f"--accumulation_steps {steps}")
    norm = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if norm not in ("auto", "none", "None") and _number(norm) != config.clip_grad:
        yield _Wish(f"gradients clipped at {norm}", f"--clip_grad {norm}")


def _fsdp(config: Config, environment: Environment) -> Iterator[_Wish]:
    if not _true(environment, "ACCELERATE_USE_FSDP"):
        return
    # FSDP 1 has strategies, by name or number; FSDP 2 has said the same by one boolean.
    kind = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if environment.get("FSDP_VERSION") == "2":
        kind = "SHARD_GRAD_OP" if environment.get("FSDP_RESHARD_AFTER_FORWARD") == "false" else "FULL_SHARD"
    same = {
        "FULL_SHARD": "fsdp",
        "1": "fsdp",
        "SHARD_GRAD_OP": "zero2",
        "2": "zero2",
        "NO_SHARD": "ddp",
        "3": "ddp",
    }
    if kind not in same:
        yield _Wish(f"FSDP's {kind}", instead="write fsdp_sharding_strategy: FULL_SHARD")
    elif config.sharing != same[kind]:
        how = "" if same[kind] == "fsdp" else f"'s {kind}"
        yield _Wish(f"FSDP{how}", f"--strategy {same[kind]}")
    if _true(environment, "FSDP_OFFLOAD_PARAMS"):
        yield _Wish("FSDP's parameters on the CPU", instead="write fsdp_offload_params: false")
    if _true(environment, "FSDP_ACTIVATION_CHECKPOINTING") and not config.activation_checkpointing:
        yield _Wish("activation checkpointing", "--activation_checkpointing true")


def _compile(config: Config, environment: Environment) -> Iterator[_Wish]:
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.upper() == "NO":
        return
    prefix = "ACCELERATE_DYNAMO"
    if backend.upper() != "INDUCTOR":
        yield _Wish(f"dynamo's {backend}", instead="write dynamo_backend: INDUCTOR")
    elif not config.compile:
        yield _Wish(f"dynamo's {backend}", "--compile true")
    mode = environment.get(f"{prefix}_MODE", "default")
    if mode != "default":
        yield _Wish(f"dynamo's mode {mode}", instead="write dynamo_mode: default")
    for name in ("use_fullgraph", "use_dynamic", "use_regional_compilation"):
        if _true(environment, f"{prefix}_{name.upper()}"):
            yield _Wish(f"dynamo's {name}", instead=f"write dynamo_{name}: false")


def _others(config: Config, environment: Environment) -> Iterator[_Wish]:
    """Ways to spread a net that are not of these."""
    if _true(environment, "ACCELERATE_USE_MEGATRON_LM"):
        yield _Wish("Megatron-LM", instead="launch with --multi_gpu")
    if _true(environment, "ACCELERATE_CPU_AFFINITY"):
        yield _Wish("CPU affinity", instead="launch without --enable_cpu_affinity")
    if not _true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    sizes = {
        name: environment.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    for name in ("tp", "cp", "sp"):
        if sizes[name] != "1":
            yield _Wish(f"{name}_size {sizes[name]}", instead=f"write parallelism_config_{name}_size: 1")
    if sizes["dp_shard"] != "1" and sizes["dp_replicate"] != "1":
        yield _Wish(
            f"dp_replicate_size {sizes['dp_replicate']} beside dp_shard_size {sizes['dp_shard']}",
            instead="write parallelism_config_dp_replicate_size: 1",
        )
    elif sizes["dp_replicate"] != "1" and config.sharing != "ddp":
        yield _Wish(f"dp_replicate_size {sizes['dp_replicate']}", "--strategy ddp")


_ASKED: tuple[Callable[[Config, Environment], Iterator[_Wish]], ...] = (
    _deepspeed,
    _fsdp,
    _steps,
    _compile,
    _others,
)


def _true(environment: Environment, name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes", "y", "on", "t")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _content(file: str | None) -> Mapping[str, Any]:
    """A DeepSpeed file's fields, as far as it can be read: as an option it is answered for."""
    try:
        return read("deepspeed_config", file) if file else {}
    except UserError:
        return {}


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}

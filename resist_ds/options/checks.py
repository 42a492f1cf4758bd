"""Which options cannot be meant together: said in one line, before anything heavy is imported."""

from typing import Any

from resist_ds.errors import UserError
from resist_ds.options.option import TIMM


def check_combinations(config: Any) -> None:
    """Refuse what cannot be meant together, with one line.

    Args:
        config: a `Config`, which this module is part of, in its constructor.

    Raises:
        UserError: what to type instead.
    """
    needs_files = config.dataset not in ("digits", "synthetic")
    if config.epochs == 0:
        raise UserError("--epochs is 0: type a number above 0")
    if not config.model:
        raise UserError("--model is empty: type a name such as preact_resnet_small")
    if not config.output_dir:
        raise UserError("--output_dir is empty: type a folder, for instance runs/latest")
    if needs_files and not config.data_dir:
        raise UserError(f"--dataset {config.dataset} needs a folder: type --data_dir FOLDER")
    if config.data_dir is not None and not needs_files:  # to train on digits by mistake would be silent
        raise UserError(f"--data_dir is not for --dataset {config.dataset}: type another, or --data_dir null")
    if config.download and not config.dataset.startswith("cifar") and config.from_pretrained != TIMM:
        raise UserError(
            f"--download cannot fetch {config.dataset}: type --dataset cifar10 or cifar100, or "
            f"--from_pretrained {TIMM}"
        )
    if config.batch_size % config.accumulation_steps:
        raise UserError(
            f"--accumulation_steps must divide --batch_size: type a divisor of {config.batch_size}"
        )
    if config.nesterov and (config.optimizer != "sgd" or config.momentum == 0):
        raise UserError("--nesterov is for --optimizer sgd and a --momentum above 0: type --nesterov false")
    for name in ("betas", "eps"):
        if config.optimizer != "adamw" and getattr(config, name) != config.default(name):
            raise UserError(f"--{name} is for --optimizer adamw: leave it out, or type that")
    if config.dtype == "float64" and config.mixed_precision != "no":
        raise UserError("--dtype float64 excludes mixed precision: type --mixed_precision no")
    if config.rounds is not None and config.warmup_rounds > config.rounds:
        raise UserError(f"--warmup_rounds exceeds --rounds: type at most {config.rounds}")
    _check_strategy(config)
    _check_team(config)
    _check_exchange(config)
    _check_rounds(config)
    if not config.resume:
        raise UserError("--resume is empty: type never, auto or the folder of a checkpoint")
    if config.from_pretrained == "":
        raise UserError(f"--from_pretrained is empty: type a file of weights, or {TIMM}")


def _check_strategy(config: Any) -> None:
    strategy, depth = config.strategy, config.strategy == "stochastic_depth"
    if not config.way.partitions and (config.warmup_rounds or (config.min_blocks and not depth)):
        name = "min_blocks" if config.min_blocks and not depth else "warmup_rounds"
        raise UserError(f"--{name} is for --strategy resist: with {strategy} all hold the full net")
    if depth and not config.min_blocks:
        raise UserError(
            "--strategy stochastic_depth runs --min_blocks random pool blocks a step: type their number"
        )
    if config.compile_mode != "default" and not config.compile:
        raise UserError(f"--compile_mode {config.compile_mode} is for --compile true: type that too")
    if config.compile_mode != "default" and config.accumulation_steps > 1:
        raise UserError(  # what a replayed pass has returned is overwritten by the next one
            f"--compile_mode {config.compile_mode} cannot add up gradients: type --accumulation_steps 1, "
            "or --compile_mode default"
        )
    if depth and config.compile:
        raise UserError("--compile is not for --strategy stochastic_depth, whose net always changes")
    if (config.way.lockstep or depth) and config.optimizer_state == "reset":
        raise UserError(
            f"--optimizer_state reset is not for --strategy {strategy}, which never re-partitions"
        )
    if config.way.lockstep and config.on_nan == "skip":
        raise UserError(
            f"--on_nan skip is not for --strategy {strategy}: a bad gradient reaches all ranks at once"
        )
    if config.deepspeed_config == "":
        raise UserError("--deepspeed_config is empty: type DeepSpeed's JSON file")
    if config.deepspeed_config is not None and not (config.way.partitions or config.way.stage):
        raise UserError(f"--deepspeed_config is for --strategy resist and zero1 to zero3, not for {strategy}")
    if config.deepspeed_config is not None and config.warmup_rounds:
        raise UserError("--warmup_rounds is not for --deepspeed_config, whose engines keep their size")
    engines = bool(config.inside and config.inside.spread) or config.deepspeed_config is not None
    if engines and config.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 is not for FSDP2 and DeepSpeed here: type bf16")
    if engines and config.compile:
        raise UserError("--compile is not for FSDP2 and DeepSpeed here: leave it out")
    if engines and config.channels_last:
        raise UserError("--channels_last is not for FSDP2 and DeepSpeed here: leave it out")
    if config.inside and config.inside.stage and config.dtype == "float64":
        name = f"--strategy {strategy}" if config.way.stage else f"--team_strategy {config.team_strategy}"
        raise UserError(f"{name} computes in float32: type --dtype float32")
    if config.deepspeed_config is None and config.schedule == "deepspeed":
        raise UserError("--schedule deepspeed needs a --deepspeed_config with a scheduler in it")


def _check_team(config: Any) -> None:
    """What is typed of teams, against the rest; how many ranks there are is not known yet."""
    if config.team_size != "auto" and type(config.team_size) is not int:
        raise UserError(f"--team_size is {config.team_size!r}: type a whole number or auto")
    if config.team_size == 1:
        if config.team_strategy != config.default("team_strategy"):
            raise UserError(
                f"--team_strategy {config.team_strategy} is for teams of several ranks: type --team_size 2 "
                f"or more, or --strategy {config.team_strategy} for one net on all ranks"
            )
        return
    if not config.way.averages:
        raise UserError(
            f"--team_size is for --strategy resist and local_sgd, not for {config.strategy}, "
            + (
                "which is one team of all ranks"
                if config.way.lockstep
                else "which has one worker and one rank"
            )
        )
    stage = config.inside.stage
    if config.deepspeed_config is not None and stage is None:
        raise UserError(
            f"--deepspeed_config is for --team_strategy zero1 to zero3, not for {config.team_strategy}"
        )
    inside = f"--team_strategy {config.team_strategy}"
    if stage and config.warmup_rounds:
        raise UserError(f"--warmup_rounds is not for {inside}, whose engines keep their size")
    if stage and config.overlap_steps:
        raise UserError(
            f"--overlap_steps is not for {inside}, whose engines show their state between rounds: "
            "type --overlap_steps 0"
        )


def _check_exchange(config: Any) -> None:
    """What is typed of wire and overlap, against the rest."""
    if not config.way.averages and (config.wire != "exact" or config.overlap_steps):
        name = "overlap_steps" if config.overlap_steps else "wire"
        raise UserError(
            f"--{name} is for --strategy resist and local_sgd, not for {config.strategy}, which exchanges "
            "nothing at the end of a round"
        )
    if config.wire == "compact" and config.dtype == "float64":
        raise UserError("--wire compact writes float32 shorter: type --dtype float32, or --wire exact")
    if config.overlap_steps >= config.local_steps:
        raise UserError(
            f"--overlap_steps is {config.overlap_steps}: type less than --local_steps {config.local_steps}, "
            "or more of those"
        )
    if config.overlap_steps and config.deepspeed_config is not None:
        raise UserError(
            "--overlap_steps is not for --deepspeed_config, whose engines show their state between "
            "rounds: type --overlap_steps 0"
        )


def _check_rounds(config: Any) -> None:
    """What is typed of the rounds' length, against the rest."""
    if config.local_steps_max is None:
        return
    if not config.way.averages:
        raise UserError(
            f"--local_steps_max is for --strategy resist and local_sgd, not for {config.strategy}, whose "
            "rounds are no more than the steps between two records"
        )
    if config.local_steps_max < config.local_steps:
        raise UserError(
            f"--local_steps_max is {config.local_steps_max}: type at least {config.local_steps}, "
            "--local_steps, or fewer of those"
        )
    if config.schedule == "deepspeed":
        raise UserError(
            "--local_steps_max follows --schedule step or cosine: DeepSpeed's has a warm-up of its own "
            "and ends by steps"
        )

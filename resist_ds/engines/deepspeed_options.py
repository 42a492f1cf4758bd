"""What DeepSpeed is given: an engine's options, and the scheduler of its learning rates.

Made of a run's options and the DeepSpeed file, which have been found to agree (`Config`). Imports no torch.
"""

from resist_ds.errors import UserError
from resist_ds.options.config import Config
from resist_ds.options.deepspeed_file import DeepSpeedFile, Json
from resist_ds.options.presets import PRESETS

# DeepSpeed would make optimizers of its own, or refuse torch's.
_NEEDED: Json = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def engine_options(config: Config, ranks: int) -> Json:
    """What DeepSpeed's engine is given. Its learning rates are ours to set, step by step.

    Args:
        ranks: that share an engine: a team's, or all; a team divides a worker's batch, and all have one each.

    Raises:
        UserError: `train_batch_size` is not what the options make it.
    """
    found = _read(config)
    each = config.batch_size if config.way.lockstep else config.batch_size // ranks
    whole = each * ranks
    if found.total not in (None, whole):
        raise UserError(
            f"{found.file}: train_batch_size is {found.total}, and {whole // config.batch_size} × "
            f"--batch_size {config.batch_size} is {whole}: leave it out"
        )
    return {
        **_NEEDED,
        "steps_per_print": 1 << 60,
        **found.passed_on,
        "train_micro_batch_size_per_gpu": each // config.accumulation_steps,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.clip_grad,
        "bf16": {"enabled": config.mixed_precision == "bf16"},
        "zero_optimization": found.zero | {"stage": found.stage},
    }


def scheduler_of(config: Config) -> Json | None:
    """The file's scheduler, {"type": …, "params": {…}}, where it decides the learning rate."""
    return _read(config).scheduler if config.schedule == "deepspeed" else None


def resolved(scheduler: Json, config: Config, steps: int) -> Json:
    """A scheduler with numbers in place of "auto", which means no warm-up where none was typed.

    Args:
        steps: local steps of the whole run.
    """
    known = {
        "total_num_steps": steps,
        "warmup_num_steps": config.lr_warmup_steps,
        "warmup_max_lr": config.lr,
        "warmup_min_lr": 0.0,
    }
    params = {k: known.get(k, v) if v == "auto" else v for k, v in scheduler["params"].items()}
    # What no option says is left to DeepSpeed.
    return {"type": scheduler["type"], "params": {k: v for k, v in params.items() if v != "auto"}}


def _read(config: Config) -> DeepSpeedFile:
    """The file that was typed, or the preset of `--strategy` or `--team_strategy` zero1|zero2|zero3."""
    file = config.deepspeed_config or str(PRESETS / f"{config.sharing}.json")
    assert isinstance(config.team_size, int)
    return DeepSpeedFile(file, config.accumulation_steps, config.inside is None, config.team_size)

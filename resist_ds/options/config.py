"""Every option of a run: its name, type, default, meaning and limits.

`Config` is the one place where an option is declared; `--help`, the YAML files and the command line
(command_line.py) are all read off its fields. Imports neither torch nor timm, so that a mistake is answered
at once.
"""

from __future__ import annotations

import difflib
import math
import os
import typing
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any, Literal

from resist_ds.errors import UserError
from resist_ds.options.checks import check_combinations
from resist_ds.options.deepspeed_file import DeepSpeedFile
from resist_ds.options.json_file import joined
from resist_ds.options.option import option
from resist_ds.options.strategy import STRATEGIES, Strategy


def _precision_of_launcher() -> Any:
    """`accelerate launch --mixed_precision bf16` arrives as a variable; `Config` checks what is in it."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


@dataclass(frozen=True)
class Config:
    """All options of a run, checked. Raises `UserError` with one line where a value cannot be meant."""

    model: str = option(
        "preact_resnet_small",
        "A ResNet of timm (resnetv2_{18,34,50,101,152}, resnet{50,101,152}) or one of the paper's CIFAR nets "
        "(preact_resnet_small, preact_resnet{101,152,200}, preact_resnet101_narrow).",
        group="Model",
    )
    num_classes: int | None = option(None, "Outputs of the classifier; null: the data set's.", low=1)
    from_pretrained: str | None = option(
        None,
        "Weights to start from: a safetensors or .pth file of plain tensors by timm's names, or timm: its "
        "own of that model, from its cache. A head of another size starts anew.",
        free=True,
    )

    dataset: Literal["digits", "cifar10", "cifar100", "imagenet", "imagefolder", "synthetic"] = option(
        "digits",
        "digits comes with a package; imagenet, imagefolder: train/ and val/ (or test/) of class folders.",
        group="Data",
    )
    data_dir: str | None = option(
        None, "Folder of the data set; required by all but digits and synthetic.", free=True
    )
    download: bool = option(
        False, "Allow fetching cifar10 or cifar100 into data_dir, and timm's weights.", free=True
    )
    img_size: int | None = option(
        None, "Side of the square images in pixels; null: 224 for imagenet and imagefolder, else 32.", low=1
    )
    augment: bool = option(True, "Random crop, and horizontal flip where the data set allows it.")
    data_workers: int = option(
        4, "Processes per rank that decode image folders which do not fit in memory.", free=True
    )
    on_bad_image: Literal["stop", "skip"] = option(
        "stop",
        "An image that cannot be read ends the run when its round is saved, or its neighbour stands in.",
        free=True,
    )
    cache_mib: int = option(2048, "Image folders stay decoded in memory up to this size (MiB).", free=True)
    gpu_cache_mib: int = option(
        1024, "Decoded images stay on the GPU, if there is one, up to this size (MiB).", free=True
    )

    strategy: Literal["resist", "local_sgd", "stochastic_depth", "ddp", "fsdp", "zero1", "zero2", "zero3"] = (
        option(
            "resist",
            "resist, or a baseline: local_sgd (the full net on every worker, averaged after each round), "
            "stochastic_depth (one worker, of whose pool min_blocks random blocks run in a step), ddp, "
            "fsdp (FSDP2), zero1, zero2, zero3 (DeepSpeed).",
            group="Protocol",
        )
    )
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed's JSON file. With resist: each sub-ResNet in an engine of its own; null with zero1-3: "
        "ds_configs/zero1.json and so on.",
        free=True,
    )
    workers: int | None = option(
        None,
        "W, the number of sub-ResNets; null: one per rank, or 4 on one rank.",
        low=1,
        free=True,
    )
    team_size: int | Literal["auto"] = option(
        1,
        "G, consecutive ranks that play a worker together and share each of its steps; auto: the ranks of a "
        "machine. batch_size is divided among them.",
        low=1,
        free=True,
    )
    team_strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = option(
        "ddp", "How the ranks of a team share a step: as the baselines of these names do.", free=True
    )
    local_steps: int = option(50, "Steps that each worker takes alone between two synchronisations.", low=1)
    local_steps_max: int | None = option(
        None,
        "Rounds grow from local_steps to so many as the learning rate falls, with the square of its inverse; "
        "null: all are alike.",
        low=1,
    )
    overlap_steps: int = option(
        0,
        "Local steps at the end of a round behind which shared is synchronised; pool blocks follow when all "
        "are done. 0: the paper's protocol.",
        null="0",
    )
    wire: Literal["exact", "compact"] = option(
        "exact",
        "How a piece travels: its own bits; or compact, about a quarter of them: int8 differences and "
        "momentum, bf16 blocks.",
    )
    min_blocks: int = option(0, "Every sub-ResNet holds at least so many pool blocks.", null="0")
    warmup_rounds: int = option(
        0,
        "First rounds done as local SGD. In these each worker holds the FULL model, with its memory.",
        null="0",
    )
    optimizer_state: Literal["travel", "reset"] = option(
        "travel", "Momentum travels with its block and is averaged like it, or starts anew every round."
    )
    transit_mib: int = option(
        64,
        "Device memory (MiB) for blocks on their way in a synchronisation; one block at least.",
        low=1,
        free=True,
    )

    batch_size: int = option(128, "Images per worker and local step.", group="Training", low=1)
    accumulation_steps: int = option(1, "Equal micro-batches that a local step's batch is cut into.", low=1)
    epochs: float = option(
        160.0, "Passes over the training set by all workers together, rounded up to whole rounds."
    )
    rounds: int | None = option(None, "Number of rounds; wins over epochs.", low=1)
    optimizer: Literal["sgd", "adamw"] = option("sgd", "Optimizer of the local steps.")
    lr: float = option(0.01, "Peak learning rate.")
    momentum: float = option(0.9, "Momentum of SGD.", below=1)
    nesterov: bool = option(False, "Nesterov's form of the momentum (SGD).")
    betas: str = option("0.9,0.999", "AdamW's two decay rates, joined by a comma.", many=True)
    eps: float = option(1e-8, "AdamW's term that keeps a division from being one by zero.")
    weight_decay: float = option(5e-4, "Weight decay, on every parameter as in the paper.")
    label_smoothing: float = option(0.0, "Label smoothing of the training loss.", below=1, null="0")
    clip_grad: float = option(0.0, "Largest gradient norm of a sub-ResNet; 0 or null: no clipping.", null="0")
    schedule: Literal["step", "cosine", "constant", "deepspeed"] = option(
        "step",
        "Learning rate over the run; step: divided by 10 at 50 % and again at 75 % of training; deepspeed: "
        "the scheduler in --deepspeed_config.",
    )
    lr_warmup_steps: int = option(0, "Local steps of linear warm-up of the learning rate.", null="0")

    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        _precision_of_launcher,
        "Autocast; accelerate launch's --mixed_precision is the default.",
        group="Device",
    )
    dtype: Literal["float32", "float64"] = option(
        "float32", "Of the weights; float64 is for checking a run against a simulation."
    )
    channels_last: bool = option(
        False, "Channels-last memory format (faster convolutions on GPUs).", free=True
    )
    compile: bool = option(False, "torch.compile the sub-ResNet.", free=True)
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = option(
        "default",
        "torch.compile's mode; the other two replay the passes as CUDA graphs.",
        free=True,
    )
    tf32: bool | None = option(
        None,
        "float32 convolutions and products in TF32 on GPUs that have it: 3 digits, much faster; null: yes, "
        "but not with deterministic.",
        free=True,
    )
    deterministic: bool = option(
        False, "The same bits on every start on GPUs too: no kernel is chosen by its speed.", free=True
    )
    activation_checkpointing: bool = option(
        False,
        "Recompute activations in the backward pass: less memory, about a third more compute.",
        free=True,
    )
    cpu_threads: int = option(
        0,
        "CPU threads per rank; 0: the cores divided among the machine's ranks. A fixed number makes CPU "
        "results independent of the number of ranks.",
        free=True,
    )

    eval_every: int = option(
        10, "Rounds between evaluations; 0: only at the end.", group="Evaluation", free=True
    )
    eval_batch_size: int | None = option(None, "Images per forward pass; null: batch_size.", low=1, free=True)
    eval_memory: int | None = option(
        None,
        "MiB per rank for test activations that wait for the next block; null: what training has left.",
        low=1,
        free=True,
    )
    calibration_samples: int = option(
        1024, "Training images that set BatchNorm's statistics.", low=1, free=True
    )

    checkpoint_every: int | None = option(
        None,
        "Rounds between checkpoints; null: once an epoch, or by checkpoint_minutes; 0: only at the end.",
        group="Checkpoints",
        free=True,
    )
    checkpoint_minutes: float | None = option(None, "Minutes between checkpoints.", free=True)
    keep: int = option(3, "Checkpoints that stay in OUTPUT_DIR/checkpoints.", low=1, free=True)
    checkpoint_async: bool | None = option(
        None, "Write from a copy in host memory while training goes on; null: on GPUs.", free=True
    )
    checkpoint_errors: Literal["warn", "stop"] = option(
        "warn", "Whether a checkpoint that cannot be written (a full disk) ends the run.", free=True
    )
    resume: str = option(
        "never",
        "never; auto: from the newest sound checkpoint in OUTPUT_DIR, if any; or a checkpoint's folder.",
        free=True,
    )
    override: str | None = option(
        None,
        "Options, joined by commas, that a resumed run may have other values of: lr,epochs.",
        free=True,
        many=True,
    )
    grace: float = option(
        25.0, "Seconds after SIGTERM or SIGINT in which the round may end and be saved.", free=True
    )
    on_nan: Literal["stop", "skip"] = option(
        "stop", "A worker that meets NaN or Inf ends the run, or only its own round is dropped.", free=True
    )

    seed: int = option(0, "Decides weights, partitions and data.", below=2**63, group="Run")
    output_dir: str = option(
        "runs/latest", "Folder for metrics.jsonl and all else that the run writes.", free=True
    )
    log_with: Literal["wandb", "tensorboard", "trackio", "none"] = option(
        "wandb",
        "Tracker; wandb is offline unless a key, a login or wandb_project asks for more.",
        free=True,
    )
    wandb_project: str | None = option(
        None, "Project in the tracker, resist_ds by default; wandb is then asked to be online.", free=True
    )
    run_name: str | None = option(None, "Name of the run in the tracker.", free=True)
    progress: bool = option(True, "Progress bar.", free=True)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} is {getattr(self, name)!r}: type one of {', '.join(choices)}")
        if not self.deepspeed_config:
            self._check_values()
            return
        file = DeepSpeedFile(
            self.deepspeed_config, self.accumulation_steps, self.inside is None, self._ranks_of_a_worker
        )
        try:
            self._check_values()
        except UserError as error:
            raise UserError(file.named(str(error))) from None
        if wrong := file.contradictions(asdict(self), self.inside.stage if self.inside else None):
            raise UserError(f"{self.deepspeed_config}: {joined(wrong)}")

    def _check_values(self) -> None:
        for name, each in FIELDS.items():
            value, low, below = getattr(self, name), each.metadata["low"], each.metadata["below"]
            if isinstance(value, int | float) and not (low <= value < below):  # NaN fails every comparison
                limit = f"at least {low}" if below == math.inf else f"at least {low} and below {below}"
                raise UserError(f"--{name} is {value}: type a finite number, {limit}")
        # One writing, however they were typed: a resumed run compares it with the checkpoint's.
        object.__setattr__(self, "betas", ",".join(map(str, self.two_betas)))
        check_combinations(self)
        for name in self.overridden:
            if name not in (*SHAPING, *PLANNED):
                near = difflib.get_close_matches(name, SHAPING, 1)
                hint = f" (did you mean {near[0]}?)" if near else f". Those that do: {', '.join(SHAPING)}"
                raise UserError(f"--override {name!r}: no option of that name shapes training{hint}")

    @property
    def way(self) -> Strategy:
        """The facts of `--strategy`."""
        return STRATEGIES[self.strategy]

    @property
    def sharing(self) -> str | None:
        """By which strategy several ranks share each step of a net, a team or all; None: each is alone."""
        if self.way.lockstep:
            return self.strategy
        return self.team_strategy if self.team_size != 1 else None

    @property
    def inside(self) -> Strategy | None:
        """The facts of `sharing`."""
        return STRATEGIES[self.sharing] if self.sharing else None

    @property
    def _ranks_of_a_worker(self) -> int | None:
        """G, or None where it is not known yet."""
        return None if self.team_size == "auto" else self.team_size

    @property
    def two_betas(self) -> tuple[float, float]:
        """The numbers in `--betas`. Raises `UserError` where it holds anything else."""
        try:
            first, second = (float(beta) for beta in self.betas.strip("[()] ").split(","))
        except ValueError:
            first = second = -1
        if not (0 <= first < 1 and 0 <= second < 1):
            raise UserError(
                f"--betas is {self.betas!r}: type two numbers, at least 0 and below 1, such as 0.9,0.999"
            )
        return first, second

    def least_blocks(self, pool: int) -> int:
        """Lower bound of the pool blocks in a worker's vector: all of them unless the net is partitioned."""
        return self.way.least_blocks(pool, self.min_blocks)

    def test_scale(self, slots: int, pool: int) -> float:
        """Scale of the pool's residuals at test time."""
        return self.way.test_scale(slots, pool, self.min_blocks)

    def parameters_held(self, parameters: int, sub_parameters: int, ranks: int) -> int:
        """Parameters on a device: of the whole net, of a sub-ResNet, or a share of one of them."""
        held = self.way.parameters_held(parameters, sub_parameters, ranks)
        if self.inside and self.inside.spread_parameters and not self.way.lockstep:
            assert isinstance(self.team_size, int)
            held = -(-held // self.team_size)
        return held

    @property
    def overridden(self) -> tuple[str, ...]:
        """The options that `--override` names."""
        return tuple(
            name.strip().replace("-", "_") for name in (self.override or "").split(",") if name.strip()
        )

    @staticmethod
    def default(name: str) -> Any:
        """An option's value where nobody has typed one."""
        factory = FIELDS[name].default_factory
        return FIELDS[name].default if factory is MISSING else factory()

    def to_dict(self) -> dict[str, Any]:
        """All options as a plain dict; `Config(**config.to_dict()) == config`."""
        return asdict(self)


FIELDS: dict[str, Field[Any]] = {f.name: f for f in fields(Config)}
TYPES: dict[str, Any] = typing.get_type_hints(Config)
PLANNED = ("eval_every", "checkpoint_every", "checkpoint_minutes")
"""They decide which rounds end without an overlap, so with `--overlap_steps` they shape what is trained."""
SHAPING = tuple(name for name, each in FIELDS.items() if not each.metadata["free"])
CHOICES = {name: typing.get_args(t) for name, t in TYPES.items() if typing.get_origin(t) is Literal}

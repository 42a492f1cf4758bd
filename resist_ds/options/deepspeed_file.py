"""A DeepSpeed configuration file as options of a run: what it says is honoured, or refused by its name.

The file is one more place where options stand, beside YAML and the command line: `DeepSpeedFile` reads it,
and `Config` refuses a flag that says otherwise. What an engine is given is made of both, in engines. "auto"
means, as in other programs that take such files, what the options say. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from resist_ds.errors import UserError
from resist_ds.options.presets import find

Json = dict[str, Any]

# Fields that decide nothing but how DeepSpeed does it, and their types; they are passed on as they are.
_PASSED_ON: dict[str, type] = {"steps_per_print": int, "wall_clock_breakdown": bool}
_ZERO_PASSED_ON: dict[str, type] = {
    "allgather_bucket_size": int,
    "allgather_partitions": bool,
    "contiguous_gradients": bool,
    "overlap_comm": bool,
    "reduce_bucket_size": int,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "sub_group_size": int,
}
# What torch's own optimizers need.
_NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
_OPTIMIZERS = {"sgd": "sgd", "adamw": "adamw", "adam": "adamw"}  # DeepSpeed's Adam decouples weight decay too
_OF_OPTIMIZER = {"sgd": ("lr", "momentum", "nesterov", "weight_decay"), "adamw": ("lr", "weight_decay")}
_ONLY = {"betas": [0.9, 0.999], "eps": 1e-8, "adam_w_mode": True, "torch_adam": True, "dampening": 0}
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")  # the others set momentum too, or never end


def read(file: str) -> Json:
    """The file's contents. Raises `UserError` where it cannot be read, or is not a JSON object."""
    try:
        found = json.loads(find(file, ".json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--deepspeed_config {file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"--deepspeed_config {file} is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"--deepspeed_config {file} is no JSON object: write {{}} around its fields")
    return found


class DeepSpeedFile:
    """One file, checked field by field.

    Attributes:
        options: {option: (field, value)}.
        zero: of the section zero_optimization, without its stage.
        passed_on: other fields that DeepSpeed is given as they are.
    """

    def __init__(self, file: str, accumulation_steps: int = 1):
        self.file = file
        self._open_steps = accumulation_steps
        self.content = read(file)
        self.options: dict[str, tuple[str, Any]] = {}
        self.zero: Json = {}
        self.stage = 0
        self.scheduler: Json | None = None
        sections: dict[str, Callable[[Any], None]] = {
            "train_batch_size": lambda value: self._number("train_batch_size", value),
            "train_micro_batch_size_per_gpu": lambda value: None,  # in _batch
            "gradient_accumulation_steps": lambda value: None,
            "gradient_clipping": lambda value: self._option("clip_grad", "gradient_clipping", float, value),
            "bf16": self._bf16,
            "fp16": self._fp16,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "zero_optimization": self._zero,
            **{name: partial(self._typed, name, kind) for name, kind in _PASSED_ON.items()},
            **{name: partial(self._needed, name) for name in _NEEDED},
        }
        for name, value in self.content.items():
            if name not in sections:
                raise self._refused(name, ": leave it out")
            sections[name](value)
        self._batch()
        self.passed_on = {n: v for n, v in self.content.items() if n in _PASSED_ON and v != "auto"}

    def contradictions(self, options: Mapping[str, Any], strategy: str, stage: int | None) -> Iterator[str]:
        """What cannot be, as words for the user: a flag that says otherwise, a strategy of another stage.

        Args:
            options: a run's, by their names.
            stage: of ZeRO that the strategy is; None: it is none of ZeRO's.
        """
        for option, (name, value) in self.options.items():
            if options[option] != value:
                yield (
                    f"{name} makes --{option} {_shown(value)}, and --{option} is {_shown(options[option])}: "
                    "type one of the two"
                )
        if stage is not None and self.stage != stage:
            yield f"zero_optimization.stage is {self.stage}, and --strategy {strategy} is ZeRO {stage}"
        if options["schedule"] == "deepspeed":
            if self.scheduler is None:
                yield "--schedule deepspeed needs a scheduler in it: write one, or type another schedule"
            elif options["lr_warmup_steps"] and self.scheduler["params"].get("warmup_num_steps") != "auto":
                yield (
                    "scheduler.params.warmup_num_steps decides, and --lr_warmup_steps is "
                    f"{options['lr_warmup_steps']}: write auto, or leave the flag out"
                )
        if options["mixed_precision"] == "bf16" and self.stage == 0:
            yield "bf16 keeps fp32 masters from zero_optimization.stage 1 on, and it is 0: write 1"
        if options["dtype"] == "float64":
            yield "DeepSpeed computes in float32: type --dtype float32"

    def _refused(self, name: str, why: str) -> UserError:
        return UserError(f"{self.file}: {name} cannot be honoured{why}")

    def _section(self, name: str, value: Any, known: tuple[str, ...]) -> Json:
        if not isinstance(value, dict):
            raise UserError(f"{self.file}: {name} is {value!r}: write an object, {{…}}")
        for key in value:
            if key not in known:
                raise self._refused(f"{name}.{key}", ": leave it out")
        return value

    def _number(self, name: str, value: Any) -> None:
        if value != "auto" and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise UserError(f"{self.file}: {name} is {value!r}: write a number, or auto")

    def _typed(self, name: str, kind: type, value: Any) -> None:
        """Refuse what is neither "auto" nor of that type."""
        if kind is bool:
            if value != "auto" and not isinstance(value, bool):
                raise UserError(f"{self.file}: {name} is {value!r}: write true, false or auto")
            return
        self._number(name, value)
        if kind is int and value not in ("auto", int(value) if value != "auto" else 0):
            raise UserError(f"{self.file}: {name} is {value!r}: write a whole number, or auto")

    def _needed(self, name: str, value: Any) -> None:
        if value != _NEEDED[name]:
            raise self._refused(f"{name} {value!r}", f": it is {_shown(_NEEDED[name])} here")

    def _option(self, option: str, name: str, kind: type, value: Any) -> None:
        self._typed(name, kind, value)
        if value != "auto":
            self.options[option] = (name, kind(value))

    def _batch(self) -> None:
        """Batch sizes: a worker's batch is micro-batch × accumulation."""
        names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        given = [self.content.get(name, "auto") for name in names]
        for name, value in zip(names, given, strict=True):
            self._typed(name, int, value)
        micro, parts = given
        self._option("accumulation_steps", names[1], int, parts)
        if micro != "auto":
            size = int(micro) * (self._open_steps if parts == "auto" else int(parts))
            self.options["batch_size"] = (" × ".join(names), size)

    def _bf16(self, value: Any) -> None:
        enabled = self._section("bf16", value, ("enabled",)).get("enabled", "auto")
        self._typed("bf16.enabled", bool, enabled)
        if enabled != "auto":
            self.options["mixed_precision"] = ("bf16.enabled", "bf16" if enabled else "no")

    def _fp16(self, value: Any) -> None:
        if (value.get("enabled", False) if isinstance(value, dict) else value) not in (False, "auto"):
            raise self._refused("fp16", ": its loss scale is no state of a worker; write bf16")

    def _optimizer(self, value: Any) -> None:
        section = self._section("optimizer", value, ("type", "params"))
        kind = _OPTIMIZERS.get(str(section.get("type")).lower())
        if kind is None:
            raise UserError(
                f"{self.file}: optimizer.type is {section.get('type')!r}: write SGD, Adam or AdamW"
            )
        self.options["optimizer"] = ("optimizer.type", kind)
        params = section.get("params", {})
        self._section("optimizer.params", params, (*_OF_OPTIMIZER[kind], *_ONLY))
        for name, given in params.items():
            if name in _OF_OPTIMIZER[kind]:
                self._option(name, f"optimizer.params.{name}", bool if name == "nesterov" else float, given)
            elif given not in ("auto", _ONLY[name]):
                raise self._refused(f"optimizer.params.{name} {given}", f": it is {_ONLY[name]} here")

    def _scheduler(self, value: Any) -> None:
        section = self._section("scheduler", value, ("type", "params"))
        if section.get("type") not in SCHEDULERS:
            known = ", ".join(SCHEDULERS)
            raise UserError(f"{self.file}: scheduler.type is {section.get('type')!r}: write one of {known}")
        self.options["schedule"] = ("scheduler.type", "deepspeed")
        params = section.get("params", {})
        if not isinstance(params, dict):
            raise UserError(f"{self.file}: scheduler.params is {params!r}: write an object, {{…}}")
        self.scheduler = {"type": section["type"], "params": params}

    def _zero(self, value: Any) -> None:
        section = self._section("zero_optimization", value, ("stage", "offload_optimizer", *_ZERO_PASSED_ON))
        stage = section.get("stage", 0)
        if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
            raise UserError(f"{self.file}: zero_optimization.stage is {stage!r}: write 0, 1, 2 or 3")
        self.stage = stage
        for name in section.keys() & _ZERO_PASSED_ON.keys():
            self._typed(f"zero_optimization.{name}", _ZERO_PASSED_ON[name], section[name])
        self.zero = {name: v for name, v in section.items() if name != "stage" and v != "auto"}
        offload = self._section(
            "zero_optimization.offload_optimizer",
            section.get("offload_optimizer", {}),
            ("device", "pin_memory"),
        )
        if offload.get("device", "none") not in ("cpu", "none"):
            raise self._refused(
                f"zero_optimization.offload_optimizer.device {offload['device']!r}", ": write cpu or none"
            )
        if offload.get("device") == "cpu" and stage == 0:
            raise self._refused("zero_optimization.offload_optimizer at stage 0", ": write stage 1, 2 or 3")


def _shown(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value

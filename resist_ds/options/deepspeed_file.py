"""A DeepSpeed configuration file as options of a run: what it says is honoured, or refused by its name.

The file is one more place where options stand, beside YAML and the command line: `DeepSpeedFile` reads it,
and `Config` refuses a flag that says otherwise. What an engine is given is made of both, in engines. "auto"
means, as in other programs that take such files, what the options say. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from resist_ds.errors import UserError
from resist_ds.options.deepspeed_fields import ZERO_PASSED_ON, asked_for, is_open
from resist_ds.options.json_file import Json, cut, joined, read, shown

_OPTIMIZERS = {"sgd": "sgd", "adamw": "adamw", "adam": "adamw"}  # DeepSpeed's Adam decouples weight decay too
_OF_OPTIMIZER = {
    "sgd": ("lr", "momentum", "nesterov", "weight_decay"),
    "adamw": ("lr", "betas", "eps", "weight_decay"),
}
# {scheduler: its parameters that are numbers}; DeepSpeed's others set momentum too, or never end.
_SCHEDULERS = {
    "WarmupLR": ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"),
    "WarmupDecayLR": ("total_num_steps", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps"),
    "WarmupCosineLR": ("total_num_steps", "warmup_min_ratio", "warmup_num_steps", "cos_min_ratio"),
}
_MICRO, _PARTS, _TOTAL = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"


class DeepSpeedFile:
    """One file, checked field by field.

    Attributes:
        options: {option: (field, value)}.
        zero: of the section zero_optimization, without its stage.
        stage: of ZeRO; 0 is none.
        scheduler: {"type": …, "params": {…}}, some of them "auto", or None.
        passed_on: other fields that DeepSpeed is given as they are.
        total: images of a step by all ranks of an engine, or None.
    """

    def __init__(self, file: str, accumulation_steps: int = 1, alone: bool = True, team_size: int | None = 1):
        """
        Args:
            accumulation_steps: what was typed, for a file that leaves that open.
            alone: each engine is a rank's own, so that all of its batch is one worker's.
            team_size: ranks that share an engine and one worker's batch; None: not known yet.

        Raises:
            UserError: naming every field that no strategy can honour, or that is not what it must be.
        """
        self.file = file
        self.options: dict[str, tuple[str, Any]] = {}
        self.zero: Json = {}
        self.stage = 0
        self.scheduler: Json | None = None
        self.passed_on: Json = {}
        self._wrong: list[str] = []
        content = read("deepspeed_config", file)
        self.total = self._number(_TOTAL, content.pop(_TOTAL, None), int)
        self._team_size = team_size
        self._batch(content.pop(_MICRO, None), content.pop(_PARTS, None), accumulation_steps, alone)
        sections: dict[str, Callable[[str, Any], None]] = {
            "bf16": self._bf16,
            "gradient_clipping": lambda name, value: self._option("clip_grad", name, float, value),
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "steps_per_print": self._passed_on,
            "zero_optimization": self._zero,
        }
        if "bf16" not in content:  # its old name
            sections["bfloat16"] = self._bf16
        known = (*sections, _MICRO, _PARTS, _TOTAL)
        for name, value in content.items():
            if name not in sections:
                self._wrong += asked_for(name, value, known)
            elif not is_open(value):
                sections[name](name, value)
        if self._wrong:
            raise UserError(f"{file}: {joined(self._wrong)}")

    def contradictions(self, options: Mapping[str, Any], stage: int | None) -> list[str]:
        """What cannot be, as words for the user: a flag that says otherwise, a strategy of another stage.

        Args:
            options: a run's, by their names.
            stage: of ZeRO that the strategy, or a team's, is; None: it is none of ZeRO's.
        """
        found = [
            f"{name} makes --{option} {_typed(value)}, and --{option} is {_typed(options[option])}: "
            "type one of the two"
            for option, (name, value) in self.options.items()
            if options[option] != value
        ]
        if stage is not None and self.stage != stage:
            name = "strategy" if options["team_size"] == 1 else "team_strategy"
            found.append(
                f"zero_optimization.stage is {self.stage}, and --{name} {options[name]} is ZeRO {stage}"
            )
        if options["schedule"] == "deepspeed":
            if self.scheduler is None:
                found.append(
                    "--schedule deepspeed needs a scheduler in it: write one, or type another schedule"
                )
            elif options["lr_warmup_steps"] and self.scheduler["params"].get("warmup_num_steps") != "auto":
                found.append(
                    "scheduler.params.warmup_num_steps decides, and --lr_warmup_steps is "
                    f"{options['lr_warmup_steps']}: write auto, or leave the flag out"
                )
        if options["mixed_precision"] == "bf16" and self.stage == 0:
            found.append(
                "bf16 keeps fp32 masters from zero_optimization.stage 1 on, and it is 0: write 1, or type "
                "--mixed_precision no"
            )
        if options["dtype"] == "float64":
            found.append("DeepSpeed computes in float32: type --dtype float32")
        return found

    def named(self, message: str) -> str:
        """A message about options, with the fields that they come from."""
        for option, (field, _) in self.options.items():
            message = re.sub(rf"--{option}\b", rf"\g<0> ({self.file}: {field})", message, count=1)
        return message

    # --- values

    def _number(self, name: str, value: Any, kind: type, least: int | None = None) -> Any:
        """The number, or None where it is left open or wrong."""
        if is_open(value):
            return None
        words = "a whole number" if kind is int else "a number"
        right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
        if not right or (kind is int and value != int(value)):
            self._wrong.append(f"{name} is {shown(value)}: write {words}, or auto")
        elif least is not None and value < least:
            self._wrong.append(f"{name} is {shown(value)}: write {words} of at least {least}, or auto")
        else:
            return kind(value)
        return None

    def _switch(self, name: str, value: Any) -> bool | None:
        """True or false, or None where it is left open or wrong."""
        if is_open(value) or isinstance(value, bool):
            return value if isinstance(value, bool) else None
        self._wrong.append(f"{name} is {shown(value)}: write true, false or auto")
        return None

    def _section(self, name: str, value: Any) -> Json:
        """The fields of a section; none where it is left open or wrong."""
        if isinstance(value, dict):
            return value
        if not is_open(value):
            self._wrong.append(f"{name} is {shown(value)}: write an object, {{…}}")
        return {}

    def _option(self, option: str, name: str, kind: type, value: Any) -> None:
        found = self._switch(name, value) if kind is bool else self._number(name, value, kind)
        if found is not None:
            self.options[option] = (name, found)

    # --- sections

    def _batch(self, micro: Any, parts: Any, typed_parts: int, alone: bool) -> None:
        """Batch sizes: a worker's batch is micro-batch × accumulation × the ranks of its team."""
        self._option("accumulation_steps", _PARTS, int, parts)
        steps = self.options.get("accumulation_steps", ("", typed_parts))[1]
        size = self._number(_MICRO, micro, int)
        if size is not None and self._team_size is None:
            self._wrong.append(f"{_MICRO} is {size}, of a team whose size is auto: leave it out")
        elif size is not None and self._team_size is not None:
            times = f" × {self._team_size} ranks" if self._team_size > 1 else ""
            self.options["batch_size"] = (f"{_MICRO} × {_PARTS}{times}", size * steps * self._team_size)
        elif (alone or self._team_size != 1) and self.total is not None:
            self.options["batch_size"] = (_TOTAL, self.total)

    def _passed_on(self, name: str, value: Any) -> None:
        found = self._number(name, value, int)
        if found is not None:
            self.passed_on[name] = found

    def _bf16(self, name: str, value: Any) -> None:
        rest = dict(self._section(name, value))
        enabled = self._switch(f"{name}.enabled", rest.pop("enabled", None))
        if enabled is not None:
            self.options["mixed_precision"] = (f"{name}.enabled", "bf16" if enabled else "no")
        if enabled is not False:
            self._wrong += asked_for("bf16", rest)

    def _optimizer(self, name: str, value: Any) -> None:
        rest = dict(self._section(name, value))
        if not rest:
            return
        written, params = rest.pop("type", None), rest.pop("params", None)
        kind = _OPTIMIZERS.get(written.lower()) if isinstance(written, str) else None
        if kind is None:
            self._wrong.append(f"{name}.type is {shown(written)}: write SGD, Adam or AdamW")
            return
        self.options["optimizer"] = (f"{name}.type", kind)
        self._wrong += asked_for(name, rest)
        for key, given in self._section(f"{name}.params", params).items():
            field = f"{name}.params.{key}"
            if key not in _OF_OPTIMIZER[kind]:
                self._wrong += asked_for(field, given, _OF_OPTIMIZER[kind])
            elif key == "betas":
                self._betas(field, given)
            else:
                self._option(key, field, bool if key == "nesterov" else float, given)

    def _betas(self, name: str, value: Any) -> None:
        if is_open(value):
            return
        if not isinstance(value, list) or len(value) != 2:
            self._wrong.append(f"{name} is {shown(value)}: write two numbers, [0.9, 0.999], or auto")
            return
        found = [self._number(f"{name}[{i}]", each, float) for i, each in enumerate(value)]
        if None not in found:
            self.options["betas"] = (name, ",".join(map(str, found)))

    def _scheduler(self, name: str, value: Any) -> None:
        rest = dict(self._section(name, value))
        if not rest:
            return
        kind, params = rest.pop("type", None), rest.pop("params", None)
        if not isinstance(kind, str) or kind not in _SCHEDULERS:
            known = ", ".join(_SCHEDULERS)
            self._wrong.append(f"{name}.type is {shown(kind)}: write one of {known}")
            return
        self._wrong += asked_for(name, rest)
        kept: Json = {}
        for key, given in self._section(f"{name}.params", params).items():
            field = f"{name}.params.{key}"
            if key == "warmup_type":
                if given not in ("log", "linear") and not is_open(given):
                    self._wrong.append(f"{field} is {shown(given)}: write log, linear or auto")
                kept[key] = given
            elif key in _SCHEDULERS[kind]:
                found = self._number(field, given, int if key.endswith("steps") else float, 0)
                kept[key] = given if found is None else found
            else:
                self._wrong += asked_for(field, given, _SCHEDULERS[kind])
        kept = {key: given for key, given in kept.items() if given is not None}
        if "total_num_steps" in _SCHEDULERS[kind] and "total_num_steps" not in kept:
            self._wrong.append(f"{name}.params.total_num_steps is missing: write a whole number, or auto")
        self.options["schedule"] = (f"{name}.type", "deepspeed")
        self.scheduler = {"type": kind, "params": kept}

    def _zero(self, name: str, value: Any) -> None:
        if isinstance(value, bool):  # as very old files have it
            self.stage = int(value)
            return
        rest = dict(self._section(name, value))
        stage = rest.pop("stage", 0)
        if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
            self._wrong.append(f"{name}.stage is {shown(stage)}: write 0, 1, 2 or 3")
        else:
            self.stage = int(stage)
        known = (*ZERO_PASSED_ON, "stage", "offload_optimizer", "offload_param", "cpu_offload")
        for key, given in rest.items():
            field, passed_on = f"{name}.{key}", _with_stage(key)
            if key == "offload_optimizer":
                self._offload(field, given)
            elif key == "offload_param":
                device = self._section(field, given).get("device")
                if not is_open(device) and device != "none":
                    self._wrong.append(f"{field}.device {shown(device)} cannot be honoured: write none")
            elif key == "cpu_offload":  # its old name
                if self._switch(field, given):
                    self._offload(field, {"device": "cpu"})
            elif passed_on is None:
                self._wrong += asked_for(field, given, known)
            else:
                kind, least = ZERO_PASSED_ON[passed_on]
                found = (
                    self._switch(field, given) if kind is bool else self._number(field, given, kind, least)
                )
                if found is not None:
                    self._keep(passed_on, field, found)

    def _offload(self, name: str, value: Any) -> None:
        rest = dict(self._section(name, value))
        device = rest.pop("device", None)
        if is_open(device) or device == "none":
            return
        if device != "cpu":
            self._wrong.append(f"{name}.device {shown(device)} cannot be honoured: write cpu or none")
            return
        if self.stage == 0:
            self._wrong.append(f"{name} at stage 0 cannot be honoured: write stage 1, 2 or 3")
        pinned = self._switch(f"{name}.pin_memory", rest.pop("pin_memory", None))
        self._wrong += asked_for(name, rest)
        found = {"device": "cpu"} | ({} if pinned is None else {"pin_memory": pinned})
        self._keep("offload_optimizer", name, found)

    def _keep(self, key: str, field: str, value: Any) -> None:
        if key in self.zero:
            self._wrong.append(f"{field} says what zero_optimization.{key} says too: remove one of them")
        self.zero[key] = value


def _with_stage(key: str) -> str | None:
    """The name by which a field of zero_optimization is passed on; `stage3_` may be left out of it."""
    return next((name for name in (key, f"stage3_{key}") if name in ZERO_PASSED_ON), None)


def _typed(value: object) -> object:
    """A value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else cut(value) if isinstance(value, str) else value

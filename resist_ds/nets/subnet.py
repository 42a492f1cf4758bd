"""The sub-ResNet: one worker's net and training state, as flat vectors of which its tensors are views.

A worker's whole state is one vector, `[shared | slot 0 | … | slot K−1]`. Each of these parts is laid
out as `[parameters | optimizer state … | step counters]`, the first ones with matrices before one-dimensional
tensors. So a piece travels as one contiguous range, and a re-partition copies numbers into the same K slots:
the optimizer is never rebuilt, and a compiled graph stays valid. Gradients are ordinary tensors that autograd
makes and frees: they never travel, and a plain loop does the same, at the same speed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resist_ds.nets.blueprint import Blueprint, Shapes
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import low_precision
from resist_ds.nets.shadow import Shadow
from resist_ds.options.config import Config

StateDict = dict[str, dict[str, Tensor]]  # {name: {"parameter": …, "momentum_buffer": …}}

ALIGNMENT = 32  # elements; every tensor starts on a 128-byte boundary (of float32), as kernels prefer


def _padded(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _is_vector(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a norm's or a bias: few numbers, of which each counts."""
    return len(shape) < 2


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps per parameter tensor: vectors of its shape, and a step counter or none."""

    vectors: tuple[str, ...]
    counter: str | None = None

    @classmethod
    def of(cls, config: Config) -> "OptimizerState":
        if config.optimizer == "adamw":
            return cls(("exp_avg", "exp_avg_sq"), "step")
        return cls(("momentum_buffer",) if config.momentum else ())

    @property
    def kinds(self) -> frozenset[str]:
        """Names of all that is kept per parameter."""
        return frozenset((*self.vectors, *([self.counter] if self.counter else [])))

    @classmethod
    def carried(cls, config: Config) -> "OptimizerState":
        """What of it outlives a round: nothing under `--optimizer_state reset`."""
        return cls.of(config) if config.optimizer_state == "travel" else cls(())


@dataclass(frozen=True)
class PartLayout:
    """Where the tensors of one part of a worker's state (shared, or a slot) lie in that part's vector.

    Attributes:
        shapes: of whole tensors.
        lanes: among which each tensor's rows are spread (`shards`); the vector is that of one lane.
    """

    shapes: Shapes
    state: OptimizerState
    channels_last: bool = False
    lanes: int = 1

    @cached_property
    def held(self) -> Shapes:
        """Of what lies in the vector: a lane's rows, as many on each, the last ones perhaps unused."""
        if self.lanes == 1:
            return self.shapes
        return tuple((name, (-(-first // self.lanes), *rest)) for name, (first, *rest) in self.shapes)

    @cached_property
    def offsets(self) -> dict[str, int]:
        offsets, end = {}, 0
        for name, shape in sorted(self.held, key=lambda item: _is_vector(item[1])):
            offsets[name] = end
            end += _padded(math.prod(shape))
        return offsets

    @cached_property
    def matrices(self) -> int:
        """Elements that parameters of two or more dimensions take; the others come behind them."""
        return sum(_padded(math.prod(shape)) for _, shape in self.held if not _is_vector(shape))

    @cached_property
    def parameters(self) -> int:
        """Elements that the parameters take, padding included."""
        return sum(_padded(math.prod(shape)) for _, shape in self.held)

    @cached_property
    def numel(self) -> int:
        """Elements of the whole part: parameters, optimizer state and step counters."""
        counters = _padded(len(self.shapes)) if self.state.counter else 0
        return self.parameters * (1 + len(self.state.vectors)) + counters

    def exchanged(self, travel: bool) -> int:
        """Elements that a synchronisation carries: all, or the parameters alone."""
        return self.numel if travel else self.parameters

    def views(self, part: Tensor, row: int = 0) -> dict[str, Tensor]:
        """Views of a part's vector: row 0 the parameters, row i the optimizer's i-th state vector."""
        return {
            name: self._view(part, row * self.parameters + self.offsets[name], shape)
            for name, shape in self.held
        }

    def _view(self, part: Tensor, offset: int, shape: tuple[int, ...]) -> Tensor:
        flat = part.narrow(0, offset, math.prod(shape))
        if self.channels_last and len(shape) == 4:
            out, inner, height, width = shape
            return flat.view(out, height, width, inner).permute(0, 3, 1, 2)
        return flat.view(shape)

    def tensors(self, part: Tensor) -> StateDict:
        """{name: {"parameter" or the name of an optimizer state: view}}."""
        state = self.optimizer_views(part)
        return {name: {"parameter": view, **state[name]} for name, view in self.views(part).items()}

    def optimizer_views(self, part: Tensor) -> dict[str, dict[str, Tensor]]:
        """{name: {state name: view}}, as a torch optimizer keeps it per parameter."""
        views: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self.shapes}
        for row, state in enumerate(self.state.vectors, start=1):
            for name, view in self.views(part, row).items():
                views[name][state] = view
        if self.state.counter:
            counters = self.parameters * (1 + len(self.state.vectors))
            for i, (name, _) in enumerate(self.shapes):
                views[name][self.state.counter] = part[counters + i]
        return views


@dataclass(frozen=True)
class StateLayout:
    """Where the parts lie in a worker's vector; the first slots lie alike whatever the number of slots."""

    shared: PartLayout
    block: PartLayout
    slots: int

    @classmethod
    def of(cls, blueprint: Blueprint, config: Config, slots: int, lanes: int = 1) -> "StateLayout":
        """Of a worker with so many slots, or of what one of the lanes has of it."""
        state = OptimizerState.of(config)
        shared, block = (
            PartLayout(shapes, state, config.channels_last, lanes)
            for shapes in (blueprint.shared, blueprint.block)
        )
        return cls(shared, block, slots)

    @property
    def numel(self) -> int:
        return self.slot_offset(self.slots)

    def slot_offset(self, slot: int) -> int:
        return self.shared.numel + slot * self.block.numel

    def shared_part(self, vector: Tensor) -> Tensor:
        return vector.narrow(0, 0, self.shared.numel)

    def slot_part(self, vector: Tensor, slot: int) -> Tensor:
        return vector.narrow(0, self.slot_offset(slot), self.block.numel)

    def tensors(self, vector: Tensor, prefix: Callable[[int], str]) -> StateDict:
        """All tensors of a vector, named as in the sub-ResNet.

        Args:
            prefix: slot → what the names of its tensors begin with.
        """
        found = self.shared.tensors(self.shared_part(vector))
        for slot in range(self.slots):
            part = self.block.tensors(self.slot_part(vector, slot))
            found |= {prefix(slot) + name: tensors for name, tensors in part.items()}
        return found

    def without_state(self) -> "StateLayout":
        """The layout of a vector that holds parameters alone, for evaluation."""
        shared, block = (replace(part, state=OptimizerState(())) for part in (self.shared, self.block))
        return StateLayout(shared, block, self.slots)

    def whole(self) -> "StateLayout":
        """The layout of a vector that no lanes share."""
        shared, block = (replace(part, lanes=1) for part in (self.shared, self.block))
        return StateLayout(shared, block, self.slots)

    def only_parameters(self, vector: Tensor) -> Tensor:
        """A copy of a vector's parameters, laid out by `without_state`."""
        parts = [self.shared_part(vector)[: self.shared.parameters]]
        parts += [self.slot_part(vector, slot)[: self.block.parameters] for slot in range(self.slots)]
        return torch.cat(parts)

    def reset_optimizer(self, vector: Tensor) -> None:
        """Forget momentum, as the release does at every re-partition (`--optimizer_state reset`)."""
        self.shared_part(vector)[self.shared.parameters :].zero_()
        for slot in range(self.slots):
            self.slot_part(vector, slot)[self.block.parameters :].zero_()


def itemsize(config: Config) -> int:
    """Bytes of an element of a worker's state."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype.itemsize


class Worker:
    """One sub-ResNet's training state.

    Attributes:
        index: 0 … W−1.
        vector: parameters and optimizer state, laid out by `StateLayout`.
        scaler: the loss scale of fp16, which is part of a worker's state.
        spoilt: where its local steps of this round first met NaN or Inf, or None.
    """

    def __init__(self, index: int, vector: Tensor, scaler: torch.amp.GradScaler):
        self.index = index
        self.vector = vector
        self.scaler = scaler
        self.spoilt: str | None = None


def bind(module: nn.Module, views: Mapping[str, Tensor]) -> None:
    """Make the parameters of a meta-device module the given views, and give BatchNorm its buffers."""
    for name, view in views.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(view))
    use_batch_statistics(module, like=next(iter(views.values())))
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def use_batch_statistics(module: nn.Module, like: Tensor) -> None:
    """Make BatchNorm use batch statistics in training mode and touch no buffer; and give it buffers.

    Only evaluation writes these, and only evaluation mode reads them.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = False
            part.running_mean = like.new_zeros(part.num_features)
            part.running_var = like.new_ones(part.num_features)
            part.num_batches_tracked = torch.zeros((), dtype=torch.long, device=like.device)


class Subnet:
    """The one net on this rank's device, bound to a vector; the rank's workers take turns in it.

    Attributes:
        weights: what the optimizer updates, by timm's names; the net's own parameters, unless it computes
            with copies of them in low precision (see `Shadow`).
    """

    def __init__(
        self,
        blueprint: Blueprint,
        layout: StateLayout,
        config: Config,
        device: torch.device,
        vector: Tensor | None = None,
    ):
        """
        Args:
            vector: to bind it to; default: a new one, of zeros.
        """
        self.layout = layout
        if vector is None:
            vector = torch.zeros(layout.numel, dtype=getattr(torch, config.dtype), device=device)
        self.vector = vector
        self.module = blueprint.subnet(layout.slots)
        tensors = layout.tensors(vector, blueprint.block_prefix)
        bind(self.module, {name: each.pop("parameter") for name, each in tensors.items()})
        if config.activation_checkpointing:
            self.module.set_grad_checkpointing()  # type: ignore[operator]
        self.weights = dict(self.module.named_parameters())
        self.optimizer = optimizer_of(config, list(self.weights.values()))
        for name, parameter in self.weights.items():
            if tensors[name]:  # beforehand, since a parameter without a gradient would never get it
                self.optimizer.state[parameter] = tensors[name]
        low = low_precision(config)
        # DistributedDataParallel would average the copies' gradients: there autocast casts the weights.
        self._shadow = None if low is None or config.inside else self._shade(low, blueprint)
        self.refresh()
        self.module.train()

    def refresh(self) -> None:
        """Bring what the net computes with up to date with the vector; before each use of it."""
        if self._shadow is not None:
            self._shadow.cast()

    def collect(self) -> None:
        """After a backward pass: bring all gradients to the optimizer's parameters."""
        if self._shadow is not None:
            self._shadow.collect()

    def _shade(self, low: torch.dtype, blueprint: Blueprint) -> Shadow:
        """Put low-precision copies of its weights into the net."""
        layout = self.layout.without_state()
        shadow = torch.zeros(layout.numel, dtype=low, device=self.vector.device)
        shared = self.layout.shared_part(self.vector)[: self.layout.shared.parameters]
        slots = self.vector[self.layout.shared.numel :].view(self.layout.slots, self.layout.block.numel)
        pairs = [
            (shared, layout.shared_part(shadow)),
            (
                slots[:, : self.layout.block.parameters],
                shadow[layout.shared.numel :].view(layout.slots, layout.block.numel),
            ),
        ]
        copies = {
            name: each["parameter"] for name, each in layout.tensors(shadow, blueprint.block_prefix).items()
        }
        return Shadow(self.module, pairs, self.weights, copies)

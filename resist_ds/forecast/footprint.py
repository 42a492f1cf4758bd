"""What a local step takes, counted on fake tensors: live bytes at every operation, and multiply-adds.

The very `Subnet` of a run is built on tensors without storage, and one step (forward, backward, optimizer) is
dispatched through it; whatever an operation returns is live until Python or autograd lets it go. All that
can be seen there is a tensor: what a kernel takes for itself (cuDNN's workspaces) is not.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import autocast
from resist_ds.nets.subnet import StateLayout, Subnet
from resist_ds.options.config import Config

Device = Literal["cuda", "cpu"]
BATCHES = (2, 4)  # counted; both even, since a kernel might pad. A single image has no batch statistics


@dataclass(frozen=True)
class Usage:
    """What a step takes at one batch, in bytes.

    Attributes:
        state: the state vector and BatchNorm's buffers.
        gradients: all of them.
        activations: what the forward pass leaves for the backward pass, the images among it.
        live: peaks of all that is live, in the forward pass, the backward pass and the optimizer's step.
        beside: the same without finished gradients.
        multiply_adds: a number, no bytes: of both passes, recomputation included.
    """

    state: int
    gradients: int
    activations: int
    live: tuple[int, int, int]
    beside: tuple[int, int, int]
    multiply_adds: int

    @property
    def peak(self) -> int:
        return max(self.live)

    @property
    def peak_with_kept_gradients(self) -> int:
        """Where gradients live in buckets that are never freed, as DDP's do."""
        return max(self.beside) + self.gradients

    @property
    def passes(self) -> int:
        """Peak of what forward and backward take beside state and finished gradients."""
        return max(self.beside[:2]) - self.state

    def towards(self, other: "Usage", share: float) -> "Usage":
        """Between two numbers of slots. All counts are affine in it but for the peak of a phase, which may
        change its place; as a maximum it is convex, so that this is never too low."""

        def between(a: int, b: int) -> int:
            return round(a + share * (b - a))

        def each(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
            return between(a[0], b[0]), between(a[1], b[1]), between(a[2], b[2])

        return Usage(
            state=between(self.state, other.state),
            gradients=between(self.gradients, other.gradients),
            activations=between(self.activations, other.activations),
            live=each(self.live, other.live),
            beside=each(self.beside, other.beside),
            multiply_adds=between(self.multiply_adds, other.multiply_adds),
        )


@dataclass(frozen=True)
class Footprint:
    """One counted step of a net: what it takes for any batch of B images, (fixed, per image) each.

    Attributes:
        state, gradients: bytes.
        live: int64 [events, 2]: bytes of all live tensors after each operation of the step.
        held: int64 [events]: bytes of `live` that are finished gradients.
        forward: events of the forward pass; backward: of both passes, before the optimizer's step.
        multiply_adds: int64 [2].
    """

    state: int
    gradients: int
    live: np.ndarray
    held: np.ndarray
    forward: int
    backward: int
    multiply_adds: np.ndarray

    def usage(self, batch: int) -> Usage:
        """At a batch of `batch` images."""
        live = self.live[:, 0] + self.live[:, 1] * batch

        def peaks(events: np.ndarray) -> tuple[int, int, int]:
            first, second, third = np.split(events, [self.forward, self.backward])
            return int(first.max()), int(second.max()), int(third.max())

        return Usage(
            state=self.state,
            gradients=self.gradients,
            activations=int(live[self.forward - 1]) - self.state,
            live=peaks(live),
            beside=peaks(live - self.held),
            multiply_adds=int(self.multiply_adds[0] + self.multiply_adds[1] * batch),
        )


class Footprints:
    """Of sub-ResNets with any number of slots: counted for the fewest and for all, between them in between.

    Args:
        least: the fewest slots that will be asked for.
        img_size, device: see `count`.
    """

    def __init__(self, blueprint: Blueprint, config: Config, least: int, img_size: int, device: Device):
        self._range = least, blueprint.pool
        self._counted = [
            count(blueprint, config, slots, img_size, device) for slots in dict.fromkeys(self._range)
        ]

    def usage(self, slots: int, batch: int) -> Usage:
        """Of a step with `slots` pool blocks on `batch` images."""
        least, most = self._range
        first, last = self._counted[0].usage(batch), self._counted[-1].usage(batch)
        return first.towards(last, (slots - least) / (most - least)) if most > least else first


def count(
    blueprint: Blueprint, config: Config, slots: int, img_size: int, device: Device = "cuda"
) -> Footprint:
    """Count a step of the sub-ResNet with `slots` pool blocks, without data and without its memory.

    Args:
        config: of it count dtype, optimizer, mixed_precision, activation_checkpointing, label_smoothing.
        img_size: side of the images in pixels.
        device: what the step is to run on: SGD is one kernel without temporary copies on a GPU, and goes
            tensor by tensor on a CPU, with a copy of one tensor's gradient.
    """
    small, large = _counts(blueprint, config, slots, img_size, device, BATCHES)
    assert small.held == large.held and small.state == large.state
    each = _affine([small.multiply_adds], [large.multiply_adds])
    return _footprint(small, _affine(small.live, large.live), each)


def count_once(blueprint: Blueprint, config: Config, slots: int, img_size: int, device: Device) -> Usage:
    """The same at one batch, in half the time: that of each of `config`'s accumulation steps."""
    batch = max(2, config.batch_size // config.accumulation_steps)
    (only,) = _counts(blueprint, config, slots, img_size, device, (batch,))
    live = np.array(only.live)
    multiply_adds = np.array([[only.multiply_adds, 0]])
    return _footprint(only, np.stack([live, 0 * live], axis=1), multiply_adds).usage(batch)


def _counts(
    blueprint: Blueprint,
    config: Config,
    slots: int,
    img_size: int,
    device: Device,
    batches: Sequence[int],
) -> list["_Count"]:
    """A step at each of these batches."""
    module = blueprint.subnet(slots)  # here: deepcopy cannot copy under the fake mode
    ready = copy.copy(blueprint)
    ready.subnet = lambda _: module  # type: ignore[method-assign, assignment]
    counter = _Counter()
    counts = []
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        subnet = Subnet(ready, StateLayout.of(blueprint, config, slots), config, torch.device("cpu"))
        if config.optimizer == "sgd":
            subnet.optimizer.param_groups[0] |= {"foreach": False, "fused": device == "cuda"}
        for parameter in subnet.module.parameters():
            parameter.register_post_accumulate_grad_hook(counter.finished)
        for batch in batches:
            counts.append(counter.start())
            _step(subnet, counter, config, batch, img_size)
    return counts


def _footprint(counted: "_Count", live: np.ndarray, multiply_adds: np.ndarray) -> Footprint:
    return Footprint(
        state=counted.state,
        gradients=max(counted.held),
        live=live,
        held=np.array(counted.held),
        forward=counted.forward,
        backward=counted.backward,
        multiply_adds=multiply_adds[0],
    )


def _affine(small: Sequence[int], large: Sequence[int]) -> np.ndarray:
    """[n, 2] from the counts [n] at two batches: the same operations, each of them affine in the batch."""
    first, second = np.array(small), np.array(large)
    assert first.shape == second.shape
    each, rest = np.divmod(second - first, BATCHES[1] - BATCHES[0])
    assert not rest.any()
    return np.stack([first - each * BATCHES[0], each], axis=1)


@dataclass
class _Count:
    """Of one step; what stands in `Footprint`, at one batch."""

    state: int
    live: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    multiply_adds: int = 0
    forward: int = 0
    backward: int = 0


class _Counter(TorchDispatchMode):
    """Counts live storages and multiply-adds.

    (torch's FlopCounterMode keeps recomputed tensors alive: with activation checkpointing a ResNet-101 at
    224 pixels then seems to need more memory than without.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = _Count(0)
        self._known: set[int] = set()
        self._gradients: set[int] = set()
        self._bytes = self._held = 0

    def start(self) -> _Count:
        """What is live now is the state: a step begins, and is counted in what is returned."""
        self.count = _Count(self._bytes)
        return self.count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.count.multiply_adds += flops(*args, **(kwargs or {}), out_val=out) // 2
        self.count.live.append(self._bytes)
        self.count.held.append(self._held)
        return out

    def finished(self, parameter: Tensor) -> None:
        """Autograd has accumulated a parameter's gradient."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if id(storage) not in self._gradients:
            self._gradients.add(id(storage))
            self._held += storage.nbytes()

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._bytes += size
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.remove(key)
        self._bytes -= size
        if key in self._gradients:
            self._gradients.remove(key)
            self._held -= size


def _step(subnet: Subnet, counter: _Counter, config: Config, batch: int, img_size: int) -> None:
    """The step of `engine.TorchStep`, on zeros."""
    count = counter.count
    subnet.refresh()
    x = torch.zeros(batch, 3, img_size, img_size, dtype=subnet.vector.dtype)
    y = torch.zeros(batch, dtype=torch.long)
    with autocast(config, subnet.vector.device):
        loss = F.cross_entropy(subnet.module(x), y, label_smoothing=config.label_smoothing)
    count.forward = len(count.live)
    loss.backward()
    subnet.collect()
    for parameter in subnet.weights.values():
        counter.finished(parameter)
    count.backward = len(count.live)
    subnet.optimizer.step()
    subnet.optimizer.zero_grad(set_to_none=True)

"""Streamed evaluation of the global model, with BatchNorm re-estimated on the way.

The global model never stands on one device: the ranks walk it in order, and each pool block comes
from its owner with the test scale K/P already folded in, is used, and is dropped (paper, section 3.2).
Statistics gathered inside sub-ResNets are wrong for the scaled global model, so every BatchNorm's
mean and variance are estimated anew, in float64, from a fixed set of un-augmented training images
that the ranks share, just before that layer first normalises. They go through the net group by group, up to
the next BatchNorm that is not known yet, so that beside their activations only one group's work needs memory.

Nothing here depends on the number of ranks: work is cut into groups and batches of fixed sizes, and
what the ranks found is added up exactly, or in the order of the groups. Statistics stay where they are used,
and what was found comes to the host in one copy at the end, so that only exchanges make it wait. (Where ranks
share a GPU, gloo carries blocks and statistics through host memory.)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint, Statistics
from resist_ds.nets.shards import join_part
from resist_ds.nets.subnet import bind
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, Partition
from resist_ds.protocol.workers import Shown

GROUP = 32  # calibration images that go together through the net on a CPU; see `_group`


class Samples(Protocol):
    """A training and a test set, as `data.Data` delivers them."""

    @property
    def train_size(self) -> int: ...

    @property
    def test_size(self) -> int: ...

    def train_images(
        self, indices: np.ndarray, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Tensor: ...

    def test_batches(
        self, batches: Iterable[np.ndarray], device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


Named = tuple[str, nn.Module]  # a module and its timm name in the global model


@dataclass(frozen=True)
class Result:
    """The global model on the test set: mean cross-entropy (nats), share of right answers, its statistics."""

    loss: float
    accuracy: float
    statistics: Statistics


class Evaluation:
    """Evaluates the global model from what the workers of all ranks hold."""

    def __init__(self, comm: Comm, layout: Layout, blueprint: Blueprint, data: Samples, config: Config):
        self.comm = comm
        self.layout = layout
        self.blueprint = blueprint
        self.data = data
        self.transit = config.transit_mib << 20
        self.memory = None if config.eval_memory is None else config.eval_memory << 20
        self._convert: dict[str, Any] = dict(
            device=comm.device, dtype=getattr(torch, config.dtype), channels_last=config.channels_last
        )
        # Every rank takes whole groups; the images are spread evenly over the training set.
        images = min(config.calibration_samples, data.train_size)
        self._group = _group(config, comm.device)
        self._groups = -(-images // self._group)
        self._groups_per_rank = -(-self._groups // comm.size)
        share = self._groups_per_rank * self._group
        chosen = np.linspace(0, data.train_size - 1, images).round().astype(np.int64)
        self._calibration = chosen[comm.rank * share : (comm.rank + 1) * share]
        size = config.eval_batch_size or config.batch_size
        self._batches = [np.arange(i, min(i + size, data.test_size)) for i in range(0, data.test_size, size)]

    @torch.no_grad()
    def run(
        self,
        shown: Shown,
        deal: Partition,
        scale: float,
        autocast: AbstractContextManager[Any] | None = None,
        free: int = 0,
    ) -> Result:
        """Test the global model. Collective: all ranks; call it after a hand-off.

        Args:
            shown: by this rank; its sub-ResNet's BatchNorm buffers are written.
            deal: the partition that the vectors are in.
            scale: the test scale of the round that was trained.
            free: bytes for waiting test activations, unless `--eval_memory` says how many; at least a batch.
        """
        subnet = shown.subnet
        walk = _Walk(self, shown, deal, scale)
        mine = range(self.comm.rank, len(self._batches), self.comm.size)
        test = self.data.test_batches([self._batches[i] for i in mine], **self._convert)
        subnet.module.eval()
        with autocast or nullcontext():
            image_bytes = walk.calibrate_before(
                self.comm.agree(lambda: self.data.train_images(self._calibration, **self._convert))
            )
            # As many batches wait for the next block as fit; every rank streams the pool equally often.
            each = image_bytes * len(self._batches[0])
            room = free - walk.calibrating if self.memory is None else self.memory
            at_once = max(1, min(self.comm.gather(room // each)))
            found, seen = [], 0
            for _ in range(0, -(-len(self._batches) // self.comm.size), at_once):
                chunk = self.comm.agree(lambda: [(walk.before(x), y) for x, y in islice(test, at_once)])
                waiting, labels = [x for x, _ in chunk], [y for _, y in chunk]
                del chunk  # it would keep every block's input alive
                walk.pool(waiting)
                for x, y in zip(waiting, labels, strict=True):
                    found.append(_score(walk.after(x), y))
                    seen += len(y)
        subnet.module.train()
        scores = torch.stack(found).tolist() if found else []
        everyone = self.comm.gather((scores, seen))
        losses, rights = zip(*(row for rows, _ in everyone for row in rows), strict=True)
        samples = sum(images for _, images in everyone)
        assert samples == self.data.test_size
        return Result(math.fsum(losses) / samples, sum(rights) / samples, walk.statistics())

    def groups(self, images: Tensor) -> list[Tensor]:
        """This rank's calibration images in groups; one group, an empty one, where it has none."""
        return list(images.split(self._group)) if len(images) else [images]

    def estimate(self, rows: Sequence[Tensor]) -> Tensor:
        """Mean and variance per channel over all ranks' calibration activations. Collective: all ranks.

        Args:
            rows: the `moments` of each of this rank's groups.

        Returns:
            float64 [2, C], beside the rows; from count, Σx and Σx² (averaging variances is wrong).
        """
        sums = F.pad(torch.stack(list(rows)), (0, 0, 0, self._groups_per_rank - len(rows)))
        every = self.comm.gather_rows(sums, "eval")[: self._groups]  # without the last ranks' padding
        total = every.to(sums.device).sum(0)
        mean, square = (total[1:] / total[0]).chunk(2)
        return torch.stack([mean, (square - mean.square()).clamp_(min=0)])


def _group(config: Config, device: torch.device) -> int:
    """Calibration images that go through the net, and are summed for the statistics, together.

    On a GPU as many as in a training step: fewer would not fill it, and more might need more memory than that
    step's forward pass had, which keeps what one pass without gradients drops. No number of ranks is in it,
    but a team's.
    """
    assert isinstance(config.team_size, int)
    parts = config.accumulation_steps * config.team_size
    return GROUP if device.type == "cpu" else max(GROUP, config.batch_size // parts)


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ cross-entropy and right answers of logits [n, classes]: float64 [2], beside them."""
    logits = logits.double()
    right = (logits.argmax(1) == labels).sum(dtype=torch.float64)
    return torch.stack([F.cross_entropy(logits, labels, reduction="sum"), right])


def moments(x: Tensor) -> Tensor:
    """Count, Σx and Σx² per channel of activations [n, C, …]: float64 [1 + 2C], beside them."""
    # one copy, squared in its place: eight bytes per activation is all that it takes
    values = x.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format, copy=True).flatten(1)
    count = torch.full((1,), values.shape[1], dtype=torch.float64, device=x.device)
    return torch.cat([count, values.sum(1), values.square_().sum(1)])


class _Walk:
    """One evaluation: the global model's parts in order, its statistics once they are known."""

    def __init__(
        self,
        evaluation: Evaluation,
        shown: Shown,
        deal: Partition,
        scale: float,
    ):
        self.evaluation = evaluation
        subnet, self.vectors, self.held = shown
        self.deal = deal
        self.scale = scale
        self.block = subnet.layout.block
        self.module_vector = subnet.vector  # on the device, in the numbers, that this rank computes with
        # {BatchNorm: its mean and variance on the device}: float64 [2, C]; and in the numbers that it takes
        self._exact: dict[str, Tensor] = {}
        self._rounded: dict[str, list[Tensor]] = {}
        family = evaluation.blueprint.family
        self._before = [(path, subnet.module.get_submodule(path)) for path in family.before]
        self._after = [(path, subnet.module.get_submodule(path)) for path in family.after]
        self._calibration: list[Tensor] | None = None  # its activations, until all statistics are known

    def calibrate_before(self, images: Tensor) -> int:
        """Estimate what comes before the pool; returns the bytes of one image's activation there."""
        self._calibration = self.evaluation.groups(images)
        self._calibrate(self._before)
        first = self._calibration[0]
        return math.prod(first.shape[1:]) * first.element_size()

    def statistics(self) -> Statistics:
        """Of all BatchNorms, float64, in host memory; they come in one copy."""
        if not self._exact:  # other norms keep none
            return {}
        flat = torch.cat([both.flatten() for both in self._exact.values()]).cpu()
        parts = flat.split([both.numel() for both in self._exact.values()])
        return {
            name: (part[: len(part) // 2], part[len(part) // 2 :])
            for name, part in zip(self._exact, parts, strict=True)
        }

    @property
    def calibrating(self) -> int:
        """Bytes of the calibration activations that wait."""
        return sum(group.nbytes for group in self._calibration or ())

    def before(self, x: Tensor) -> Tensor:
        return _run(self._before, x)

    def after(self, x: Tensor) -> Tensor:
        return _run(self._after, x)

    def pool(self, waiting: list[Tensor]) -> None:
        """Stream the pool past the waiting test activations, in place. Collective: all ranks.

        The first time, the statistics of every block, and of what comes after the pool, are estimated
        just before they are needed, and the calibration activations are dropped.
        """
        for block in self._stream():
            if self._calibration is None:
                self._restore(block)
            else:
                self._calibrate([block])
            for i, x in enumerate(waiting):
                waiting[i] = block[1](x)
        if self._calibration is not None:
            self._calibrate(self._after)
            self._calibration = None

    def _calibrate(self, modules: Sequence[Named]) -> None:
        """Run the calibration activations through `modules`, in place. Collective: all ranks.

        Each BatchNorm is estimated before it normalises: all groups go up to the first one that is not known
        yet, once for each of them, and then through.
        """
        assert self._calibration is not None
        for unit in _units(modules):
            norms = dict(_batch_norms([unit]))
            hooks = {n: norm.register_forward_pre_hook(partial(_reach, n)) for n, norm in norms.items()}
            while hooks:
                rows = []
                for group in self._calibration:
                    try:
                        unit[1](group)
                    except _ReachedError as reached:
                        rows.append(reached.moments)
                        name = reached.name
                assert len(rows) == len(self._calibration), f"{unit[0]} has a BatchNorm that it does not use"
                self._exact[name] = self.evaluation.estimate(rows)
                dtype = self.module_vector.dtype
                self._rounded[name] = [values.to(dtype, copy=True) for values in self._exact[name]]
                _set(norms[name], self._rounded[name])
                hooks.pop(name).remove()
            for i, group in enumerate(self._calibration):
                self._calibration[i] = unit[1](group)

    def _restore(self, block: Named) -> None:
        for name, norm in _batch_norms([block]):
            _set(norm, self._rounded[name])

    def _stream(self) -> Iterator[Named]:
        """The pool's blocks in order, each usable until the next one is asked for. Collective: all ranks.

        Where two blocks fit into the transit budget, the next one travels while this one works.
        """
        block_bytes = self.block.parameters * self.module_vector.element_size()
        ahead = 2 * block_bytes <= self.evaluation.transit
        berths = [_Berth(self) for _ in range(1 + ahead)]
        for block in range(self.deal.pool):
            if block == 0 or not ahead:
                berths[block % len(berths)].fetch(block)
            if ahead and block + 1 < self.deal.pool:
                berths[(block + 1) % len(berths)].fetch(block + 1)
            yield self._name(block), berths[block % len(berths)].arrived()

    def _name(self, block: int) -> str:
        return self.evaluation.blueprint.block_prefix(block).rstrip(".")


class _Berth:
    """Room for one pool block in transit: a flat vector and a module whose parameters are views of it.

    A block that lies on the lanes of a team in parts comes in as many, and is put together here.
    """

    def __init__(self, walk: _Walk):
        self.walk = walk
        comm, layout, held = walk.evaluation.comm, walk.block, walk.held.block
        here = walk.module_vector
        self.parts = [comm.buffer(held.parameters, here) for _ in range(held.lanes)]
        in_place = held.lanes == 1 and self.parts[0].device == here.device
        self.values = (
            self.parts[0]
            if in_place
            else torch.empty(layout.parameters, dtype=here.dtype, device=here.device)
        )
        self.module = walk.evaluation.blueprint.pool_block()
        bind(self.module, layout.views(self.values))
        self.module.eval()

    def fetch(self, block: int) -> None:
        """Start bringing a block here, folded by its owner. Collective: all ranks."""
        walk = self.walk
        comm, layout, deal = walk.evaluation.comm, walk.held.block, walk.deal
        owner = deal.owners[block]
        self._waits = []
        for lane, buffer in enumerate(self.parts):
            root = walk.evaluation.layout.rank_of(owner, lane)
            if comm.rank == root:
                part = walk.held.slot_part(walk.vectors[owner], deal.blocks[owner].index(block))
                # Nobody writes an idle worker's vector, which is pinned, before the device was waited for.
                part = part[: layout.parameters]
                buffer.copy_(part, non_blocking=buffer.device.type == "cuda")
                walk.evaluation.blueprint.fold(layout.views(buffer), walk.scale)
            self._waits.append(comm.broadcast(buffer, root, "eval"))

    def arrived(self) -> nn.Module:
        """Wait for the block and return it."""
        for wait in self._waits:
            wait()
        layout = self.walk.held.block
        if layout.lanes > 1:
            join_part(layout, self.walk.block, self.parts, self.values)
        elif self.values is not self.parts[0]:  # the host waits: it will write another block into the buffer
            self.values.copy_(self.parts[0])
        return self.module


class _ReachedError(Exception):
    """Calibration has come to a BatchNorm whose statistics are not known yet."""

    def __init__(self, name: str, moments: Tensor):
        super().__init__(name)
        self.name = name
        self.moments = moments


def _reach(name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _ReachedError(name, moments(args[0]))


def _units(modules: Sequence[Named]) -> Iterator[Named]:
    """The modules, with those that only run their children in order cut into these."""
    for path, module in modules:
        if isinstance(module, nn.Sequential):
            yield from _units([(f"{path}.{name}", child) for name, child in module.named_children()])
        else:
            yield path, module


def _run(modules: Sequence[Named], x: Tensor) -> Tensor:
    for _, module in modules:
        x = module(x)
    return x


def _batch_norms(modules: Sequence[Named]) -> Iterator[Named]:
    for path, module in modules:
        for name, part in module.named_modules(prefix=path):
            if isinstance(part, _BatchNorm):
                yield name, part


def _set(norm: nn.Module, statistics: Sequence[Tensor]) -> None:
    """Give a BatchNorm its mean and variance: these very tensors, which nothing writes, and no copies."""
    norm.running_mean, norm.running_var = statistics

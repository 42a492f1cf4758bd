"""The workers that one rank plays: their states, and the one sub-ResNet in which they take turns.

A rank that plays one worker has that worker's state on the device for good. A rank that plays several
keeps the idle ones in host memory (pinned when a GPU is used), so that the device never holds more
than one sub-ResNet's training state; trained bits are the same either way.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.config import Config
from resist_ds.models import Blueprint
from resist_ds.partition import Layout, Partition, chunk_bounds
from resist_ds.subnet import PartLayout, StateLayout, Subnet

StateDict = dict[str, dict[str, Tensor]]  # {timm name: {"parameter": …, "momentum_buffer": …}}


class Worker:
    """One sub-ResNet's training state.

    Attributes:
        index: 0 … W−1.
        vector: parameters and optimizer state, laid out by `StateLayout`.
        scaler: the loss scale of fp16, which is part of a worker's state.
    """

    def __init__(self, index: int, vector: Tensor, scaler: torch.amp.GradScaler):
        self.index = index
        self.vector = vector
        self.scaler = scaler


class Workers:
    """This rank's workers, at their initial state in the slots of `deal`."""

    def __init__(self, comm: Comm, layout: Layout, blueprint: Blueprint, config: Config, deal: Partition):
        self._blueprint = blueprint
        self._config = config
        self.subnet = self._subnet(comm.device, deal.slots)
        mine = layout.workers_of(comm.rank)
        fp16 = config.mixed_precision == "fp16"
        self._workers = [
            Worker(w, self._room(alone=len(mine) == 1), torch.amp.GradScaler(comm.device.type, enabled=fp16))
            for w in mine
        ]
        for worker in self._workers:
            self._initialise(worker.vector, deal.blocks[worker.index])

    @property
    def layout(self) -> StateLayout:
        return self.subnet.layout

    @property
    def vectors(self) -> dict[int, Tensor]:
        """State vector of each of this rank's workers."""
        return {worker.index: worker.vector for worker in self._workers}

    def turns(self) -> Iterator[Worker]:
        """Every worker in turn, its state in the sub-ResNet for as long."""
        for worker in self._workers:
            self._swap(self.subnet.vector, worker.vector)
            yield worker
            self._swap(worker.vector, self.subnet.vector)

    def reset_optimizer(self) -> None:
        """Forget momentum, as the release does at every re-partition (`--optimizer_state reset`)."""
        for vector in self.vectors.values():
            self.layout.reset_optimizer(vector)

    def prepare_evaluation(self) -> None:
        """Put the shared part, which is the same for all workers after a hand-off, into the sub-ResNet."""
        self._swap(self.subnet.vector, self._workers[0].vector)

    def resize(self, slots: int) -> None:
        """Go on with fewer slots, when warm-up ends: the first ones of each state are kept."""
        alone = self._workers[0].vector is self.subnet.vector
        kept = [worker.vector[: self.layout.slot_offset(slots)].clone() for worker in self._workers]
        self.subnet = self._subnet(self.subnet.vector.device, slots)
        for worker, values in zip(self._workers, kept, strict=True):
            worker.vector = self._room(alone)
            worker.vector.copy_(values)

    def owned(self, deal: Partition) -> StateDict:
        """The partitioned state dict: what this rank's workers own, as views, by timm's names.

        A pool block belongs to its owner, a shared tensor to the worker in whose chunk it begins, so
        that every tensor of the global model is named on exactly one rank.
        """
        state: StateDict = {}
        for worker in self._workers:
            shared, block = self.layout.shared, self.layout.block
            start, stop = chunk_bounds(shared.parameters, deal.workers)[worker.index]
            tensors = _tensors(shared, self.layout.shared_part(worker.vector))
            state |= {name: t for name, t in tensors.items() if start <= shared.offsets[name] < stop}
            for slot, b in enumerate(deal.blocks[worker.index]):
                if deal.owners[b] == worker.index:
                    tensors = _tensors(block, self.layout.slot_part(worker.vector, slot))
                    state |= {self._blueprint.block_prefix(b) + name: t for name, t in tensors.items()}
        return state

    def _subnet(self, device: torch.device, slots: int) -> Subnet:
        return Subnet(
            self._blueprint, StateLayout.of(self._blueprint, self._config, slots), self._config, device
        )

    def _room(self, alone: bool) -> Tensor:
        """Where a worker's state lives: in the sub-ResNet itself, or in host memory."""
        on_device = self.subnet.vector
        if alone:
            return on_device
        return torch.zeros(on_device.shape, dtype=on_device.dtype, pin_memory=on_device.is_cuda)

    def _initialise(self, vector: Tensor, blocks: tuple[int, ...]) -> None:
        seed, layout = self._config.seed, self.layout
        _copy(self._blueprint.initial_shared(seed), layout.shared.views(layout.shared_part(vector)))
        for slot, block in enumerate(blocks):
            part = layout.slot_part(vector, slot)
            _copy(self._blueprint.initial_block(seed, block), layout.block.views(part))

    @staticmethod
    def _swap(into: Tensor, out_of: Tensor) -> None:
        if into is not out_of:
            into.copy_(out_of)


def _copy(values: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> None:
    assert values.keys() == views.keys()
    for name, value in values.items():
        views[name].copy_(value)


def _tensors(layout: PartLayout, part: Tensor) -> StateDict:
    state = layout.optimizer_views(part)
    return {name: {"parameter": view, **state[name]} for name, view in layout.views(part).items()}

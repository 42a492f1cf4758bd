"""The workers that one rank plays: their states, and the one sub-ResNet in which they take turns.

A rank that plays one worker has that worker's state on the device for good. A rank that plays several
keeps the idle ones in host memory (pinned when a GPU is used), so that the device never holds more
than one sub-ResNet's training state; trained bits are the same either way.

Under `--on_nan skip` a worker's state at the start of the round stays in host memory until its local
steps have turned out well: an idle worker's is there anyway, a lone worker's is copied.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.config import Config
from resist_ds.initial import Initialisation, Piece, Source
from resist_ds.models import Blueprint
from resist_ds.partition import Layout, Partition, spread
from resist_ds.subnet import PartLayout, StateLayout, Subnet

StateDict = dict[str, dict[str, Tensor]]  # {timm name: {"parameter": …, "momentum_buffer": …}}


class Worker:
    """One sub-ResNet's training state.

    Attributes:
        index: 0 … W−1.
        vector: parameters and optimizer state, laid out by `StateLayout`.
        scaler: the loss scale of fp16, which is part of a worker's state.
        spoilt: whether the local steps that it has just done met NaN or Inf.
    """

    def __init__(self, index: int, vector: Tensor, scaler: torch.amp.GradScaler):
        self.index = index
        self.vector = vector
        self.scaler = scaler
        self.spoilt = False


class Workers:
    """This rank's workers, at their initial state in the slots of `deal`.

    Args:
        source: of the initial values; default: timm's initialisation under the run's seed.

    Attributes:
        copies: bytes of host memory for round-start copies that exist for nothing else.
    """

    def __init__(
        self,
        comm: Comm,
        layout: Layout,
        blueprint: Blueprint,
        config: Config,
        deal: Partition,
        source: Source | None = None,
    ):
        self._blueprint = blueprint
        self._config = config
        self._number = layout.workers
        self.subnet = self._subnet(comm.device, deal.slots)
        mine = layout.workers_of(comm.rank)
        fp16 = config.mixed_precision == "fp16"
        self._workers = [
            Worker(w, self._room(alone=len(mine) == 1), torch.amp.GradScaler(comm.device.type, enabled=fp16))
            for w in mine
        ]
        source = source or Initialisation(blueprint, config.seed)
        for worker in self._workers:
            self._fill(worker.vector, deal.blocks[worker.index], source)
        self._round_start: Tensor | None = None
        if config.on_nan == "skip" and len(mine) == 1:
            self._round_start = self._room(alone=False)

    @property
    def copies(self) -> int:
        return 0 if self._round_start is None else self._round_start.nbytes

    @property
    def layout(self) -> StateLayout:
        return self.subnet.layout

    @property
    def vectors(self) -> dict[int, Tensor]:
        """State vector of each of this rank's workers."""
        return {worker.index: worker.vector for worker in self._workers}

    def turns(self) -> Iterator[Worker]:
        """Every worker in turn, its state in the sub-ResNet for as long; a spoilt one's is as before."""
        for worker in self._workers:
            worker.spoilt = False
            self._swap(self.subnet.vector, worker.vector)
            if self._round_start is not None:
                self._round_start.copy_(worker.vector)
            yield worker
            if not worker.spoilt:
                self._swap(worker.vector, self.subnet.vector)
            elif self._round_start is not None:
                worker.vector.copy_(self._round_start)

    @property
    def loss_scales(self) -> dict[int, dict[str, Any]]:
        """State of each worker's loss scaler; empty unless fp16 is used."""
        return {w.index: w.scaler.state_dict() for w in self._workers if w.scaler.is_enabled()}

    def set_loss_scales(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on with the loss scales of a run; if it had another number of workers, with its smallest."""
        least = min(states, key=lambda state: state["scale"])
        for worker in self._workers:
            same = len(states) == self._number
            worker.scaler.load_state_dict(states[worker.index] if same else least)

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
        if self._round_start is not None:
            self._round_start = self._room(alone=False)

    def owned(self, deal: Partition) -> StateDict:
        """The partitioned state dict: what this rank's workers own, as views, by timm's names.

        A pool block belongs to its owner, and the shared tensors, which all workers hold, are spread so
        that all own about as much; every tensor of the global model is named on exactly one rank.
        """
        state: StateDict = {}
        shared, block = self.layout.shared, self.layout.block
        loads = [deal.owners.count(worker) * block.parameters for worker in range(deal.workers)]
        owner = spread({name: math.prod(shape) for name, shape in shared.shapes}, loads)
        for worker in self._workers:
            tensors = _tensors(shared, self.layout.shared_part(worker.vector))
            state |= {name: t for name, t in tensors.items() if owner[name] == worker.index}
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

    def _fill(self, vector: Tensor, blocks: tuple[int, ...], source: Source) -> None:
        layout = self.layout
        _copy(source.shared(), _tensors(layout.shared, layout.shared_part(vector)))
        for slot, block in enumerate(blocks):
            _copy(source.block(block), _tensors(layout.block, layout.slot_part(vector, slot)))

    @staticmethod
    def _swap(into: Tensor, out_of: Tensor) -> None:
        if into is not out_of:
            into.copy_(out_of)


def _copy(piece: Piece, views: StateDict) -> None:
    """Fill a piece's views; optimizer state that the source lacks stays zero."""
    filled = set()
    for name, tensors in piece:
        filled.add(name)
        for kind in tensors.keys() & views[name].keys():
            views[name][kind].copy_(tensors[kind])
    assert filled == views.keys()


def _tensors(layout: PartLayout, part: Tensor) -> StateDict:
    state = layout.optimizer_views(part)
    return {name: {"parameter": view, **state[name]} for name, view in layout.views(part).items()}

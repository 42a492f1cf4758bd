"""The workers that one rank plays: their states, and the one engine in which they take turns.

A rank that plays one worker has that worker's state on the device for good. A rank that plays several
keeps the idle ones in host memory (pinned when a GPU is used), so that the device never holds more
than one sub-ResNet's training state; trained bits are the same either way. A DeepSpeed engine keeps masters
of its own, so there every worker's vector is in host memory.

Under `--on_nan skip` a worker's state at the start of the round stays in host memory until its local
steps have turned out well: an idle worker's is there anyway, a lone worker's is copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resist_ds.engines.engine import Engine, RandomDepth, TorchEngine
from resist_ds.memory import host_bytes
from resist_ds.nets.initial import Piece
from resist_ds.nets.shards import place
from resist_ds.nets.subnet import StateDict, StateLayout, Subnet, Worker
from resist_ds.protocol.partition import Partition
from resist_ds.protocol.workers import RankWorkers, Shown, owned


class Workers(RankWorkers):
    """This rank's workers, at their initial state in the slots of the first round's deal.

    Attributes:
        engine: that they take turns in.
    """

    def _make(self, deal: Partition) -> None:
        self._prepare(deal.slots)
        self._place(deal)

    def _place(self, deal: Partition) -> None:
        """Give this rank's workers room, and fill it."""
        mine = self._ranks.workers_of(self._comm.rank)
        device, fp16 = self._comm.device.type, self._config.mixed_precision == "fp16"
        self._workers = [
            Worker(w, self._room(alone=len(mine) == 1), torch.amp.GradScaler(device, enabled=fp16))
            for w in mine
        ]
        for worker in self._workers:
            self._fill(worker.vector, deal.blocks[worker.index])
        self._round_start: Tensor | None = None
        if self._config.on_nan == "skip" and self._workers[0].vector is self._in_place:
            self._round_start = self._room(alone=False)

    @property
    def copies(self) -> int:  # type: ignore[override]
        return 0 if self._round_start is None else host_bytes(self._round_start)

    @property
    def idle(self) -> int:  # type: ignore[override]
        return sum(host_bytes(vector) for vector in self.vectors.values() if vector.is_pinned())

    @property
    def subnet(self) -> Subnet:
        """The net of torch's own engine."""
        assert isinstance(self.engine, TorchEngine)
        return self.engine.subnet

    @property
    def vectors(self) -> dict[int, Tensor]:
        """State vector of each of this rank's workers."""
        return {worker.index: worker.vector for worker in self._workers}

    def connect(self) -> None:
        """Put torch's DistributedDataParallel around a net that ranks share. Collective: all ranks."""
        self._wrap()

    def _wrap(self) -> None:
        """The same, of an engine that is new. Collective: all ranks."""
        if self._config.inside is None:
            return
        assert isinstance(self.engine, TorchEngine)
        from resist_ds.engines.parallel import (  # which imports much that the others do not need
            Inside,
            data_parallel,
        )

        self.engine.wrap(partial(data_parallel, Inside.of(self._comm, self._config)))

    @property
    def mine(self) -> tuple[int, ...]:
        """Which workers this rank plays."""
        return tuple(worker.index for worker in self._workers)

    def turns(self) -> Iterator[Worker]:
        """Every worker in turn, its state in the engine for as long; a spoilt one's is as before."""
        for worker in self._workers:
            worker.spoilt = None
            self.engine.load(worker)
            if self._round_start is not None:
                self._round_start.copy_(worker.vector)
            yield worker
            if not worker.spoilt:
                self.engine.store(worker)
            elif self._round_start is not None:
                worker.vector.copy_(self._round_start)
        if self._comm.device.type == "cuda":  # idle workers' vectors are on their way back to the host
            torch.cuda.current_stream(self._comm.device).synchronize()

    def standing(self, worker: Worker) -> Tensor:
        """What counts of a worker in its turn: its state now, or, if it is spoilt, at the round's start."""
        now = self._in_place
        assert now is not None
        if not worker.spoilt:
            return now
        if worker.vector is not now:
            return worker.vector
        return now if self._round_start is None else self._round_start  # none: nothing of it will be used

    @property
    def loss_scales(self) -> dict[int, dict[str, Any]]:
        """State of each worker's loss scaler; empty unless fp16 is used."""
        return {w.index: w.scaler.state_dict() for w in self._workers if w.scaler.is_enabled()}

    def set_loss_scales(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on with the loss scales of a run; if it had another number of workers, with its smallest."""
        least = min(states, key=lambda state: state["scale"])
        for worker in self._workers:
            same = len(states) == self._ranks.workers
            worker.scaler.load_state_dict(states[worker.index] if same else least)

    def reset_optimizer(self) -> None:
        """Forget momentum, as the release does at every re-partition (`--optimizer_state reset`)."""
        for vector in self.vectors.values():
            self.layout.reset_optimizer(vector)

    def for_evaluation(self, deal: Partition) -> Shown:
        """A sub-ResNet with the shared part, which all workers hold alike after a hand-off; their vectors."""
        first = self._workers[0].vector
        if isinstance(self.engine, TorchEngine):
            if first is not self.subnet.vector:
                self.subnet.vector.copy_(first, non_blocking=True)
            self.subnet.refresh()
            return Shown(self.subnet, self.vectors, self.layout)
        alone = {worker: self.layout.only_parameters(vector) for worker, vector in self.vectors.items()}
        on_device = next(iter(alone.values())).to(self._comm.device)
        layout = self.layout.without_state()
        subnet = Subnet(self._blueprint, layout, self._config, self._comm.device, on_device)
        return Shown(subnet, alone, layout)

    def resize(self, slots: int) -> None:
        """Go on with fewer slots, when warm-up ends: the first ones of each state are kept."""
        alone = self._workers[0].vector is self._in_place
        kept = [worker.vector[: self.layout.slot_offset(slots)].clone() for worker in self._workers]
        self._prepare(slots)
        self._wrap()
        for worker, values in zip(self._workers, kept, strict=True):
            worker.vector = self._room(alone)
            worker.vector.copy_(values)
        if self._round_start is not None:
            self._round_start = self._room(alone=False)

    def owned(self, deal: Partition, agreed: Mapping[int, Tensor] | None = None) -> StateDict:
        """The partitioned state dict: what this rank's workers own, as views, by timm's names."""
        lane = self._lane, self._lanes
        return owned(self._blueprint, self.layout, self.vectors, deal, agreed, lane)

    def _prepare(self, slots: int) -> None:
        """Make the engine for workers of so many slots."""
        config, blueprint, comm = self._config, self._blueprint, self._comm
        self.layout = StateLayout.of(blueprint, config, slots, self._shards)
        self._in_place: Tensor | None = None
        if config.deepspeed_config is not None:
            from resist_ds.engines.parallel import Inside
            from resist_ds.engines.zero import ZeroEngine  # which takes seconds to import

            self.engine: Engine = ZeroEngine(Inside.of(comm, config), blueprint, config, self.layout)
            return
        subnet = Subnet(blueprint, self.layout, config, comm.device)
        self._in_place = subnet.vector
        if config.strategy == "stochastic_depth":
            blocks = [
                subnet.module.get_submodule(blueprint.block_prefix(b).rstrip(".")) for b in range(slots)
            ]
            self.engine = RandomDepth(subnet, config, blocks, config.min_blocks, self._steps)
        else:
            self.engine = TorchEngine(subnet, config)

    def _room(self, alone: bool) -> Tensor:
        """Where a worker's state lives: in the sub-ResNet itself, or in host memory."""
        if alone and self._in_place is not None:
            return self._in_place
        dtype = getattr(torch, self._config.dtype)
        return torch.zeros(self.layout.numel, dtype=dtype, pin_memory=self._comm.device.type == "cuda")

    def _fill(self, vector: Tensor, blocks: tuple[int, ...]) -> None:
        layout, source = self.layout, self._source
        lane = (self._lane, self._shards)
        _copy(source.shared(), layout.shared.tensors(layout.shared_part(vector)), lane)
        for slot, block in enumerate(blocks):
            _copy(source.block(block), layout.block.tensors(layout.slot_part(vector, slot)), lane)


def _copy(piece: Piece, views: StateDict, lane: tuple[int, int]) -> None:
    """Fill a piece's views with a lane's rows; optimizer state that the source lacks stays zero."""
    filled = set()
    for name, tensors in piece:
        filled.add(name)
        for kind in tensors.keys() & views[name].keys():
            place(tensors[kind], views[name][kind], *lane)
    assert filled == views.keys()

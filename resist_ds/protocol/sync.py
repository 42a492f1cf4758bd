"""Synchronisation: runs the exchange plans of `partition` on the workers' vectors (paper, section 3).

`aggregate` leaves every piece's mean with its owner; `hand_off` brings it to its next holders. Both
go through the pieces in slices, so that what is in transit stays within a fixed budget whatever the
model, and both read a slice of every vector before they write it: a slot is overwritten only after
its block has left. Pieces that stay on their rank take the same way, without the network.

Groups of pieces that have a code (`coded`) travel as bytes, between workers of one rank too, so that the bits
do not depend on R.

On a GPU means are taken there, wherever the values lie: idle workers' vectors are in pinned host memory,
and so is what gloo carries. What crosses between host and device is queued on the device's current stream,
whose order is all that later work on the device needs, NCCL's too. The host waits (`_settle`) before it
touches such memory itself: before gloo sends and receives, and at the end of both exchanges; so who comes
after them, a copy between two idle workers or a checkpoint, finds every vector complete.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.subnet import StateLayout
from resist_ds.protocol.coded import CHUNK, Coder, Differences, Pass
from resist_ds.protocol.partition import (
    Layout,
    Move,
    Partition,
    counted,
    plan_aggregate,
    plan_hand_off,
    slice_length,
)
from resist_ds.protocol.pieces import WHOLE, Lane, Pieces, groups_for
from resist_ds.protocol.team_gather import TeamGather
from resist_ds.protocol.wire import BLOCK

BERTH = 16  # bytes: a multiple of it is where a parcel may begin in the buffer
MEAN_CHUNK = 1 << 16  # elements averaged at a time on a CPU: their fp64 sum stays in a core's cache


class Synchroniser:
    """Aggregates and hands on what the workers of all ranks hold.

    Args:
        pool: P.
        budget: bytes that may be in transit on a rank; at least one block is always allowed, and never more
            used than a sub-ResNet's gradients took: so no peak rises above that of training, unless this runs
            behind a step.
        travel: whether optimizer state goes with its piece and is averaged like it.
        compact: the wire.
        vectors: of this rank's workers as they begin, on the compact wire.
        replicas: all ranks of a team hold the same vectors: each lane carries its slice, and they gather them
            inside the team. Otherwise a lane's vectors are a part of their own.

    Attributes:
        blocks, shared: the groups of pieces of each, which together are synchronised.
        chunk: elements that are averaged at a time.
        differences: what the compact wire keeps of shared; None on the exact one, and for a single worker.
    """

    def __init__(
        self,
        comm: Comm,
        layout: Layout,
        state: StateLayout,
        pool: int,
        *,
        budget: int,
        travel: bool,
        compact: bool = False,
        vectors: Mapping[int, Tensor] | None = None,
        replicas: bool = True,
    ):
        self.comm = comm
        self.layout = layout
        self._lane = layout.lane_of(comm.rank)
        # A GPU's copies should be long: 4 MiB of float32. Its sums and berth take at most 16 bytes an
        # element, and a quarter of the budget.
        on_gpu = comm.device.type == "cuda"
        self.chunk = min(1 << 20, budget // 64) if on_gpu else MEAN_CHUNK
        self.budget = budget - 16 * self.chunk if on_gpu else budget
        self._mine = layout.workers_of(comm.rank)
        self._transit = torch.empty(0)
        self._block_length = state.block.exchanged(travel)
        self._gradients = state.shared.parameters + state.slots * state.block.parameters
        gathers = replicas and layout.team_size > 1 and layout.workers > 1
        lane = Lane(self._lane, layout.team_size) if replicas else WHOLE
        groups = groups_for(state, pool, layout.workers, travel=travel, compact=compact, lane=lane)
        self._gathered = TeamGather(comm, layout, state) if gathers else None
        self.blocks, self.shared = (
            tuple(group for group in groups if group.of == of) for of in ("blocks", "shared")
        )
        # Its temporaries, 24 bytes a value, are on a GPU no more than those of a mean, at another time.
        chunk = max(BLOCK, min(1 << 19, budget // 128) // BLOCK * BLOCK) if on_gpu else CHUNK
        place = (self._mine, comm.device, chunk)
        self._coders = {group: Coder(group, *place) for group in groups if group.code is not None}
        self.differences: Differences | None = None
        for group in (g for g in groups if g.differences):
            assert vectors is not None
            self.differences = Differences(group, *place, vectors)
            self._coders[group] = self.differences

    def aggregate(
        self,
        vectors: Mapping[int, Tensor],
        now: Partition,
        dropped: frozenset[int] = frozenset(),
        groups: tuple[Pieces, ...] | None = None,
    ) -> None:
        """Leave every piece's mean over its holders with its owner. Collective: all ranks.

        The mean is taken in fp64 in worker order: n equal values then keep every bit, and the result
        does not depend on which ranks play the workers.

        Args:
            vectors: state vector of each worker that this rank plays.
            dropped: workers whose round does not count; their vectors are those of the round's start.
            groups: `blocks` or `shared`; None: both.
        """
        plan = plan_aggregate(now, dropped)
        everyone = tuple(range(now.workers))
        for group in groups or self.blocks + self.shared:
            blocks, coder = group.of == "blocks", self._coders.get(group)
            owners = now.owners if blocks else everyone
            held = now.holders if blocks else (everyone,) * now.workers
            holders = [counted(workers, owner, dropped) for workers, owner in zip(held, owners, strict=True)]
            moves = group.moves(plan)
            if coder is None:
                moves = tuple(m for m in moves if self._rank(m.source) != self._rank(m.targets[0]))
            owned = [p for p, owner in enumerate(owners) if owner in self._mine]
            self._begin(coder, vectors)
            for lo, hi in self._slices(group, moves, vectors):
                arrived = self._exchange(group, moves, vectors, now, lo, hi, "aggregate")
                for piece in (p for p in owned if lo < group.lengths[p]):
                    owner, of = owners[piece], holders[piece]
                    if coder is not None:
                        if group.differences and owner in dropped and of == (owner,):
                            continue  # nobody is counted: nothing has changed
                        coder.average(Pass(vectors, now, lo, hi), piece, owner, of, arrived)
                    elif of != (owner,):
                        values = [
                            group.slice(vectors[w], piece, w, now, lo, hi)
                            if w in self._mine
                            else arrived[piece, w]
                            for w in of
                        ]
                        out = group.slice(vectors[owner], piece, owner, now, lo, hi)
                        _mean(values, out, self.comm.device, self.chunk)
        self._settle(vectors)

    def hand_off(
        self,
        vectors: Mapping[int, Tensor],
        now: Partition,
        then: Partition,
        groups: tuple[Pieces, ...] | None = None,
    ) -> None:
        """Bring every piece from its owner to its next holders' slots. Collective: all ranks.

        Args:
            groups: `blocks` or `shared`; None: both.
        """
        plan = plan_hand_off(now, then, self.layout)
        for group in groups or self.blocks + self.shared:
            moves, coder = group.moves(plan), self._coders.get(group)
            # Where a chunk of shared goes, nothing is left that must leave: it arrives in its place. Where a
            # block goes, another may still lie: it waits in the buffer until this slice of all has left.
            places = then if group.of == "shared" else None
            self._begin(coder, vectors)
            staying = self._staying(now, moves) if coder is not None and group.of == "blocks" else []
            for lo, hi in self._slices(group, moves, vectors):
                arrived = self._exchange(group, moves, vectors, now, lo, hi, "hand_off", places)
                if coder is not None:
                    for piece, owner in staying:
                        coder.write(Pass(vectors, now, lo, hi), piece, owner, "hand_off", None)
                    coder.place(Pass(vectors, then, lo, hi), moves, arrived)
                    continue
                for move in (m for m in moves if (m.piece, m.source) in arrived):
                    for worker in (w for w in move.targets if w in self._mine):
                        place = group.slice(vectors[worker], move.piece, worker, then, lo, hi)
                        if place.data_ptr() != arrived[move.piece, move.source].data_ptr():
                            place.copy_(arrived[move.piece, move.source], non_blocking=True)
        self._settle(vectors)
        if self._gathered is not None:
            self._gathered.run(vectors, groups or self.blocks + self.shared, self._transit)
            self._settle(vectors)

    def _staying(self, now: Partition, moves: Sequence[Move]) -> list[tuple[int, int]]:
        """(block, owner) of those of this rank's workers' blocks that go to nobody."""
        moving = {move.piece for move in moves}
        return [(b, owner) for b, owner in enumerate(now.owners) if owner in self._mine and b not in moving]

    def _begin(self, coder: Coder | None, vectors: Mapping[int, Tensor]) -> None:
        """Before a group without a code: the host may copy it where others are still read."""
        if coder is None and self._coders:
            self._settle(vectors)

    def _settle(self, vectors: Mapping[int, Tensor]) -> None:
        """Wait for copies between host memory and a GPU, before the host reads or writes what they touch."""
        ends = (self._transit, *vectors.values())
        if self.comm.device.type == "cuda" and any(end.device.type == "cpu" for end in ends):
            torch.cuda.current_stream(self.comm.device).synchronize()

    def _rank(self, worker: int) -> int:
        """That of its team in this rank's lane."""
        return self.layout.rank_of(worker, self._lane)

    def _slices(
        self, group: Pieces, moves: Sequence[Move], vectors: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, int]]:
        """[lo, hi) of each pass, within the budget; one pass with nothing to carry where nothing moves."""
        like = next(iter(vectors.values()))
        budget = max(min(self.budget // like.element_size(), self._gradients), self._block_length)
        longest, multiple = group.longest, 1
        if group.code is not None:
            multiple = BLOCK
            parcel = group.code.nbytes(BLOCK) + BERTH
            budget = max(budget, -(-BLOCK * len(moves) * parcel // like.element_size() // BLOCK))
        if self._transit.numel() < budget:  # kept from then on, so that its pages are touched once
            self._transit = self.comm.buffer(budget, like)
        if group.code is not None:
            budget = budget * like.element_size() // parcel * BLOCK
        step = slice_length(tuple(moves), self.layout, longest, budget, multiple)
        return ((lo, min(lo + step, longest)) for lo in range(0, longest, step))

    def _exchange(
        self,
        group: Pieces,
        moves: Sequence[Move],
        vectors: Mapping[int, Tensor],
        now: Partition,
        lo: int,
        hi: int,
        kind: str,
        places: Partition | None = None,
    ) -> dict[tuple[int, int], Tensor]:
        """Carry [lo, hi) of every moving piece to its targets' rank. Collective: all ranks.

        What leaves is sent straight from its vector, where the back end can read that; or as it was written.

        Args:
            places: the partition in which pieces may arrive in their place at once, or None.

        Returns:
            {(piece, source worker): what is now here}, in its place, or in a buffer for the next pass; of a
            group with a code what was written, by this rank's workers too.
        """
        rank, used = self.comm.rank, 0
        coder = self._coders.get(group)
        transit = self._transit if coder is None else self._transit.view(torch.uint8)
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arrived: dict[tuple[int, int], Tensor] = {}

        def room(length: int) -> Tensor:
            nonlocal used
            start = used
            used += length if coder is None else -(-length // BERTH) * BERTH
            return transit[start : start + length]

        def leaving(move: Move) -> Tensor:
            """What goes on its way from a worker of this rank."""
            if coder is not None:
                if (move.piece, move.source) in arrived:
                    return arrived[move.piece, move.source]
                written = room(coder.code.nbytes(length))
                coder.write(Pass(vectors, now, lo, hi), move.piece, move.source, kind, written)
                arrived[move.piece, move.source] = written
                return written
            part = group.slice(vectors[move.source], move.piece, move.source, now, lo, hi)
            readable = part.device == transit.device if target != rank else places is not None
            return part if readable else room(length).copy_(part, non_blocking=True)

        def berth(move: Move) -> Tensor:
            """Where what another rank sends arrives."""
            if coder is not None:
                return room(coder.code.nbytes(length))
            worker = move.targets[0]
            if places is not None:
                part = group.slice(vectors[worker], move.piece, worker, places, lo, hi)
                if part.device == transit.device:
                    return part
            return room(length)

        for move in moves:
            source, target = self._rank(move.source), self._rank(move.targets[0])
            length = group.length(move.piece, lo, hi)
            if length <= 0 or rank not in (source, target):
                continue
            if source == rank:
                part = leaving(move)
                if target == rank:
                    arrived[move.piece, move.source] = part
                else:
                    sends.append((part, target))
            else:
                part = berth(move)
                receives.append((part, source))
                arrived[move.piece, move.source] = part
        if self.comm.buffer_device.type == "cpu":  # gloo reads what was copied, and writes where it was read
            self._settle(vectors)
        self.comm.exchange(sends, receives, kind)
        return arrived


def _mean(values: Sequence[Tensor], out: Tensor, device: torch.device, chunk: int) -> None:
    """out = mean of `values` [n each], summed in fp64 in the order given; `out` may be one of them.

    A plain fp32 mean of n equal values changes 15 % of them at n = 3 and 44 % at n = 8; in fp64 none. Two
    values are summed as they are: fp64's sum, rounded, is fp32's (53 ≥ 2 · 24 + 2 bits); halves are exact.

    Args:
        device: where it is computed; the tensors lie there or in host memory, pinned where that is a GPU.
        chunk: elements at a time.
    """
    if len(values) == 2 and device.type == "cpu":
        room = torch.empty(min(len(out), chunk), dtype=out.dtype)
        for parts in zip(out.split(chunk), *(value.split(chunk) for value in values), strict=True):
            total = torch.add(parts[1], parts[2], out=room[: len(parts[0])])
            if math.isfinite(total.sum()):
                torch.mul(total, 0.5, out=parts[0])
            else:  # one does not fit, its half does
                _wide_mean(parts[1:], parts[0], device, chunk)
        return
    _wide_mean(values, out, device, chunk)


def _wide_mean(values: Sequence[Tensor], out: Tensor, device: torch.device, chunk: int) -> None:
    """The same, summed in fp64."""
    total = torch.empty(min(len(out), chunk), dtype=torch.float64, device=device)
    # A tensor: by a number a GPU divides as it multiplies by its reciprocal, which may miss the last bit.
    count = total.new_full((), len(values))
    away = any(tensor.device != device for tensor in (out, *values))
    berth = torch.empty(len(total) if away else 0, dtype=out.dtype, device=device)

    def here(tensor: Tensor) -> Tensor:
        if tensor.device == device:
            return tensor
        return berth[: len(tensor)].copy_(tensor, non_blocking=True)

    for lo in range(0, len(out), chunk):
        part = total[: len(out) - lo]
        part.copy_(here(values[0][lo : lo + chunk]))
        for value in values[1:]:
            part += here(value[lo : lo + chunk])
        part.div_(count)
        mean = part if out.device == device else berth[: len(part)].copy_(part)
        out[lo : lo + chunk].copy_(mean, non_blocking=True)

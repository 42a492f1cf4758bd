"""Synchronisation: runs the exchange plans of `partition` on the workers' vectors (paper, section 3).

`aggregate` leaves every piece's mean with its owner; `hand_off` brings it to its next holders. Both
go through the pieces in slices, so that what is in transit stays within a fixed budget whatever the
model, and both read a slice of every vector before they write it: a slot is overwritten only after
its block has left. Pieces that stay on their rank take the same way, without the network.

On a GPU means are taken there, wherever the values lie: idle workers' vectors are in pinned host memory,
and so is what gloo carries. What crosses between host and device is queued on the device's current stream,
whose order is all that later work on the device needs, NCCL's too. The host waits (`_settle`) before it
touches such memory itself: before gloo sends and receives, and at the end of both exchanges; so who comes
after them, a copy between two idle workers or a checkpoint, finds every vector complete.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.nets.subnet import StateLayout
from resist_ds.protocol.partition import (
    Layout,
    Move,
    Partition,
    chunk_bounds,
    counted,
    plan_aggregate,
    plan_hand_off,
    slice_length,
)

MEAN_CHUNK = 1 << 18  # elements averaged at a time on a CPU: their fp64 sum stays in a core's cache


@dataclass(frozen=True)
class Pieces:
    """One group of pieces, the pool blocks or the chunks of shared, and where they lie in a vector.

    Attributes:
        lengths: elements of each piece that take part (without momentum under `reset`).
        start: (piece, worker, partition) → where the piece begins in that worker's vector.
    """

    lengths: tuple[int, ...]
    start: Callable[[int, int, Partition], int]

    def slice(self, vector: Tensor, piece: int, worker: int, deal: Partition, lo: int, hi: int) -> Tensor:
        """View of elements [lo, hi) of a piece; shorter where the piece ends."""
        length = max(0, min(hi, self.lengths[piece]) - lo)
        return vector.narrow(0, self.start(piece, worker, deal) + lo, length) if length else vector[:0]


class Synchroniser:
    """Aggregates and hands on what the workers of all ranks hold.

    Args:
        pool: P.
        budget: bytes that may be in transit on a rank; at least one block is always allowed, and never more
            used than a sub-ResNet's gradients took: so no peak rises above that of training.
        travel: whether optimizer state goes with its piece and is averaged like it.
    """

    def __init__(
        self, comm: Comm, layout: Layout, state: StateLayout, pool: int, *, budget: int, travel: bool
    ):
        self.comm = comm
        self.layout = layout
        # A GPU's copies should be long: 4 MiB of float32. Its sums and berth take at most 16 bytes an
        # element, and a quarter of the budget.
        on_gpu = comm.device.type == "cuda"
        self._chunk = min(1 << 20, budget // 64) if on_gpu else MEAN_CHUNK
        self.budget = budget - 16 * self._chunk if on_gpu else budget
        self._mine = layout.workers_of(comm.rank)
        self._transit = torch.empty(0)
        self._block_length = state.block.exchanged(travel)
        self._gradients = state.shared.parameters + state.slots * state.block.parameters
        chunks = chunk_bounds(state.shared.exchanged(travel), layout.workers)
        self._blocks = Pieces(
            lengths=(self._block_length,) * pool,
            start=lambda piece, worker, deal: state.slot_offset(deal.blocks[worker].index(piece)),
        )
        self._shared = Pieces(
            lengths=tuple(stop - start for start, stop in chunks),
            start=lambda piece, worker, deal: chunks[piece][0],
        )

    def aggregate(
        self, vectors: Mapping[int, Tensor], now: Partition, dropped: frozenset[int] = frozenset()
    ) -> None:
        """Leave every piece's mean over its holders with its owner. Collective: all ranks.

        The mean is taken in fp64 in worker order: n equal values then keep every bit, and the result
        does not depend on which ranks play the workers.

        Args:
            vectors: state vector of each worker that this rank plays.
            dropped: workers whose round does not count; their vectors are those of the round's start.
        """
        plan = plan_aggregate(now, dropped)
        everyone = tuple(range(now.workers))
        for pieces, moves, owners, held in (
            (self._blocks, plan.blocks, now.owners, now.holders),
            (self._shared, plan.shared, everyone, (everyone,) * now.workers),
        ):
            holders = [counted(workers, owner, dropped) for workers, owner in zip(held, owners, strict=True)]
            leaving = [m for m in moves if self._rank(m.source) != self._rank(m.targets[0])]
            owned = [p for p, owner in enumerate(owners) if owner in self._mine and holders[p] != (owner,)]
            for lo, hi in self._slices(pieces, leaving, vectors):
                arrived = self._exchange(pieces, leaving, vectors, now, lo, hi, "aggregate")
                for piece in (p for p in owned if lo < pieces.lengths[p]):
                    values = [
                        pieces.slice(vectors[w], piece, w, now, lo, hi)
                        if w in self._mine
                        else arrived[piece, w]
                        for w in holders[piece]
                    ]
                    out = pieces.slice(vectors[owners[piece]], piece, owners[piece], now, lo, hi)
                    _mean(values, out, self.comm.device, self._chunk)
        self._settle(vectors)

    def hand_off(self, vectors: Mapping[int, Tensor], now: Partition, then: Partition) -> None:
        """Bring every piece from its owner to its next holders' slots. Collective: all ranks."""
        plan = plan_hand_off(now, then, self.layout)
        # Where a chunk of shared goes, nothing is left that must leave: it arrives in its place. Where a
        # block goes, another may still lie: it waits in the buffer until this slice of all has left.
        for pieces, moves, places in ((self._blocks, plan.blocks, None), (self._shared, plan.shared, then)):
            for lo, hi in self._slices(pieces, moves, vectors):
                arrived = self._exchange(pieces, moves, vectors, now, lo, hi, "hand_off", places)
                for move in (m for m in moves if (m.piece, m.source) in arrived):
                    for worker in (w for w in move.targets if w in self._mine):
                        place = pieces.slice(vectors[worker], move.piece, worker, then, lo, hi)
                        if place.data_ptr() != arrived[move.piece, move.source].data_ptr():
                            place.copy_(arrived[move.piece, move.source], non_blocking=True)
        self._settle(vectors)

    def _settle(self, vectors: Mapping[int, Tensor]) -> None:
        """Wait for copies between host memory and a GPU, before the host reads or writes what they touch."""
        ends = (self._transit, *vectors.values())
        if self.comm.device.type == "cuda" and any(end.device.type == "cpu" for end in ends):
            torch.cuda.synchronize(self.comm.device)

    def _rank(self, worker: int) -> int:
        return self.layout.rank_of(worker)

    def _slices(
        self, pieces: Pieces, moves: Sequence[Move], vectors: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, int]]:
        """[lo, hi) of each pass, within the budget; one pass with nothing to carry where nothing moves."""
        like = next(iter(vectors.values()))
        budget = max(min(self.budget // like.element_size(), self._gradients), self._block_length)
        if self._transit.numel() < budget:  # kept from then on, so that its pages are touched once
            self._transit = self.comm.buffer(budget, like)
        longest = max(pieces.lengths)
        step = slice_length(tuple(moves), self.layout, longest, budget)
        return ((lo, min(lo + step, longest)) for lo in range(0, longest, step))

    def _exchange(
        self,
        pieces: Pieces,
        moves: Sequence[Move],
        vectors: Mapping[int, Tensor],
        now: Partition,
        lo: int,
        hi: int,
        kind: str,
        places: Partition | None = None,
    ) -> dict[tuple[int, int], Tensor]:
        """Carry [lo, hi) of every moving piece to its targets' rank. Collective: all ranks.

        What leaves is sent straight from its vector, where the back end can read that.

        Args:
            places: the partition in which pieces may arrive in their place at once, or None.

        Returns:
            {(piece, source worker): what is now here}, in its place, or in a buffer for the next pass.
        """
        rank, used = self.comm.rank, 0
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arrived: dict[tuple[int, int], Tensor] = {}

        def room(length: int) -> Tensor:
            nonlocal used
            used += length
            return self._transit[used - length : used]

        for move in moves:
            source, target = self._rank(move.source), self._rank(move.targets[0])
            length = min(hi, pieces.lengths[move.piece]) - lo
            if length <= 0 or rank not in (source, target):
                continue
            if source == rank:
                part = pieces.slice(vectors[move.source], move.piece, move.source, now, lo, hi)
                readable = part.device == self._transit.device if target != rank else places is not None
                part = part if readable else room(length).copy_(part, non_blocking=True)
                if target == rank:
                    arrived[move.piece, move.source] = part
                else:
                    sends.append((part, target))
            else:
                worker = move.targets[0]
                part = vectors[worker][:0]
                if places is not None:
                    part = pieces.slice(vectors[worker], move.piece, worker, places, lo, hi)
                if part.device != self._transit.device or places is None:
                    part = room(length)
                receives.append((part, source))
                arrived[move.piece, move.source] = part
        if self.comm.buffer_device.type == "cpu":  # gloo reads what was copied, and writes where it was read
            self._settle(vectors)
        self.comm.exchange(sends, receives, kind)
        return arrived


def _mean(values: Sequence[Tensor], out: Tensor, device: torch.device, chunk: int) -> None:
    """out = mean of `values` [n each], summed in fp64 in the order given; `out` may be one of them.

    A plain fp32 mean of n equal values changes 15 % of them at n = 3 and 44 % at n = 8; in fp64 none.

    Args:
        device: where it is computed; the tensors lie there or in host memory, pinned where that is a GPU.
        chunk: elements at a time.
    """
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

"""Synchronisation: runs the exchange plans of `partition` on the workers' vectors (paper, section 3).

`aggregate` leaves every piece's mean with its owner; `hand_off` brings it to its next holders. Both
go through the pieces in slices, so that what is in transit stays within a fixed budget whatever the
model, and both read a slice of every vector before they write it: a slot is overwritten only after
its block has left. Pieces that stay on their rank take the same way, without the network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.partition import (
    Layout,
    Move,
    Partition,
    chunk_bounds,
    plan_aggregate,
    plan_hand_off,
    slice_length,
)
from resist_ds.subnet import StateLayout

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
        budget: bytes that may be in transit on a rank; at least one block is always allowed.
        travel: whether optimizer state goes with its piece and is averaged like it.
    """

    def __init__(
        self, comm: Comm, layout: Layout, state: StateLayout, pool: int, *, budget: int, travel: bool
    ):
        self.comm = comm
        self.layout = layout
        self.budget = budget
        self._mine = layout.workers_of(comm.rank)
        self._transit = torch.empty(0)
        self._block_length = state.block.numel if travel else state.block.parameters
        chunks = chunk_bounds(state.shared.numel if travel else state.shared.parameters, layout.workers)
        self._blocks = Pieces(
            lengths=(self._block_length,) * pool,
            start=lambda piece, worker, deal: state.slot_offset(deal.blocks[worker].index(piece)),
        )
        self._shared = Pieces(
            lengths=tuple(stop - start for start, stop in chunks),
            start=lambda piece, worker, deal: chunks[piece][0],
        )

    def aggregate(self, vectors: Mapping[int, Tensor], now: Partition) -> None:
        """Leave every piece's mean over its holders with its owner. Collective: all ranks.

        The mean is taken in fp64 in worker order: n equal values then keep every bit, and the result
        does not depend on which ranks play the workers.

        Args:
            vectors: state vector of each worker that this rank plays.
        """
        plan = plan_aggregate(now)
        everyone = tuple(range(now.workers))
        for pieces, moves, owners, holders in (
            (self._blocks, plan.blocks, now.owners, now.holders),
            (self._shared, plan.shared, everyone, (everyone,) * now.workers),
        ):
            leaving = [m for m in moves if self._rank(m.source) != self._rank(m.targets[0])]
            owned = [p for p, owner in enumerate(owners) if owner in self._mine and len(holders[p]) > 1]
            for lo, hi in self._slices(pieces, leaving, vectors):
                received = self._exchange(pieces, leaving, vectors, now, lo, hi, "aggregate")
                for piece in owned:
                    values = [
                        pieces.slice(vectors[w], piece, w, now, lo, hi)
                        if w in self._mine
                        else received[piece, w]
                        for w in holders[piece]
                    ]
                    _mean(values, out=values[holders[piece].index(owners[piece])])

    def hand_off(self, vectors: Mapping[int, Tensor], now: Partition, then: Partition) -> None:
        """Bring every piece from its owner to its next holders' slots. Collective: all ranks."""
        plan = plan_hand_off(now, then, self.layout)
        for pieces, moves in ((self._blocks, plan.blocks), (self._shared, plan.shared)):
            for lo, hi in self._slices(pieces, moves, vectors):
                received = self._exchange(pieces, moves, vectors, now, lo, hi, "hand_off")
                for move in moves:
                    for worker in move.targets:
                        if worker in self._mine:
                            slot = pieces.slice(vectors[worker], move.piece, worker, then, lo, hi)
                            slot.copy_(received[move.piece, move.source])

    def _rank(self, worker: int) -> int:
        return self.layout.rank_of(worker)

    def _slices(
        self, pieces: Pieces, moves: Sequence[Move], vectors: Mapping[int, Tensor]
    ) -> Iterator[tuple[int, int]]:
        """[lo, hi) of each pass, within the budget; one pass with nothing to carry where nothing moves."""
        itemsize = next(iter(vectors.values())).element_size()
        longest = max(pieces.lengths)
        budget = max(self.budget // itemsize, self._block_length)
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
    ) -> dict[tuple[int, int], Tensor]:
        """Carry [lo, hi) of every moving piece to its targets' rank. Collective: all ranks.

        Returns:
            {(piece, source worker): what arrived here}, views of a buffer that the next pass reuses.
        """
        rank, size = self.comm.rank, self.comm.size
        outgoing: list[list[Move]] = [[] for _ in range(size)]
        incoming: list[list[Move]] = [[] for _ in range(size)]
        for move in moves:
            source, target = self._rank(move.source), self._rank(move.targets[0])
            if source == rank:
                outgoing[target].append(move)
            if target == rank:
                incoming[source].append(move)

        def length(move: Move) -> int:
            return max(0, min(hi, pieces.lengths[move.piece]) - lo)

        send_counts = [sum(map(length, to)) for to in outgoing]
        receive_counts = [sum(map(length, of)) for of in incoming]
        send, receive = self._buffers(sum(send_counts), sum(receive_counts), next(iter(vectors.values())))
        end = 0
        for move in (m for to in outgoing for m in to):
            part = pieces.slice(vectors[move.source], move.piece, move.source, now, lo, hi)
            send[end : end + len(part)].copy_(part)
            end += len(part)
        self.comm.all_to_all(send, receive, send_counts, receive_counts, kind)
        arrived, end = {}, 0
        for move in (m for of in incoming for m in of):
            arrived[move.piece, move.source] = receive[end : end + length(move)]
            end += length(move)
        return arrived

    def _buffers(self, send: int, receive: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two exchange buffers out of one allocation that is kept, so that its pages are touched once."""
        if self._transit.numel() < send + receive or self._transit.dtype != like.dtype:
            self._transit = self.comm.buffer(send + receive, like)
        return self._transit[:send], self._transit[send : send + receive]


def _mean(values: Sequence[Tensor], out: Tensor) -> None:
    """out = mean of `values` [n each], summed in fp64 in the order given; `out` may be one of them.

    A plain fp32 mean of n equal values changes 15 % of them at n = 3 and 44 % at n = 8; in fp64 none.
    """
    step = min(len(out), MEAN_CHUNK if out.device.type == "cpu" else len(out))
    total = torch.empty(step, dtype=torch.float64, device=out.device)
    for lo in range(0, len(out), max(1, step)):
        part = total[: len(out) - lo]
        part.copy_(values[0][lo : lo + step])
        for value in values[1:]:
            part += value[lo : lo + step].to(out.device)
        out[lo : lo + step] = part.div_(len(values))

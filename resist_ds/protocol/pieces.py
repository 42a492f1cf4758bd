"""Groups of pieces: what a synchronisation carries of a worker's vector, and in which code. Pure.

On the exact wire there are two groups, pool blocks and chunks of shared, each piece one range of a vector. On
the compact wire every kind of number is a group of its own, so that all of a group is written alike.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from resist_ds.nets.subnet import PartLayout, StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol import wire
from resist_ds.protocol.partition import (
    Exchange,
    Layout,
    Move,
    Partition,
    chunk_bounds,
    plan_aggregate,
    plan_hand_off,
)
from resist_ds.protocol.wire import BLOCK, Code


@dataclass(frozen=True, eq=False)
class Pieces:
    """One group of pieces, of pool blocks or of shared, and where they lie in a vector.

    Attributes:
        of: whose pieces.
        lengths: elements of each piece that take part.
        start: (piece, worker, partition) → where the piece begins in that worker's vector.
        code: in which it travels; None: as it is.
        differences: what travels is how far they are from what all workers agreed on.
    """

    of: Literal["blocks", "shared"]
    lengths: tuple[int, ...]
    start: Callable[[int, int, Partition], int]
    code: Code | None = None
    differences: bool = False

    def slice(self, vector: Tensor, piece: int, worker: int, deal: Partition, lo: int, hi: int) -> Tensor:
        """View of elements [lo, hi) of a piece; shorter where the piece ends."""
        length = self.length(piece, lo, hi)
        return vector.narrow(0, self.start(piece, worker, deal) + lo, length) if length else vector[:0]

    def length(self, piece: int, lo: int, hi: int) -> int:
        """Elements of a piece in [lo, hi)."""
        return max(0, min(hi, self.lengths[piece]) - lo)

    def moves(self, exchange: Exchange) -> tuple[Move, ...]:
        """Those of this group's pieces."""
        return exchange.blocks if self.of == "blocks" else exchange.shared

    def nbytes(self, numel: int, itemsize: int) -> int:
        """Bytes that so many elements of a piece take on the wire."""
        return numel * itemsize if self.code is None else self.code.nbytes(numel)


def groups_for(
    state: StateLayout, pool: int, workers: int, *, travel: bool, compact: bool
) -> tuple[Pieces, ...]:
    """What a run's synchronisations carry. One worker has nobody to write to, on any wire."""
    groups = compact_groups if compact and workers > 1 else exact_groups
    return groups(state, pool, workers, travel)


def groups_of(state: StateLayout, config: Config, pool: int, workers: int) -> tuple[Pieces, ...]:
    """The same, as a run's options have it."""
    travel, compact = config.optimizer_state == "travel", config.wire == "compact"
    return groups_for(state, pool, workers, travel=travel, compact=compact)


def exact_groups(state: StateLayout, pool: int, workers: int, travel: bool) -> tuple[Pieces, ...]:
    """Pool blocks and chunks of shared, all of them that takes part."""
    return (
        _blocks(state, pool, 0, state.block.exchanged(travel)),
        _chunks(state.shared.exchanged(travel), 0, workers, multiple=1),
    )


def compact_groups(state: StateLayout, pool: int, workers: int, travel: bool) -> tuple[Pieces, ...]:
    """Of pool blocks and of shared: each row's matrices in a code, its one-dimensional tensors as they are.

    Raises:
        UserError: an optimizer's state has no code.
    """
    groups = []
    for lo, hi, code in _ranges(state, state.block, travel, wire.BF16):
        groups.append(_blocks(state, pool, lo, hi - lo, code))
    for lo, hi, code in _ranges(state, state.shared, travel, wire.INT8):
        groups.append(_chunks(hi - lo, lo, workers, BLOCK, code, differences=lo == 0 and code is not None))
    return tuple(groups)


def _ranges(
    state: StateLayout, part: PartLayout, travel: bool, parameters: Code
) -> Iterator[tuple[int, int, Code | None]]:
    """[start, stop) of a part's ranges that take part, and their code."""
    rows = [parameters]
    if travel:
        rows += [wire.code_of_state(kind, shared=part is state.shared) for kind in part.state.vectors]
    for row, code in enumerate(rows):
        start = row * part.parameters
        yield start, start + part.matrices, code
        yield start + part.matrices, start + part.parameters, None
    if travel and part.state.counter:
        yield len(rows) * part.parameters, part.numel, None


def _blocks(state: StateLayout, pool: int, offset: int, length: int, code: Code | None = None) -> Pieces:
    return Pieces(
        "blocks",
        lengths=(length,) * pool,
        start=lambda piece, worker, deal: state.slot_offset(deal.blocks[worker].index(piece)) + offset,
        code=code,
    )


def _chunks(
    numel: int, offset: int, workers: int, multiple: int, code: Code | None = None, differences: bool = False
) -> Pieces:
    """Elements [offset, offset + numel) of shared, cut into a chunk for each worker."""
    bounds = chunk_bounds(numel, workers, multiple)
    return Pieces(
        "shared",
        lengths=tuple(stop - start for start, stop in bounds),
        start=lambda piece, worker, deal: offset + bounds[piece][0],
        code=code,
        differences=differences,
    )


def bytes_sent(
    groups: tuple[Pieces, ...], now: Partition, then: Partition, layout: Layout, itemsize: int
) -> int:
    """Bytes that leave a rank when `now` is synchronised and handed to `then`, over all ranks."""
    plans = plan_aggregate(now), plan_hand_off(now, then, layout)

    def crossings(of: Pieces) -> Counter[int]:
        """How often each piece leaves a rank."""
        moves = (move for plan in plans for move in of.moves(plan))
        return Counter(m.piece for m in moves if layout.rank_of(m.source) != layout.rank_of(m.targets[0]))

    times = {kind: crossings(of) for kind, of in {group.of: group for group in groups}.items()}
    return sum(
        number * group.nbytes(group.lengths[piece], itemsize)
        for group in groups
        for piece, number in times[group.of].items()
    )

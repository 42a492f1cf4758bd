"""Groups of pieces: what a synchronisation carries of a worker's vector, and in which code. Pure.

On the exact wire there are two groups, pool blocks and chunks of shared, each piece one range of a vector. On
the compact wire every kind of number is a group of its own, so that all of a group is written alike.

Where all ranks of a team hold the whole vector, each lane carries its own slice of every part.
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
        longest: of a piece, on the lane that has most: all lanes go through so many.
        lanes: [start, stop) of what each lane carries, in the part of a vector that the pieces are of.
        start: (piece, worker, partition) → where the piece begins in that worker's vector.
        code: in which it travels; None: as it is.
        differences: what travels is how far they are from what all workers agreed on.
    """

    of: Literal["blocks", "shared"]
    lengths: tuple[int, ...]
    longest: int
    lanes: tuple[tuple[int, int], ...]
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


@dataclass(frozen=True)
class Lane:
    """Whose slice of every part is carried: that of lane `index` of `count`."""

    index: int = 0
    count: int = 1

    def slices(self, start: int, stop: int, multiple: int) -> tuple[tuple[int, int], ...]:
        """What each lane carries of [start, stop): as much as any other, but for the last ones."""
        return tuple((start + a, start + b) for a, b in chunk_bounds(stop - start, self.count, multiple))


WHOLE = Lane()


def groups_for(
    state: StateLayout, pool: int, workers: int, *, travel: bool, compact: bool, lane: Lane = WHOLE
) -> tuple[Pieces, ...]:
    """What a run's synchronisations carry. One worker has nobody to write to, on any wire."""
    groups = compact_groups if compact and workers > 1 else exact_groups
    return groups(state, pool, workers, travel, lane)


def groups_of(state: StateLayout, config: Config, pool: int, workers: int) -> tuple[Pieces, ...]:
    """The same, as a run's options have it."""
    travel, compact = config.optimizer_state == "travel", config.wire == "compact"
    return groups_for(state, pool, workers, travel=travel, compact=compact)


def exact_groups(
    state: StateLayout, pool: int, workers: int, travel: bool, lane: Lane = WHOLE
) -> tuple[Pieces, ...]:
    """Pool blocks and chunks of shared, all of them that takes part."""
    return (
        _blocks(state, pool, (0, state.block.exchanged(travel)), lane),
        _chunks((0, state.shared.exchanged(travel)), workers, lane, multiple=1),
    )


def compact_groups(
    state: StateLayout, pool: int, workers: int, travel: bool, lane: Lane = WHOLE
) -> tuple[Pieces, ...]:
    """Of pool blocks and of shared: each row's matrices in a code, its one-dimensional tensors as they are.

    Raises:
        UserError: an optimizer's state has no code.
    """
    groups = []
    for lo, hi, code in _ranges(state, state.block, travel, wire.BF16):
        groups.append(_blocks(state, pool, (lo, hi), lane, code))
    for lo, hi, code in _ranges(state, state.shared, travel, wire.INT8):
        differences = lo == 0 and code is not None
        groups.append(_chunks((lo, hi), workers, lane, BLOCK, code, differences))
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


def _blocks(
    state: StateLayout, pool: int, part: tuple[int, int], lane: Lane, code: Code | None = None
) -> Pieces:
    """Elements [start, stop) of every pool block."""
    lanes = lane.slices(*part, multiple=1 if code is None else BLOCK)
    offset, stop = lanes[lane.index]
    return Pieces(
        "blocks",
        lengths=(stop - offset,) * pool,
        longest=lanes[0][1] - lanes[0][0],
        lanes=lanes,
        start=lambda piece, worker, deal: state.slot_offset(deal.blocks[worker].index(piece)) + offset,
        code=code,
    )


def _chunks(
    part: tuple[int, int],
    workers: int,
    lane: Lane,
    multiple: int,
    code: Code | None = None,
    differences: bool = False,
) -> Pieces:
    """Elements [start, stop) of shared, cut into a chunk for each worker."""
    lanes = lane.slices(*part, multiple)
    offset, end = lanes[lane.index]
    bounds = chunk_bounds(end - offset, workers, multiple)
    first = chunk_bounds(lanes[0][1] - lanes[0][0], workers, multiple)[0]
    return Pieces(
        "shared",
        lengths=tuple(stop - start for start, stop in bounds),
        longest=first[1] - first[0],
        lanes=lanes,
        start=lambda piece, worker, deal: offset + bounds[piece][0],
        code=code,
        differences=differences,
    )


def bytes_sent(
    groups: tuple[Pieces, ...], now: Partition, then: Partition, layout: Layout, itemsize: int
) -> int:
    """Bytes that leave a team when `now` is synchronised and handed to `then`, over all ranks.

    Args:
        groups: that a lane carries, or all lanes together.
    """
    plans = plan_aggregate(now), plan_hand_off(now, then, layout)

    def crossings(of: Pieces) -> Counter[int]:
        """How often each piece leaves a team."""
        moves = (move for plan in plans for move in of.moves(plan))
        return Counter(m.piece for m in moves if layout.team_of(m.source) != layout.team_of(m.targets[0]))

    times = {kind: crossings(of) for kind, of in {group.of: group for group in groups}.items()}
    return sum(
        number * group.nbytes(group.lengths[piece], itemsize)
        for group in groups
        for piece, number in times[group.of].items()
    )

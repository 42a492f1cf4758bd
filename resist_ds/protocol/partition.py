"""Who holds and who owns what, and what must move: pure functions that every rank evaluates alike.

A *piece* is one pool block or one flat chunk of shared. Each piece has *holders* (the workers that
train it in a round) and one *owner* among them. A synchronisation is two exchanges (paper, section 3,
"aggregate" and "decentralised re-partition"):

    aggregate   every piece goes from its holders to its owner, who takes the mean;
    hand_off    every piece goes from its owner to its holders of the next round.

Nothing here communicates or touches a tensor, and nothing drawn here depends on a global generator.
"""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Layout:
    """Which ranks play which worker: worker w is played by team ⌊w·T/W⌋, a team being G consecutive ranks.

    Workers are a number of the algorithm, ranks and teams numbers of the machine; any W ≥ T goes on T teams.
    The ranks that have the same place in their teams are a lane: a synchronisation runs along lanes.

    Attributes:
        workers, ranks: W and R.
        team_size: G; a team of one is a rank.
    """

    workers: int
    ranks: int
    team_size: int = 1

    def __post_init__(self) -> None:
        assert self.ranks % self.team_size == 0, (self.ranks, self.team_size)
        assert 1 <= self.teams <= self.workers, (self.workers, self.ranks, self.team_size)

    @property
    def teams(self) -> int:
        """T = R/G."""
        return self.ranks // self.team_size

    @property
    def most_workers(self) -> int:
        """That a team plays."""
        return -(-self.workers // self.teams)

    def lane_of(self, rank: int) -> int:
        """A rank's place in its team."""
        return rank % self.team_size

    def team_of(self, worker: int) -> int:
        return worker * self.teams // self.workers

    def rank_of(self, worker: int, lane: int = 0) -> int:
        """The one of its team's ranks that has this place."""
        return self.team_of(worker) * self.team_size + lane

    def workers_of(self, rank: int) -> tuple[int, ...]:
        team = rank // self.team_size
        return tuple(w for w in range(self.workers) if self.team_of(w) == team)


@dataclass(frozen=True)
class Partition:
    """One round's deal of the pool.

    Attributes:
        blocks: per worker, the K pool blocks in its slots, ascending (order matters in a ResNet).
        owners: per pool block, the one of its holders that averages it.
        draw: a number that differs from round to round and from seed to seed, for other random choices.
    """

    blocks: tuple[tuple[int, ...], ...]
    owners: tuple[int, ...]
    draw: int = 0

    @property
    def workers(self) -> int:
        return len(self.blocks)

    @property
    def pool(self) -> int:
        """P, the number of pool blocks."""
        return len(self.owners)

    @property
    def slots(self) -> int:
        """K, the number of pool blocks in each sub-ResNet."""
        return len(self.blocks[0])

    @property
    def scale(self) -> float:
        """The test scale K/P: the share of pool blocks that is active in training."""
        return self.slots / self.pool

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """Per pool block, the workers that hold it, ascending."""
        held: list[list[int]] = [[] for _ in self.owners]
        for worker, blocks in enumerate(self.blocks):
            for block in blocks:
                held[block].append(worker)
        return tuple(map(tuple, held))


def slots_for(workers: int, pool: int, min_blocks: int = 0) -> int:
    """K = max(min_blocks, ⌈P/W⌉): the same for all workers, so that all do equal work.

    The paper deals round-robin, so that its workers differ by one block; its slowest does K too.
    """
    return max(min_blocks, -(-pool // workers))


def key(*parts: object) -> int:
    """A 64-bit number from a keyed hash: the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def sample_partition(seed: int, round: int, *, workers: int, pool: int, min_blocks: int = 0) -> Partition:
    """Deal the P pool blocks to W workers at random, K each (paper, section 3).

    The blocks are put on a circle in a random order; the worker at place i, in a random order of the
    workers, takes the K blocks from ⌊iP/W⌋ on, and owns those before ⌊(i+1)P/W⌋. So every block has a
    holder, no worker holds one twice, and both the holder counts of blocks and the loads of owners
    differ by at most one. `min_blocks=pool` deals the whole pool to everyone (local SGD).

    Args:
        seed, round: what the deal is drawn from; equal arguments give equal partitions everywhere.
        min_blocks: lower bound of K, at most P.
    """
    assert workers >= 1 and 0 <= min_blocks <= pool, (workers, min_blocks, pool)
    slots = slots_for(workers, pool, min_blocks)
    order = sorted(range(pool), key=lambda b: key(seed, round, "block", b))
    places = sorted(range(workers), key=lambda w: key(seed, round, "worker", w))
    dealt: list[tuple[int, ...]] = [()] * workers
    owners = [-1] * pool
    for i, worker in enumerate(places):
        start, stop = i * pool // workers, (i + 1) * pool // workers
        dealt[worker] = tuple(sorted(order[(start + k) % pool] for k in range(slots)))
        for block in order[start:stop]:
            owners[block] = worker
    return Partition(tuple(dealt), tuple(owners), key(seed, round))


@dataclass(frozen=True)
class Move:
    """One piece's journey from one worker to workers that one rank plays.

    Attributes:
        piece: index of the pool block, or of the chunk of shared.
        source: the worker that it leaves.
        targets: the workers that it reaches; all are played by the same team, so it is sent once.
    """

    piece: int
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """What moves in one exchange: of pool blocks, and of chunks of shared.

    The two groups run one after the other, each in slices [lo, hi) of its pieces' flat vectors.
    """

    blocks: tuple[Move, ...]
    shared: tuple[Move, ...]


def counted(holders: tuple[int, ...], owner: int, dropped: frozenset[int]) -> tuple[int, ...]:
    """The holders whose values a piece's mean is taken of: those whose round counts.

    Where none does, its owner alone: all are back at the round's start. (There they held the same values, but
    for shared that had gone on being trained behind an exchange.)
    """
    return tuple(h for h in holders if h not in dropped) or (owner,)


def plan_aggregate(partition: Partition, dropped: frozenset[int] = frozenset()) -> Exchange:
    """Every piece from its holders to its owner. Chunk w of shared is owned by worker w.

    Args:
        dropped: the workers whose round does not count (`--on_nan skip`).
    """
    blocks = (
        Move(block, holder, (partition.owners[block],))
        for block, holders in enumerate(partition.holders)
        for holder in counted(holders, partition.owners[block], dropped)
        if holder != partition.owners[block]
    )
    workers = tuple(range(partition.workers))
    shared = (
        Move(chunk, holder, (chunk,))
        for chunk in workers
        for holder in counted(workers, chunk, dropped)
        if holder != chunk
    )
    return Exchange(tuple(blocks), tuple(shared))


def plan_hand_off(now: Partition, then: Partition, layout: Layout) -> Exchange:
    """Every piece from its owner to its next holders; what stays in the same slot does not move."""

    def moves(piece: int, owner: int, holders: tuple[int, ...], stays: bool) -> list[Move]:
        by_team: dict[int, list[int]] = {}
        for holder in holders:
            if not (stays and holder == owner):
                by_team.setdefault(layout.team_of(holder), []).append(holder)
        return [Move(piece, owner, tuple(targets)) for targets in by_team.values()]

    blocks: list[Move] = []
    for block, owner in enumerate(now.owners):
        kept = block in then.blocks[owner]
        stays = kept and now.blocks[owner].index(block) == then.blocks[owner].index(block)
        blocks += moves(block, owner, then.holders[block], stays)
    everyone = tuple(range(now.workers))
    shared = [move for chunk in everyone for move in moves(chunk, chunk, everyone, stays=True)]
    return Exchange(tuple(blocks), tuple(shared))


def chunk_bounds(numel: int, chunks: int, multiple: int = 1) -> tuple[tuple[int, int], ...]:
    """Cut `numel` elements into equal flat chunks, (start, stop) each; the last may be shorter or empty.

    Args:
        multiple: of elements, where chunks begin.
    """
    size = -(-numel // chunks)
    size = -(-size // multiple) * multiple
    return tuple((min(c * size, numel), min((c + 1) * size, numel)) for c in range(chunks))


def spread(sizes: Mapping[str, int], loads: Sequence[int]) -> dict[str, int]:
    """Give named things to workers so that their loads stay even: the largest first, to whoever has least.

    Args:
        sizes: of each thing.
        loads: what each worker has already.

    Returns:
        {name: worker}.
    """
    heap = [(load, worker) for worker, load in enumerate(loads)]
    heapq.heapify(heap)
    given = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        load, given[name] = heap[0]
        heapq.heapreplace(heap, (load + sizes[name], given[name]))
    return given


def slice_length(moves: tuple[Move, ...], layout: Layout, numel: int, budget: int, multiple: int = 1) -> int:
    """How many elements of every piece one pass of an exchange may carry within `budget` elements.

    A pass holds, on each rank, all it sends and all it receives of that slice; the busiest team's decide.

    Args:
        multiple: of elements, unless the pieces are shorter.
    """
    load = [0] * layout.teams
    for move in moves:
        load[layout.team_of(move.source)] += 1
        load[layout.team_of(move.targets[0])] += 1
    length = budget // max(1, *load)
    return max(1, min(numel, max(multiple, length - length % multiple)))

"""Who holds what, and what must move: properties over all sizes, and both exchanges played with symbols."""

import math
from collections import Counter
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import OptimizerState, PartLayout, StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.partition import (
    Layout,
    Partition,
    chunk_bounds,
    plan_aggregate,
    plan_hand_off,
    sample_partition,
    slice_length,
    slots_for,
)
from resist_ds.protocol.pieces import bytes_sent, exact_groups, groups_of

GOLDEN_4_OF_22 = (
    ((1, 3, 5, 14, 15, 18), (0, 2, 11, 14, 17, 21), (4, 6, 10, 12, 13, 16), (7, 8, 9, 12, 19, 20)),
    (1, 0, 1, 0, 2, 0, 2, 3, 3, 3, 2, 1, 3, 2, 1, 0, 2, 1, 0, 3, 3, 1),
)
GOLDEN_3_OF_5 = (((0, 3, 4), (1, 2, 4), (0, 2, 3)), (2, 1, 1, 2, 0))
unhurried = settings(deadline=None)  # a busy machine is no failure
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def deals(draw):
    """(partition of a round, partition of the next, layout), where warm-up may just be over."""
    workers, pool = draw(st.integers(1, 9)), draw(st.integers(1, 30))
    least = draw(st.integers(0, pool))
    seed, round = draw(SEEDS), draw(st.integers(0, 10**6))
    warm_up = draw(st.booleans())
    now = sample_partition(seed, round, workers=workers, pool=pool, min_blocks=pool if warm_up else least)
    then = sample_partition(seed, round + 1, workers=workers, pool=pool, min_blocks=least)
    return now, then, Layout(workers, draw(st.integers(1, workers)))


# --- the partition


@unhurried
@given(st.integers(1, 40), st.integers(1, 60), SEEDS, st.integers(0, 10**9), st.data())
def test_a_partition_is_fair_and_complete(workers, pool, seed, round, data):
    least = data.draw(st.integers(0, pool))
    deal = sample_partition(seed, round, workers=workers, pool=pool, min_blocks=least)
    assert (deal.workers, deal.pool) == (workers, pool)
    assert deal.slots == slots_for(workers, pool, least) == max(least, math.ceil(pool / workers))
    assert deal.scale == deal.slots / pool
    for blocks in deal.blocks:
        assert len(blocks) == deal.slots
        assert all(a < b for a, b in pairwise(blocks)), "ascending, none twice"
        assert blocks[0] >= 0 and blocks[-1] < pool
    held = Counter(block for blocks in deal.blocks for block in blocks)
    assert len(held) == pool, "every block has a holder"
    assert max(held.values()) - min(held.values()) <= 1
    for block, holders in enumerate(deal.holders):
        assert holders == tuple(w for w, blocks in enumerate(deal.blocks) if block in blocks)
        assert deal.owners[block] in holders
    loads = Counter(deal.owners)
    assert max(loads.values()) - min(loads[w] for w in range(workers)) <= 1
    assert deal == sample_partition(seed, round, workers=workers, pool=pool, min_blocks=least)


@unhurried
@given(st.integers(1, 12), st.integers(1, 40), SEEDS)
def test_the_whole_pool_for_everyone_is_local_sgd(workers, pool, seed):
    deal = sample_partition(seed, 0, workers=workers, pool=pool, min_blocks=pool)
    assert deal.blocks == (tuple(range(pool)),) * workers
    assert deal.scale == 1


def test_the_partitions_stay_what_they_are():
    """Golden values: a run resumed next year, or on another machine, must deal the same blocks."""
    deal = sample_partition(0, 0, workers=4, pool=22)
    assert (deal.blocks, deal.owners) == GOLDEN_4_OF_22
    deal = sample_partition(2**63 - 1, 5, workers=3, pool=5, min_blocks=3)
    assert (deal.blocks, deal.owners) == GOLDEN_3_OF_5


@pytest.mark.parametrize(("workers", "pool", "least"), [(3, 7, 0), (5, 3, 0), (2, 6, 5)])
def test_everything_is_equally_likely(workers, pool, least):
    """Frequencies over many rounds, within 5 standard deviations of a fair and independent draw."""
    rounds = 3000
    held, owned, together = Counter(), Counter(), Counter()
    again = 0
    previous = sample_partition(11, rounds, workers=workers, pool=pool, min_blocks=least)
    for round in range(rounds):
        deal = sample_partition(11, round, workers=workers, pool=pool, min_blocks=least)
        for worker, blocks in enumerate(deal.blocks):
            held.update((worker, block) for block in blocks)
            together.update(combinations(blocks, 2))
        owned.update(enumerate(deal.owners))
        again += sum(a == b for a, b in zip(deal.owners, previous.owners, strict=True))
        previous = deal

    def check(count, chance, draws=rounds):
        assert abs(count - draws * chance) <= 5 * math.sqrt(draws * chance * (1 - chance)) + 1e-9

    slots = deal.slots
    for block in range(pool):
        for worker in range(workers):
            check(held[worker, block], slots / pool)
            check(owned[block, worker], 1 / workers)
    # Pairs: which blocks share a sub-ResNet, and whether a round knows of the one before it.
    if slots > 1:
        mean = sum(together.values()) / math.comb(pool, 2)
        assert all(
            abs(together[p] - mean) <= 5 * math.sqrt(mean * workers) for p in combinations(range(pool), 2)
        )
    assert abs(again - rounds * pool / workers) <= 5 * pool * math.sqrt(rounds / workers)


def test_rounds_and_seeds_deal_differently():
    deals = {sample_partition(seed, round, workers=4, pool=22) for seed in range(5) for round in range(5)}
    assert len(deals) == 25


# --- workers on ranks


@unhurried
@given(st.integers(1, 64), st.data())
def test_a_layout_maps_every_worker_to_one_rank(workers, data):
    layout = Layout(workers, data.draw(st.integers(1, workers)))
    played = [layout.workers_of(rank) for rank in range(layout.ranks)]
    assert [w for workers_of in played for w in workers_of] == list(range(workers)), "all, once, contiguous"
    assert all(layout.rank_of(w) == rank for rank, workers_of in enumerate(played) for w in workers_of)
    assert max(map(len, played)) - min(map(len, played)) <= 1


def test_a_layout_needs_a_worker_for_every_rank():
    with pytest.raises(AssertionError):
        Layout(2, 3)


# --- the exchanges, played with symbols: ("block", 3, 1) is what worker 1 made of block 3


def crosses(layout, move):
    return layout.rank_of(move.source) != layout.rank_of(move.targets[0])


def play(now: Partition, then: Partition, layout: Layout):
    """What every worker holds after both exchanges: {(worker, slot): value}, {(worker, chunk): value}."""
    workers = range(now.workers)
    slots = {(w, k): ("block", b, w) for w, blocks in enumerate(now.blocks) for k, b in enumerate(blocks)}
    chunks = {(w, c): ("shared", c, w) for w in workers for c in workers}

    plan = plan_aggregate(now)
    arrived = {}
    for move in plan.blocks:
        arrived.setdefault(move.piece, []).append(
            slots[move.source, now.blocks[move.source].index(move.piece)]
        )
    for block, owner in enumerate(now.owners):
        place = owner, now.blocks[owner].index(block)
        slots[place] = frozenset([slots[place], *arrived.get(block, [])])
    arrived = {}
    for move in plan.shared:
        arrived.setdefault(move.piece, []).append(chunks[move.source, move.piece])
    for chunk in workers:
        chunks[chunk, chunk] = frozenset([chunks[chunk, chunk], *arrived.get(chunk, [])])

    plan = plan_hand_off(now, then, layout)
    sent = [(m, slots[m.source, now.blocks[m.source].index(m.piece)]) for m in plan.blocks]
    for move, value in sent:  # all have left before one arrives
        for target in move.targets:
            slots[target, then.blocks[target].index(move.piece)] = value
    sent = [(m, chunks[m.source, m.piece]) for m in plan.shared]
    for move, value in sent:
        for target in move.targets:
            chunks[target, move.piece] = value
    return slots, chunks


@unhurried
@given(deals())
def test_both_exchanges_leave_everyone_with_the_right_means(case):
    now, then, layout = case
    slots, chunks = play(now, then, layout)
    for worker, blocks in enumerate(then.blocks):
        for slot, block in enumerate(blocks):
            assert slots[worker, slot] == {("block", block, holder) for holder in now.holders[block]}
        for chunk in range(now.workers):
            assert chunks[worker, chunk] == {("shared", chunk, holder) for holder in range(now.workers)}


@unhurried
@given(deals())
def test_every_holder_but_the_owner_sends_once_to_the_owner(case):
    now, _, _ = case
    plan = plan_aggregate(now)
    expected = {
        (b, w, (now.owners[b],)) for b, held in enumerate(now.holders) for w in held if w != now.owners[b]
    }
    assert Counter((m.piece, m.source, m.targets) for m in plan.blocks) == Counter(expected)
    workers = range(now.workers)
    expected = {(chunk, w, (chunk,)) for chunk in workers for w in workers if w != chunk}
    assert Counter((m.piece, m.source, m.targets) for m in plan.shared) == Counter(expected)


@unhurried
@given(deals())
def test_every_next_holder_is_served_once_and_nothing_travels_in_vain(case):
    now, then, layout = case
    plan = plan_hand_off(now, then, layout)
    served = Counter((m.piece, target) for m in plan.blocks for target in m.targets)
    needed = set()
    for block, owner in enumerate(now.owners):
        for holder in then.holders[block]:
            place = now.blocks[owner].index(block)
            if holder != owner or then.blocks[owner].index(block) != place:
                needed.add((block, holder))
    assert served == Counter(needed)
    assert all(m.source == now.owners[m.piece] for m in plan.blocks)
    served = Counter((m.piece, target) for m in plan.shared for target in m.targets)
    workers = range(now.workers)
    assert served == Counter((chunk, w) for chunk in workers for w in workers if w != chunk)
    assert all(m.source == m.piece for m in plan.shared)
    for moves in (plan.blocks, plan.shared):
        ranks = [{layout.rank_of(t) for t in m.targets} for m in moves]
        assert all(len(r) == 1 for r in ranks)
        once = Counter((m.piece, *r) for m, r in zip(moves, ranks, strict=True))
        assert set(once.values()) <= {1}, "a piece goes to a rank once, however many workers it plays"


@unhurried
@given(deals(), st.integers(1, 1000), st.integers(1, 1000))
def test_the_bytes_are_those_of_what_crosses_ranks(case, block, shared):
    """In elements, which cannot be divided: a chunk of shared is whole elements."""
    now, then, layout = case
    parts = (PartLayout((("tensor", (n,)),), OptimizerState(())) for n in (shared, block))
    state = StateLayout(*parts, slots=1)
    blocks, chunked = exact_groups(state, now.pool, now.workers, travel=False)
    block, shared = state.block.parameters, state.shared.parameters
    chunks = [stop - start for start, stop in chunk_bounds(shared, now.workers)]
    expected = 0
    for plan in (plan_aggregate(now), plan_hand_off(now, then, layout)):
        expected += block * sum(crosses(layout, move) for move in plan.blocks)
        expected += sum(chunks[move.piece] * crosses(layout, move) for move in plan.shared)
    assert bytes_sent((blocks, chunked), now, then, layout, 4) == 4 * expected
    assert expected > 0 or layout.ranks == 1
    if layout.ranks == layout.workers:  # shared: a ring all-reduce's 2(W−1) times its size
        expected = 2 * (now.workers - 1) * shared
        assert bytes_sent((chunked,), now, then, layout, 4) == 4 * expected


# --- within the budget


@unhurried
@given(deals(), st.integers(1, 10**6), st.integers(500, 10**6))
def test_every_pass_stays_within_its_budget_and_uses_it(case, numel, budget):
    now, then, layout = case
    aggregate, hand_off = plan_aggregate(now), plan_hand_off(now, then, layout)
    leaving = tuple(m for m in aggregate.blocks if crosses(layout, m))
    for moves in (leaving, aggregate.blocks, aggregate.shared, hand_off.blocks, hand_off.shared, ()):
        length = slice_length(moves, layout, numel, budget)
        held = Counter()
        for move in moves:
            held[layout.rank_of(move.source)] += 1  # what it sends
            held[layout.rank_of(move.targets[0])] += 1  # what it receives
        busiest = max(held.values(), default=0)
        assert 1 <= length <= numel
        assert busiest <= 500 and length * busiest <= budget
        assert length == numel or (length + 1) * max(1, busiest) > budget


def test_a_budget_below_one_element_per_piece_still_gets_on():
    deal = sample_partition(0, 0, workers=4, pool=8)
    assert slice_length(plan_aggregate(deal).shared, Layout(4, 4), 100, 3) == 1


@unhurried
@given(st.integers(0, 10**6), st.integers(1, 70))
def test_chunks_cover_what_they_cut(numel, chunks):
    bounds = chunk_bounds(numel, chunks)
    assert len(bounds) == chunks
    assert bounds[0][0] == 0 and bounds[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
    lengths = [stop - start for start, stop in bounds]
    assert min(lengths) >= 0 and max(lengths) == math.ceil(numel / chunks)


# --- the figures of the paper


@pytest.mark.parametrize(
    ("workers", "paper", "reset", "travel", "compact"),
    [(2, 454, 175.1, 350.2, 87.0), (4, 720, 464.0, 928.0, 214.8), (8, 1289, 969.7, 1939.4, 415.9)],
)
def test_the_papers_net_needs_the_bytes_that_were_promised(workers, paper, reset, travel, compact):
    """MB a round of preact_resnet101 with 10 classes, one worker per rank, as a mean over 1,000 seeds.

    The paper's own figure; on the exact wire without momentum and with it; compact, with momentum.
    """
    plan, layout = Blueprint("preact_resnet101", 10), Layout(workers, workers)
    configs = (
        Config(optimizer_state="reset"),
        Config(optimizer_state="travel"),
        Config(optimizer_state="travel", wire="compact"),
    )
    ways = [groups_of(StateLayout.of(plan, config, 1), config, plan.pool, workers) for config in configs]
    total = [0, 0, 0]
    for seed in range(1000):
        now, then = (sample_partition(seed, r, workers=workers, pool=plan.pool) for r in (0, 1))
        for way, groups in enumerate(ways):
            total[way] += bytes_sent(groups, now, then, layout, 4)
    megabytes = [sent / 1000 / 1e6 for sent in total]
    assert megabytes == pytest.approx([reset, travel, compact], abs=0.06)
    assert megabytes[0] < paper

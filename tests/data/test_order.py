"""Going on in the order of the data and among the workers: nothing is lost, doubled or drawn anew."""

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.data.order import Order, Position
from resist_ds.engines.rates import Rates
from resist_ds.engines.timetable import Timetable
from resist_ds.engines.workers import Workers
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateDict, StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, counted, sample_partition, spread
from resist_ds.protocol.workers import owned
from tests import oracle  # registers the narrow nets

CPU = torch.device("cpu")
MOST = 40  # images that all workers together may see in a step
LOCAL_STEPS = st.integers(1, 6)
EPOCHS = st.one_of(
    st.sampled_from([0.1, 0.2, 0.3, 0.7, 1 / 3, 1.1, 2.675, 1e-5, 3.0]),
    st.floats(1e-3, 8, allow_nan=False),
    st.integers(1, 8),
)


@st.composite
def crews(draw: Any) -> tuple[int, int]:
    """(workers, batch size)."""
    workers = draw(st.integers(1, 6))
    return workers, draw(st.integers(1, MOST // workers))


@st.composite
def orders(draw: Any) -> Order:
    """Of a run that begins, or that goes on from one with other workers."""
    seed, samples = draw(st.integers(0, 2**63 - 1)), draw(st.integers(MOST, 150))
    order = Order(seed, samples, *draw(crews()))
    for rounds in draw(st.lists(st.integers(0, 20), max_size=2)):
        order = gone_on(order, rounds, draw(LOCAL_STEPS))
        order = Order(seed, samples, *draw(crews()), order.start)
    return order


def gone_on(order: Order, rounds: int, local_steps: int) -> Order:
    """The order of the same run, resumed when it has done `rounds` more."""
    return replace(order, start=order.after(rounds, rounds * local_steps))


def timetable(order: Order, local_steps: int, epochs: float) -> Timetable:
    return Timetable(Config(local_steps=local_steps, epochs=epochs), order)


def permutation(order: Order, epoch: int) -> list[int]:
    alone = Order(order.seed, order.samples, 1, order.samples)  # sees a whole epoch at each step
    return alone.batch(epoch, 0)[1].tolist()


def dealt(order: Order, steps: range) -> list[tuple[int, list[int]]]:
    """(epoch, what all workers see in it together), step by step."""
    result = []
    for step in steps:
        batches = [order.batch(step, worker) for worker in range(order.workers)]
        (epoch,) = {epoch for epoch, _ in batches}
        result.append((epoch, np.concatenate([indices for _, indices in batches]).tolist()))
    return result


# ------------------------------------------------------------------------------------------------------------
# The order of the data


@given(orders(), st.lists(st.integers(0, 30), min_size=1, max_size=4), LOCAL_STEPS)
def test_a_run_that_is_cut_goes_on_with_the_same_batches(order: Order, cuts: list[int], local: int) -> None:
    part = order
    for cut in sorted(cuts):
        part = gone_on(part, cut - (part.start.round - order.start.round), local)
        assert part.start == order.after(cut, cut * local)
        steps = range(part.start.step, part.start.step + 2 * order.steps_per_epoch + 1)
        assert dealt(part, steps) == dealt(order, steps)
        for more in range(4):
            assert part.after(more, more * local) == order.after(cut + more, (cut + more) * local)


@given(orders(), LOCAL_STEPS)
def test_after_no_round_a_run_is_where_it_started_or_in_the_next_epoch(order: Order, local: int) -> None:
    start, each = order.start, order.workers * order.batch_size
    if order.samples - start.offset >= each:
        assert order.after(0, 0) == start
    else:
        assert order.after(0, 0) == replace(start, epoch=start.epoch + 1, offset=0)
    assert order.after(0, 0) == gone_on(order, 0, local).after(0, 0)


@given(orders(), st.integers(0, 20), LOCAL_STEPS, crews())
def test_other_workers_deal_the_rest_of_the_epoch_first_and_in_order(
    before: Order, rounds: int, local: int, crew: tuple[int, int]
) -> None:
    position = before.after(rounds, rounds * local)
    order = Order(before.seed, before.samples, *crew, position)
    each = order.workers * order.batch_size
    rest = permutation(order, position.epoch)[position.offset :]
    steps = len(rest) // each
    seen = dealt(order, range(position.step, position.step + steps + order.steps_per_epoch))
    assert [epoch for epoch, _ in seen] == [position.epoch] * steps + [position.epoch + 1] * (
        len(seen) - steps
    )
    of_epoch = [sample for _, samples in seen[:steps] for sample in samples]
    assert of_epoch == rest[: len(of_epoch)] and 0 <= len(rest) - len(of_epoch) <= each - 1
    of_next = [sample for _, samples in seen[steps:] for sample in samples]
    assert of_next == permutation(order, position.epoch + 1)[: len(of_next)]


@given(
    st.integers(0, 2**63 - 1),
    st.integers(MOST, 150),
    st.lists(st.tuples(crews(), st.integers(0, 12)), min_size=2, max_size=5),
    LOCAL_STEPS,
)
def test_however_often_the_workers_change_no_epoch_deals_a_sample_twice(
    seed: int, samples: int, legs: list[tuple[tuple[int, int], int]], local: int
) -> None:
    position, seen, images = Position(), Counter[tuple[int, int]](), 0
    for crew, rounds in legs:
        order = Order(seed, samples, *crew, position)
        for epoch, together in dealt(order, range(position.step, position.step + rounds * local)):
            seen.update((epoch, sample) for sample in together)
            images += len(together)
        position = order.after(rounds, rounds * local)
    assert set(seen.values()) <= {1}
    assert position.samples == images
    assert position.round == sum(rounds for _, rounds in legs) and position.step == position.round * local


@given(orders(), LOCAL_STEPS, EPOCHS, st.data())
def test_a_cut_does_not_change_how_many_rounds_the_epochs_take(
    order: Order, local: int, epochs: float, draw: st.DataObject
) -> None:
    rounds = timetable(order, local, epochs).rounds
    wanted = Fraction(str(epochs)) * order.samples
    more = rounds - order.start.round
    assert order.after(more, more * local).samples >= wanted
    assert more == 0 or order.after(more - 1, (more - 1) * local).samples < wanted
    part = order
    for _ in range(3):
        left = rounds - part.start.round
        part = gone_on(part, draw.draw(st.integers(0, left)), local)
        assert timetable(part, local, epochs).rounds == rounds
    beyond = gone_on(part, rounds - part.start.round + 2, local)
    assert timetable(beyond, local, epochs).rounds == beyond.start.round


# ------------------------------------------------------------------------------------------------------------
# Learning rates


@given(
    orders(),
    LOCAL_STEPS,
    st.one_of(st.builds(dict, epochs=EPOCHS), st.builds(dict, rounds=st.integers(1, 40))),
    st.sampled_from(["step", "cosine", "constant"]),
    st.integers(0, 30),
    st.data(),
)
def test_a_run_that_is_cut_goes_on_with_the_same_learning_rates(
    order: Order, local: int, length: dict[str, Any], schedule: str, warm_up: int, draw: st.DataObject
) -> None:
    config = Config(
        local_steps=local,
        batch_size=order.batch_size,
        schedule=schedule,  # type: ignore[arg-type]
        lr_warmup_steps=warm_up,
        lr=0.1,
        **length,
    )
    rounds = Timetable(config, order).rounds
    assume(rounds > order.start.round)
    cut = draw.draw(st.integers(order.start.round, rounds - 1))
    rest = gone_on(order, cut - order.start.round, local)
    assert Timetable(config, rest).rounds == rounds
    whole, part = (Rates(config, Timetable(config, which)) for which in (order, rest))
    for round in range(cut, min(cut + 5, rounds)):
        rates = whole.of(round)
        assert [rate.hex() for rate in part.of(round)] == [rate.hex() for rate in rates]
        assert len(rates) == local and all(0 <= rate <= 0.1 and math.isfinite(rate) for rate in rates)


# ------------------------------------------------------------------------------------------------------------
# Who counts, and who owns what

NAMES = st.dictionaries(st.text("abc.", max_size=4), st.integers(0, 10**9), max_size=25)


@given(NAMES, st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.booleans(), st.randoms())
def test_things_are_given_once_and_as_evenly_as_the_largest_allows(
    sizes: dict[str, int], loads: list[int], even: bool, shuffle: Any
) -> None:
    if even:
        loads = [loads[0]] * len(loads)
    given_to = spread(sizes, loads)
    assert given_to.keys() == sizes.keys() and set(given_to.values()) <= set(range(len(loads)))
    after = list(loads)
    for name, worker in given_to.items():
        after[worker] += sizes[name]
    assert max(after) - min(after) <= max(max(sizes.values(), default=0), max(loads) - min(loads))
    names = list(sizes)
    shuffle.shuffle(names)
    assert spread({name: sizes[name] for name in names}, loads) == given_to


@given(st.sets(st.integers(0, 8), min_size=1), st.frozensets(st.integers(0, 8)), st.data())
def test_those_count_whose_round_was_good_or_else_the_owner_alone(
    holders: set[int], dropped: frozenset[int], draw: st.DataObject
) -> None:
    owner = draw.draw(st.sampled_from(sorted(holders)))
    counts = counted(tuple(sorted(holders)), owner, dropped)
    assert counts == (tuple(sorted(holders - dropped)) or (owner,))


def owned_by_each(workers: int, blueprint: Blueprint, config: Config, device: str) -> list[StateDict]:
    """What each worker owns, of vectors on `device` that hold nothing."""
    deal = sample_partition(config.seed, 3, workers=workers, pool=blueprint.pool)
    state = StateLayout.of(blueprint, config, deal.slots)
    vectors = {index: torch.empty(state.numel, device=device) for index in range(workers)}
    return [owned(blueprint, state, {index: vector}, deal) for index, vector in vectors.items()]


def elements(share: StateDict) -> int:
    return sum(t.numel() for tensors in share.values() for t in tensors.values())


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["preact_resnet101", "resnetv2_50"])
def test_every_tensor_of_the_global_model_has_one_owner(model: str, workers: int) -> None:
    blueprint = Blueprint(model, 10)
    shares = owned_by_each(workers, blueprint, Config(model=model), "meta")
    shapes = dict(blueprint.shared)
    for block in range(blueprint.pool):
        shapes |= {blueprint.block_prefix(block) + name: shape for name, shape in blueprint.block}
    named = Counter(name for share in shares for name in share)
    assert named == Counter(shapes.keys())
    for share in shares:
        for name, tensors in share.items():
            assert tensors.keys() == {"parameter", "momentum_buffer"}
            assert {tuple(t.shape) for t in tensors.values()} == {tuple(shapes[name])}
    assert sum(map(elements, shares)) == 2 * blueprint.parameters


def test_the_owners_of_the_papers_net_write_about_as_much_each() -> None:
    blueprint = Blueprint("preact_resnet101", 10)
    shares = owned_by_each(4, blueprint, Config(model="preact_resnet101"), "meta")
    sizes = [elements(share) for share in shares]
    assert max(sizes) <= 1.1 * sum(sizes) / len(sizes), sizes


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (3, 1), (3, 2), (4, 4), (8, 3)])
def test_what_the_workers_own_is_the_global_model(workers: int, ranks: int) -> None:
    config = Config(model=oracle.resist_test_basic.__name__, seed=5)
    blueprint = Blueprint(config.model, 10)
    deal = sample_partition(config.seed, 0, workers=workers, pool=blueprint.pool)
    all_owned: dict[str, Tensor] = {}
    for rank in range(ranks):
        place: Comm = SimpleNamespace(rank=rank, size=ranks, device=CPU)  # type: ignore[assignment]
        crew = Workers(place, Layout(workers, ranks), blueprint, config, deal)
        for name, tensors in crew.owned(deal).items():
            assert name not in all_owned and tensors.keys() == {"parameter", "momentum_buffer"}
            all_owned[name] = tensors["parameter"]
    initial = dict(blueprint.initial_shared(5))
    for block in range(blueprint.pool):
        of_block = blueprint.initial_block(5, block)
        initial |= {blueprint.block_prefix(block) + name: value for name, value in of_block.items()}
    assert all_owned.keys() == initial.keys()
    for name, value in all_owned.items():
        np.testing.assert_array_equal(value.numpy().view(np.uint32), initial[name].numpy().view(np.uint32))

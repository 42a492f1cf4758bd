"""Rounds that grow as the learning rate falls: the rule, and that all else follows it."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from resist_ds.data.order import Order, Position
from resist_ds.engines.rates import Rates
from resist_ds.engines.timetable import Timetable, mean_local_steps
from resist_ds.options.config import Config

SIZE, WORKERS, BATCH = 1000, 4, 5  # 20 images a step, 50 steps an epoch
FEWEST, MOST = 5, 50
BEGIN = Position()

# The learning rate when the share u of the run is done, in words of its own.
FALLING: dict[str, Callable[[float], float]] = {
    "cosine": lambda u: math.cos(math.pi * u / 2) ** 2,
    "step": lambda u: 0.01 if u >= 0.75 else 0.1 if u >= 0.5 else 1.0,
    "constant": lambda u: 1.0,
}


def config_of(**options: Any) -> Config:
    given: dict[str, Any] = {"local_steps": FEWEST, "local_steps_max": MOST, "batch_size": BATCH, "epochs": 8}
    return Config(**(given | {"schedule": "cosine", "lr": 0.4} | options))


def order_of(start: Position = BEGIN, workers: int = WORKERS) -> Order:
    return Order(0, SIZE, workers, BATCH, start)


def lengths(timetable: Timetable) -> list[int]:
    return [timetable.local_steps(r) for r in range(timetable.order.start.round, timetable.rounds)]


def by_hand(config: Config, samples: int = 0, workers: int = WORKERS) -> list[int]:
    """⌊(α/lr)²⌋ of round after round, until the epochs are over."""
    lr, alpha, found = FALLING[config.schedule], math.sqrt(config.local_steps), []
    assert config.local_steps_max
    while samples < config.epochs * SIZE:
        rate = lr(samples / (config.epochs * SIZE))
        wished = config.local_steps_max if rate == 0 else (alpha / rate) ** 2 + 1e-6
        found.append(max(config.local_steps, min(config.local_steps_max, math.floor(wished))))
        samples += found[-1] * workers * BATCH
    return found


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize(("fewest", "most"), [(5, 50), (1, 7), (3, 3), (2, 10_000)])
def test_rounds_grow_with_the_inverse_square_of_the_rate(schedule: str, fewest: int, most: int) -> None:
    config = config_of(schedule=schedule, local_steps=fewest, local_steps_max=most)
    timetable = Timetable(config, order_of())
    found = lengths(timetable)
    assert found == by_hand(config) and found[0] == fewest
    assert found == sorted(found) and (schedule == "constant" or found[-1] > fewest or most == fewest)
    assert timetable.mean == pytest.approx(sum(found) / len(found))
    # The epochs are over with the last round, and not before.
    assert timetable.after(timetable.rounds - 2).samples < config.epochs * SIZE <= timetable.end.samples
    assert timetable.end == timetable.after(timetable.rounds - 1)
    assert timetable.end.samples == 20 * sum(found)


def test_a_rate_that_is_a_tenth_has_rounds_a_hundred_times_as_long() -> None:
    """5 / 0.1² is 499.99… in floats. At 1e-4 the rule would have 50,000."""
    found = lengths(Timetable(config_of(schedule="step", local_steps_max=500, epochs=400), order_of()))
    assert {*found} == {5, 500}
    found = lengths(Timetable(config_of(schedule="step", local_steps_max=60_000, epochs=4000), order_of()))
    assert {*found} == {5, 500, 50_000}


@pytest.mark.parametrize("schedule", FALLING)
def test_under_rounds_the_rounds_are_what_is_counted(schedule: str) -> None:
    config = config_of(schedule=schedule, rounds=40)
    timetable = Timetable(config, order_of())
    rates = [FALLING[schedule](r / 40) for r in range(40)]
    assert lengths(timetable) == [max(5, min(50, math.floor(5 / rate**2 + 1e-6))) for rate in rates]
    of = Rates(config, timetable)
    for round in range(40):  # the rate that the rule has seen is the one that is used
        used = of.of(round)
        assert len(used) == timetable.local_steps(round)
        assert used[0] == pytest.approx(0.4 * rates[round], rel=1e-9)


def test_no_warm_up_and_no_peak_move_the_rule() -> None:
    plain = lengths(Timetable(config_of(), order_of()))
    for options in ({"lr_warmup_steps": 60}, {"lr": 0.0}, {"lr": 1e-30}, {"warmup_rounds": 3}, {"seed": 3}):
        assert lengths(Timetable(config_of(**options), order_of())) == plain


def test_the_rates_follow_the_rounds() -> None:
    config = config_of(lr_warmup_steps=7)
    timetable = Timetable(config, order_of())
    rates, step = Rates(config, timetable), 0
    for round, steps in enumerate(lengths(timetable)):
        assert timetable.after(round - 1).step == step
        for rate in rates.of(round):
            expected = 0.4 * FALLING["cosine"](step * 20 / timetable.end.samples) * min(1, (step + 1) / 7)
            assert rate == pytest.approx(expected, rel=1e-9)
            step += 1
        assert timetable.after(round).step == step == timetable.after(round - 1).step + steps
    assert step == timetable.end.step


@given(
    st.sampled_from([*FALLING]),
    st.integers(1, 6),
    st.integers(0, 60),
    st.one_of(st.builds(dict, epochs=st.floats(0.1, 8)), st.builds(dict, rounds=st.integers(1, 40))),
    st.data(),
)
def test_a_run_that_is_cut_has_the_same_rounds(
    schedule: str, fewest: int, more: int, length: dict[str, Any], draw: st.DataObject
) -> None:
    config = config_of(schedule=schedule, local_steps=fewest, local_steps_max=fewest + more, **length)
    whole = Timetable(config, order_of())
    cut = draw.draw(st.integers(0, whole.rounds))
    part = Timetable(config, order_of(whole.after(cut - 1)))
    assert part.rounds == whole.rounds and part.end == whole.end
    assert lengths(part) == lengths(whole)[cut:]
    for round in range(cut, whole.rounds):
        assert part.after(round) == whole.after(round)
        assert Rates(config, part).of(round) == Rates(config, whole).of(round)


def test_other_workers_go_on_from_the_images_seen() -> None:
    config = config_of()
    whole = Timetable(config, order_of())
    half = whole.after(30)
    part = Timetable(config, order_of(half, workers=8))
    found = lengths(part)
    assert found == by_hand(config, half.samples, workers=8) != lengths(whole)[31:]
    assert (
        part.rounds == 31 + len(found) and part.end.samples >= 8 * SIZE > part.after(part.rounds - 2).samples
    )
    assert part.after(31).samples == half.samples + 40 * found[0]


@given(
    st.one_of(st.builds(dict, epochs=st.floats(1e-3, 8)), st.builds(dict, rounds=st.integers(1, 40))),
    st.integers(1, 9),
    st.sampled_from([*FALLING]),
    st.integers(0, 20),
)
def test_a_maximum_that_is_the_minimum_changes_nothing(
    length: dict[str, Any], steps: int, schedule: str, cut: int
) -> None:
    plain = config_of(local_steps=steps, local_steps_max=None, schedule=schedule, **length)
    same = replace(plain, local_steps_max=steps)
    assume(cut < Timetable(plain, order_of()).rounds)
    start = Timetable(plain, order_of()).after(cut - 1)
    old, new = (Timetable(config, order_of(start)) for config in (plain, same))
    assert (old.rounds, old.end, old.mean) == (new.rounds, new.end, new.mean) and old.mean == steps
    assert lengths(old) == lengths(new) == [steps] * (old.rounds - cut)
    for round in range(cut, old.rounds):
        assert old.after(round) == new.after(round)
        assert Rates(plain, old).of(round) == Rates(same, new).of(round)


def test_without_a_maximum_the_longest_run_takes_no_memory() -> None:
    for length in ({"rounds": 10**30}, {"epochs": 1e30}):
        timetable = Timetable(config_of(local_steps_max=None, **length), order_of())
        assert timetable.mean == timetable.local_steps(10**29) == FEWEST
        assert timetable.after(10**28).step == FEWEST * (10**28 + 1)


@pytest.mark.parametrize("options", [{"rounds": 3}, {"epochs": 0.5}])
@pytest.mark.parametrize("most", [None, MOST])
def test_a_run_that_is_over_has_no_round_left(options: dict[str, Any], most: int | None) -> None:
    done = Position(round=9, step=50, samples=1000, epoch=1, offset=0)
    timetable = Timetable(config_of(local_steps_max=most, **options), order_of(done))
    assert timetable.rounds == options.get("rounds", 9) and timetable.end == done
    Rates(timetable.config, timetable)


@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize("length", [{"rounds": 20_000}, {"epochs": 4000}])
def test_the_mean_of_a_prediction_is_that_of_a_long_run(schedule: str, length: dict[str, Any]) -> None:
    config = config_of(schedule=schedule, **length)
    assert mean_local_steps(config) == pytest.approx(Timetable(config, order_of()).mean, rel=2e-3)
    assert mean_local_steps(replace(config, local_steps_max=None)) == FEWEST


def test_the_longer_the_rounds_the_fewer() -> None:
    rounds = [Timetable(config_of(local_steps_max=most), order_of()).rounds for most in (5, 6, 10, 50, 500)]
    assert all(more > fewer for more, fewer in pairwise(rounds))

"""Synchronisations of made-up vectors against the oracle, round after round: the compact wire to the bit."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resist_ds.nets.subnet import PartLayout, StateLayout
from resist_ds.protocol.partition import Layout, Partition, sample_partition
from resist_ds.protocol.sync import Synchroniser
from resist_ds.protocol.wire import BF16, INT4, INT8, LOG8
from tests.oracle_wire import (
    Compact,
    Exact,
    State,
    given_bits,
    rounded_bf16,
    rounded_int4,
    rounded_int8,
    rounded_log8,
)
from tests.protocol.test_sync import STATES, ThreadComm, on_threads

pytestmark = pytest.mark.numerical

MIB = 1 << 20


@dataclass(frozen=True)
class Situation:
    """What is synchronised: every worker's vector, drawn anew in each round from what was agreed on before.

    Attributes:
        dropped: of each round, the workers that do not count.
    """

    deals: tuple[Partition, ...]
    dropped: tuple[frozenset[int], ...]
    state: StateLayout
    travel: bool
    seed: int

    @property
    def workers(self) -> int:
        return self.deals[0].workers

    @property
    def rounds(self) -> Iterator[tuple[Partition, Partition, frozenset[int]]]:
        for (now, then), dropped in zip(itertools.pairwise(self.deals), self.dropped, strict=True):
            yield now, then, dropped

    def held(self, vector: Tensor, blocks: Sequence[int]) -> State:
        """{name: {kind: view}} of a worker's vector; names of block 3 begin with `pool.3.`."""
        found = self._named("shared.", self.state.shared, self.state.shared_part(vector))
        for slot, block in enumerate(blocks):
            found |= self._named(f"pool.{block}.", self.state.block, self.state.slot_part(vector, slot))
        return found

    @staticmethod
    def _named(prefix: str, layout: PartLayout, part: Tensor) -> State:
        return {prefix + name: tensors for name, tensors in layout.tensors(part).items()}

    def begin(self) -> dict[int, Tensor]:
        """All workers' vectors at the start: the same numbers of each piece, and zeros between tensors."""
        vectors = {w: torch.zeros(self.state.numel) for w in range(self.workers)}
        for w, vector in vectors.items():
            for name, tensors in self.held(vector, self.deals[0].blocks[w]).items():
                generator = np.random.default_rng([self.seed, 0, *name.encode()])
                for tensor in tensors.values():
                    numbers = np.abs(_numbers(generator, tensor.numel()))
                    tensor.copy_(torch.from_numpy(numbers).view(tensor.shape))
        return vectors

    def train(self, vector: Tensor, round: int, worker: int) -> None:
        """A made-up round of a worker: small differences of all sizes, new momentum, a counter."""
        generator = np.random.default_rng((self.seed, 1 + round, worker))
        for tensors in self.held(vector, self.deals[round].blocks[worker]).values():
            for kind, tensor in tensors.items():
                numbers = torch.from_numpy(_numbers(generator, tensor.numel())).view(tensor.shape)
                if kind == "parameter":
                    tensor.add_(numbers, alpha=0.01)
                elif kind == "step":
                    tensor.add_(1 + round)
                else:
                    tensor.copy_(numbers.square() if kind == "exp_avg_sq" else numbers)


def _numbers(generator: np.random.Generator, n: int) -> np.ndarray:
    """float32 [n] of all sizes, with zeros, and runs that are much larger or smaller than others."""
    numbers = generator.standard_normal(n) * np.exp(2 * generator.standard_normal(n))
    numbers *= np.repeat(10.0 ** generator.integers(-6, 3, -(-n // 100)), 100)[:n]
    return np.where(generator.random(n) < 0.1, 0, numbers).astype(np.float32)


def expected(s: Situation, compact: bool = True) -> list[list[State]]:
    """What each worker holds after each round, as the oracle has it."""
    vectors = s.begin()
    initial = s.held(vectors[0], range(s.state.slots))
    initial |= {  # of blocks names and shapes alone matter
        f"pool.{b}.{name}": {"parameter": torch.zeros(shape)}
        for b in range(s.deals[0].pool)
        for name, shape in s.state.block.shapes
    }
    wire = Exact(s.travel)
    if compact:
        wire = Compact(s.travel, s.workers, initial, [f"pool.{b}." for b in range(s.deals[0].pool)])
    seen = []
    for round, (now, then, dropped) in enumerate(s.rounds):
        for w in set(range(s.workers)) - dropped:
            s.train(vectors[w], round, w)
        ends = [s.held(vectors[w], now.blocks[w]) for w in range(s.workers)]
        agreed = wire.agree(ends, now, dropped)
        for w, vector in vectors.items():
            for name, tensors in s.held(vector, then.blocks[w]).items():
                for kind, value in agreed[name].items():
                    tensors[kind].copy_(value)
        seen.append([_copy(s.held(vectors[w], then.blocks[w])) for w in range(s.workers)])
    return seen


def _copy(state: State) -> State:
    return {name: {kind: t.clone() for kind, t in tensors.items()} for name, tensors in state.items()}


def real(s: Situation, ranks: int, budget: int) -> list[list[State]]:
    """The same by the package, on ranks that are threads."""
    layout, seen = Layout(s.workers, ranks), [[{}] * s.workers for _ in s.dropped]

    def rank(comm: ThreadComm) -> None:
        mine = {w: v for w, v in s.begin().items() if w in layout.workers_of(comm.rank)}
        sync = Synchroniser(
            comm,  # type: ignore[arg-type]
            layout,
            s.state,
            s.deals[0].pool,
            budget=budget,
            travel=s.travel,
            compact=True,
            vectors=mine,
        )
        for round, (now, then, dropped) in enumerate(s.rounds):
            for w in mine.keys() - dropped:
                s.train(mine[w], round, w)
            sync.aggregate(mine, now, dropped)
            sync.hand_off(mine, now, then)
            for w, vector in mine.items():
                seen[round][w] = _copy(s.held(vector, then.blocks[w]))

    on_threads(ranks, rank)
    return seen


@st.composite
def situations(draw: Any) -> Situation:
    workers, pool = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**32))
    least = sorted(draw(st.lists(st.integers(0, pool), min_size=2, max_size=4)), reverse=True)
    deals = tuple(
        sample_partition(seed, r, workers=workers, pool=pool, min_blocks=m) for r, m in enumerate(least)
    )
    optimizer = draw(st.sampled_from(STATES))
    matrix = st.tuples(st.integers(1, 40), st.integers(1, 40))
    shapes = st.lists(matrix | st.tuples(st.integers(1, 90)), min_size=1, max_size=4)
    shared, block = (
        PartLayout(tuple((f"tensor{i}", shape) for i, shape in enumerate(draw(shapes))), optimizer)
        for _ in range(2)
    )
    few = st.frozensets(st.integers(0, workers - 1)) | st.just(frozenset())
    return Situation(
        deals,
        tuple(draw(few) for _ in deals[1:]),
        StateLayout(shared, block, deals[0].slots),
        draw(st.booleans()),
        seed,
    )


@settings(max_examples=100)
@given(situations(), st.data())
def test_a_compact_synchronisation_is_the_oracles(s: Situation, data: Any) -> None:
    ranks = data.draw(st.integers(1, min(s.workers, 3)))
    budget = data.draw(st.sampled_from([1, 4096, MIB]))
    for round, states in enumerate(zip(real(s, ranks, budget), expected(s), strict=True)):
        for worker, (got, want) in enumerate(zip(*states, strict=True)):
            assert got.keys() == want.keys()
            for name, tensors in want.items():
                for kind, value in tensors.items():
                    assert torch.equal(got[name][kind], value), (round, worker, name, kind)


def test_codes_are_the_oracles_at_the_edges_too() -> None:
    """Halves, zeros, numbers next to the smallest and the largest, blocks of one value and of 255."""
    generator = np.random.default_rng(0)
    halves = np.arange(-127, 128, dtype=np.float32) / 2
    for numbers in (
        np.concatenate([halves, np.float32([127, -127])]),
        np.float32([0]),
        np.float32([-0.0, 0.0]),
        np.float32([3.37e38, -3.37e38, 1, 1e-45]),  # int4's step is up to 1/128 longer
        np.float32([1e-45, -1e-40, 1.2e-38]),  # no difference so small can be written
        np.exp(15 * generator.standard_normal(5 * 256 - 1)).astype(np.float32),
        _numbers(generator, 256),
    ):
        values = torch.from_numpy(numbers)
        random = generator.integers(0, 1 << 16, len(numbers))
        noise = torch.from_numpy(random - (1 << 15)).int()
        for code, got, want in (
            (INT4, INT4.encode(values), rounded_int4(numbers)),
            (INT8, INT8.encode(values), rounded_int8(numbers)),
            (LOG8, LOG8.encode(values.abs()), rounded_log8(np.abs(numbers))),
            (BF16, BF16.encode(values, noise), rounded_bf16(numbers, random)),
        ):
            assert len(got) == code.nbytes(len(numbers))
            np.testing.assert_array_equal(code.decode(got, len(numbers)).numpy(), want)
            # and what has been read is written as it was, whatever the random bits
            again = code.encode(torch.from_numpy(want), noise)
            np.testing.assert_array_equal(code.decode(again, len(numbers)).numpy(), want)


def test_random_bits_are_uniform_and_differ_from_key_to_key() -> None:
    """In each stream of numbers, and at each place over all streams: rounding has no bias anywhere."""
    n = 1 << 16
    streams = np.stack(
        [
            given_bits(sample_partition(seed, round, workers=2, pool=2), stage, block, worker, n)
            for seed, round in itertools.product((0, 1), range(2))
            for stage, block, worker in itertools.product(("aggregate", "hand_off"), (0, 1), (0, 1))
        ]
    )
    assert streams.min() == 0 and streams.max() == (1 << 16) - 1
    for numbers in (*streams, streams[:, :2048].T.ravel()):
        for part in (numbers >> 8, numbers & 255):  # χ² of 255 degrees of freedom
            counts = np.bincount(part, minlength=256)
            assert ((counts - n / 256) ** 2).sum() / (n / 256) < 255 + 6 * np.sqrt(2 * 255)
    scaled = (streams - 32767.5) / (65536 / np.sqrt(12))
    within = [(scaled[:, :-lag] * scaled[:, lag:]).mean(1) for lag in (1, 2, 3, 32, 256, 1 << 15)]
    assert np.abs(within).max() < 6 / np.sqrt(n / 2)
    assert np.abs(scaled.mean(0)).max() < 6 / np.sqrt(len(streams))
    between = np.corrcoef(scaled)[np.triu_indices(len(streams), 1)]
    assert np.sqrt((between**2).mean()) < 0.1

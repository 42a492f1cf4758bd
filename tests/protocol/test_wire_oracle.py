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
from tests.oracle_wire import Compact, Exact, State
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
        """All workers' vectors at the start: the same numbers, and zeros between tensors."""
        generator = np.random.default_rng((self.seed, 0))
        first = torch.zeros(self.state.numel)
        for tensors in self.held(first, range(self.state.slots)).values():
            for tensor in tensors.values():
                tensor.copy_(torch.from_numpy(np.abs(_numbers(generator, tensor.numel()))).view(tensor.shape))
        return {w: first.clone() for w in range(self.workers)}

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

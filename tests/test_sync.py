"""Synchronisation: bit for bit, on any number of ranks, within the transit budget, and every byte counted."""

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resist_ds.comm import Comm, Ledger
from resist_ds.config import Config
from resist_ds.models import Blueprint
from resist_ds.partition import Layout, Partition, chunk_bounds, sample_partition, synchronisation_bytes
from resist_ds.subnet import OptimizerState, PartLayout, StateLayout
from resist_ds.sync import Synchroniser
from resist_ds.trainer import Trainer
from tests import oracle  # registers the narrow nets

CPU = torch.device("cpu")
MIB = 1 << 20

BASE: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 16,
    "model": oracle.resist_test_basic.__name__,  # P = 7
    "batch_size": 2,
    "local_steps": 1,
    "lr": 0.1,
    "schedule": "constant",
    "eval_every": 0,
    "eval_batch_size": 128,
    "calibration_samples": 16,
    "log_with": "none",
    "progress": False,
    "cpu_threads": 1,
}


def bits(values: np.ndarray) -> np.ndarray:
    """The bits of floating-point numbers: 0.0 and -0.0 differ, and a NaN equals itself."""
    return np.ascontiguousarray(values).view({4: np.uint32, 8: np.uint64}[values.dtype.itemsize])


# ------------------------------------------------------------------------------------------------------------
# One synchronisation, of made-up vectors. Ranks are threads of this process, so that hypothesis can try many.


class Wire:
    """What joins the ranks: a table of what each sends, and a barrier on both sides of reading it."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.sent: list[tuple[Tensor, ...]] = [()] * size


class ThreadComm:
    """Comm's part of an exchange, checked: counts that match, and how much memory is in transit."""

    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank, self.size = wire, rank, wire.size
        self.device = self.buffer_device = CPU
        self.ledger = Ledger()
        self.live: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.most = 0  # bytes of buffers that were alive at a time

    def buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        buffer = torch.full((numel,), torch.nan, dtype=dtype)
        self.live[id(buffer)] = buffer
        self.most = max(self.most, sum(b.nbytes for b in self.live.values()))
        return buffer

    def all_to_all(
        self, send: Tensor, receive: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], kind: str
    ) -> None:
        self.wire.sent[self.rank] = tuple(part.clone() for part in send.split(list(send_counts)))
        self.wire.barrier.wait()
        for source, into in enumerate(receive.split(list(receive_counts))):
            part = self.wire.sent[source][self.rank]
            assert part.shape == into.shape, "a rank expects another number of elements than its peer sends"
            into.copy_(part)
        self.ledger[kind] += sum(part.nbytes for r, part in enumerate(self.wire.sent[self.rank]) if r != self.rank)
        self.wire.barrier.wait()


def on_threads(size: int, rank: Callable[[ThreadComm], None]) -> list[ThreadComm]:
    wire = Wire(size)
    comms = [ThreadComm(wire, r) for r in range(size)]
    errors: list[BaseException] = []

    def run(comm: ThreadComm) -> None:
        try:
            rank(comm)
        except BaseException as error:
            errors.append(error)
            wire.barrier.abort()

    threads = [threading.Thread(target=run, args=(comm,)) for comm in comms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return comms


def synchronise(
    vectors: dict[int, Tensor],
    deals: Sequence[Partition],
    ranks: int,
    state: StateLayout,
    *,
    budget: int,
    travel: bool,
    after_aggregate: Callable[[dict[int, Tensor], Partition], None] = lambda vectors, now: None,
) -> list[ThreadComm]:
    """Hand all workers' vectors through the deals, in place."""
    layout = Layout(len(vectors), ranks)

    def rank(comm: ThreadComm) -> None:
        mine = {w: vectors[w] for w in layout.workers_of(comm.rank)}
        sync = Synchroniser(comm, layout, state, deals[0].pool, budget=budget, travel=travel)  # type: ignore[arg-type]
        for now, then in zip(deals, deals[1:], strict=False):
            sync.aggregate(mine, now)
            comm.wire.barrier.wait()
            if comm.rank == 0:
                after_aggregate(vectors, now)
            comm.wire.barrier.wait()
            sync.hand_off(mine, now, then)

    return on_threads(ranks, rank)


class Reference:
    """The same from the book: what every worker holds is taken apart into a dict of pieces, and put together."""

    def __init__(self, state: StateLayout, travel: bool):
        self.shared = state.shared.numel if travel else state.shared.parameters
        self.block = state.block.numel if travel else state.block.parameters
        self.begin = [state.shared.numel + slot * state.block.numel for slot in range(state.slots)]

    def averages(self, vectors: dict[int, np.ndarray], now: Partition) -> dict[object, np.ndarray]:
        def mean(values: list[np.ndarray]) -> np.ndarray:
            total = np.zeros(len(values[0]), np.float64) - 0.0
            for value in values:
                total = total + value
            return (total / len(values)).astype(values[0].dtype)

        pieces: dict[object, np.ndarray] = {"shared": mean([vectors[w][: self.shared] for w in sorted(vectors)])}
        for block in range(now.pool):
            starts = [(w, self.begin[held.index(block)]) for w, held in enumerate(now.blocks) if block in held]
            pieces[block] = mean([vectors[w][at : at + self.block] for w, at in starts])
        return pieces

    def handed_on(
        self, vectors: dict[int, np.ndarray], pieces: dict[object, np.ndarray], then: Partition
    ) -> dict[int, np.ndarray]:
        """What does not take part (padding behind it, momentum under `reset`) stays as it is."""
        after = {w: vector.copy() for w, vector in vectors.items()}
        for w, vector in after.items():
            vector[: self.shared] = pieces["shared"]
            for slot, block in enumerate(then.blocks[w]):
                vector[self.begin[slot] : self.begin[slot] + self.block] = pieces[block]
        return after


STATES = (
    OptimizerState(()),
    OptimizerState(("momentum_buffer",)),
    OptimizerState(("exp_avg", "exp_avg_sq"), "step"),
)


@st.composite
def situations(draw: Any) -> dict[str, Any]:
    workers, pool = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    ranks = draw(st.integers(1, min(workers, 4)))
    seed = draw(st.integers(0, 2**32))
    least = draw(st.lists(st.integers(0, pool), min_size=2, max_size=4).map(lambda x: sorted(x, reverse=True)))
    deals = [
        sample_partition(seed, r, workers=workers, pool=pool, min_blocks=m) for r, m in enumerate(least)
    ]  # with fewer and fewer slots, as when warm-up ends
    optimizer = draw(st.sampled_from(STATES))
    shapes = st.lists(st.integers(1, 90), min_size=1, max_size=3)
    shared, block = (
        PartLayout(tuple((f"{i}", (n,)) for i, n in enumerate(draw(shapes))), optimizer) for _ in range(2)
    )
    return {
        "deals": deals,
        "ranks": ranks,
        "state": StateLayout(shared, block, deals[0].slots),
        "travel": draw(st.booleans()),
        "budget": draw(st.sampled_from([1, 333, 1000, 4096, MIB])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": seed,
    }


@settings(max_examples=150, deadline=None)
@given(situations())
def test_a_synchronisation_is_means_over_holders_brought_to_the_next_ones(situation):
    deals, state, travel = situation["deals"], situation["state"], situation["travel"]
    generator = torch.Generator().manual_seed(situation["seed"])
    vectors = {
        w: torch.randn(state.numel, generator=generator, dtype=situation["dtype"])
        for w in range(deals[0].workers)
    }
    reference = Reference(state, travel)
    expected = {w: vector.numpy().copy() for w, vector in vectors.items()}
    averages: dict[object, np.ndarray] = {}

    def owners_have_the_means(vectors: dict[int, Tensor], now: Partition) -> None:
        nonlocal averages, expected
        # what a hand-off does not overwrite is what aggregate has left in the vectors
        averages = reference.averages(expected, now)
        expected = {w: vector.numpy().copy() for w, vector in vectors.items()}
        for block, owner in enumerate(now.owners):
            at = reference.begin[now.blocks[owner].index(block)]
            got = expected[owner][at : at + reference.block]
            np.testing.assert_array_equal(bits(got), bits(averages[block]))
        for owner, (start, stop) in enumerate(chunk_bounds(reference.shared, now.workers)):
            np.testing.assert_array_equal(bits(expected[owner][start:stop]), bits(averages["shared"][start:stop]))

    for now, then in zip(deals, deals[1:], strict=False):
        before = {w: vector.numpy().copy() for w, vector in vectors.items()}
        comms = synchronise(
            vectors,
            (now, then),
            situation["ranks"],
            state,
            budget=situation["budget"],
            travel=travel,
            after_aggregate=owners_have_the_means,
        )
        expected = reference.handed_on(before, averages, then)
        _ = comms

"""Synchronisation: bit for bit, on any number of ranks, within the transit budget, and every byte counted."""

import itertools
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resist_ds.comm import Comm, Ledger
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import OptimizerState, PartLayout, StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol import sync
from resist_ds.protocol.partition import Layout, Partition, chunk_bounds, sample_partition
from resist_ds.protocol.pieces import bytes_sent, exact_groups, groups_of
from resist_ds.protocol.sync import Synchroniser
from resist_ds.telemetry.records import Telemetry
from resist_ds.trainer import Trainer
from tests import THREADS, oracle  # registers the narrow nets

CPU = torch.device("cpu")
MIB = 1 << 20

BASE: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
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
    "cpu_threads": THREADS,
}


def bits(values: np.ndarray) -> np.ndarray:
    """The bits of floating-point numbers: 0.0 and -0.0 differ, and a NaN equals itself."""
    return np.ascontiguousarray(values).view({4: np.uint32, 8: np.uint64}[values.dtype.itemsize])


# ------------------------------------------------------------------------------------------------------------
# One synchronisation, of made-up vectors. Ranks are threads of this process, so that hypothesis can try many.


class Wire:
    """What joins the ranks: the messages on their way, {(source, target): in order}, and a barrier."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.posted: dict[tuple[int, int], list[Tensor]] = {
            pair: [] for pair in itertools.product(range(size), repeat=2)
        }


class ThreadComm:
    """Comm's part of an exchange, checked: counts that match, and how much memory is in transit."""

    def __init__(self, wire: Wire, rank: int):
        self.wire, self.rank, self.size = wire, rank, wire.size
        self.device = self.buffer_device = CPU
        self.ledger = Ledger()
        self.live: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
        self.most = 0  # bytes of buffers that were in memory at a time

    def buffer(self, numel: int, like: Tensor) -> Tensor:
        buffer = torch.full((numel,), torch.nan, dtype=like.dtype).numpy()  # lives as long as any view of it
        self.live[id(buffer)] = buffer
        self.most = max(self.most, sum(b.nbytes for b in self.live.values()))
        return torch.from_numpy(buffer)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], kind: str
    ) -> None:
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t, _ in (*receives, *sends)]
        for i, (start, stop) in enumerate(spans[: len(receives)]):
            others = spans[:i] + spans[i + 1 :]
            assert all(stop <= a or b <= start for a, b in others), "a message arrives where another one lies"
        for tensor, rank in sends:
            assert rank != self.rank and tensor.is_contiguous()
            self.wire.posted[self.rank, rank].append(tensor.clone())
            self.ledger[kind] += tensor.nbytes
        self.wire.barrier.wait()
        for tensor, rank in receives:
            assert rank != self.rank and tensor.is_contiguous()
            message = self.wire.posted[rank, self.rank].pop(0)
            assert message.shape == tensor.shape, "a rank expects other messages than its peer sends"
            tensor.copy_(message)
        self.wire.barrier.wait()
        assert not any(self.wire.posted.values()), "something was sent that nobody waits for"
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


Seen = Callable[[int, str], None]  # round, "aggregate" or "hand_off"


def synchronise(
    vectors: dict[int, Tensor],
    deals: Sequence[Partition],
    ranks: int,
    state: StateLayout,
    *,
    budget: int,
    travel: bool,
    seen: Seen = lambda round, step: None,
) -> list[ThreadComm]:
    """Lead all workers' vectors through the deals, in place; `seen` is called after every step."""
    layout = Layout(len(vectors), ranks)

    def rank(comm: ThreadComm) -> None:
        def done(round: int, step: str) -> None:
            comm.wire.barrier.wait()
            if comm.rank == 0:
                seen(round, step)
            comm.wire.barrier.wait()

        mine = {w: vectors[w] for w in layout.workers_of(comm.rank)}
        sync = Synchroniser(comm, layout, state, deals[0].pool, budget=budget, travel=travel)  # type: ignore[arg-type]
        for round, (now, then) in enumerate(itertools.pairwise(deals)):
            sync.aggregate(mine, now)
            done(round, "aggregate")
            sync.hand_off(mine, now, then)
            done(round, "hand_off")

    return on_threads(ranks, rank)


@dataclass(frozen=True)
class Book:
    """Where the pieces lie in a vector and what becomes of them, said in the plainest way.

    Attributes:
        shared, block: elements of shared and of a pool block that take part; they come first in their part.
        begin: where each part of a vector begins: shared, slot 0, slot 1, ...
        end: where each ends.
    """

    shared: int
    block: int
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, state: StateLayout, travel: bool) -> "Book":
        sizes = [state.shared.numel] + [state.block.numel] * state.slots
        ends = tuple(itertools.accumulate(sizes))
        part = "numel" if travel else "parameters"
        begins = tuple(end - size for end, size in zip(ends, sizes, strict=True))
        return cls(getattr(state.shared, part), getattr(state.block, part), begins, ends)

    def held(self, vector: np.ndarray, blocks: Sequence[int]) -> dict[object, np.ndarray]:
        """A worker's vector, taken apart: {"shared" or block: its values}."""
        slots = zip(blocks, self.begin[1:], strict=False)
        return {"shared": vector[: self.shared]} | {b: vector[at : at + self.block] for b, at in slots}

    def idle(self, vector: np.ndarray) -> np.ndarray:
        """What takes no part in an exchange (momentum under `reset`)."""
        lengths = (self.shared, *(self.block for _ in self.begin[1:]))
        return np.concatenate(
            [vector[b + n : e] for b, n, e in zip(self.begin, lengths, self.end, strict=True)]
        )

    def means(self, vectors: Mapping[int, np.ndarray], deal: Partition) -> dict[object, np.ndarray]:
        """{piece: mean over its holders, in float64 and in the workers' order}."""
        values: dict[object, list[np.ndarray]] = {}
        for worker in sorted(vectors):
            for piece, value in self.held(vectors[worker], deal.blocks[worker]).items():
                values.setdefault(piece, []).append(value)
        return {piece: _mean(of) for piece, of in values.items()}

    def bytes(self, now: Partition, then: Partition, layout: Layout, itemsize: int) -> int:
        """What has to cross between ranks."""
        chunks = [stop - start for start, stop in chunk_bounds(self.shared, layout.workers)]
        return itemsize * crossing(now, then, layout, self.block, chunks)


def crossing(now: Partition, then: Partition, layout: Layout, block: int, chunks: Sequence[int]) -> int:
    """Each holder's piece goes to the owner, then one copy to each rank: their sizes, over all ranks.

    Args:
        block, chunks: sizes of a pool block, and of each chunk of shared.
    """

    def crossings(owner: int, holders: Iterable[int], heirs: Iterable[int]) -> int:
        home = layout.rank_of(owner)
        sent = sum(layout.rank_of(holder) != home for holder in holders)
        return sent + len({layout.rank_of(heir) for heir in heirs} - {home})

    everyone = range(layout.workers)
    total = 0
    for b, owner in enumerate(now.owners):
        heirs = [w for w in everyone if b in then.blocks[w]]
        total += block * crossings(owner, [w for w in everyone if b in now.blocks[w]], heirs)
    return total + sum(size * crossings(w, everyone, everyone) for w, size in enumerate(chunks))


def compact_bytes(state: StateLayout, travel: bool, now: Partition, then: Partition, layout: Layout) -> int:
    """The same on the compact wire: a byte a number and four for 256, two a number of blocks, or all four.

    Half a byte, and two for 64, where it is SGD's momentum of shared.
    """

    def rows(
        part: PartLayout, parameters: Callable[[int], int], momentum: Callable[[int], int]
    ) -> list[tuple[int, Callable[[int], int]]]:
        """(elements, bytes of so many) of what is written alike."""
        matrices = sum(-(-math.prod(shape) // 32) * 32 for _, shape in part.shapes if len(shape) > 1)
        kept = [momentum if kind == "momentum_buffer" else scaled for kind in part.state.vectors]
        kinds = [parameters, *(kept if travel else [])]
        found = [(matrices, kind) for kind in kinds]
        found += [(part.parameters - matrices, as_it_is)] * len(kinds)
        counters = part.numel - part.parameters * (1 + len(part.state.vectors))
        return [*found, (counters if travel else 0, as_it_is)]

    def scaled(n: int) -> int:
        return n + 4 * -(-n // 256)

    def halves(n: int) -> int:
        return 34 * -(-n // 64)

    def as_it_is(n: int) -> int:
        return 4 * n

    block = sum(size(n) for n, size in rows(state.block, lambda n: 2 * n, scaled))
    chunks = [0] * layout.workers
    for n, size in rows(state.shared, scaled, halves):
        step = math.ceil(n / layout.workers / 256) * 256
        for c in range(layout.workers):
            chunks[c] += size(min(n, (c + 1) * step) - min(n, c * step))
    return crossing(now, then, layout, block, chunks)


def _mean(values: list[np.ndarray]) -> np.ndarray:
    total = values[0].astype(np.float64)
    for value in values[1:]:
        total = total + value
    return (total / len(values)).astype(values[0].dtype)


def copies(vectors: Mapping[int, Tensor]) -> dict[int, np.ndarray]:
    return {worker: vector.numpy().copy() for worker, vector in vectors.items()}


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    np.testing.assert_array_equal(bits(got), bits(want), err_msg=what)


STATES = (
    OptimizerState(()),
    OptimizerState(("momentum_buffer",)),
    OptimizerState(("exp_avg", "exp_avg_sq"), "step"),
)


@dataclass(frozen=True)
class Situation:
    deals: tuple[Partition, ...]
    ranks: int
    state: StateLayout
    travel: bool
    budget: int
    dtype: torch.dtype
    seed: int


@st.composite
def situations(draw: Any) -> Situation:
    workers, pool = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32))
    # fewer and fewer slots, as when warm-up ends
    least = sorted(draw(st.lists(st.integers(0, pool), min_size=2, max_size=4)), reverse=True)
    deals = tuple(
        sample_partition(seed, r, workers=workers, pool=pool, min_blocks=m) for r, m in enumerate(least)
    )
    optimizer = draw(st.sampled_from(STATES))
    lengths = st.lists(st.integers(1, 90), min_size=1, max_size=3)
    shared, block = (
        PartLayout(tuple((f"tensor{i}", (n,)) for i, n in enumerate(draw(lengths))), optimizer)
        for _ in range(2)
    )
    return Situation(
        deals,
        draw(st.integers(1, min(workers, 4))),
        StateLayout(shared, block, deals[0].slots),
        draw(st.booleans()),
        draw(st.sampled_from([1, 300, 1000, 4096, MIB])),
        draw(st.sampled_from([torch.float32, torch.float64])),
        seed,
    )


@settings(max_examples=200, deadline=None)
@given(situations())
def test_a_synchronisation_is_means_over_holders_brought_to_the_next_ones(s: Situation) -> None:
    generator = torch.Generator().manual_seed(s.seed)
    workers = range(s.deals[0].workers)
    vectors = {w: torch.randn(s.state.numel, generator=generator, dtype=s.dtype) for w in workers}
    book = Book.of(s.state, s.travel)
    before, means = copies(vectors), {}

    def check(round: int, step: str) -> None:
        nonlocal before, means
        now, then = s.deals[round], s.deals[round + 1]
        after = copies(vectors)
        if step == "aggregate":
            means = book.means(before, now)
            for block, owner in enumerate(now.owners):
                assert_same_bits(book.held(after[owner], now.blocks[owner])[block], means[block])
            for owner, (start, stop) in enumerate(chunk_bounds(book.shared, len(workers))):
                assert_same_bits(after[owner][start:stop], means["shared"][start:stop])
            return
        for worker in workers:
            for piece, value in book.held(after[worker], then.blocks[worker]).items():
                assert_same_bits(value, means[piece], f"{piece} of worker {worker}")
            assert_same_bits(book.idle(after[worker]), book.idle(before[worker]))
        before = after

    comms = synchronise(vectors, s.deals, s.ranks, s.state, budget=s.budget, travel=s.travel, seen=check)

    itemsize, layout = s.dtype.itemsize, Layout(len(workers), s.ranks)
    rounds = list(itertools.pairwise(s.deals))
    sent = sum(comm.ledger.total() for comm in comms)
    assert sent == sum(book.bytes(now, then, layout, itemsize) for now, then in rounds)
    groups = exact_groups(s.state, s.deals[0].pool, len(workers), s.travel)
    assert sent == sum(bytes_sent(groups, now, then, layout, itemsize) for now, then in rounds)
    for comm in comms:
        assert comm.most <= max(s.budget, itemsize * book.block), "more in transit than the budget"


@pytest.mark.numerical
@pytest.mark.parametrize("holders", [2, 3, 5, 7])
def test_means_of_equal_values_keep_every_bit(holders: int) -> None:
    words = np.random.default_rng(holders).integers(0, 2**32, 20_000, np.uint64).astype(np.uint32)
    values = words.view(np.float32)
    values = np.append(values[np.isfinite(values)], np.float32([0.0, -0.0, 1e-45, 3.4028235e38]))
    part = PartLayout((("tensor", (len(values) // 2,)),), OptimizerState(()))
    state = StateLayout(part, part, slots=1)
    start = np.zeros(state.numel, np.float32)
    start[: len(values)] = values
    deal = sample_partition(0, 0, workers=holders, pool=1)
    vectors = {w: torch.from_numpy(start.copy()) for w in range(holders)}
    synchronise(vectors, (deal, deal), 2, state, budget=MIB, travel=True)
    for vector in vectors.values():
        assert_same_bits(vector.numpy(), start)


@pytest.mark.numerical
def test_means_of_two_are_those_of_float64() -> None:
    """Without its sums: of any magnitudes, with halves that are subnormal and sums that are too large."""
    words = np.random.default_rng(0).integers(0, 2**32, (2, 400_000), np.uint64).astype(np.uint32)
    values = words.view(np.float32)
    with np.errstate(all="ignore"):
        values[1, ::3] = values[0, ::3] * np.float32(1 + 1e-6)
        values[:, ::5] *= np.float32(1e-39)
    values = np.where(np.isfinite(values), values, np.float32(3.4e38))
    wide = values.astype(np.float64)
    found = torch.empty(values.shape[1])
    sync._mean([torch.from_numpy(v) for v in values], found, torch.device("cpu"), sync.MEAN_CHUNK)
    assert_same_bits(found.numpy(), ((wide[0] + wide[1]) / 2).astype(np.float32))


# ------------------------------------------------------------------------------------------------------------
# Whole runs on real ranks


def train(comm: Comm, config: Config) -> dict[int, np.ndarray]:
    """{worker of this rank: its vector at the end of a run}, parameters and optimizer state."""
    trainer = Trainer(comm, config)
    trainer.run()
    return {worker: vector.numpy().copy() for worker, vector in trainer.workers.vectors.items()}


def run(
    ranks: Any, size: int, folder: Path, function: Callable[..., Any] = train, **options: Any
) -> tuple[list[Any], list[dict[str, Any]]]:
    """(what each rank returned, the lines of metrics.jsonl)."""
    returned = ranks(function, size, Config(**{**BASE, **options, "output_dir": str(folder)}))
    return returned, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_everywhere(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the machine."""
    machine = ("perf/", "mem/", "comm/", "save/")
    kept = [{k: v for k, v in line.items() if not k.startswith(machine)} for line in lines]
    for line in kept:
        for key in ("R", "backend", "output_dir", "eval_every"):
            line.get("settings", {}).pop(key, None)
    return kept


@pytest.mark.numerical
@pytest.mark.ranks
def test_the_same_bits_on_any_number_of_ranks(ranks: Any, tmp_path: Path) -> None:
    options = {"workers": 6, "rounds": 3, "local_steps": 2, "eval_every": 2}
    (vectors,), lines = run(ranks, 1, tmp_path / "1", **options)
    assert sorted(vectors) == list(range(6)) and [line["kind"] for line in lines].count("eval") == 2
    assert np.abs(vectors[0]).max() > 0 and not np.array_equal(vectors[0], vectors[1])
    for size in (2, 3, 6):
        returned, others = run(ranks, size, tmp_path / f"{size}", **options)
        for worker, vector in (item for rank in returned for item in rank.items()):
            assert_same_bits(vector, vectors[worker], f"worker {worker} on {size} ranks")
        assert [list(rank) for rank in returned] == [list(part) for part in np.array_split(range(6), size)]
        assert same_everywhere(others) == same_everywhere(lines), f"{size} ranks"
    # nor does it matter how often one looks
    returned, _ = run(ranks, 2, tmp_path / "unseen", **{**options, "eval_every": 0})
    for worker, vector in (item for rank in returned for item in rank.items()):
        assert_same_bits(vector, vectors[worker], f"worker {worker} without an evaluation in between")


def final_parameters(comm: Comm, config: Config) -> list[Any]:
    """[what every worker of this rank holds at the end of a run]."""
    trainer = Trainer(comm, config)
    trainer.run()
    return list(oracle.held(trainer).values())


def assert_ledger(lines: list[dict[str, Any]], ranks: int, config: Config) -> None:
    """The bytes of every round are those of its plan, to the last one."""
    assert config.workers and config.rounds
    blueprint = Blueprint(config.model, 10)
    state, travel = StateLayout.of(blueprint, config, 1), config.optimizer_state == "travel"
    book = Book.of(state, travel)
    groups = groups_of(state, config, blueprint.pool, config.workers)
    options = {"workers": config.workers, "pool": blueprint.pool, "min_blocks": config.min_blocks}
    deals = [sample_partition(config.seed, r, **options) for r in range(config.rounds + 1)]
    layout, itemsize = Layout(config.workers, ranks), getattr(torch, config.dtype).itemsize
    total = 0
    for line in lines:
        if line["kind"] == "checkpoint":
            continue
        if line["kind"] == "round":
            now, then = deals[line["round"] - 1 : line["round"] + 1]
            sent = line["comm/bytes_round"]
            if config.wire == "compact":
                assert sent == compact_bytes(state, travel, now, then, layout) > 0
            else:
                assert sent == book.bytes(now, then, layout, itemsize) > 0
            assert sent == bytes_sent(groups, now, then, layout, itemsize)
            total += sent
        if line["kind"] == "eval":
            total += line["comm/bytes_eval"]
        assert line["comm/bytes_total"] == total
    assert [line["kind"] for line in lines].count("round") == config.rounds


@pytest.mark.ranks
@pytest.mark.parametrize(("workers", "size", "min_blocks"), [(3, 2, 0), (5, 3, 4), (8, 2, 0)])
def test_without_a_learning_rate_no_bit_changes(
    ranks: Any, tmp_path: Path, workers: int, size: int, min_blocks: int
) -> None:
    options = {"workers": workers, "min_blocks": min_blocks, "rounds": 7, "lr": 0.0, "weight_decay": 0.0}
    returned, lines = run(ranks, size, tmp_path, final_parameters, **options)
    held = [state for rank in returned for state in rank]
    assert len(held) == workers
    blueprint = Blueprint(BASE["model"], 10)  # whose values know nothing of W
    assert blueprint.pool % 2 == 1
    initial = dict(blueprint.initial_shared(0))
    for block in range(blueprint.pool):
        of_block = blueprint.initial_block(0, block)
        initial |= {blueprint.block_prefix(block) + name: value for name, value in of_block.items()}
    assert {name for state in held for name in state} == initial.keys()
    for worker, state in enumerate(held):
        for name, tensors in state.items():
            assert_same_bits(tensors["parameter"], initial[name].numpy(), f"{name} of worker {worker}")
    moved = sum(bool(tensors["momentum_buffer"].any()) for tensors in held[0].values())
    assert moved > len(held[0]) / 2, "nothing was trained"
    assert_ledger(lines, size, Config(**{**BASE, **options}))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (2, {"optimizer_state": "reset", "dtype": "float64"}),
        (3, {"optimizer": "adamw", "min_blocks": 5}),
        (4, {"optimizer_state": "reset", "min_blocks": 3}),
        (2, {"wire": "compact", "workers": 5, "optimizer_state": "reset"}),
        (3, {"wire": "compact", "workers": 4, "optimizer": "adamw", "min_blocks": 5}),
        (4, {"wire": "compact", "rounds": 5}),
    ],
)
def test_the_ledger_is_the_plan(ranks: Any, tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    options = {"workers": size, "rounds": 3, **options}
    _, lines = run(ranks, size, tmp_path, **options)
    assert_ledger(lines, size, Config(**{**BASE, **options}))


def train_watched(comm: Comm, config: Config) -> tuple[int, int, int]:
    """(most bytes of exchange buffers in memory at a time, bytes of a block, exchanges a round)."""
    trainer = Trainer(comm, config)
    live: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    most = exchanges = 0
    make, exchange = trainer.comm.buffer, trainer.comm.exchange

    def buffer(numel: int, like: Tensor) -> Tensor:
        nonlocal most
        made = make(numel, like).numpy()  # lives as long as any view of it
        live[id(made)] = made
        most = max(most, sum(b.nbytes for b in live.values()))
        return torch.from_numpy(made)

    def counted(*args: Any) -> None:
        nonlocal exchanges
        exchanges += 1
        exchange(*args)

    trainer.comm.buffer, trainer.comm.exchange = buffer, counted  # type: ignore[method-assign]
    for round in range(2):
        trainer.net.synchronise(round)
    vector = trainer.workers.vectors[trainer.net.layout.workers_of(comm.rank)[0]]
    return most, trainer.workers.layout.block.numel * vector.element_size(), exchanges // 2


@pytest.mark.ranks
def test_transit_stays_within_the_budget_or_one_block(ranks: Any, tmp_path: Path) -> None:
    options = (
        BASE
        | {"output_dir": str(tmp_path)}
        | {"model": "resist_test_wide", "dtype": "float64", "workers": 3, "min_blocks": 3}
    )
    transit = {}
    for mib in (1, 2):
        returned = ranks(train_watched, 2, Config(**options, transit_mib=mib))
        for most, block, _ in returned:
            assert 0 < most <= max(mib * MIB, block)
        assert MIB < block < 2 * MIB
        transit[mib] = max(most for most, _, _ in returned), returned[0][2]
    assert transit[1] < transit[2]  # the budget is what limits it, ...
    assert transit[1][1] > transit[2][1] > 4  # ... by slices


def threads_in_use(comm: Comm, config: Config) -> int:
    """CPU threads once everything that might set their number has been made."""
    trainer = Trainer(comm, config)
    with Telemetry(comm, trainer.config, 1, trainer.folder.metrics, trainer.start) as telemetry:
        telemetry.open({})
    return torch.get_num_threads()


@pytest.mark.ranks
def test_no_library_sets_another_number_of_threads(ranks: Any, tmp_path: Path) -> None:
    config = Config(**{**BASE, "workers": 2, "cpu_threads": 3, "output_dir": str(tmp_path)})
    assert ranks(threads_in_use, 2, config) == [3, 3]

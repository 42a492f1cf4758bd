"""NaN and Inf, wherever they come up: they stop the run or cost one worker's round, and reach nobody else."""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.engines import engine, local
from resist_ds.engines.engine import TorchEngine
from resist_ds.engines.local import Tally
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, Partition, chunk_bounds, sample_partition
from resist_ds.protocol.sync import Synchroniser
from resist_ds.trainer import Trainer
from tests.conftest import Ranks
from tests.protocol.test_sync import (
    BASE,
    Book,
    Situation,
    ThreadComm,
    _mean,
    assert_same_bits,
    copies,
    on_threads,
    same_everywhere,
    situations,
)

STEPS = 3  # local steps of a round
VALUES = (math.nan, math.inf)
OPTIONS = BASE | {
    "local_steps": STEPS,
    "lr": 0.01,
    "calibration_samples": 4,
    "data_workers": 0,
    "img_size": 4,
    "checkpoint_every": 0,
}

# ------------------------------------------------------------------------------------------------------------
# What goes wrong, and a trainer to which it happens


class Accident(NamedTuple):
    """What befalls a worker at a local step of a round.

    Attributes:
        what: loss; gradient, once it is complete; weight, before the forward pass; or what the optimizer
            keeps, by its name there, before the forward pass too.
        step: index in the round.
        value: what comes into the place of one number.
        tensor: index among the net's convolutions of the one that is hit.
    """

    what: str
    step: int
    value: float
    tensor: int = 0

    def place(self, round: int) -> str:
        """Where the worker is said to have met it."""
        first = round * STEPS + 1
        if self.what == "exp_avg_sq":  # an infinite one ends the updates of a weight, and no loss shows it
            seen = STEPS
        else:
            seen = self.step + (self.what not in ("loss", "weight"))
        if seen < STEPS:
            return f"first in the loss of local step {first + seen}"
        return f"in the weights or momentum after local step {first + STEPS - 1}"


Accidents = dict[tuple[int, int], Accident]  # {(round, worker): what happens}


@dataclass
class Seen:
    """What a rank's workers held in a round.

    Attributes:
        start, ended, after: each one's vector before its local steps, right after them, and after the
            hand-off.
        losses: each one's losses, summed over the images of a local step.
    """

    start: dict[int, np.ndarray]
    ended: dict[int, np.ndarray] = field(default_factory=dict)
    after: dict[int, np.ndarray] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()
    files: dict[str, str] = field(default_factory=dict)


class Watched(Trainer):
    """A trainer to which accidents happen, and which keeps what its workers held."""

    accidents: Accidents = {}  # noqa: RUF012
    latest: "Watched"

    def __init__(self, comm: Comm, config: Config):
        super().__init__(comm, config)
        Watched.latest = self
        self.rounds_seen: list[Seen] = []
        self.net.synchronise, self._inner = self._synchronise, self.net.synchronise  # type: ignore[method-assign]

    def _local_steps(self, round: int, *rest: Any) -> Any:
        self.rounds_seen.append(Seen(copies(self.workers.vectors), files=hashes(self.folder.checkpoints)))
        self.round = round
        return super()._local_steps(round, *rest)

    def _synchronise(self, round: int, dropped: frozenset[int] = frozenset()) -> None:
        self._inner(round, dropped)
        self.rounds_seen[-1].dropped = dropped
        self.rounds_seen[-1].after = copies(self.workers.vectors)


def hashes(folder: Path) -> dict[str, str]:
    """{path: hash} of all files below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


_local_steps = local.local_steps


def local_steps(own: TorchEngine, batches: Iterator[tuple[Tensor, Tensor]], **options: Any) -> Tally:
    """The real ones, with the accident that is meant for this worker and round."""
    watched = Watched.latest
    seen = watched.rounds_seen[-1]
    worker = watched.net.layout.workers_of(watched.comm.rank)[len(seen.losses)]
    subnet = own.subnet
    accident = watched.accidents.get((watched.round, worker), Accident("nothing", -1, 0.0))
    convolutions = [p for p in subnet.module.parameters() if p.ndim == 4]
    victim = convolutions[accident.tensor % len(convolutions)]
    losses: list[float] = []

    def spoil(tensor: Tensor | None) -> None:
        assert tensor is not None
        with torch.no_grad():
            tensor[0, 0, tensor.shape[2] // 2, tensor.shape[3] // 2] = accident.value

    def delivered() -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(STEPS):
            batch = next(batches)
            if step == accident.step and accident.what == "weight":
                spoil(victim)
            elif step == accident.step and accident.what in subnet.optimizer.state[victim]:
                spoil(subnet.optimizer.state[victim][accident.what])
            yield batch

    def cross_entropy(logits: Tensor, y: Tensor, **rest: Any) -> Tensor:
        loss = F.cross_entropy(logits, y, **rest)
        if len(losses) == accident.step and accident.what == "loss":
            loss = loss + accident.value  # whose gradient is that of the good loss
        losses.append(float(loss.detach() * len(y)))
        return loss

    def before_update(*_: object) -> None:
        if len(losses) - 1 == accident.step and accident.what == "gradient":
            spoil(victim.grad)

    engine.F = SimpleNamespace(cross_entropy=cross_entropy)  # type: ignore[assignment]
    hook = subnet.optimizer.register_step_pre_hook(before_update)
    tally = _local_steps(own, delivered(), **options)
    hook.remove()
    seen.ended[worker] = subnet.vector.numpy().copy()
    seen.losses[worker] = losses
    return tally


@functools.cache
def blueprint(name: str, classes: int) -> Blueprint:
    """Made once: timm's constructor, which gives the initial values, would take most of these tests."""
    plan = Blueprint(name, classes)
    for method in ("initial_shared", "initial_block"):
        setattr(plan, method, functools.cache(getattr(plan, method)))
    return plan


class Ended(NamedTuple):
    """How a run ended on a rank: train.py's exit code, and what it wrote to stderr."""

    code: int
    stderr: str
    trainer: Watched


def train(comm: Comm, options: dict[str, Any], accidents: Accidents) -> Ended:
    """`train.py`, its options parsed, in a process that survives it: to be called again and again."""
    if comm.size == 1:  # as under plain python, where accelerate finds no launcher
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    close, comm.close = comm.close, lambda: None  # type: ignore[method-assign]
    trainer.Comm = lambda: comm  # type: ignore[assignment,misc]
    trainer.Trainer, trainer.local_steps = Watched, local_steps  # type: ignore[misc]
    trainer.Blueprint = blueprint  # type: ignore[assignment,misc]
    Watched.accidents = accidents
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()):
        code = trainer.main(Config(**options))
    comm.close = close  # type: ignore[method-assign]
    return Ended(code, stderr.getvalue(), Watched.latest)


def everything(workers: int, names: Sequence[str] = ("momentum_buffer",)) -> list[tuple[int, Accident]]:
    """All pairs of a worker and what may befall it, at every step, in every tensor in turn."""
    kinds = ("loss", "gradient", "weight", *names)
    every = itertools.product(range(workers), kinds, range(STEPS), VALUES)
    return [(w, Accident(what, step, value, i)) for i, (w, what, step, value) in enumerate(every)]


# ------------------------------------------------------------------------------------------------------------
# --on_nan stop


class Stop(NamedTuple):
    """How a stopped run looks from one rank."""

    code: int
    stderr: str
    rounds: int  # that were begun
    finite: dict[int, bool]  # whether a worker's vector is
    before: dict[str, str]  # files of the checkpoints, when the round began
    files: dict[str, str]  # and afterwards


def stopped(comm: Comm, folder: Path, options: dict[str, Any], cases: list[Accidents]) -> list[Stop]:
    """Each case in a run of its own."""
    result = []
    for number, accidents in enumerate(cases):
        of_case = options | {"output_dir": str(folder / str(number))}
        code, stderr, watched = train(comm, of_case, accidents)
        comm.barrier()
        result.append(
            Stop(
                code,
                stderr,
                len(watched.rounds_seen),
                {w: bool(torch.isfinite(v).all()) for w, v in watched.workers.vectors.items()},
                watched.rounds_seen[-1].files,
                hashes(watched.folder.checkpoints),
            )
        )
    return result


ADVICE = "Nothing of this round is kept: try a lower --lr or --clip_grad 1, or --on_nan skip\n"


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "workers"), [(1, 3), (2, 3), (2, 4)])
def test_stop_names_the_culprit_and_leaves_all_else_alone(
    ranks: Ranks, tmp_path: Path, size: int, workers: int
) -> None:
    cases: list[Accidents] = [
        {(1, worker): accident}
        for worker, accident in everything(workers)
        if (accident.tensor + accident.tensor // 2 + worker) % 2 == 0  # NaN and Inf by turns
    ]
    if size > 1:  # where a worker is played makes no difference to what befalls it: some of it will do
        cases = cases[::5]
    cases.append({(1, 2): Accident("loss", 0, math.nan), (1, 0): Accident("gradient", 2, math.inf)})
    options = OPTIONS | {"workers": workers, "rounds": 3, "checkpoint_every": 1}
    returned = ranks(stopped, size, tmp_path, options, cases)
    for number, accidents in enumerate(cases):
        outcomes = [of_rank[number] for of_rank in returned]
        said = "; ".join(
            f"worker {worker} met NaN or Inf in round {round + 1}, {accidents[round, worker].place(round)}"
            for round, worker in sorted(accidents)
        )
        assert [o.stderr for o in outcomes] == [f"error: {said}. {ADVICE}"] + [""] * (size - 1), accidents
        assert [(o.code, o.rounds) for o in outcomes] == [(3, 2)] * size
        finite = {w: f for o in outcomes for w, f in o.finite.items()}
        assert len(finite) == workers
        assert all(finite[w] for w in range(workers) if (1, w) not in accidents), accidents
        assert outcomes[0].files == outcomes[0].before
        assert {name.split("/")[0] for name in outcomes[0].files} == {"round-000001"}


@pytest.mark.ranks
def test_stop_lets_a_checkpoint_in_flight_be_completed(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"workers": 3, "rounds": 3, "checkpoint_every": 1}
    written = []
    for background in (False, True):
        folder = tmp_path / str(background)
        of_run = options | {"checkpoint_async": background}
        ((outcome,), (_,)) = ranks(stopped, 2, folder, of_run, [{(1, 1): Accident("loss", 0, math.nan)}])
        assert outcome.code == 3 and {name.split("/")[0] for name in outcome.files} == {"round-000001"}
        written.append({n: h for n, h in outcome.files.items() if n.endswith(".safetensors")})
        for name in written[-1]:
            assert_finite_file(folder / "0" / "checkpoints" / name)
    assert written[0] == written[1] != {}


def assert_finite_file(path: Path) -> None:
    for name, values in load_file(path).items():
        assert np.isfinite(values).all(), f"{name} of {path}"


# ------------------------------------------------------------------------------------------------------------
# --on_nan skip


def means(book: Book, seen: Seen, deal: Partition, bad: set[int]) -> dict[object, np.ndarray]:
    """The global model after a round: {piece: mean over its good holders, else as at the round's start}."""
    pieces: dict[object, np.ndarray] = {}
    good: dict[object, list[np.ndarray]] = {}
    for worker, blocks in enumerate(deal.blocks):
        for piece, value in book.held(seen.start[worker], blocks).items():
            assert_same_bits(pieces.setdefault(piece, value), value, f"{piece} at the start of a round")
        if worker not in bad:
            for piece, value in book.held(seen.ended[worker], blocks).items():
                good.setdefault(piece, []).append(value)
    return pieces | {piece: _mean(values) for piece, values in good.items()}


def check_rounds(watched: Watched, accidents: Accidents) -> None:
    """Every round of a run whose workers are all here, against a plain computation."""
    config, workers = watched.config, watched.net.layout.workers
    plan = watched.net.blueprint
    untouched = 0
    for round, seen in enumerate(watched.rounds_seen):
        deals = []
        for r in (round, round + 1):
            least = plan.pool if r < config.warmup_rounds else config.min_blocks
            deals.append(sample_partition(config.seed, r, workers=workers, pool=plan.pool, min_blocks=least))
        now, then = deals
        bad = {w for r, w in accidents if r == round}
        assert seen.dropped == bad, (round, seen.dropped, bad)
        travel = config.optimizer_state == "travel"
        books = [Book.of(StateLayout.of(plan, config, deal.slots), travel) for deal in deals]
        want = means(books[0], seen, now, bad)
        untouched += sum(set(holders) <= bad for holders in now.holders)
        for worker in range(workers):
            if worker not in bad:
                assert np.isfinite(seen.ended[worker]).all()
                assert not np.array_equal(seen.ended[worker], seen.start[worker])
            assert np.isfinite(seen.after[worker]).all(), f"worker {worker} after round {round}"
            for piece, value in books[1].held(seen.after[worker], then.blocks[worker]).items():
                assert_same_bits(value, want[piece], f"{piece} of worker {worker} after round {round}")
    assert untouched or not accidents, "no block was left without a good holder"


class Skip(NamedTuple):
    """How a run that went on looks from one rank."""

    code: int
    stderr: str
    digests: list[dict[int, str]]  # per round {worker: hash of all that it held}
    losses: list[dict[int, list[float]]]


def digest(seen: Seen, worker: int) -> str:
    """Of what must not depend on the ranks; a NaN's bits may."""
    parts = (seen.start[worker], np.nan_to_num(seen.ended[worker], posinf=0, neginf=0), seen.after[worker])
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def skipped(comm: Comm, folder: Path, options: dict[str, Any], accidents: Accidents) -> Skip:
    code, stderr, watched = train(comm, options | {"output_dir": str(folder)}, accidents)
    if comm.size == 1:
        check_rounds(watched, accidents)
    return Skip(
        code,
        stderr,
        [{w: digest(seen, w) for w in seen.ended} for seen in watched.rounds_seen],
        [seen.losses for seen in watched.rounds_seen],
    )


def a_worker_each_round(workers: int, names: Sequence[str] = ("momentum_buffer",)) -> Accidents:
    """All that may happen, one accident a round, and in every fifth round none."""
    accidents: Accidents = {}
    for number, (worker, accident) in enumerate(everything(workers, names)):
        accidents[number + number // 4, worker] = accident
    return accidents


def several_each_round(workers: int, rounds: int, names: Sequence[str] = ("momentum_buffer",)) -> Accidents:
    """Every set of workers in turn, from none to all, with whatever may happen to each."""
    accidents: Accidents = {}
    happen = itertools.cycle([accident for _, accident in everything(workers, names)][::5])
    for round in range(rounds):
        for worker in range(workers):
            if round >> worker & 1:
                accidents[round, worker] = next(happen)
    return accidents


SKIPS: dict[str, tuple[dict[str, Any], Accidents]] = {
    "everything to each of 3": ({"workers": 3, "rounds": 90}, a_worker_each_round(3)),
    "any of 4": ({"workers": 4, "rounds": 17, "min_blocks": 4}, several_each_round(4, 17)),
    "reset": (
        {"workers": 3, "rounds": 9, "min_blocks": 4, "optimizer_state": "reset"},
        several_each_round(3, 9),
    ),
    "adamw": (
        {"workers": 4, "rounds": 17, "optimizer": "adamw", "min_blocks": 3},
        several_each_round(4, 17, ("exp_avg", "exp_avg_sq")),
    ),
    "warm-up": ({"workers": 3, "rounds": 17, "warmup_rounds": 9}, several_each_round(3, 17)),
    "float64": (
        {"workers": 3, "rounds": 9, "dtype": "float64", "min_blocks": 7},
        several_each_round(3, 9),
    ),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", SKIPS)
def test_skip_drops_the_round_of_bad_workers_and_of_nobody_else(
    ranks: Ranks, tmp_path: Path, case: str
) -> None:
    options, accidents = SKIPS[case]
    options = OPTIONS | {"on_nan": "skip"} | options
    warnings = "".join(
        f"warning: worker {worker} met NaN or Inf in round {round + 1}, "
        f"{accidents[round, worker].place(round)}: its round is dropped\n"
        for round, worker in sorted(accidents)
    )
    runs = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        returned: list[Skip] = ranks(skipped, size, folder, options, accidents)
        assert [r.stderr for r in returned] == [warnings] + [""] * (size - 1)
        assert [r.code for r in returned] == [0] * size
        rounds = zip(*(r.digests for r in returned), strict=True)
        digests = [{w: d for rank in round for w, d in rank.items()} for round in rounds]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs.append((digests, same_everywhere([line for line in lines if line["kind"] == "round"])))
        for path in (folder / "checkpoints").rglob("*.safetensors"):
            assert_finite_file(path)
        if size == 1:
            assert_records(runs[0][1], returned[0].losses, accidents)
    assert runs[0] == runs[1]


def assert_records(
    lines: list[dict[str, Any]], losses: list[dict[int, list[float]]], accidents: Accidents
) -> None:
    assert len(lines) == len(losses)
    for round, (line, of_round) in enumerate(zip(lines, losses, strict=True)):
        good = [sum(of_round[w]) for w in sorted(of_round) if (round, w) not in accidents]
        assert line["train/skipped"] == len(of_round) - len(good)
        images = len(good) * STEPS * OPTIONS["batch_size"]
        assert line["train/loss"] == (math.fsum(good) / images if good else None)
        assert (line["train/accuracy"] is None) == (not good)


@st.composite
def setbacks(draw: Any) -> tuple[Situation, frozenset[int]]:
    situation: Situation = draw(situations())
    workers = situation.deals[0].workers
    return situation, draw(st.frozensets(st.integers(0, workers - 1)))


@settings(max_examples=150)
@given(setbacks())
def test_owners_end_with_the_means_of_those_that_count_and_nothing_else_is_touched(
    case: tuple[Situation, frozenset[int]],
) -> None:
    s, dropped = case
    now, generator = s.deals[0], np.random.default_rng(s.seed)
    workers = range(now.workers)
    book, numbers = (
        Book.of(s.state, s.travel),
        {torch.float32: np.float32, torch.float64: np.float64}[s.dtype],
    )
    start: dict[object, np.ndarray] = {b: generator.normal(size=book.block) for b in range(now.pool)}
    start["shared"] = generator.normal(size=book.shared)
    before = {w: generator.normal(size=s.state.numel).astype(numbers) for w in workers}
    good = {
        piece: [w for w in workers if (piece == "shared" or piece in now.blocks[w]) and w not in dropped]
        for piece in start
    }
    for worker in dropped:
        for piece, view in book.held(before[worker], now.blocks[worker]).items():
            view[:] = math.nan if good[piece] else start[piece]  # nobody looks at it where others count
    want = {w: before[w].copy() for w in workers}

    def mean(piece: object, owner: int) -> np.ndarray:
        return _mean(
            [book.held(before[w], now.blocks[w])[piece] for w in good[piece] or [owner]],
        )

    for block, owner in enumerate(now.owners):
        book.held(want[owner], now.blocks[owner])[block][:] = mean(block, owner)
    for owner, (lo, hi) in enumerate(chunk_bounds(book.shared, now.workers)):
        want[owner][lo:hi] = mean("shared", owner)[lo:hi]

    vectors = {w: torch.from_numpy(before[w].copy()) for w in workers}
    layout = Layout(now.workers, s.ranks)

    def rank(comm: ThreadComm) -> None:
        sync = Synchroniser(comm, layout, s.state, now.pool, budget=s.budget, travel=s.travel)  # type: ignore[arg-type]
        sync.aggregate({w: vectors[w] for w in layout.workers_of(comm.rank)}, now, dropped)

    on_threads(s.ranks, rank)
    for worker in workers:
        assert_same_bits(vectors[worker].numpy(), want[worker], f"worker {worker}")

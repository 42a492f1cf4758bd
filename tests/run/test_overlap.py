"""Exchanges behind local steps: the same bits on any ranks, and what goes wrong while one is on its way."""

import contextlib
import hashlib
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.engines.engine import TorchEngine
from resist_ds.errors import NotFiniteError, RunError
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.overlap import Overlap
from resist_ds.protocol.sync import Synchroniser
from resist_ds.trainer import Trainer
from tests import THREADS
from tests.conftest import _CONTEXT, Ranks

STEPS, BEHIND, ROUNDS = 3, 2, 3
OPTIONS: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "model": "preact_resnet_small",
    "batch_size": 4,
    "local_steps": STEPS,
    "overlap_steps": BEHIND,
    "rounds": ROUNDS,
    "lr": 0.05,
    "schedule": "constant",
    "eval_every": 0,
    "checkpoint_every": 0,
    "calibration_samples": 8,
    "log_with": "none",
    "progress": False,
    "cpu_threads": THREADS,
}


def vectors(of: Trainer) -> dict[int, str]:
    """{worker: hash of all that it holds}."""
    held = of.workers.vectors.items()
    return {worker: hashlib.sha256(vector.numpy().tobytes()).hexdigest() for worker, vector in held}


class Enough(Exception):
    """All has been seen: an evaluation and a checkpoint would take longer than the rest."""


def bits(comm: Comm, runs: Sequence[dict[str, Any]]) -> list[list[dict[int, str]]]:
    """Of each run: what this rank's workers hold after every round."""
    found = []
    for options in runs:
        run, seen = Trainer(comm, Config(**options)), []
        finish, synchronise = run.net.finish, run.net.synchronise

        def watched(how: Callable[..., None], run: Trainer = run, seen: list[Any] = seen) -> Any:
            def completed(round: int, *args: Any) -> None:
                how(round, *args)
                seen.append({"hidden": how == finish, **vectors(run)})  # noqa: B023
                if len(seen) == ROUNDS:
                    raise Enough

            return completed

        run.net.finish = watched(finish)  # type: ignore[method-assign]
        run.net.synchronise = watched(synchronise)  # type: ignore[method-assign]
        with contextlib.suppress(Enough):
            run.run()
        run.folder.release()
        found.append(seen)
    return found


@pytest.mark.ranks
def test_the_bits_do_not_depend_on_the_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """W = 6 on R = 1, 2, 3, 6: after every round, those with the exchange behind local steps first."""
    cases = [{"wire": "compact"}, {"optimizer": "adamw", "lr": 0.002}]
    often = {"rounds": 10**3, "checkpoint_every": ROUNDS, "workers": 6, "batch_size": 2}
    first: list[Any] = []
    for size in (1, 2, 3, 6):
        runs = [
            OPTIONS | often | case | {"output_dir": str(tmp_path / f"{size}-{number}")}
            for number, case in enumerate(cases)
        ]
        returned = ranks(bits, size, runs)
        merged = [
            [{k: v for rank in of_round for k, v in rank.items()} for of_round in zip(*of_case, strict=True)]
            for of_case in zip(*returned, strict=True)
        ]
        assert all([r.pop("hidden") for r in of_case] == [True, True, False] for of_case in merged)
        assert all(len(set(r.values())) > 1 for of_case in merged for r in of_case), "workers differ"
        first = first or merged
        assert merged == first, size


class Meeting:
    """Something that happens to a rank at a local step of its first round."""

    def __init__(self, rank: int, step: int, does: Callable[[Any], Any]):
        self.rank, self.step, self.does = rank, step, does

    def arrange(self, comm: Comm) -> None:
        inner, done = TorchEngine.step, iter(range(10**9))

        def step(engine: TorchEngine, *args: Any) -> Any:
            result = inner(engine, *args)
            return self.does(result) if next(done) == self.step and comm.rank == self.rank else result

        TorchEngine.step = step  # type: ignore[method-assign]


def breaks(result: Any) -> Any:
    raise RunError("the disk is on fire")


def spoils(result: Any) -> Any:
    return result[0] * math.nan, result[1]


def dies(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(comm: Comm, step: int, options: dict[str, Any]) -> tuple[str, bool]:
    Meeting(1, step, breaks).arrange(comm)
    run = Trainer(comm, Config(**options))
    with pytest.raises(RunError) as caught:
        run.run()
    run.folder.release()
    return str(caught.value), run.net.overlap.running


@pytest.mark.ranks
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_a_failing_rank_ends_all_in_its_words(ranks: Ranks, tmp_path: Path, step: int) -> None:
    """Before its exchange has begun, for which the others wait; and behind one that is on its way."""
    options = OPTIONS | {"workers": 2, "output_dir": str(tmp_path)}
    assert ranks(failing, 2, step, options, timeout=40) == [("the disk is on fire", False)] * 2


def skipping(comm: Comm, step: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a first round that spoils rank 1's worker at a step has come to."""
    Meeting(1, step, spoils).arrange(comm)
    run, seen = Trainer(comm, Config(**options)), {}
    finish = run.net.finish

    def watched(round: int, lost: frozenset[int]) -> None:
        finish(round, lost)
        if not seen:
            shared = run.workers.layout.shared.numel
            vector, agreed = run.workers.vectors[comm.rank], run.net.overlap.shared[comm.rank]
            seen["lost"], seen["dropped"] = sorted(lost), sorted(run.net.overlap.dropped)
            seen["alike"] = torch.equal(vector[:shared], agreed)
            was, now, layout = run.net.trained, run.net.deal, run.workers.layout
            momentum = {
                block: next(iter(layout.block.tensors(layout.slot_part(vector, slot)).values()))
                for slot, block in enumerate(now.blocks[comm.rank])
            }
            seen["as at the start"] = [b for b, of in momentum.items() if not of["momentum_buffer"].any()]
            seen["of the lost"] = [block for block in now.blocks[comm.rank] if block in was.blocks[1]]
            seen["finite"] = bool(vector.isfinite().all())

    run.net.finish = watched  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        run.run()
    seen["warned"] = [line.partition("NaN or Inf in ")[2] for line in stderr.getvalue().splitlines()]
    return seen


@pytest.mark.ranks
@pytest.mark.parametrize(("step", "dropped"), [(0, [1]), (STEPS - 1, [])])
def test_nan_costs_the_round_or_what_came_after_the_exchange_began(
    ranks: Ranks, tmp_path: Path, step: int, dropped: list[int]
) -> None:
    options = OPTIONS | {"workers": 2, "output_dir": str(tmp_path), "on_nan": "skip"}
    zero, one = found = ranks(skipping, 2, step, options)
    but = "" if dropped else ", but for what it had sent of shared"
    warning = f"round 1, first in the loss of local step {step + 1}: its round is dropped{but}"
    expected = {"lost": [1], "dropped": dropped, "finite": True}
    for seen in found:
        assert seen.pop("as at the start") == seen.pop("of the lost")
    assert zero == expected | {"alike": False, "warned": [warning]}  # it has gone on training
    assert one == expected | {"alike": True, "warned": []}


def stopping(comm: Comm, step: int, options: dict[str, Any]) -> str:
    Meeting(1, step, spoils).arrange(comm)
    aggregated = []
    run = Trainer(comm, Config(**options))
    inner = run.net.sync.aggregate
    run.net.sync.aggregate = lambda *args: (aggregated.append(1), inner(*args))  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError) as caught:
        run.run()
    run.folder.release()
    return f"{caught.value} {len(aggregated)}"


@pytest.mark.ranks
def test_nan_stops_before_anything_is_exchanged(ranks: Ranks, tmp_path: Path) -> None:
    said = ranks(stopping, 2, 0, OPTIONS | {"workers": 2, "output_dir": str(tmp_path)})
    assert len(set(said)) == 1 and said[0].startswith("worker 1 met NaN") and said[0].endswith(" 0")


def life(rank: int, size: int, store: str, options: dict[str, Any], said: Path, dying: bool = True) -> None:
    """`train.py` on a rank, of which the second dies behind its exchange."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    sys.stderr = said.open("w")
    torch.set_num_threads(1)
    comm = Comm(init_method=f"file://{store}")
    trainer.Comm = lambda: comm  # type: ignore[assignment,misc]
    if dying:
        Meeting(1, STEPS - 1, dies).arrange(comm)
    code = trainer.main(Config(**options))
    sys.stderr.close()
    os._exit(code)


def broken(rank: int, size: int, store: str, options: dict[str, Any], said: Path) -> None:
    """`train.py` on a rank, of which the second cannot hand anything on."""

    def hand_off(*args: Any) -> None:
        raise ValueError("no such piece")

    if rank == 1:
        Synchroniser.hand_off = hand_off  # type: ignore[method-assign]
    life(rank, size, store, options, said, dying=False)


def ends(lives: Callable[..., None], size: int, folder: Path) -> tuple[list[int | None], list[list[str]]]:
    """Exit code of every rank, and the lines that it wrote to stderr."""
    options = OPTIONS | {"workers": size, "output_dir": str(folder / "run")}
    said = [folder / f"rank{rank}" for rank in range(size)]
    place = (size, str(folder / "store"), options)
    ranks = [_CONTEXT.Process(target=lives, args=(r, *place, said[r]), daemon=True) for r in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks], [path.read_text().splitlines() for path in said]


def killed(rank: int, size: int, store: str, options: dict[str, Any], said: Path) -> None:
    """`train.py` on a rank, of which the second dies in its exchange."""
    if rank == 1:
        Synchroniser.hand_off = dies  # type: ignore[method-assign,assignment]
    life(rank, size, store, options, said, dying=False)


@pytest.mark.ranks
@pytest.mark.parametrize("lives", [life, killed])
def test_a_rank_that_is_killed_ends_the_others_in_a_line(lives: Callable[..., None], tmp_path: Path) -> None:
    """Behind its exchange, and in it, where all the others wait for it at once."""
    codes, words = ends(lives, 3, tmp_path)
    assert codes == [1, -signal.SIGKILL, 1]
    lines = [*words[0], *words[2]]
    assert len(lines) == 1 and "lost another rank" in lines[0], lines


@pytest.mark.ranks
def test_an_exchange_that_breaks_on_one_rank_ends_the_others(tmp_path: Path) -> None:
    """They stand in it and cannot be told: they learn of it by that rank's end."""
    codes, words = ends(broken, 2, tmp_path)
    assert codes == [1, 1]
    assert words[1] == ["error: rank 1: an exchange broke off: ValueError: no such piece"]
    assert len(words[0]) == 1 and "lost another rank" in words[0][0]


def test_copies_are_counted_once_they_are_there() -> None:
    config = Config()
    blueprint = Blueprint("preact_resnet_small", 10)
    state = StateLayout.of(blueprint, config, 2)
    overlap = Overlap(Comm(), None, state, travel=True)  # type: ignore[arg-type]
    assert overlap.nbytes == 0
    overlap.take(0, torch.zeros(state.numel), spoilt=False)
    assert overlap.nbytes == 4 * 2 * state.shared.numel

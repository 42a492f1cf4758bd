"""Teams as their users meet them: what is typed wrong, what goes wrong, a loop of one's own."""

import contextlib
import io
import math
import queue
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resist_ds import ResIST, api
from resist_ds.comm import Comm
from resist_ds.engines import engine
from resist_ds.errors import NotFiniteError
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.partition import sample_partition
from resist_ds.trainer import Trainer
from tests.conftest import _CONTEXT, Ranks, _rank
from tests.oracle import arrays
from tests.run.test_api import ROUNDS, SHARED, STEPS, TRAIN
from tests.run.test_errors import TINY, expect, outcome
from tests.saved import checkpoints, tensors

pytestmark = pytest.mark.ranks

TEAM = {"workers": 2, "team_size": 2}
# {what is wrong: (ranks, options, the line)}
WRONG: dict[str, tuple[int, dict[str, Any], str]] = {
    "no such teams": (
        3,
        {"team_size": 2, "workers": 4},
        "--team_size is 2, and 3 ranks cannot be cut into teams of 2: type a divisor of 3",
    ),
    "no ranks": (
        1,
        {"team_size": 2},
        "--team_size is 2, and there is 1 rank: start 2 or more, or leave --team_size out",
    ),
    "a batch that cannot be divided": (
        2,
        {**TEAM, "batch_size": 6, "accumulation_steps": 2},
        "--batch_size 6 cannot be divided over a team's 2 ranks and --accumulation_steps 2: type a multiple "
        "of 4",
    ),
    "fewer workers than teams": (
        4,
        {**TEAM, "workers": 1},
        "--workers 1 is less than the 2 teams of 2 ranks: type --workers 2 or more, or start fewer ranks",
    ),
    "a strategy, and no team": (
        1,
        {"team_size": "auto", "team_strategy": "fsdp"},
        "--team_size auto makes a team of every machine's one rank, and --team_strategy fsdp is for teams of "
        "several: leave both out",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_team(case: str, ranks: Ranks, tmp_path: Path) -> None:
    size, options, line = WRONG[case]
    outcomes = ranks(outcome, size, tmp_path, TINY | {"output_dir": str(tmp_path / "run")} | options)
    expect(outcomes, 2, line)


def on_two_machines(comm: Comm, options: dict[str, Any]) -> list[str]:
    """What a run is told of its start, where the ranks of a team sit on two machines."""
    comm.machine = f"node{comm.rank % 2} boot"
    trainer = Trainer(comm, Config(**options))
    trainer.folder.release()
    return trainer.start.remarks


def test_a_team_across_machines_is_warned_of(ranks: Ranks, tmp_path: Path) -> None:
    options = TRAIN | TEAM | {"output_dir": str(tmp_path)}
    for remarks in ranks(on_two_machines, 4, options):
        (remark,) = (r for r in remarks if r.startswith("team 0 spans machines (node0 and node1)"))
        assert "start as many ranks on each machine" in remark


def poisoned(comm: Comm, options: dict[str, Any], gradients: bool) -> tuple[str, dict[str, Any]]:
    """A run in whose second round rank 1's loss is NaN: what is said on this rank, and what it then owns.

    Args:
        gradients: whether they are NaN too, and so reach the others of the team.
    """
    trainer = Trainer(comm, Config(**options))
    cross_entropy, steps = engine.F.cross_entropy, [0]

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        loss = cross_entropy(*args, **kwargs)
        if comm.rank != 1 or steps[0] != STEPS + 1:
            return loss
        return loss * math.nan if gradients else loss + math.nan

    from resist_ds.engines import zero  # after DeepSpeed's environment is set

    modules: list[Any] = [engine, zero]
    for module in modules:
        module.F = SimpleNamespace(cross_entropy=spoilt, pad=F.pad)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            trainer.run()
    except NotFiniteError as error:
        said.write(str(error))
    finally:
        for module in modules:
            module.F = F
        trainer.folder.release()
    return said.getvalue(), arrays(trainer.workers.owned(trainer.net.deal))


@pytest.mark.parametrize("way", ["ddp", "fsdp", "zero2"])
def test_a_team_agrees_that_its_worker_is_spoilt(way: str, ranks: Ranks, tmp_path: Path) -> None:
    """One lane alone sees the loss that is NaN, and all of its team drop the worker's round."""
    options = TRAIN | TEAM | {"team_strategy": way, "on_nan": "skip", "output_dir": str(tmp_path)}
    options |= {"checkpoint_every": 1, "keep": 9}
    words, found = zip(*ranks(poisoned, 4, options, False), strict=True)
    assert all(np.isfinite(v).all() for rank in found for of in rank.values() for v in of.values())
    said = "".join(words)
    assert f"worker 0 met NaN or Inf in round 2, first in the loss of local step {STEPS + 1}" in said
    assert said.count("its round is dropped") == 1
    # The blocks that it alone held are as they were on all lanes, and the others' are not.
    blueprint = Blueprint(TRAIN["model"], 10)
    deal = sample_partition(TRAIN["seed"], 1, workers=2, pool=blueprint.pool)
    before, after = (tensors(tmp_path / "checkpoints" / name) for name in checkpoints(tmp_path)[:2])
    for block, holders in enumerate(deal.holders):
        prefix = blueprint.block_prefix(block)
        same = {np.array_equal(after[n], v) for n, v in before.items() if n.startswith(prefix) and v.ndim > 1}
        assert same == {holders == (0,)}, (block, holders)


def test_a_team_agrees_to_stop(ranks: Ranks, tmp_path: Path) -> None:
    """All ranks end with the same line, and none has averaged anything of the round."""
    options = TRAIN | TEAM | {"checkpoint_every": 1, "output_dir": str(tmp_path)}
    words, _ = zip(*ranks(poisoned, 4, options, True), strict=True)
    assert len(set(words)) == 1
    assert words[0].startswith(
        f"worker 0 met NaN or Inf in round 2, first in the loss of local step {STEPS + 1}. Nothing of this "
    )
    assert checkpoints(tmp_path) == ["round-000001"]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_rank_of_a_team_that_dies_leaves_nobody_waiting(way: str, tmp_path: Path) -> None:
    results = _CONTEXT.Queue()
    options = TINY | TEAM | {"batch_size": 8, "team_strategy": way, "output_dir": str(tmp_path / "run")}
    arguments = (tmp_path, options, "kill")  # the last rank, in its local steps
    store = str(tmp_path / "rendezvous")
    job = [
        _CONTEXT.Process(target=_rank, args=(outcome, rank, 4, store, results, arguments), daemon=True)
        for rank in range(4)
    ]
    try:
        for process in job:
            process.start()
        ended = {}
        while len(ended) < 3:
            try:
                rank, result, error = results.get(timeout=60)
            except queue.Empty:
                pytest.fail(f"of the others, only {sorted(ended)} have ended")
            assert error is None, error
            ended[rank] = result
    finally:
        for process in job:
            process.kill()
            process.join(10)
    assert job[3].exitcode == -signal.SIGKILL
    assert {result.code for result in ended.values()} == {1}
    assert sum(result.stderr.count("lost another rank") for result in ended.values()) >= 1
    assert not any("Traceback" in result.stderr for result in ended.values())


def own_loop(comm: Comm, folder: str, team: dict[str, Any]) -> Any:
    """`TRAIN` in teams, by a loop of one's own in which every rank takes its part of a batch."""
    api.Comm = lambda: comm  # type: ignore[assignment,misc]
    whole = Trainer(comm, Config(**{**TRAIN, **TEAM, "output_dir": f"{folder}-batches"}))
    whole.folder.release()
    options = SHARED | team | {"output_dir": folder}
    with ResIST("preact_resnet_small", num_classes=10, **options) as resist:
        comm.close = lambda: None  # type: ignore[method-assign]
        for round in range(ROUNDS):
            for worker in resist.workers():
                steps = range(round * STEPS, (round + 1) * STEPS)
                schedule = (whole.order.batch(step, worker.index, comm.rank % 2, 2) for step in steps)
                for x, y in whole.data.train_batches(schedule, resist.device, torch.float32, False):
                    F.cross_entropy(worker.module(x), y).backward()
                    worker.optimizer.step()
                    worker.optimizer.zero_grad()
            resist.synchronise()
        resist.save()
        return arrays(resist._net.workers.owned(resist._net.deal))


def as_train_py(comm: Comm, folder: str, team: dict[str, Any]) -> Any:
    trainer = Trainer(comm, Config(**{**TRAIN, **team, "output_dir": folder}))
    trainer.run()
    trainer.folder.release()
    return arrays(trainer.workers.owned(trainer.net.deal))


@pytest.mark.numerical
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_loop_of_ones_own_trains_in_teams(way: str, ranks: Ranks, tmp_path: Path) -> None:
    team = TEAM | {"team_strategy": way}
    expected = ranks(as_train_py, 4, str(tmp_path / "train"), team)
    for want, got in zip(expected, ranks(own_loop, 4, str(tmp_path / "own"), team), strict=True):
        assert got.keys() == want.keys()
        for name, kinds in want.items():
            for kind, values in kinds.items():
                assert np.array_equal(got[name][kind], values), (name, kind)

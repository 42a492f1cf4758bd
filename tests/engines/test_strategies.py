"""Baselines in the same trainer: local SGD is ResIST without a partition, DDP is local SGD of one step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.errors import RunError
from resist_ds.nets.blueprint import Blueprint
from tests.conftest import Ranks
from tests.run.test_errors import Outcome
from tests.saved import OPTIONS, checkpoints, digest, last, loss_log, outcome, tensors, train

pytestmark = pytest.mark.ranks

P = 7
RUN: dict[str, Any] = {"workers": 3, "rounds": 3, "local_steps": 4, "eval_every": 0, "checkpoint_every": 0}


def test_local_sgd_is_resist_with_the_whole_pool_for_everyone(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train, 2, RUN | {"strategy": "local_sgd", "output_dir": str(tmp_path / "local_sgd")})
    ranks(train, 2, RUN | {"min_blocks": P, "output_dir": str(tmp_path / "resist")})
    assert digest(last(tmp_path / "local_sgd")) == digest(last(tmp_path / "resist"))
    assert loss_log(tmp_path / "local_sgd") == loss_log(tmp_path / "resist")
    assert json.loads((last(tmp_path / "local_sgd") / "state.json").read_text())["test_scale"] == 1


@pytest.mark.numerical
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.01},
        {"accumulation_steps": 4, "nesterov": True, "channels_last": True},
        {"momentum": 0.0, "activation_checkpointing": True, "label_smoothing": 0.1},
    ],
    ids=["momentum", "accumulation", "checkpointing"],
)
def test_ddp_is_local_sgd_that_averages_after_every_step(
    options: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """SGD is linear in the gradients, so the means of weights and momentum are those of mean gradients."""
    # (Micro-batches of two images would turn a last bit into a third digit: BatchNorm makes ±1 of two.)
    both = RUN | options | {"dtype": "float64", "workers": None, "batch_size": 32}
    ranks(train, 3, both | {"strategy": "ddp", "output_dir": str(tmp_path / "ddp")})
    every_step = {"strategy": "local_sgd", "rounds": 12, "local_steps": 1}
    ranks(train, 3, both | every_step | {"output_dir": str(tmp_path / "local_sgd")})
    ours, expected = tensors(last(tmp_path / "ddp")), tensors(last(tmp_path / "local_sgd"))
    assert ours.keys() == expected.keys()
    start = Blueprint(OPTIONS["model"], 10).initial_shared(0)
    moved = [np.abs(ours[name] - value.numpy()).max() for name, value in start.items()]
    assert max(moved) > 1e-2
    for name, array in ours.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_bytes_of_ddp_are_those_of_a_ring(accumulation_steps: int, ranks: Ranks, tmp_path: Path) -> None:
    """Of one all-reduce of all gradients a step, however many micro-batches it has."""
    options = {"strategy": "ddp", "workers": None, "accumulation_steps": accumulation_steps}
    ranks(train, 2, RUN | options | {"output_dir": str(tmp_path)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    parameters = Blueprint(OPTIONS["model"], 10).parameters
    rounds = [line["comm/bytes_round"] for line in lines if line["kind"] == "round"]
    assert rounds == [2 * 4 * parameters * 4] * 3  # ranks x steps x 2(R - 1)/R x bytes


def test_a_resumed_ddp_run_is_the_uninterrupted_one(ranks: Ranks, tmp_path: Path) -> None:
    options = {"strategy": "ddp", "workers": None, "schedule": "constant", "checkpoint_every": 1}
    ranks(train, 2, RUN | options | {"output_dir": str(tmp_path / "whole")})
    place = {"output_dir": str(tmp_path / "run")}
    ranks(train, 2, RUN | options | place | {"rounds": 2})
    ranks(train, 2, RUN | options | place | {"resume": "auto", "override": "rounds"})
    assert digest(last(tmp_path / "run")) == digest(last(tmp_path / "whole"))


def test_a_run_may_go_on_with_another_strategy(ranks: Ranks, tmp_path: Path) -> None:
    """Nothing is lost on the way: at learning rate 0 all weights are what they were."""
    still = RUN | {"lr": 0.0, "weight_decay": 0.0, "output_dir": str(tmp_path), "keep": 3}
    ranks(train, 2, still | {"strategy": "ddp", "workers": None, "rounds": 1})
    goes_on = {"resume": "auto", "override": "strategy,rounds"}
    ranks(train, 2, still | goes_on | {"strategy": "resist", "workers": 3, "rounds": 2})
    ranks(train, 3, still | goes_on | {"strategy": "local_sgd", "workers": 3})
    names = checkpoints(tmp_path)
    assert len(names) == 3
    first, *others = [tensors(tmp_path / "checkpoints" / name) for name in names]
    weights = [name for name in first if name in Blueprint(OPTIONS["model"], 10).shapes]
    for other in others:
        assert all(first[name].tobytes() == other[name].tobytes() for name in weights)


# ------------------------------------------------------------------------------------------------------------
# What goes wrong.


@pytest.mark.parametrize("size", [1, 2])
def test_ddp_has_one_worker_per_rank(size: int, ranks: Ranks, tmp_path: Path) -> None:
    options = {"strategy": "ddp", "workers": 3, "output_dir": str(tmp_path / "run")}
    results = ranks(outcome, size, tmp_path, options)
    line = f"--strategy ddp has one worker per rank: type --workers {size}, or start 3 ranks"
    assert results == [(2, f"error: {line}\n")] + [(2, "")] * (size - 1)


def meets_an_error(comm: Comm, folder: Path, options: dict[str, Any], which: int) -> Outcome:
    """One rank fails in its second step, while the others wait for its gradients."""
    train_steps = trainer.local_steps

    def failing(engine: Any, batches: Any, **given: Any) -> Any:
        def some() -> Any:
            yield next(batches)
            raise RunError("cannot read the image 7.png: it is none")

        return train_steps(engine, some(), **given)

    if comm.rank == which:
        trainer.local_steps = failing  # type: ignore[assignment]
    return outcome(comm, folder, options)


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_fails_between_two_averages_says_so_itself(
    which: int, ranks: Ranks, tmp_path: Path
) -> None:
    """The others cannot be told: they stand in an all-reduce, until they see that it is gone."""
    options = {"strategy": "ddp", "workers": None, "output_dir": str(tmp_path / "run")}
    results = ranks(meets_an_error, 2, tmp_path, options, which)
    assert results[which] == (1, "error: cannot read the image 7.png: it is none\n")
    code, stderr = results[1 - which]
    assert code == 1
    if which == 1:  # rank 0 speaks for those who have lost another
        assert stderr.startswith("error: rank 0 lost another rank, whose own message or exit says why")
        assert stderr.count("\n") == 1


@pytest.mark.numerical
def test_nan_reaches_all_ranks_of_ddp_at_once(ranks: Ranks, tmp_path: Path) -> None:
    options = {"strategy": "ddp", "workers": None, "lr": 1e30, "output_dir": str(tmp_path / "run")}
    first, second = ranks(outcome, 2, tmp_path, options)
    assert (first.code, second) == (3, (3, ""))
    assert first.stderr.startswith("error: worker 0 met NaN or Inf in round 1, ")
    assert "; worker 1 met NaN or Inf in round 1, " in first.stderr
    assert first.stderr.endswith(". Nothing of this round is kept: try a lower --lr or --clip_grad 1\n")
    assert not (tmp_path / "run" / "checkpoints").exists()

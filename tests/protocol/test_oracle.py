"""Real runs on several gloo ranks against the oracle, a plain simulation of the protocol in one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Partition
from resist_ds.trainer import Trainer
from tests import THREADS
from tests.oracle import Outcome, arrays, held, simulate

pytestmark = [pytest.mark.ranks, pytest.mark.numerical]

BASE: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "model": "preact_resnet_small",
    "batch_size": 8,
    "local_steps": 3,
    "rounds": 3,
    "lr": 0.05,
    "schedule": "constant",
    "dtype": "float64",
    "eval_every": 2,
    "calibration_samples": 50,
    "transit_mib": 1,
    "log_with": "none",
    "progress": False,
    "cpu_threads": THREADS,
}


def train(comm: Comm, config: Config) -> dict[str, Any]:
    """A rank's life: the deals that it really went through, and every tensor that its workers end up with."""
    trainer = Trainer(comm, config)
    deals = [trainer.net.deal]
    hand_off = trainer.net.sync.hand_off

    def spied(vectors: Any, now: Partition, then: Partition, *groups: Any) -> None:
        if groups == (trainer.net.sync.blocks,):  # after shared
            assert [now, then] == deals[-2:]
        else:
            assert now == deals[-1]
            deals.append(then)
        hand_off(vectors, now, then, *groups)

    trainer.net.sync.hand_off = spied  # type: ignore[method-assign]
    result = trainer.run()
    return {
        "deals": deals,
        "test": (result.loss, result.accuracy),
        "threads": torch.get_num_threads(),
        "owned": arrays(trainer.workers.owned(trainer.net.deal)),
        "held": held(trainer),
    }


def assert_agreement(
    ranks: Any, size: int, folder: Path, tolerance: float, figures: float | None = None, **options: Any
) -> None:
    """A real run on `size` ranks agrees with the oracle, each tensor to `tolerance`, by the norm.

    Both compute by the same kernels. So they agree in float32 too, but for the order of some sums; and a
    single number that is the small difference of large ones may be off by more than its tensor.

    Args:
        figures: tolerance of losses; default: that of the tensors.
    """
    figures = tolerance if figures is None else figures
    config = Config(**{**BASE, "workers": size, **options, "output_dir": str(folder)})
    returned = ranks(train, size, config)
    expected = simulate(alone(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    for rank in returned:
        assert rank["deals"] == expected.deals
        assert rank["threads"] == config.cpu_threads  # no library has set another number
    names = [name for rank in returned for name in rank["owned"]]
    assert sorted(names) == sorted(expected.state), "each tensor is owned once"
    lanes = config.team_size
    workers = [worker for rank in returned for worker in rank["held"]]
    assert sorted(workers) == [worker for worker in range(config.workers or 0) for _ in range(lanes)]
    states = [rank["owned"] for rank in returned]
    if not (config.inside and config.inside.spread):  # there a rank holds no whole tensors
        states += [state for rank in returned for state in rank["held"].values()]
    for state in states:
        _assert_tensors(state, expected, tolerance, config.optimizer_state == "travel")

    inexact = config.dtype == "float32"  # the last bit decides between two classes that are as likely
    rounds = [line for line in lines if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == list(range(1, len(expected.train) + 1))
    for line, (loss, accuracy) in zip(rounds, expected.train, strict=True):
        assert line["train/loss"] == pytest.approx(loss, rel=figures, abs=0)
        assert line["train/accuracy"] == accuracy or inexact
    tests = {line["round"]: line for line in lines if line["kind"] == "eval"}
    assert tests.keys() == expected.tests.keys()
    for done, (loss, accuracy) in expected.tests.items():
        assert tests[done]["eval/loss"] == pytest.approx(loss, rel=figures, abs=0)
        assert tests[done]["eval/accuracy"] == accuracy or inexact
        last = (tests[done]["eval/loss"], tests[done]["eval/accuracy"])
    assert {rank["test"] for rank in returned} == {last}


def alone(config: Config) -> Config:
    """The run without teams that must train the same: a team's ranks are as many micro-batches."""
    assert isinstance(config.team_size, int)
    parts = config.accumulation_steps * config.team_size
    return replace(config, team_size=1, team_strategy="ddp", accumulation_steps=parts)


def _assert_tensors(state: dict[str, Any], expected: Outcome, tolerance: float, travel: bool) -> None:
    for name, tensors in state.items():
        wanted = expected.state[name]
        assert tensors.keys() == wanted.keys() or not travel, name
        for kind, want in wanted.items():
            error = np.linalg.norm(tensors[kind] - want.numpy()) / max(float(want.norm()), 1e-9)
            assert error <= tolerance, f"{kind} of {name} is off by {error:.1e} of its norm"


HIDDEN: dict[str, Any] = {"local_steps": 4, "overlap_steps": 2, "eval_every": 0}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # P = 8 blocks on two or four workers: one holder each. On three workers, one block has two holders.
    "two": (2, {}),
    "two-reset": (2, {"optimizer_state": "reset"}),
    # Micro-batches of 8: of two images whose maps have shrunk to 1×1, BatchNorm makes ±1, by the last bit.
    "two-overlap": (2, {"min_blocks": 6, "accumulation_steps": 4, "batch_size": 32}),
    "three": (3, {"schedule": "step", "local_steps": 4}),
    "three-reset-overlap": (3, {"optimizer_state": "reset", "min_blocks": 5}),
    "four-reset": (4, {"optimizer_state": "reset", "schedule": "step"}),
    "four-overlap": (4, {"min_blocks": 3, "momentum": 0.5}),
    "more-workers-than-ranks": (2, {"workers": 5, "local_steps": 2}),
    "everything-held-by-all": (2, {"min_blocks": 8, "momentum": 0.0}),
    "warm-up": (2, {"workers": 3, "warmup_rounds": 2, "rounds": 4, "local_steps": 2, "eval_every": 1}),
    "adamw": (2, {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "min_blocks": 5}),
    "adamw-reset": (
        2,
        # At the usual ε of 1e-8 a rounding of 1e-16 in a gradient of next to nothing becomes 1e-8 of a step.
        {"optimizer": "adamw", "lr": 1e-3, "optimizer_state": "reset", "betas": "0.8,0.99", "eps": 1e-3},
    ),
    "options-of-training": (
        2,
        {
            "clip_grad": 0.5,
            "nesterov": True,
            "label_smoothing": 0.1,
            "schedule": "cosine",
            "lr_warmup_steps": 4,
            "channels_last": True,
        },
    ),
    # The exchange behind the last two steps, but where warm-up ends, and before evaluations and checkpoints.
    "hidden": (
        2,
        HIDDEN | {"workers": 3, "warmup_rounds": 2, "rounds": 4, "clip_grad": 0.5, "nesterov": True},
    ),
    "hidden-reset": (
        3,
        HIDDEN
        | {"optimizer_state": "reset", "min_blocks": 5, "rounds": 5, "eval_every": 3, "checkpoint_every": 2},
    ),
    "hidden-adamw": (
        4,
        HIDDEN | {"optimizer": "adamw", "lr": 1e-3, "eps": 1e-3, "min_blocks": 3, "betas": "0.9,0.5"},
    ),
    # post-activation nets, and odd pools
    "basic": (3, {"model": "resist_test_basic", "img_size": 32}),
    "bottleneck": (2, {"model": "resist_test_bottleneck", "img_size": 32, "min_blocks": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_in_float64_a_run_is_the_simulation(ranks, tmp_path, case):
    size, options = CASES[case]
    assert_agreement(ranks, size, tmp_path, 1e-10, **options)


@pytest.mark.parametrize(("size", "options"), [(2, {}), (3, {"min_blocks": 5, "optimizer_state": "reset"})])
def test_in_float32_the_first_three_steps_are_the_simulation(ranks, tmp_path, size, options):
    options |= {"dtype": "float32", "rounds": 3, "local_steps": 1, "eval_every": 1}
    assert_agreement(ranks, size, tmp_path, 1e-5, **options)


COMPACT: dict[str, tuple[int, dict[str, Any]]] = {
    "two": (2, {"eval_every": 2}),
    "hidden": (3, HIDDEN | {"min_blocks": 5}),
    "reset": (2, {"workers": 3, "optimizer_state": "reset", "warmup_rounds": 1, "min_blocks": 5}),
    "adamw": (2, {"optimizer": "adamw", "lr": 1e-3, "rounds": 2}),
    "hidden-adamw": (4, HIDDEN | {"optimizer": "adamw", "lr": 1e-3, "min_blocks": 3}),
}


@pytest.mark.parametrize("case", COMPACT)
def test_on_the_compact_wire_a_run_has_the_bits_of_the_simulation(ranks, tmp_path, case):
    """No tolerance: torch's own steps on the same numbers by the same kernels, and codes that are the same.

    A value that is rounded to its other neighbour is off by 1/127 of the largest difference in its block; of
    that a round makes other gradients, and other codes all over. A run is the simulation, or far from it.
    """
    size, options = COMPACT[case]
    options = {"dtype": "float32", "wire": "compact", "eval_every": 0, **options}
    assert_agreement(ranks, size, tmp_path, 0.0, 1e-5, **options)


@pytest.mark.parametrize("wire", ["exact", "compact"])
def test_without_a_learning_rate_a_hidden_exchange_changes_no_bit(ranks, tmp_path, wire):
    """Nor does the compact wire, but in the first round, which makes blocks bf16."""
    options = {"workers": 5, "min_blocks": 3, "rounds": 4, "eval_every": 0, "overlap_steps": 1}
    options |= {"local_steps": 2, "lr": 0.0, "weight_decay": 0.0, "dtype": "float32", "wire": wire}
    config = Config(**{**BASE, **options, "output_dir": str(tmp_path)})
    returned = ranks(train, 3, config)
    once = simulate(replace(config, rounds=1)).state
    states = [state for rank in returned for state in (rank["owned"], *rank["held"].values())]
    assert len(states) == 3 + 5
    for state in states:
        for name, tensors in state.items():
            want = once[name]["parameter"].numpy()
            np.testing.assert_array_equal(tensors["parameter"].view(np.uint32), want.view(np.uint32), name)
    assert any(tensors["momentum_buffer"].any() for tensors in states[0].values()), "nothing was trained"
    # What that first round does: nothing to shared, and to none of a block's numbers more than bf16 must.
    blueprint = Blueprint(config.model, 10)
    initial = dict(blueprint.initial_shared(config.seed))
    blocks = {
        blueprint.block_prefix(b) + name: value
        for b in range(blueprint.pool)
        for name, value in blueprint.initial_block(config.seed, b).items()
    }
    for name, value in (initial | blocks).items():
        got = once[name]["parameter"]
        if wire == "compact" and name in blocks and value.ndim > 1:
            assert torch.equal(got, got.bfloat16().float()) and not torch.equal(got, value)
            assert ((got - value).abs() <= value.abs() / 128).all()
        else:
            assert torch.equal(got, value)

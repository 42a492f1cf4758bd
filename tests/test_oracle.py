"""Real runs on several gloo ranks against the oracle, a plain simulation of the protocol in one process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resist_ds.comm import Comm
from resist_ds.config import Config
from resist_ds.partition import Partition
from resist_ds.trainer import Trainer
from tests.oracle import Outcome, simulate

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
    "cpu_threads": 1,
}


def train(comm: Comm, config: Config) -> dict[str, Any]:
    """A rank's life: the deals it really went through, and every tensor that its workers end up with."""
    trainer = Trainer(comm, config)
    deals = [trainer.deal]
    hand_off = trainer.sync.hand_off

    def spied(vectors: Any, now: Partition, then: Partition) -> None:
        assert now == deals[-1]
        deals.append(then)
        hand_off(vectors, now, then)

    trainer.sync.hand_off = spied  # type: ignore[method-assign]
    result = trainer.run()
    owned = trainer.workers.owned(trainer.deal)
    layout, blueprint = trainer.workers.layout, trainer.blueprint
    held: dict[int, Any] = {}
    for worker, vector in trainer.workers.vectors.items():
        parts = [("", layout.shared, layout.shared_part(vector))]
        for slot, block in enumerate(trainer.deal.blocks[worker]):
            parts.append((blueprint.block_prefix(block), layout.block, layout.slot_part(vector, slot)))
        held[worker] = {
            prefix + name: {"parameter": view, **part.optimizer_views(values)[name]}
            for prefix, part, values in parts
            for name, view in part.views(values).items()
        }
    return {
        "deals": deals,
        "test": (result.loss, result.accuracy),
        "owned": _arrays(owned),
        "held": {worker: _arrays(state) for worker, state in held.items()},
    }


def _arrays(state: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: {kind: t.detach().numpy().copy() for kind, t in tensors.items()}
        for name, tensors in state.items()
    }


def run_both(ranks: Any, size: int, tmp_path: Path, **options: Any) -> tuple[Outcome, list[Any], list[Any]]:
    """(the oracle's outcome, what each rank returned, the lines of metrics.jsonl)."""
    config = Config(**{**BASE, "workers": size, **options, "output_dir": str(tmp_path)})
    returned = ranks(train, size, config)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return simulate(config), returned, lines


def compare(expected: Outcome, returned: list[Any], lines: list[Any], tolerance: float, travel: bool) -> float:
    """Assert that a run agrees with the oracle, each tensor relative to its largest value; the worst error."""
    worst = 0.0

    def close(got: Any, want: Any, what: str) -> None:
        nonlocal worst
        got, want = np.asarray(got), np.asarray(want)
        assert got.shape == want.shape, what
        error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-3))
        worst = max(worst, error)
        assert error <= tolerance, f"{what} is off by {error:.1e} of its scale"

    names = [name for rank in returned for name in rank["owned"]]
    assert len(names) == len(set(names)), "a tensor has two owners"
    assert set(names) == set(expected.state)
    everyone = [state for rank in returned for state in (rank["owned"], *rank["held"].values())]
    for state in everyone:
        for name, tensors in state.items():
            kinds = expected.state[name]
            assert set(tensors) == set(kinds) if travel else "parameter" in tensors
            for kind, tensor in kinds.items():
                close(tensors[kind], tensor, f"{kind} of {name}")

    assert sorted(worker for rank in returned for worker in rank["held"]) == list(range(expected.deals[0].workers))
    for rank in returned:
        assert rank["deals"] == expected.deals
        close(rank["test"][0], expected.tests[len(expected.train)][0], "returned test loss")

    rounds = [line for line in lines if line["kind"] == "round"]
    assert len(rounds) == len(expected.train)
    for line, (loss, accuracy) in zip(rounds, expected.train, strict=True):
        close(line["train/loss"], loss, f"training loss of round {line['round']}")
        assert line["train/accuracy"] == accuracy
    tests = {line["round"]: line for line in lines if line["kind"] == "eval"}
    assert tests.keys() == expected.tests.keys()
    for done, (loss, accuracy) in expected.tests.items():
        close(tests[done]["eval/loss"], loss, f"test loss after {done} rounds")
        assert tests[done]["eval/accuracy"] == accuracy
    return worst


SMALL = {"model": "resist_test_basic", "img_size": 32, "lr": 0.1}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    # K = 4 of 8: every block has one holder
    "two": (2, {}),
    "two-reset": (2, {"optimizer_state": "reset"}),
    "two-overlap": (2, {"min_blocks": 6}),
    "three-reset-overlap": (3, {"optimizer_state": "reset", "min_blocks": 5}),
    "three-step-schedule": (3, {"schedule": "step"}),
    "four-step-reset": (4, {"schedule": "step"}),
    "workers-exceed-ranks": (2, {"workers": 5, "local_steps": 2}),
    "warm-up": (2, {"workers": 3, "warmup_rounds": 2, "eval_every": 1}),
    "adamw": (2, {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "min_blocks": 5}),
    "adamw-reset": (2, {"optimizer": "adamw", "lr": 1e-3, "optimizer_state": "reset"}),
    "clip": (2, {"clip_grad": 0.5, "accumulation_steps": 2, "nesterov": True, "label_smoothing": 0.1,
    "schedule": "cosine", "lr_warmup_steps": 4}),
    "basic": (3, {"model": "resist_test_basic", "img_size": 32}),
    "bottleneck": (2, {"model": "resist_test_bottleneck", "img_size": 32, "min_blocks": 4}),
}

@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_float64(ranks, tmp_path, case):
    import time
    size, options = CASES[case]
    t=time.time()
    outcome, returned, lines = run_both(ranks, size, tmp_path, **options)
    worst = compare(outcome, returned, lines, 1e-10, options.get("optimizer_state") != "reset")
    print(case, "worst", worst, time.time()-t)

@pytest.mark.ranks
@pytest.mark.parametrize("size", [2,3])
def test_float32(ranks, tmp_path, size):
    outcome, returned, lines = run_both(ranks, size, tmp_path, dtype="float32", local_steps=1, rounds=3, eval_every=1)
    worst = compare(outcome, returned, lines, 1e-5, True)
    print("f32", "worst", worst)

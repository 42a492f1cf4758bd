"""What a run promises on GPUs: the protocol, to rounding; and with --deterministic, bits.

Where there are fewer GPUs than ranks, these share one and exchange over gloo; else NCCL carries it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resist_ds.nets.blueprint import Blueprint
from tests.conftest import Ranks
from tests.engines.test_engines import RUN, assert_the_same_training
from tests.protocol.test_oracle import CASES, assert_agreement
from tests.saved import OPTIONS, digest, last, loss_log, tensors, train

pytestmark = [pytest.mark.gpu, pytest.mark.ranks]

EXACT: dict[str, Any] = {"deterministic": True, "checkpoint_every": 0, "schedule": "constant"}


@pytest.mark.parametrize("case", CASES)
def test_in_float64_a_run_is_the_simulation(ranks: Ranks, tmp_path: Path, case: str) -> None:
    """The simulation's numbers are a CPU's."""
    size, options = CASES[case]
    if "optimizer" in options:  # at the usual ε other kernels' last bits become a part of a step
        options = {**options, "eps": 1e-3}
    assert_agreement(ranks, size, tmp_path, 1e-10, **options)


@pytest.mark.parametrize(("workers", "size"), [(1, 1), (4, 1), (4, 2), (3, 3)])
def test_without_a_learning_rate_no_bit_changes(
    ranks: Ranks, tmp_path: Path, workers: int, size: int
) -> None:
    options = {"workers": workers, "rounds": 3, "lr": 0.0, "weight_decay": 0.0, "output_dir": str(tmp_path)}
    ranks(train, size, OPTIONS | options)
    blueprint, initial = Blueprint(OPTIONS["model"], 10), {}
    for block in range(blueprint.pool):
        values = blueprint.initial_block(0, block)
        initial |= {blueprint.block_prefix(block) + name: value for name, value in values.items()}
    initial |= blueprint.initial_shared(0)
    found = tensors(last(tmp_path))
    for name, value in initial.items():
        assert found[name].tobytes() == value.numpy().tobytes(), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_deterministic_runs_make_the_same_bits(ranks: Ranks, tmp_path: Path, precision: str) -> None:
    """Started again, on another number of ranks, and resumed."""
    options = OPTIONS | EXACT | {"mixed_precision": precision}
    ranks(train, 1, options | {"output_dir": str(tmp_path / "first")})
    ranks(train, 1, options | {"output_dir": str(tmp_path / "again")})
    ranks(train, 2, options | {"output_dir": str(tmp_path / "two")})
    place = {"output_dir": str(tmp_path / "resumed")}
    ranks(train, 2, options | place | {"rounds": 3})
    ranks(train, 1, options | place | {"resume": "auto", "override": "rounds"})
    first = tmp_path / "first"
    for other in ("again", "two", "resumed"):
        assert digest(last(tmp_path / other)) == digest(last(first)), other
        assert loss_log(tmp_path / other)[-1]["eval/loss"] == loss_log(first)[-1]["eval/loss"], other


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "fsdp"},
        {"strategy": "zero1"},
        {"strategy": "zero2"},
        {"strategy": "zero3"},
        {"channels_last": True},
        {"compile": True},
        {"compile": True, "compile_mode": "reduce-overhead"},
        {"activation_checkpointing": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_one_net_trains_alike_whatever_trains_it(
    ranks: Ranks, tmp_path: Path, options: dict[str, Any]
) -> None:
    """In IEEE float32, against float64."""
    for name, given in {"exact": {"dtype": "float64"}, "found": options}.items():
        ddp = RUN | {"strategy": "ddp", "deterministic": True, "output_dir": str(tmp_path / name)}
        ranks(train, 1, ddp | given, timeout=300)  # torch's compiler takes minutes for the first time
    assert_the_same_training(tmp_path / "found", tmp_path / "exact")


def test_adamw_counts_its_steps_in_float64_too(ranks: Ranks, tmp_path: Path) -> None:
    options = RUN | {"strategy": "ddp", "optimizer": "adamw", "lr": 1e-3, "dtype": "float64"}
    ranks(train, 1, options | {"output_dir": str(tmp_path)})
    found = tensors(last(tmp_path))
    steps = [value for name, value in found.items() if name.endswith(".step")]
    assert steps and all(np.all(value == 10) for value in steps)

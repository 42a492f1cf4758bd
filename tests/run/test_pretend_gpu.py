"""The trainer on a CUDA device that is not there: what a run on the CPU cannot show of what touches a GPU."""

from pathlib import Path
from typing import Any

import pytest

from tests import THREADS, pretend_gpu
from tests.pretend_gpu.start import Job, Ranks, build
from tests.pretend_gpu.trial import Seen, train_all

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(pretend_gpu.misfit() is not None, reason=str(pretend_gpu.misfit())),
]

OPTIONS: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "model": "preact_resnet_small",
    "batch_size": 8,
    "local_steps": 2,
    "rounds": 2,
    "eval_every": 2,
    "eval_batch_size": 512,
    "calibration_samples": 32,
    "checkpoint_every": 1,
    "log_with": "none",
    "progress": False,
    "cpu_threads": THREADS,
}
ALONE, EACH, SHARED = [[0]], [[0, 1], [0, 1]], [[0], [0]]
"""The GPUs that each rank sees: one rank; two with a GPU each; two that share one."""

ALL = {"clip_grad": 1.0, "accumulation_steps": 2, "activation_checkpointing": True}
BF16 = {"mixed_precision": "bf16", "channels_last": True}
ADAMW = {"optimizer": "adamw", "lr": 1e-3}
FP16 = {"mixed_precision": "fp16"}
HOST = {"gpu_cache_mib": 0}  # images wait on the host
RUNS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "one worker": (ALONE, {"workers": 1}),
    "four workers, bf16, channels_last": (ALONE, {"workers": 4} | BF16),
    "two workers, AdamW, clipped, accumulated, checkpointed": (ALONE, {"workers": 2} | ADAMW | ALL | HOST),
    "four workers, fp16": (ALONE, {"workers": 4} | FP16),
    "two ranks, a GPU each, bf16, channels_last": (EACH, {"workers": 2} | BF16),
    "two ranks, a GPU each, AdamW, fp16, clipped": (EACH, {"workers": 4, "clip_grad": 1.0} | ADAMW | FP16),
    "two ranks, one GPU, all": (SHARED, {"workers": 4} | ALL | HOST),
    "two ranks, one GPU, AdamW, bf16": (SHARED, {"workers": 2} | ADAMW | BF16),
}

KNOWN: dict[str, list[str]] = {}
"""What a local step still does that it must not: {where and what: on which runs}."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretended")


@pytest.fixture(scope="module")
def seen(library: Path, folder: Path) -> dict[str, list[Seen]]:
    """What each rank saw of each run."""

    def runs(gpus: list[list[int]]) -> dict[str, dict[str, Any]]:
        return {
            name: OPTIONS | options | {"output_dir": str(folder / name)}
            for name, (where, options) in RUNS.items()
            if where is gpus
        }

    places = {"alone": ALONE, "each": EACH, "shared": SHARED}
    jobs = [Job(name, gpus, train_all, (runs(gpus),)) for name, gpus in places.items()]
    results = Ranks(library, folder, jobs).results()
    return {name: [rank[name] for rank in ranks] for ranks in results.values() for name in ranks[0]}


@pytest.mark.parametrize("name", RUNS)
def test_a_local_step_waits_for_nothing(seen: dict[str, list[Seen]], name: str) -> None:
    """No answer of the device's is asked for, nothing is copied from it, and to it from pinned memory alone."""
    known = {fault for fault, runs in KNOWN.items() if name in runs}
    for rank in seen[name]:
        assert set(rank.faults) == known
        assert rank.steps > 0 and rank.launches > 100  # it was looked at all


@pytest.mark.parametrize("name", RUNS)
def test_exchanges_go_where_they_can(seen: dict[str, list[Seen]], name: str) -> None:
    gpus, _ = RUNS[name]
    for rank, found in enumerate(seen[name]):
        device = f"cuda:{rank}" if gpus is EACH else "cuda:0"
        buffers = "cpu" if gpus is SHARED else device
        assert found.devices == (device, buffers)
        assert found.carrier == {1: "none", 2: "gloo" if gpus is SHARED else "nccl"}[len(gpus)]

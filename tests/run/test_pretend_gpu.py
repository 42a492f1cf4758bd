"""The trainer on a CUDA device that is not there: what a run on the CPU cannot show of what touches a GPU."""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resist_ds.comm import Comm
from tests import THREADS, pretend_gpu, saved
from tests.conftest import Ranks as Start
from tests.conftest import run_ranks
from tests.pretend_gpu.record import RECORD
from tests.pretend_gpu.start import Job, Ranks, build
from tests.pretend_gpu.trial import Seen, train, train_all

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(240),  # the first test waits for all runs
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
BEHIND = {"wire": "compact", "overlap_steps": 1, "rounds": 3, "eval_every": 0, "checkpoint_every": 0}
HOST = {"gpu_cache_mib": 0}  # images wait in the host's memory
RUNS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "one worker": (ALONE, {"workers": 1}),
    "one rank, bf16, channels_last": (ALONE, {"workers": 2} | BF16),
    "one rank, AdamW, clipped, accumulated, checkpointed": (ALONE, {"workers": 2} | ADAMW | ALL | HOST),
    "one rank, AdamW, fp16, clipped": (ALONE, {"workers": 4, "clip_grad": 1.0} | ADAMW | FP16),
    "a GPU each, bf16, channels_last": (EACH, {"workers": 2} | BF16),
    "a GPU each, AdamW, fp16, clipped": (EACH, {"workers": 4, "clip_grad": 1.0} | ADAMW | FP16),
    "one rank, AdamW, compact": (ALONE, {"workers": 2, "wire": "compact"} | ADAMW),
    "a GPU each, AdamW, compact": (EACH, {"workers": 2, "wire": "compact"} | ADAMW),
    "one GPU, clipped, accumulated, checkpointed": (SHARED, {"workers": 4} | ALL | HOST),
    "one GPU, fp16": (SHARED, {"workers": 2} | FP16),
    "one rank, compact, exchange behind steps": (ALONE, {"workers": 2} | BEHIND),
    "a GPU each, compact, exchange behind steps": (EACH, {"workers": 2} | BEHIND),
    "one GPU, compact, exchange behind steps": (SHARED, {"workers": 2} | BEHIND),
    "ddp": (EACH, {"workers": 2, "strategy": "ddp"}),
    "fsdp": (EACH, {"workers": 2, "strategy": "fsdp"}),
    "zero3": (EACH, {"workers": 2, "strategy": "zero3"}),
}
IN_FP32 = [name for name, (_, o) in RUNS.items() if "mixed_precision" not in o and "strategy" not in o]
TWINS = {  # what trains the same on other ranks
    "a GPU each, compact, exchange behind steps": "one rank, compact, exchange behind steps",
    "one GPU, compact, exchange behind steps": "one rank, compact, exchange behind steps",
    "a GPU each, bf16, channels_last": "one rank, bf16, channels_last",
    "a GPU each, AdamW, fp16, clipped": "one rank, AdamW, fp16, clipped",
    "a GPU each, AdamW, compact": "one rank, AdamW, compact",
}

MOST = {  # operations of a local step
    "one worker": 214,
    "one rank, bf16, channels_last": 165,
    "one rank, AdamW, fp16, clipped": 156,
}
UPLOAD, DOWNLOAD = "copy from host to device, pageable", "copy from device to host, pageable, blocking"
KNOWN: dict[str, list[str]] = {}
"""What a local step of ours still does that it must not, and on which runs; it may only shrink."""
OF_OTHERS = {  # the same, of libraries in the middle of a step
    f"engines/engine.py step: {UPLOAD}": ["ddp"],  # once: the ranks agree on DDP's buckets
    f"engines/engine.py step: {DOWNLOAD}": ["ddp"],
    f"engines/zero.py step: {UPLOAD}, blocking": ["zero3"],
    "engines/zero.py step: waits for _local_scalar_dense": ["zero3"],
    "engines/zero.py step: waits for the device": ["zero3"],
    "engines/zero.py step: waits for a stream": ["zero3"],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@dataclass(frozen=True)
class Found:
    """What each rank saw of each run, the same runs by one rank on the CPU, and what else was tried."""

    seen: dict[str, list[Seen]]
    cpu: dict[str, Seen]
    folder: Path
    tried: dict[str, list[Any]]


@pytest.fixture(scope="module")
def found(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("runs")

    def runs(where: str, chosen: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
        return {
            name: OPTIONS | options | {"output_dir": str(folder / where / name)}
            for name, (_, options) in RUNS.items()
            if chosen(name)
        }

    jobs = [
        Job(place, gpus, train_all, (runs("gpu", lambda name, gpus=gpus: RUNS[name][0] is gpus),))
        for place, gpus in {"alone": ALONE, "each": EACH, "shared": SHARED}.items()
    ]
    jobs += [Job("mixes", [[0, 1]], mixes), Job("late", [[0]], late), Job("record", [[0]], record)]
    jobs += [Job("virtual", [[0], [1]], identity)]
    at_work = Ranks(library, tmp_path_factory.mktemp("said"), jobs)
    cpu = run_ranks(train_all, 1, runs("cpu", lambda name: name in IN_FP32), store=folder / "store")[0]
    results = at_work.results()
    seen = {
        name: [rank[name] for rank in results[place]]
        for place in ("alone", "each", "shared")
        for name in results[place][0]
    }
    return Found(seen, cpu, folder, {job.name: results[job.name] for job in jobs[3:]})


def mixes(comm: Comm) -> dict[str, str | None]:
    """What CUDA says to operations on several devices; None: nothing."""
    gpu, host, scalar = torch.ones(3, device="cuda"), torch.ones(3), torch.ones(())
    tries: dict[str, Callable[[], object]] = {
        "sum": lambda: gpu + host,
        "in place": lambda: gpu.add_(host),
        "concatenated": lambda: torch.cat([gpu, host]),
        "gathered": lambda: gpu.gather(0, torch.zeros(1, dtype=torch.int64)),
        "listed": lambda: torch._foreach_add_([gpu], [host]),
        "two GPUs": lambda: gpu + torch.ones(3, device="cuda:1"),
        "into a scalar of the host": lambda: scalar.add_(gpu.sum()),
        "with a scalar of the host": lambda: gpu * scalar,
        "with an index of the host": lambda: gpu[torch.tensor([0])],
    }
    said: dict[str, str | None] = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = None
        except RuntimeError as error:
            said[name] = str(error)
    return said


def test_devices_do_not_mix(found: Found) -> None:
    said = found.tried["mixes"][0]
    allowed = {name for name, error in said.items() if error is None}
    assert allowed == {"with a scalar of the host", "with an index of the host"}
    assert all("on the same device" in error for error in said.values() if error is not None)


def late(comm: Comm) -> list[Any]:
    """What is in pinned memory before and after a copy without blocking was waited for."""
    values = torch.arange(3.0, device="cuda")
    pinned = torch.empty(3, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    values += 1  # behind the copy in the stream's order
    copied = torch.cuda.Event()
    copied.record()
    before, done = pinned.tolist(), copied.query()
    copied.synchronize()
    pinned_too = values.to("cpu", non_blocking=True)
    after = [pinned.tolist(), copied.query(), pinned_too.is_pinned(), pinned_too.tolist()]
    torch.cuda.current_stream().synchronize()
    source = torch.ones(3).pin_memory()
    there = source.to("cuda", non_blocking=True)
    source.zero_()
    try:
        there.sum().item()
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    return [before, done, *after, pinned_too.tolist(), said]


def test_copies_without_blocking_arrive_late(found: Found) -> None:
    before, done, after, done_after, pinned, early, in_time, overwritten = found.tried["late"][0]
    assert all(math.isnan(x) for x in before) and not done
    assert after == [0, 1, 2] and done_after
    assert pinned and all(math.isnan(x) for x in early) and in_time == [1, 2, 3]
    assert "was overwritten" in overwritten


def record(comm: Comm) -> list[Any]:
    """What is recorded of a step's operations."""
    gpu, host = torch.ones(3, device="cuda"), torch.ones(3)
    pinned = host.pin_memory()
    with RECORD.step():
        gpu.sum().item()  # of the first step nothing
    with RECORD.step():
        (gpu * 2).view(3, 1).t()  # one launch
        gpu.sum().item()  # another, and a wait
        gpu.nonzero()
        torch.cuda.synchronize()
        gpu.cpu()
        gpu.copy_(host)
        host.to("cuda", non_blocking=True)
        pinned.to("cuda")
        pinned.to("cuda", torch.float64, non_blocking=True)  # through memory that is not pinned
        pinned.to("cuda", non_blocking=True)
        pinned.copy_(gpu, non_blocking=True)
    gpu.sum().item()
    copies = sorted((str(copy), count) for (copy, _), count in RECORD.copies.items())
    waits = sorted(operation for operation, _ in RECORD.waits)
    return [copies, waits, sorted(operation for operation, _ in RECORD.launches), RECORD.steps]


def test_copies_and_waits_are_recorded(found: Found) -> None:
    copies, waits, launches, steps = found.tried["record"][0]
    assert copies == [
        ("copy from device to host, pageable, blocking", 1),
        ("copy from device to host, pinned", 1),
        ("copy from host to device, pageable", 2),
        ("copy from host to device, pageable, blocking", 1),
        ("copy from host to device, pinned", 1),
        ("copy from host to device, pinned, blocking", 1),
    ]
    assert waits == ["_local_scalar_dense", "nonzero", "the device"]
    assert launches == ["_local_scalar_dense", "mul", "nonzero", "sum"] and steps == 1


def identity(comm: Comm) -> tuple[int, str, str]:
    """How many GPUs this rank sees, who its own is, and what carries exchanges."""
    return torch.cuda.device_count(), str(torch.cuda.get_device_properties(comm.device).uuid), comm.backend


def test_virtual_local_ranks(found: Found) -> None:
    """Each rank sees one GPU, as under torchrun's --virtual-local-rank: two GPUs, by their UUID."""
    (one, first, carrier), (same, second, too) = found.tried["virtual"]
    assert one == same == 1 and first != second
    assert carrier == too == "nccl"


@pytest.mark.parametrize("name", RUNS)
def test_a_local_step_waits_for_nothing(found: Found, name: str) -> None:
    """It asks for no answer of the device, copies nothing from it, and to it from pinned memory alone.

    An exchange behind local steps does so, on a thread of its own: all that is in `protocol/`.
    """
    known = {fault for fault, runs in (KNOWN | OF_OTHERS).items() if name in runs}
    beside = "protocol/" if "overlap_steps" in RUNS[name][1] else "-"
    for rank in found.seen[name]:
        assert {fault for fault in rank.faults if not fault.startswith(beside)} == known
        assert rank.steps > 0 and rank.launches > 100  # it was looked at all


@pytest.mark.parametrize("name", MOST)
def test_operations_of_a_local_step(found: Found, name: str) -> None:
    """Launches bound an eager step: their number may only fall."""
    assert found.seen[name][0].launches <= MOST[name]


@pytest.mark.parametrize("name", RUNS)
def test_exchanges_go_where_they_can(found: Found, name: str) -> None:
    gpus, _ = RUNS[name]
    for rank, seen in enumerate(found.seen[name]):
        device = f"cuda:{rank}" if gpus is EACH else "cuda:0"
        buffers = "cpu" if gpus is SHARED else device
        assert seen.devices == (device, buffers)
        assert seen.carrier == {1: "none", 2: "gloo" if gpus is SHARED else "nccl"}[len(gpus)]


def last(folder: Path, where: str, name: str) -> Path:
    return folder / where / name / "checkpoints" / "round-000002"


@pytest.mark.parametrize("name", IN_FP32)
def test_it_trains_what_a_cpu_trains(found: Found, name: str) -> None:
    """To the bit where the same kernels compute, whatever brought the numbers there.

    SGD is fused on a GPU alone, and rounds otherwise. Autocast's lists differ so much that nothing compares.
    """
    seen, cpu = found.seen[name][0], found.cpu[name]
    assert (seen.loss, seen.accuracy) == (pytest.approx(cpu.loss, rel=1e-9), cpu.accuracy)
    here, there = (last(found.folder, where, name) for where in ("gpu", "cpu"))
    if "AdamW" in name:
        assert seen.loss == cpu.loss and saved.digest(here) == saved.digest(there)
    trained, wanted = saved.tensors(here), saved.tensors(there)
    for tensor, values in wanted.items():
        np.testing.assert_allclose(trained[tensor], values, rtol=1e-5, atol=1e-7, err_msg=tensor)


@pytest.mark.parametrize("name", TWINS)
def test_it_trains_the_same_on_any_ranks(found: Found, name: str) -> None:
    first, second = (saved.digest(last(found.folder, "gpu", run)) for run in (name, TWINS[name]))
    assert first == second


def test_strategies_agree(found: Found) -> None:
    losses = [found.seen[name][0].loss for name in ("ddp", "fsdp", "zero3")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_its_checkpoint_goes_on_on_a_cpu(found: Found, ranks: Start, tmp_path: Path) -> None:
    name = "one rank, AdamW, clipped, accumulated, checkpointed"
    first = last(found.folder, "gpu", name).with_name("round-000001")
    shutil.copytree(first, tmp_path / "checkpoints" / first.name)
    ranks(train, 1, OPTIONS | RUNS[name][1] | {"output_dir": str(tmp_path), "resume": "auto"})
    assert saved.digest(tmp_path / "checkpoints" / "round-000002") == saved.digest(
        last(found.folder, "gpu", name)
    )

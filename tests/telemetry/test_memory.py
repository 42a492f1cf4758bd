"""Never the full model: training under a real cap on memory, and the measure that reports peaks."""

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet

from resist_ds.comm import Comm
from resist_ds.memory import PeakMemory
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import StateLayout
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.protocol.pieces import bytes_sent, exact_groups
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.export import export
from resist_ds.telemetry.meter import Meter
from resist_ds.trainer import Trainer
from tests.conftest import Ranks
from tests.forecast.test_plan import Live

MIB = 1 << 20

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks of an interval, and the cap, need Linux's /proc"
)

# ------------------------------------------------------------------------------------------------------------
# A cap that the sub-ResNets fit under and the full model does not.


@register_model
def resist_test_large_blocks(
    pretrained: bool = False, num_classes: int = 10, device: object = None, **_: object
):
    """A ResNet of few, large blocks: 78 M parameters, 76 M of them in a pool of 16."""
    wide = {"channels": (8, 8, 512, 8), "stem_width": 8, "stem_type": "deep"}
    return ResNet(BasicBlock, (1, 1, 17, 1), num_classes=num_classes, device=device, **wide)


MODEL = resist_test_large_blocks.__name__
W = 4
SLOTS = 4  # K, of P = 16

OPTIONS: dict[str, Any] = {
    "model": MODEL,
    "dataset": "digits",
    "img_size": 16,
    "batch_size": 2,
    "local_steps": 1,
    "rounds": 2,
    "eval_every": 0,
    "calibration_samples": 32,
    "eval_batch_size": 60,
    "transit_mib": 1,  # so one block
    "cpu_threads": 1,
    "log_with": "none",
    "progress": False,
}


def data_segment() -> int:
    """Bytes of private writable memory that this process has: what RLIMIT_DATA limits."""
    return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10


def cap(allowance: int) -> None:
    """From here on this process may take `allowance` bytes on top of what it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data_segment() + allowance, hard))


def train_under_a_cap(comm: Comm, options: dict[str, Any], allowance: int) -> str:
    """Train with `allowance` bytes on top of what this process has; returns what went wrong."""
    cap(allowance)
    try:
        trainer = Trainer(comm, Config(**options))
        trainer.run()
        trainer.folder.release()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.ranks
@needs_linux
def test_the_full_training_state_exceeds_a_cap_that_the_run_keeps(ranks: Ranks, tmp_path: Path) -> None:
    """Four ranks train, carry momentum, evaluate and save, each with room for one sub-ResNet but not for the
    model; other four go on from there, under the same cap.

    What a process may take on top of its imports:
        one sub-ResNet's state, (shared + 4 blocks) × (parameter + gradient + momentum)     244 MiB
        one block in transit, parameters and momentum                                        36 MiB
        the rest: workspaces of convolutions, activations, threads, and what malloc
        keeps of freed gradients (so it varies: 80 to 170 MiB were seen)                    300 MiB
    580 MiB in all. The full model's state is 892 MiB, and its parameters and momentum alone, which are
    allocated first, are 595.
    """
    blueprint = Blueprint(MODEL, num_classes=10)
    shared, block = blueprint.parameters_held(0), blueprint.parameters_held(1) - blueprint.parameters_held(0)
    parameter, gradient, momentum = 4, 4, 4  # bytes
    state = parameter + gradient + momentum
    allowance = (shared + SLOTS * block) * state + block * (parameter + momentum) + 300 * MIB
    assert allowance < blueprint.parameters * (parameter + momentum) < 0.67 * blueprint.parameters * state

    options = OPTIONS | {"workers": W, "output_dir": str(tmp_path)}
    assert ranks(train_under_a_cap, W, options, allowance) == [""] * W
    alone = {"workers": 1, "output_dir": str(tmp_path / "alone")}
    (error,) = ranks(train_under_a_cap, 1, OPTIONS | alone, allowance)
    assert error.startswith("RunError: out of memory on cpu of rank 0"), error
    longer = {"rounds": 3, "resume": "auto", "override": "rounds"}
    assert ranks(train_under_a_cap, W, options | longer, allowance) == [""] * W

    # The run was a whole one: momentum travelled, and the global model was tested and saved.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kinds = ["round", "round", "eval", "checkpoint", "round", "eval", "checkpoint", "summary"]
    assert [line["kind"] for line in lines] == kinds
    for line in lines:
        if line["kind"] == "eval":
            assert 0 < line["eval/loss"] < 10 and line["comm/bytes_eval"] > 0
        if line["kind"] == "checkpoint":  # parameters and momentum, little else
            assert line["save/bytes"] == pytest.approx(8 * blueprint.parameters, rel=0.01)
    layout = StateLayout.of(blueprint, Config(), SLOTS)
    groups = exact_groups(layout, blueprint.pool, W, travel=True)
    for r, metrics in enumerate(line for line in lines if line["kind"] == "round"):
        assert metrics["mem/params_held"] == blueprint.parameters_held(SLOTS)
        now, then = (sample_partition(0, at, workers=W, pool=blueprint.pool) for at in (r, r + 1))
        assert metrics["comm/bytes_round"] == bytes_sent(groups, now, then, Layout(W, W), parameter)


def export_under_a_cap(comm: Comm, checkpoint: Path, out: Path, allowance: int) -> str:
    cap(allowance)
    try:
        export(Checkpoint.verified(checkpoint), out)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:  # what is returned goes through a thread, whose stack alone may be too much
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return ""


@pytest.mark.ranks
@needs_linux
def test_an_export_needs_room_for_a_tensor_and_not_for_the_model(ranks: Ranks, tmp_path: Path) -> None:
    """Its 298 MiB go out through a cap of 64 MiB above the imports; the largest tensor has 9."""
    ranks(train_under_a_cap, 1, OPTIONS | {"workers": 4, "rounds": 1, "output_dir": str(tmp_path)}, 1 << 40)
    checkpoint, out = tmp_path / "checkpoints" / "round-000001", tmp_path / "net.safetensors"
    assert ranks(export_under_a_cap, 1, checkpoint, out, 64 * MIB) == [""]
    assert out.stat().st_size == pytest.approx(4 * Blueprint(MODEL, 10).parameters, rel=0.01)
    (error,) = ranks(export_under_a_cap, 1, checkpoint, tmp_path / "other", 4 * MIB)
    assert "allocate memory" in error or "MemoryError" in error


# ------------------------------------------------------------------------------------------------------------
# The measure.


def watched(trainer: Trainer) -> dict[str, int]:
    """The most bytes of tensors alive in each phase of a run, once it has run."""
    found: dict[str, int] = {}
    phase = trainer.meter.phase

    @contextlib.contextmanager
    def counted(name: str) -> Iterator[None]:
        with phase(name), Live(*trainer.workers.vectors.values()) as live:
            yield
        found[name] = max(live.peak, found.get(name, 0))

    trainer.meter.phase = counted  # type: ignore[method-assign]
    return found


def peaks_of_phases(comm: Comm, options: dict[str, Any]) -> dict[str, int]:
    """The same of a run from its begin to its end."""
    trainer = Trainer(comm, Config(**options))
    found = watched(trainer)
    trainer.run()
    trainer.folder.release()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_nothing_raises_the_peak_above_that_of_training(size: int, ranks: Ranks, tmp_path: Path) -> None:
    """Synchronisation, evaluation with its 1,024 calibration images, and saving, with default options."""
    options = OPTIONS | {"model": "preact_resnet_small", "img_size": 32, "batch_size": 128, "workers": 2}
    options |= {"local_steps": 1, "rounds": 2, "eval_every": 1, "calibration_samples": 1024}
    options |= {"eval_memory": None, "eval_batch_size": None, "transit_mib": 64, "output_dir": str(tmp_path)}
    for peaks in ranks(peaks_of_phases, size, options):
        assert peaks.keys() == {"local", "sync", "eval", "save"}
        assert max(peaks.values()) == peaks["local"], peaks


# What is resident in pytest's own process depends on the tests before: what they left may be given back at
# any moment, and hide a peak. So it is measured in a process of its own.


def touch(mib: int) -> None:
    """Have so much memory for a moment."""
    torch.ones(mib * MIB, dtype=torch.uint8)


def peaks_of_an_interval(comm: Comm) -> list[int]:
    """What is read before 300 MiB are touched, then after, then again, and after a reset."""
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    found = [memory.read()[0]]
    touch(300)
    found += [memory.read()[0], memory.read()[0]]
    memory.reset()
    return [*found, memory.read()[0]]


@pytest.mark.ranks
@needs_linux
def test_a_peak_is_seen_after_it_is_over_and_forgotten_by_reset(ranks: Ranks) -> None:
    ((before, peak, again, after),) = ranks(peaks_of_an_interval, 1)
    assert 290 * MIB < peak - before < 400 * MIB
    assert again >= peak  # reading does not reset
    assert after < peak - 200 * MIB


def peaks_of_touches(comm: Comm, *rounds: dict[str, int]) -> list[dict[str, int]]:
    """{phase: peak} of rounds in whose phases so many MiB are touched."""
    meter = Meter(comm)
    found = []
    for sizes in rounds:
        for phase, mib in sizes.items():
            with meter.phase(phase):
                touch(mib)
        found.append(meter.take().peak)
    return found


@pytest.mark.ranks
@needs_linux
def test_phases_have_peaks_of_their_own(ranks: Ranks) -> None:
    sizes = {"local": 300, "sync": 0, "eval": 150}
    ((peaks, of_the_next_round),) = ranks(peaks_of_touches, 1, sizes, {"local": 0})
    assert set(peaks) == set(sizes)
    for phase, mib in sizes.items():
        assert peaks[phase] - peaks["sync"] == pytest.approx(mib * MIB, abs=50 * MIB)
    assert of_the_next_round["local"] < peaks["local"] - 200 * MIB


@pytest.mark.gpu
def test_a_peak_on_a_gpu() -> None:
    device = torch.device("cuda")
    memory = PeakMemory(device)
    memory.reset()
    before, _ = memory.read()
    torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    peak, reserved = memory.read()
    assert peak - before == 64 * MIB <= reserved
    memory.reset()
    assert memory.read()[0] == before

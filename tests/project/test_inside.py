"""tools/inside.py: what it sees is what is there, and looking changes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resist_ds.comm import Comm
from resist_ds.options.command_line import parse
from resist_ds.trainer import Trainer
from tests import ROOT
from tools.accuracy.inside import Inside

TOOL = ROOT / "tools" / "inside.py"
TINY = {
    "model": "preact_resnet_small",
    "dataset": "digits",
    "img_size": "8",
    "batch_size": "8",
    "workers": "3",
    "local_steps": "2",
    "rounds": "4",
    "lr": "0.1",
    "eval_every": "2",
    "calibration_samples": "64",
    "eval_batch_size": "360",
    "checkpoint_every": "0",
    "cpu_threads": "1",
    "log_with": "none",
    "progress": "false",
}


def train(folder: Path, look: bool, **changes: str) -> tuple[Trainer, list[dict[str, Any]]]:
    options = {**TINY, **changes, "output_dir": str(folder)}
    trainer = Trainer(Comm(), parse([f"--{name}={value}" for name, value in options.items()]))
    seen: list[dict[str, Any]] = []
    try:
        if look:
            Inside(trainer, 2, seen.append, images=400)
        trainer.run()
    finally:
        trainer.folder.release()
    return trainer, seen


def recorded(folder: Path, *names: str) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for line in lines if name in line] for name in names]


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("inside") / "run"
    return folder, *train(folder, look=True)


def test_looking_changes_nothing(looked_at: tuple[Path, Trainer, Any], tmp_path: Path) -> None:
    folder, trainer, _ = looked_at
    other, _ = train(tmp_path / "run", look=False)
    for worker, vector in trainer.workers.vectors.items():  # type: ignore[union-attr]
        assert torch.equal(vector, other.workers.vectors[worker])  # type: ignore[union-attr]
    assert recorded(folder, "train/loss", "eval/loss") == recorded(
        tmp_path / "run", "train/loss", "eval/loss"
    )


def test_the_global_model_is_the_one_that_was_tested(looked_at: tuple[Path, Trainer, Any]) -> None:
    """All 360 test images of the digits are among those that it looks at."""
    folder, _, seen = looked_at
    losses, shares = recorded(folder, "eval/loss", "eval/accuracy")
    assert [look["round"] for look in seen] == [2, 4]
    assert [look["global"]["test accuracy"] for look in seen] == shares[:2]
    assert [look["global"]["test loss"] for look in seen] == pytest.approx(losses[:2], rel=1e-6)
    assert seen[-1]["scales"]["1.0"] == seen[-1]["global"] and "scales" not in seen[0]
    assert seen[-1]["scales"]["0.0"] != seen[-1]["global"]


def test_every_part_has_a_gradient(looked_at: tuple[Path, Trainer, Any]) -> None:
    _, trainer, seen = looked_at
    held = {f"block {block:02d}" for blocks in trainer.net.partition(1).blocks for block in blocks}
    shared = {"stem", "stages.0", "stages.1", "stages.2", "stages.3", "norm", "head"}
    assert set(seen[0]["gradients"]) == held | shared and held == {f"block {b:02d}" for b in range(8)}
    assert all(norm > 0 for norm in seen[0]["gradients"].values())


def test_workers_are_apart_before_a_synchronisation(looked_at: tuple[Path, Trainer, Any]) -> None:
    _, _, seen = looked_at
    assert all(look["apart"] > 0 and look["moved"] > 0 and look["momentum_apart"] > 0 for look in seen)
    assert all(look["alone"] != look["averaged"] for look in seen)


def test_one_worker_is_never_apart(tmp_path: Path) -> None:
    _, seen = train(tmp_path / "run", look=True, workers="1", rounds="2")
    (look,) = seen
    assert look["apart"] == 0 and look["momentum_apart"] == 0 and look["moved"] > 0
    assert look["alone"] == look["averaged"]  # nothing was averaged


def test_a_gradient_s_norm_is_that_of_all_its_tensors(tmp_path: Path) -> None:
    """Of one worker that takes one step, against the momentum that this step leaves: its gradient alone."""
    changes = {
        "workers": "1",
        "rounds": "1",
        "local_steps": "1",
        "weight_decay": "0",
        "accumulation_steps": "2",
    }
    trainer, (look,) = train(tmp_path / "run", look=True, **changes)
    layout, (vector,) = trainer.workers.layout, trainer.workers.vectors.values()  # type: ignore[union-attr]
    for block in range(8):
        momentum = layout.block.views(layout.slot_part(vector, block), row=1).values()
        norm = torch.stack([part.double().square().sum() for part in momentum]).sum().sqrt()
        assert look["gradients"][f"block {block:02d}"] == pytest.approx(float(norm), rel=1e-6)


def start(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "--records"),
        (("--arms", "resist:lr=1"), "type --data_dir FOLDER"),
        (("--data_dir", "{}"), "type --arms ARM,ARM,..."),
        (("--data_dir", "{}", "--arms", "resist"), "--arms resist: type its rate too, as resist:lr=0.4"),
        ((), "holds no records of this tool"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    if line != "--records":
        words = (*words, "--records", str(tmp_path / "none.jsonl"))
    done = start(*(word.format(tmp_path) for word in words))
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1], done.stderr


def test_from_images_to_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(2):
            folder = tmp_path / "images" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(32):
                values = rng.integers(0, 128, (8, 8, 3)) + 100 * label
                Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.png")
    place = ("--data_dir", str(tmp_path / "images"), "--records", str(tmp_path / "seen.jsonl"))
    small = (
        "--model",
        "preact_resnet_small",
        "--img_size",
        "8",
        "--batch_size",
        "4",
        "--lr_warmup_steps",
        "0",
    )
    arms = ("--arms", "resist:lr=0.1:workers=2,ddp:lr=0.1:workers=2", "--output_dir", str(tmp_path / "runs"))
    done = start(*place, *small, *arms, "--passes", "2", "--picture", str(tmp_path / "seen.png"))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["resist:lr=0.1:workers=2"] * 2 + [
        "ddp:lr=0.1:workers=2"
    ] * 2
    assert (tmp_path / "seen.png").stat().st_size > 10_000

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
from resist_ds.errors import UserError
from resist_ds.options.command_line import parse
from resist_ds.trainer import Trainer
from tests import ROOT
from tools.accuracy.looks import Looks, check

TOOL = ROOT / "tools" / "inside.py"
DIR = ("--data_dir", "{}")
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


def train(folder: Path, look: bool, images: int = 32, **changes: str) -> tuple[Trainer, list[dict[str, Any]]]:
    options = {**TINY, **changes, "output_dir": str(folder)}
    trainer = Trainer(Comm(), parse([f"--{name}={value}" for name, value in options.items()]))
    seen: list[dict[str, Any]] = []
    try:
        if look:
            Looks(trainer, 2, seen.append, images)
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
    return folder, *train(folder, look=True, images=400, batch_size="90")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"wire": "compact", "mixed_precision": "bf16"},
        {"strategy": "ddp", "workers": "1", "accumulation_steps": "2"},
    ],
    ids=["exact", "compact-bf16", "ddp"],
)
def test_looking_changes_nothing(changes: dict[str, str], tmp_path: Path) -> None:
    names = ("train/loss", "eval/loss")
    (seen, looked_at), (unseen, _) = (train(tmp_path / str(look), look, **changes) for look in (True, False))
    assert len(looked_at) == 2
    for worker, vector in seen.workers.vectors.items():  # type: ignore[union-attr]
        assert torch.equal(vector, unseen.workers.vectors[worker])  # type: ignore[union-attr]
    assert recorded(tmp_path / "True", *names) == recorded(tmp_path / "False", *names)
    assert all(norm > 0 for norm in looked_at[0]["gradients"].values())  # in low precision too


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
    in_order = ["stem", *(f"stages.{n}" for n in range(3)), *sorted(held), "stages.3", "head", "norm"]
    assert list(seen[0]["gradients"]) == in_order


def test_workers_are_apart_before_a_synchronisation(looked_at: tuple[Path, Trainer, Any]) -> None:
    _, _, seen = looked_at
    assert all(look["apart"] > 0 and look["moved"] > 0 and look["momentum_apart"] > 0 for look in seen)
    assert all(look["alone"] != look["next"] for look in seen)


def test_one_worker_is_never_apart(tmp_path: Path) -> None:
    _, seen = train(tmp_path / "run", look=True, workers="1", rounds="2")
    (look,) = seen
    assert look["apart"] == 0 and look["momentum_apart"] == 0 and look["moved"] > 0
    assert look["alone"] == look["next"]  # nothing was averaged


def test_a_gradient_s_norm_is_that_of_all_its_tensors(tmp_path: Path) -> None:
    """After one step, against the momentum that it leaves: of a block with one holder its gradient alone."""
    changes = {"rounds": "1", "local_steps": "1", "weight_decay": "0", "accumulation_steps": "2"}
    trainer, (look,) = train(tmp_path / "run", look=True, **changes)
    layout, vectors = trainer.workers.layout, trainer.workers.vectors  # type: ignore[union-attr]
    now, alone = trainer.net.deal, 0
    for block, holders in enumerate(trainer.net.trained.holders):
        if len(holders) == 1:
            worker = now.holders[block][0]
            part = layout.slot_part(vectors[worker], now.blocks[worker].index(block))
            momentum = layout.block.views(part, row=1).values()
            norm = torch.stack([each.double().square().sum() for each in momentum]).sum().sqrt()
            assert look["gradients"][f"block {block:02d}"] == pytest.approx(float(norm), rel=1e-6)
            alone += 1
    assert alone == 7  # 3 workers with 3 slots each hold one of 8 blocks twice


def start(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "--records"),
        (("--arms", "resist:lr=1"), "type --data_dir FOLDER"),
        (DIR, "type --arms ARM,ARM,..."),
        ((*DIR, "--arms", "resist", "--lr", "1"), "--lr is every arm's own: type it there"),
        ((*DIR, "--arms", "resist"), "--arms resist: type its rate too, as resist:lr=0.4"),
        ((*DIR, "--arms", "resist:lr=1", "--seed", "0,1"), "one number of --passes and one --seed"),
        ((*DIR, "--arms", "resist:lr=1:overlap_steps=1"), "--overlap_steps cannot be looked into"),
        (("--picture", "seen.gif"), "--picture is seen.gif: type a name that ends in"),
        ((), "holds no record of a run"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    if line != "--records":
        words = (*words, "--records", str(tmp_path / "none.jsonl"))
    done = start(*(word.format(tmp_path) for word in words))
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "stochastic_depth", "min_blocks": "2", "workers": "1"}, "a run of stochastic_depth"),
        ({"mixed_precision": "fp16"}, "a run in fp16"),
        ({"warmup_rounds": "1"}, "a run with --warmup_rounds"),
    ],
)
def test_what_cannot_be_looked_into_is_said(options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(parse([f"--{name}={value}" for name, value in {**TINY, **options}.items()]))


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
    before = (tmp_path / "seen.jsonl").read_bytes()
    again = start(*place, *small, *arms, "--passes", "2")
    assert again.stdout.splitlines()[:1] == [row for row in done.stdout.splitlines() if "| way" in row]
    assert (tmp_path / "seen.jsonl").read_bytes() == before

"""What a new user does wrong, and what breaks: one line from one rank, its exit code, and nobody hangs."""

import dataclasses
import importlib.util
import os
import queue
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.data.order import Order
from resist_ds.errors import RunError
from resist_ds.options.config import Config
from tests.conftest import _CONTEXT, Ranks, _rank

pytestmark = pytest.mark.ranks

TINY: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "batch_size": 8,
    "local_steps": 2,
    "rounds": 2,
    "eval_every": 1,
    "calibration_samples": 64,
    "eval_batch_size": 8,
    "cpu_threads": 1,
    "data_workers": 0,  # the tests' ranks are daemons, which may have no children
    "log_with": "none",
    "progress": False,
}


class Outcome(NamedTuple):
    """How a rank's run ended: train.py's exit code (1 after a traceback), and what it wrote to stderr."""

    code: int
    stderr: str


def outcome(comm: Comm, folder: Path, options: dict[str, Any], sabotage: str | None = None) -> Outcome:
    """What `train.py` does on this rank once its options are parsed."""
    if sabotage and comm.rank == comm.size - 1:
        SABOTAGE[sabotage]()
    trainer.Comm = lambda: comm  # type: ignore[assignment,misc]
    log = folder / f"stderr{comm.rank}"
    with log.open("w", buffering=1) as stderr, (folder / f"stdout{comm.rank}").open("w") as stdout:
        os.dup2(stderr.fileno(), 2)  # libraries' own writes too
        os.dup2(stdout.fileno(), 1)
        sys.stderr, sys.stdout = stderr, stdout
        try:
            code = trainer.main(Config(**options))
        except BaseException:
            traceback.print_exc()
            code = 1
    return Outcome(code, log.read_text())


def _divide_by_zero(*args: Any, **kwargs: Any) -> None:
    _ = 1 / 0


def _local_steps_have_a_defect() -> None:
    trainer.local_steps = _divide_by_zero  # type: ignore[assignment]


def _local_steps_kill_their_rank() -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    trainer.local_steps = killed  # type: ignore[assignment]


def _local_steps_use_what_has_no_deterministic_form() -> None:
    def scattered(*args: Any, **kwargs: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    trainer.local_steps = scattered  # type: ignore[assignment]


def _tensorboard_is_not_installed() -> None:
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "tensorboard" else find(name, *rest)


def _another_machine_has_other_data() -> None:
    load = trainer.load_data
    trainer.load_data = lambda config: load(dataclasses.replace(config, dataset="digits"))


SABOTAGE = {
    "data": _another_machine_has_other_data,
    "defect": _local_steps_have_a_defect,
    "deterministic": _local_steps_use_what_has_no_deterministic_form,
    "kill": _local_steps_kill_their_rank,
    "tensorboard": _tensorboard_is_not_installed,
}


def expect(outcomes: list[Outcome], code: int, line: str) -> None:
    """All ranks end alike, and the first one alone says why, in one line."""
    assert [o.stderr for o in outcomes] == [f"error: {line}\n"] + [""] * (len(outcomes) - 1)
    assert [o.code for o in outcomes] == [code] * len(outcomes)


# ------------------------------------------------------------------------------------------------------------
# What the user typed: exit code 2.

FAMILIES = (
    "Models that can: resnetv2_18, resnetv2_34, resnetv2_50, resnetv2_101, resnetv2_152, "
    "resnet50, resnet101, resnet152, "
    "preact_resnet101, preact_resnet152, preact_resnet200, preact_resnet_small, preact_resnet101_narrow, "
    "and timm nets built of the same blocks."
)

WRONG = {
    "unknown model": (
        {"model": "resnetv2_100"},
        "unknown --model resnetv2_100 (nearest: resnetv2_101, resnetv2_101d, resnetv2_50)",
    ),
    "unknown CIFAR net": (
        {"model": "preact_resnet_smal"},
        "unknown --model preact_resnet_smal "
        "(nearest: preact_resnet_small, preact_resnet200, preact_resnet152)",
    ),
    "model like no other": ({"model": "zzz"}, f"unknown --model zzz. {FAMILIES}"),
    "model of no family": (
        {"model": "vit_tiny_patch16_224"},
        f"--model vit_tiny_patch16_224 is of no family that ResIST can partition. {FAMILIES}",
    ),
    "model that cannot be folded": (
        {"model": "seresnet50"},
        "--model seresnet50: a residual scale cannot be folded into its blocks (weight standardisation or "
        f"attention after the last norm). {FAMILIES}",
    ),
    "min_blocks > P": (
        {"min_blocks": 9},
        "--min_blocks 9 is more than preact_resnet_small has: type at most 8, its pool blocks",
    ),
    "too few samples": (
        {"batch_size": 1025, "workers": 2},
        "too few samples for one batch per worker: the training set has 2048, "
        "and 2 workers × --batch_size 1025 = 2050; type --batch_size 1024 or less, or fewer --workers",
    ),
    "fewer samples than workers": (
        {"workers": 3000},
        "too few samples for one batch per worker: the training set has 2048, "
        "and 3000 workers × --batch_size 8 = 24000; type --workers 2048 or less",
    ),
    "no data_dir": (
        {"dataset": "imagefolder", "data_dir": "{}/none"},
        "--data_dir {}/none: no such folder",
    ),
    "no cifar10": (
        {"dataset": "cifar10", "data_dir": "{}/none"},
        "cifar10 is not in {}/none (no folder cifar-10-batches-py): type --download to fetch it, or another "
        "--data_dir",
    ),
    "half a cifar10": (
        {"dataset": "cifar10", "data_dir": "{}/half"},
        "{}/half/cifar-10-batches-py is incomplete or damaged: type --download to fetch it again",
    ),
    "half an image folder": (
        {"dataset": "imagenet", "data_dir": "{}/half"},
        "--data_dir {}/half has no val folder: it must hold train/ and val/ (or test/), "
        "each with one folder of images per class",
    ),
    "class without images": (
        {"dataset": "imagefolder", "data_dir": "{}/empty"},
        "{}/empty/val has class folders without images: dog",
    ),
    "too few classes": (
        {"dataset": "digits", "num_classes": 3},
        "--num_classes 3 is too few: digits has 10 classes; type --num_classes 10, or leave it out",
    ),
    "output_dir is a file": (
        {"output_dir": "{}/file"},
        "--output_dir {}/file cannot be written to (File exists): type another folder",
    ),
    "output_dir is below a file": (
        {"output_dir": "{}/file/run"},
        "--output_dir {}/file/run cannot be written to (Not a directory): type another folder",
    ),
    "one image on maps of 1×1": (
        {"batch_size": 2, "accumulation_steps": 2},
        "BatchNorm cannot train on a single image whose maps shrink to 1×1: type a larger --img_size, or a "
        "--batch_size of at least 4 (2 for each accumulation step)",
    ),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with everything that the cases above stumble over."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "half" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "half" / "train").mkdir()
    for folder in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
        if folder != "val/dog":
            Image.new("RGB", (8, 8)).save(tmp_path / "empty" / folder / "0.png")
    return tmp_path


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("case", WRONG)
def test_what_the_user_typed(case: str, size: int, ranks: Ranks, place: Path) -> None:
    typed, line = WRONG[case]
    options = {name: v.format(place) if isinstance(v, str) else v for name, v in typed.items()}
    outcomes = ranks(outcome, size, place, TINY | {"output_dir": str(place / "run")} | options)
    expect(outcomes, 2, line.format(place))


def test_fewer_workers_than_ranks(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks(outcome, 2, tmp_path, TINY | {"workers": 1, "output_dir": str(tmp_path)})
    expect(
        outcomes, 2, "--workers 1 is less than the 2 ranks: type --workers 2 or more, or start fewer ranks"
    )


def test_tracker_that_is_not_installed(ranks: Ranks, tmp_path: Path) -> None:
    options = TINY | {"log_with": "tensorboard", "output_dir": str(tmp_path)}
    line = "--log_with tensorboard: type pip install tensorboard, or --log_with none"
    expect(ranks(outcome, 1, tmp_path, options, "tensorboard"), 2, line)


@pytest.mark.parametrize("strategy", ["resist", "ddp"])
def test_what_has_no_deterministic_form(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    options = {"deterministic": True, "strategy": strategy, "output_dir": str(tmp_path)}
    line = (
        "torch has no deterministic form of put_, which preact_resnet_small uses: leave --deterministic out"
    )
    expect(ranks(outcome, 1, tmp_path, TINY | options, "deterministic"), 2, line)


# ------------------------------------------------------------------------------------------------------------
# What breaks on one rank, and must end them all: exit code 1.


def image_folder(root: Path, train: int, test: int) -> dict[str, list[Path]]:
    """Class folders of images too large to be kept decoded; returns their paths in the data set's order."""
    noise = np.random.default_rng(0)
    paths: dict[str, list[Path]] = {}
    for split, count in (("train", train), ("val", test)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count // 2):
                path = folder / f"{i:03}.png"
                Image.fromarray(noise.integers(0, 255, (72, 72, 3), dtype=np.uint8)).save(path)
                paths.setdefault(split, []).append(path)
    return paths


@pytest.mark.parametrize("met", ["in training", "in calibration", "in the test set"])
def test_corrupt_image_that_one_rank_meets(met: str, ranks: Ranks, tmp_path: Path) -> None:
    """Two workers on two ranks: the second one's share holds an image that is none."""
    paths = image_folder(tmp_path / "data", train=96, test=32)
    order = Order(seed=0, samples=96, workers=2, batch_size=8)
    seen = [{*order.batch(0, worker)[1], *order.batch(1, worker)[1]} for worker in range(2)]
    if met == "in training":
        corrupt = paths["train"][order.batch(1, 1)[1][0]]
    elif met == "in calibration":  # all 96 images, 48 per rank; one that nobody has trained on yet
        corrupt = paths["train"][max({*range(64, 96)} - seen[0] - seen[1])]
    else:  # batches of 8 go to the ranks in turn
        corrupt = paths["val"][9]
    corrupt.write_bytes(b"no image")
    options = {
        "dataset": "imagefolder",
        "data_dir": str(tmp_path / "data"),
        "img_size": 72,
        "rounds": 1,
        "calibration_samples": 96,
        "output_dir": str(tmp_path / "run"),
    }
    outcomes = ranks(outcome, 2, tmp_path, TINY | options)
    assert outcomes[0].stderr.startswith(f"error: cannot read the image {corrupt}: ")
    assert outcomes[0].stderr.count("\n") == 1
    assert [o.code for o in outcomes] == [1, 1]
    assert outcomes[1].stderr == ""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_ends_the_record_and_not_the_run(size: int, ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    outcomes = ranks(outcome, size, tmp_path, TINY | {"output_dir": str(tmp_path)})
    path = tmp_path / "metrics.jsonl"
    said = f"warning: cannot write {path}: No space left on device; going on without it\n"
    assert [o.stderr for o in outcomes] == [said] + [""] * (size - 1)
    assert [o.code for o in outcomes] == [0] * size
    assert "global model: " in (tmp_path / "stdout0").read_text()


def test_defect_on_one_rank_is_named_by_the_others(ranks: Ranks, tmp_path: Path) -> None:
    options = TINY | {"output_dir": str(tmp_path / "run")}
    first, second = ranks(outcome, 2, tmp_path, options, "defect")
    assert first == (1, "error: rank 1 failed with ZeroDivisionError: division by zero\n")
    assert second.code == 1
    assert second.stderr.startswith("Traceback")  # a defect of ours: where it happened is what helps
    assert "in _divide_by_zero" in second.stderr


def test_machines_with_different_data(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks(outcome, 2, tmp_path, TINY | {"output_dir": str(tmp_path / "run")}, "data")
    line = (
        "rank 1 sees 1437 training and 360 test images of 10 classes, "
        "rank 0 2048 training and 512 test images of 10 classes: "
        "--data_dir must hold the same on all machines"
    )
    expect(outcomes, 1, line)


def test_killed_rank_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    """A rank that is killed says nothing; its peer must notice before the 30 minutes of a collective."""
    results = _CONTEXT.Queue()
    arguments = (tmp_path, TINY | {"output_dir": str(tmp_path / "run")}, "kill")
    store = str(tmp_path / "rendezvous")
    pair = [
        _CONTEXT.Process(target=_rank, args=(outcome, rank, 2, store, results, arguments), daemon=True)
        for rank in range(2)
    ]
    start = time.monotonic()
    try:
        for process in pair:
            process.start()
        try:
            rank, result, error = results.get(timeout=60)
        except queue.Empty:
            pytest.fail("the other rank hangs")
        pair[1].join(10)
    finally:
        for process in pair:
            process.kill()
            process.join(10)
    assert pair[1].exitcode == -signal.SIGKILL
    assert (rank, error) == (0, None)
    assert result.code == 1
    lost = "error: rank 0 lost another rank, whose own message or exit says why "
    gloo_says = r"\((Connection closed by peer|Connection reset by peer|Read error|Write error)\)\n"
    assert re.fullmatch(lost + gloo_says, result.stderr)
    assert time.monotonic() - start < 60


def test_a_rank_that_cannot_reach_the_others_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What gloo says where a machine's name stands for its own loopback."""

    def init(*args: object, **kwargs: object) -> None:
        raise RuntimeError(
            "Gloo connectFullMesh failed with [/gloo/pair.cc:152] timed out connecting: refused"
        )

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(
        RunError, match=r"^rank 1 cannot reach the other ranks \(timed out connecting.*IFNAME"
    ):
        Comm(init_method="file:///nowhere")


@pytest.mark.parametrize(("local_rank", "says"), [(0, True), (1, False)])
def test_every_machine_says_once_that_a_rank_is_lost(local_rank: int, says: bool) -> None:
    """Rank 0, which speaks for all, may be on the machine that is gone."""
    rank: Any = SimpleNamespace(rank=4, local_rank=local_rank)
    with (
        pytest.raises(RunError, match=r"rank 4 lost another rank.*\(Read error\)") as lost,
        Comm.others(rank),
    ):
        raise RuntimeError(
            "[/gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1: Connection reset by peer"
        )
    assert lost.value.alone == says

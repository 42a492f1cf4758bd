"""Checkpoints to test with, and readers of them that share no code with the package."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from resist_ds.trainer import Trainer
from tests import THREADS, oracle
from tests.run import test_errors  # oracle registers the narrow nets

OPTIONS: dict[str, Any] = {
    "dataset": "synthetic",  # 2,048 images
    "img_size": 8,
    "model": oracle.resist_test_basic.__name__,  # P = 7
    "workers": 4,
    "batch_size": 8,
    "local_steps": 2,
    "rounds": 6,
    "lr": 0.05,
    "schedule": "cosine",
    "eval_every": 2,
    "eval_batch_size": 256,
    "calibration_samples": 32,
    "checkpoint_every": 1,
    "keep": 100,
    "log_with": "none",
    "progress": False,
    "cpu_threads": THREADS,
}


def train(comm: Comm, options: dict[str, Any]) -> None:
    """A run of `OPTIONS`, with others on top."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    try:
        trainer.run()
    finally:
        trainer.folder.release()


def outcome(comm: Comm, folder: Path, options: dict[str, Any]) -> test_errors.Outcome:
    """What `train.py` does with `OPTIONS`, and others on top; its stdout and stderr go into `folder`."""
    return test_errors.outcome(comm, folder, OPTIONS | options)


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """{name: array} of a whole checkpoint, each name from one file only."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, array in load_file(file).items():
            assert name not in found, f"{name} is there twice"
            found[name] = array
    return found


def digest(checkpoint: Path) -> dict[str, str]:
    """{name: sha256 of type, shape and bytes}."""
    return {
        name: hashlib.sha256(repr((a.dtype.str, a.shape)).encode() + a.tobytes()).hexdigest()
        for name, a in tensors(checkpoint).items()
    }


def loss_log(folder: Path) -> list[dict[str, Any]]:
    """What a run's records say of training and testing, without what depends on the machine."""
    machine = ("perf/", "mem/", "comm/")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(machine)}
        for line in lines
        if line["kind"] in ("round", "eval")
    ]


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints, and of whatever else lies there."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def last(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return folder / "checkpoints" / checkpoints(folder)[-1]

"""tools/study.py: it runs what is missing, and its table says what the records say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import ROOT

TOOL = ROOT / "tools" / "study.py"


def study(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, options)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of noise, 16 training images and 4 to test with."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for kind in ("a", "b"):
            folder = tmp_path / "images" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return tmp_path / "images"


@pytest.mark.timeout(240)
def test_a_study_goes_on_and_reports_its_runs(images: Path, tmp_path: Path) -> None:
    small = (
        "--img_size",
        8,
        "--batch_size",
        4,
        "--local_steps",
        1,
        "--calibration_samples",
        16,
        "--epochs",
        1,
    )
    what = (
        "--data_dir",
        images,
        "--output_dir",
        tmp_path / "study",
        "--workers",
        "2,4,8",
        "--jobs",
        2,
        *small,
    )
    arms = ("--only", "resist-2-travel,stochastic_depth-1")
    first = study(*what, *arms, "--seeds", "3")
    assert first.returncode == 0, first.stderr
    summaries = {}
    for name in ("resist-2-travel", "stochastic_depth-1"):
        lines = (tmp_path / "study" / f"{name}-seed3" / "metrics.jsonl").read_text().splitlines()
        summaries[name] = json.loads(lines[-1])
    rows = {
        line.split(" | ")[0].strip("| "): line for line in first.stdout.splitlines() if line.startswith("| ")
    }
    for name, summary in summaries.items():
        assert f"{name}-seed3: {100 * summary['eval/accuracy']:.2f} %" in first.stdout
        assert rows[name].split(" | ")[1:4] == [f"{100 * summary['eval/accuracy']:.2f}", "–", "1"]
    resist, depth = (summaries[name]["settings"] for name in summaries)
    assert (resist["W"], resist["K"], resist["strategy"], resist["seed"]) == (2, 4, "resist", 3)
    assert (depth["W"], depth["min_blocks"], depth["strategy"]) == (1, 2, "stochastic_depth")

    again = study(*what, *arms, "--seeds", "3")  # nothing is missing
    assert again.returncode == 0 and again.stdout == "\n".join([*rows_of(first.stdout), ""])


def rows_of(printed: str) -> list[str]:
    """The table in what was printed."""
    return [line for line in printed.splitlines() if line.startswith("|")]

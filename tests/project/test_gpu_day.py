"""tools/gpu_day.sh: what it would run can be run, and what it says of it is true."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resist_ds.options.command_line import parse
from resist_ds.options.strategy import STRATEGIES
from tests import ROOT
from tools import deepest, study
from tools.benchmark.asked import read

SCRIPT = ROOT / "tools" / "gpu_day.sh"
PARTS = ["smoke", "suite", "speed", "speed224", "memory", "demo", "bench", "accuracy"]
DATA = ("--data_dir", "images")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def gpu_day(*words: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, timeout=60
    )


def commands(*words: str) -> list[list[str]]:
    """What --dry-run prints, in words."""
    done = gpu_day("--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("words", [DATA, ("--cpu",)], ids=["gpu", "cpu"])
def test_every_option_that_it_types_is_one(words: tuple[str, ...], tmp_path: Path) -> None:
    strategies: set[str] = set()
    several: set[str] = set()
    for command in commands(*words):
        assert command[0] == sys.executable
        program = next(i for i, word in enumerate(command) if word.endswith(".py") or word == "pytest")
        name, options = command[program], command[program + 1 :]
        if name != "pytest":
            assert (ROOT / name).is_file()
        if name == "train.py":
            config = parse(options)
            strategies.add(config.strategy)
            if "torch.distributed.run" in command:
                several.add(config.strategy)
        elif name == "tools/bench.py":
            read(options, "")
        elif name == "tools/deepest.py":
            deepest.parse(options)
        elif name == "tools/study.py":
            given, others = study.asked(options)
            if not given.report:
                given.data_dir = tmp_path
                design = study.design_of(given, others)
                assert [arm.options["strategy"] for arm in design.arms] == ["resist", "ddp"]
                assert design.arms[1].options["batch_size"] == "512" and design.study["compile"] == "true"
        elif name == "pytest":
            assert all((ROOT / word).exists() for word in options if word.startswith("tests"))
    assert strategies == set(STRATEGIES)
    on_one_gpu = {"resist", "local_sgd"}
    assert several == (on_one_gpu if words == DATA else strategies - {"stochastic_depth"})


def test_all_parts_in_their_order_or_those_that_are_named() -> None:
    cases = ((DATA, PARTS), ((), PARTS[:-1]), (("bench", "demo"), ["bench", "demo"]), (("--cpu",), ["smoke"]))
    for words, parts in cases:
        said = gpu_day("--dry-run", *words).stdout.splitlines()
        assert [line[2:] for line in said if line.startswith("# ")] == parts


def test_without_a_gpu_it_says_so() -> None:
    done = gpu_day()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: there is no GPU: --dry-run ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [("smok",), ("-o",), ("--gpu",), ("accuracy",), ("--data_dir",)])
def test_a_wrong_call_is_answered_in_one_line(words: tuple[str, ...]) -> None:
    done = gpu_day(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_step_that_fails_stops_nothing_and_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"  # runs nothing: fsdp's steps end with exit code 3
    python.write_text('#!/bin/sh\necho "said: $*"\ncase "$*" in *fsdp*) exit 3;; esac\n')
    python.chmod(0o755)
    out = tmp_path / "out of the way"
    stale = out / "smoke" / "resist-1" / "checkpoints"
    stale.mkdir(parents=True)

    done = gpu_day("--cpu", "-o", str(out), "smoke", "demo", python=str(python))
    assert (done.returncode, done.stderr) == (1, "")
    steps = len(commands("--cpu", "smoke"))
    smoke, demo = (out / "summary.txt").read_text().splitlines()
    assert smoke.startswith(f"smoke    FAILED {steps - 2} of {steps} steps in ")
    assert smoke.endswith(" s (rehearsal on a CPU): fsdp-1 (3), fsdp-2 (3)")
    assert demo.startswith("demo     ok     1 of 1 steps in ") and demo.endswith("(rehearsal on a CPU)")
    assert done.stdout.endswith(f"\n\n{smoke}\n{demo}\n")
    log = (out / "smoke.txt").read_text()
    assert log.count("said: ") == steps and "= fsdp-1: exit code 3 after " in log
    assert not stale.exists()  # runs of a day before would be refused, or gone on with

    fine = gpu_day("--cpu", "-o", str(out), "demo", python=str(python))
    assert fine.returncode == 0 and (out / "summary.txt").read_text().count("\n") == 1

"""Every wrong call that a new user makes, and the line that it prints; then what a right one prints.

tests/options/test_config.py and test_errors.py have the rarer mistakes, and those that several ranks meet.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import ROOT
from tests.conftest import _CONTEXT

TINY = "--dataset synthetic --img_size 8 --batch_size 8 --local_steps 2 --rounds 2 --calibration_samples 32 "
TINY += "--eval_every 0 --cpu_threads 1 --log_with none"

_TABLE = (Path(__file__).parent / "first_hour.txt").read_text()
CALLS: dict[str, str] = {
    variables + words: line
    for variables, words, line in re.findall(
        r"^\$ ((?:\w+=\S* )*)python (.*)\nerror: (.*)$", _TABLE, re.MULTILINE
    )
}
LATE = "train.py --batch_size 1 --img_size 8 --dataset synthetic"  # shows when training has begun


def typed(words: list[str], place: Path) -> None:
    """The life of a process that was started with these words, NAME=value before them."""
    while (variable := words[0].partition("="))[1]:
        os.environ[variable[0]] = variable[2]
        words = words[1:]
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(place)
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


def call(words: list[str], place: Path) -> tuple[int | None, str, str]:
    process = _CONTEXT.Process(target=typed, args=(words, place))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode, (place / "stdout").read_text(), (place / "stderr").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run is done, and a few things that a path may hit by mistake."""
    place = tmp_path_factory.mktemp("first hour")
    (place / "empty").mkdir()
    (place / "wrong.yaml").write_text("lr: 0.1\nworker: 3\n")
    (place / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (place / "spoilt" / "checkpoints" / "round-000002").mkdir(parents=True)
    (place / "twice.json").write_text('{"steps_per_print": Infinity, "bf16": {}, "bf16": {}}')
    (place / "on.json").write_text(
        '{"amp": {"enabled": true}, "dump_state": false, "fp16": {"enabled": true}}'
    )
    for folder in ("one/train/cat", "one/val/cat", "grey/train/cat", "grey/val/cat"):
        (place / folder).mkdir(parents=True)
        Image.new("F", (8, 8)).save(place / folder / "0.tiff")
    for folder in ("grey/train/dog", "grey/val/dog"):
        (place / folder).mkdir()
        Image.new("L", (8, 8)).save(place / folder / "0.png")
    code, _, stderr = call(["train.py", *TINY.split(), "--output_dir", "run"], place)
    assert (code, stderr) == (0, "")
    return place


@pytest.mark.parametrize("words", CALLS)
def test_a_wrong_call_is_answered_in_one_line(words: str, place: Path) -> None:
    code, stdout, stderr = call(words.replace("TINY", TINY).replace("RUN", "run").split(), place)
    # argparse prints the usage before its own line
    said = [text for text in stderr.splitlines() if not text.startswith(("usage: ", "warning: "))]
    assert [text.partition("error: ")[2] for text in said] == [CALLS[words]]
    assert code in (1, 2)
    if words != LATE:
        assert stdout == ""


def test_the_first_lines_say_what_will_happen_and_the_last_what_did(place: Path) -> None:
    words = ["train.py", *TINY.split(), "--workers", "3", "--output_dir", "words", "--seed", "3"]
    code, stdout, stderr = call(words, place)
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if line.startswith("worker "))]
    closing = lines[len(opening) :]
    assert len(opening) <= 10 and len(closing) <= 10
    for word in ("W = 3", "R = 1", "K = 3 of 8", "rank 0: workers 0–2", "2 rounds of 2", "predicted: "):
        assert word in "\n".join(opening), word
    for word in ("peak local", "samples/s", "test accuracy", "bytes a round", "checkpoint: words/"):
        assert word in "\n".join(closing), word


def test_help_has_every_group_and_fits_a_terminal(place: Path) -> None:
    code, stdout, _ = call(["train.py", "--help"], place)
    assert code == 0
    groups = re.findall(r"^(\w[\w &]*):$", stdout, re.MULTILINE)
    assert groups[1:] == [
        "Model",
        "Data",
        "Protocol",
        "Training",
        "Device",
        "Evaluation",
        "Checkpoints",
        "Run",
    ]
    assert max(map(len, stdout.splitlines())) <= 80
    for tool in ("bench", "check_data", "export", "plan", "plot", "study", "verify"):
        code, stdout, stderr = call([f"tools/{tool}.py", "--help"], place)
        assert (code, stderr) == (0, "") and "usage: " in stdout, tool

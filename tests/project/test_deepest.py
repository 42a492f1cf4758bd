"""tools/deepest.py: the deepest net that fits, by a line through two counts."""

import math
from pathlib import Path

import pytest

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from tests.conftest import Ranks
from tools import deepest


@pytest.mark.parametrize("memory", [0, 99, 100, 101, 104, 105, 1234, 98765])
@pytest.mark.parametrize("bend", [0.0, 0.001])
def test_the_most_blocks_are_those_before_it_does_not_fit(memory: int, bend: float) -> None:
    asked = []

    def takes(blocks: int) -> float:
        asked.append(blocks)
        return 95 + 5 * blocks + bend * blocks**2

    found = deepest.most_blocks(takes, memory)
    assert found == 0 if takes(1) > memory else takes(found) <= memory < takes(found + 1)
    assert len(asked) < 40


def test_running_out_says_nothing_of_how_much_was_missing() -> None:
    asked = []

    def takes(blocks: int) -> float:
        asked.append(blocks)
        return 5 * blocks if blocks <= 1234 else math.inf

    assert deepest.most_blocks(takes, 1e9) == 1234
    assert len(asked) < 60


def test_what_cannot_be_run_out_of_is_bounded() -> None:
    assert deepest.most_blocks(lambda blocks: 1, 1) > deepest.MOST / 4


def test_predictions_lie_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A net of three times as many blocks, counted, is where the line through two smaller ones says."""
    config = Config(model=deepest.MODEL, workers=4, batch_size=2)
    arm = ("fsdp", True)
    takes = deepest.predicted(config)  # which counts a net once
    monkeypatch.setattr(deepest, "COUNTED", (1, 2))
    line = takes(arm, 3)
    monkeypatch.setattr(deepest, "COUNTED", (3, 2))
    assert line == pytest.approx(takes(arm, 3), rel=1e-3)


def measured(comm: Comm, blocks: int) -> float:
    config = Config(model=deepest.MODEL, workers=4, batch_size=2)
    return deepest.measured(config, 2**40)(("resist", False), blocks)


@pytest.mark.ranks
def test_a_measured_step_takes_more_with_more_blocks(ranks: Ranks) -> None:
    """On this machine's CPU, in processes of their own: the same code as on a GPU, whose peak torch knows."""
    few, many = (ranks(measured, 1, blocks)[0] for blocks in (1, 8))
    assert many - few > 7 * 3 * 4 * 9 * 256**2  # a block's first convolution, its momentum and its gradient


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--memory", "much"], "--memory is 'much'"),
        (["--workers", "0"], "--workers and --batch_size are whole numbers above 0"),
        (["--depth"], "unrecognized arguments: --depth"),
    ],
)
def test_a_wrong_call_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert deepest.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}") and said.err.count("\n") == 1 and said.out == ""


def test_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deepest, "predicted", lambda config: lambda arm, blocks: blocks * (1 + arm[1]) * 2**20
    )
    assert deepest.main(["--memory", "1gib", "--output_dir", str(tmp_path)]) == 0
    table = (tmp_path / "deepest.md").read_text()
    assert "| without | 4,097 | 1,025 | 1,025 |" in table and "| with | 2,049 | 513 | 513 |" in table
    assert (tmp_path / "deepest.png").stat().st_size > 10_000

"""tools/plot.py: what it reads from the records, and that it makes its pictures."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from resist_ds.telemetry import figures
from tests import ROOT
from tests.conftest import Ranks
from tests.saved import train

TOOL = ROOT / "tools" / "plot.py"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return figures


def record_run(folder: Path, accuracies: list[float], **settings: Any) -> Path:
    """A run as its records tell it: one evaluation a round, which takes four seconds and ten bytes."""
    known = {
        "strategy": "resist",
        "W": 2,
        "P": 4,
        "min_blocks": 0,
        "warmup_rounds": 0,
        "seed": 0,
        "device": "cpu",
    }
    records: list[dict[str, Any]] = []
    for i, accuracy in enumerate(accuracies, start=1):
        records.append({"kind": "round", "round": i, "perf/local_s": 2.0, "perf/sync_s": 0.5})
        position = {"round": i, "samples_seen": 100 * i, "comm/bytes_total": 10 * i}
        records.append({"kind": "eval", "eval/accuracy": accuracy, "perf/eval_s": 1.5, **position})
    peaks = {"mem/local_gib": 1.0, "mem/sync_gib": 0.5}
    records.append({"kind": "summary", "round": len(accuracies), **peaks, "settings": known | settings})
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_seeds_become_one_line_and_other_options_tell_runs_apart(plot: ModuleType, tmp_path: Path) -> None:
    runs = [
        plot.read(record_run(tmp_path / name, [0.1, 0.2], **settings))
        for name, settings in {
            "a": {"seed": 0},
            "b": {"seed": 1, "output_dir": "elsewhere"},
            "c": {"lr": 0.1, "W": 2},
            "d": {"strategy": "ddp", "W": 4},
        }.items()
    ]
    groups = plot.grouped(runs)
    assert [[run.path.name for run in group] for group in groups.values()] == [["a", "b"], ["c"], ["d"]]
    assert list(plot.grouped(runs[:2])) == ["resist, W = 2"]
    assert list(plot.grouped([runs[0], runs[3]])) == ["resist, W = 2", "ddp, W = 4"]


def test_lines_are_means_at_the_places_of_the_records(plot: ModuleType, tmp_path: Path) -> None:
    runs = [
        plot.read(record_run(tmp_path / "0", [0.1, 0.4, 0.6])),
        plot.read(record_run(tmp_path / "1", [0.3, 0.6, 0.8], seed=1)),
    ]
    figure = plot.accuracy(plot.grouped(runs))
    lines = [panel.get_lines()[0] for panel in figure.axes]
    assert [list(line.get_xdata()) for line in lines] == [[100, 200, 300], [4, 8, 12], [1e-8, 2e-8, 3e-8]]
    assert all(list(line.get_ydata()) == pytest.approx([20, 50, 70]) for line in lines)
    assert lines[0].get_label() == "resist, W = 2 (2 runs)"


def test_the_deal_is_the_one_that_was_trained(plot: ModuleType, tmp_path: Path) -> None:
    from resist_ds.protocol.partition import sample_partition

    run = plot.read(record_run(tmp_path / "run", [0.1] * 5, seed=3, warmup_rounds=1, min_blocks=3))
    (image,) = plot.blocks(run).axes[0].get_images()
    deals = [sample_partition(3, r, workers=2, pool=4, min_blocks=4 if r == 0 else 3) for r in range(5)]
    assert image.get_array().tolist() == [[deal.owners[block] for deal in deals] for block in range(4)]


@pytest.mark.ranks
def test_pictures_of_a_real_run(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(train, 2, {"rounds": 4, "output_dir": str(tmp_path / "run")})
    assert call(monkeypatch, tmp_path / "run", "--output_dir", tmp_path / "plots") == 0
    made = [tmp_path / "plots" / f"{name}.png" for name in ("accuracy", "memory", "blocks")]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in made]
    for path in made:
        with Image.open(path) as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "is no run: it has no metrics.jsonl"),
        ("", "has not ended"),
        ('{"kind": "round"}\n', "has not ended"),
    ],
)
def test_folders_that_are_no_finished_run(
    content: str | None, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert call(monkeypatch, tmp_path, "--output_dir", tmp_path / "plots") == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {tmp_path} {line}") and said.err.count("\n") == 1 and said.out == ""
    assert not (tmp_path / "plots").exists()

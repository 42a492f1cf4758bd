"""What only informs (a hint, a name, a terminal, a tracker) may fail as it likes: the run goes on."""

import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest

from resist_ds.telemetry import records, report, tracker
from tests import ROOT
from tests.conftest import _CONTEXT
from tests.run.test_first_hour import TINY, call

Break = Callable[[Path], None]


def _raise(error: Exception) -> Callable[..., Any]:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fails


def _streams_are_closed(place: Path) -> None:
    """As `train.py <&- >&- 2>&-` begins."""
    sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]
    os.closerange(0, 3)


def _streams_are_full(place: Path) -> None:
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _readers_are_gone(place: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    for number in (1, 2):
        os.dup2(write, number)
    # Made anew, as the ones of the process that this one is forked from may stand for files.
    sys.stdout, sys.stderr = map(os.fdopen, (1, 2), "ww")


def _folder_is_gone(place: Path) -> None:
    gone = place / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()


def _nobody_is_at_home(place: Path) -> None:
    """A user who is but a number, in a container, without git."""
    os.environ.pop("HOME", None)
    os.environ["PATH"] = ""
    Path.home = _raise(RuntimeError("Could not determine home directory."))  # type: ignore[method-assign]


def _terminal_is_strange(place: Path) -> None:
    os.environ |= {"COLUMNS": "wide", "TQDM_NCOLS": "wide", "LC_ALL": "nowhere", "TERM": ""}


def _processes_are_hidden(place: Path) -> None:
    for name in ("parents", "cmdline", "memory_info", "create_time"):
        setattr(psutil.Process, name, _raise(PermissionError(13, "Permission denied")))


def _packages_are_unknown(place: Path) -> None:
    report.version = _raise(PackageNotFoundError("deepspeed"))


BREAKS: dict[str, Break] = {
    f.__name__.strip("_"): f
    for f in (
        _streams_are_closed,
        _streams_are_full,
        _readers_are_gone,
        _folder_is_gone,
        _nobody_is_at_home,
        _terminal_is_strange,
        _processes_are_hidden,
        _packages_are_unknown,
    )
}


def broken(words: list[str], place: Path, what: str) -> None:
    """The life of a process in such a place."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(place)
    BREAKS[what](place)
    sys.argv = [str(ROOT / "train.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def ends(words: list[str], place: Path, what: str) -> int | None:
    process = _CONTEXT.Process(target=broken, args=(words, place, what))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    return process.exitcode


def finished(folder: Path) -> dict[str, Any]:
    """The last record; every line is a record, and nothing else was written among them."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "summary"
    assert len(list((folder / "checkpoints").iterdir())) == 1
    return dict(lines[-1]["settings"])


@pytest.mark.parametrize("what", BREAKS)
def test_a_run_goes_on_without_what_only_informs(what: str, tmp_path: Path) -> None:
    words = [*TINY.split(), "--output_dir", str(tmp_path / "run")]
    code = ends(words, tmp_path, what)
    assert code == 0, (tmp_path / "stderr").read_text()
    assert (tmp_path / "stderr").read_text() == ""
    finished(tmp_path / "run")
    if what.startswith(("streams", "readers")):  # a run that has nothing left to do says so, and ends well
        assert ends([*words, "--resume", "auto"], tmp_path, what) == 0
        assert ends(["--help"], tmp_path, what) == 0
        assert ends(["--lr", "x"], tmp_path, what) == 2


def test_bytes_that_are_no_text_are_options_too(tmp_path: Path) -> None:
    """A folder whose name was typed in another encoding, in which TensorBoard cannot write."""
    folder = tmp_path / "caf\udce9"
    words = [*TINY.split(), "--output_dir", str(folder), "--run_name", "\udcff", "--log_with", "tensorboard"]
    code, stdout, stderr = call(["train.py", *words], tmp_path)
    assert code == 0 and "checkpoint: " in stdout
    assert stderr.count("\n") == 1
    assert stderr.startswith("warning: tensorboard could not be started, going on without it: ")
    settings = finished(folder)
    assert settings["run_name"] == "?" and settings["output_dir"] == "…/caf?"


@pytest.mark.parametrize("variable", ["WANDB_DISABLED=true", "WANDB_DISABLED=1", "WANDB_MODE=disabled"])
def test_wandb_is_called_off_by_the_environment(variable: str, tmp_path: Path) -> None:
    words = [variable, "train.py", *TINY.split(), "--log_with", "wandb", "--output_dir", "run"]
    assert call(words, tmp_path)[::2] == (0, "")
    finished(tmp_path / "run")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"checkpoints", "metrics.jsonl", "run.lock"}


def test_wandb_is_there_where_it_is_not_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = type("Config", (), {"log_with": "wandb"})
    for name in ("WANDB_DISABLED", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert tracker.is_wanted(config)
    monkeypatch.setenv("WANDB_DISABLED", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracker.is_wanted(config)


def test_a_tracker_that_cannot_be_imported_is_gone_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracker.importlib, "import_module", _raise(ImportError("libstdc++.so.6 is too old")))
    config: Any = type("Config", (), {"log_with": "wandb", "run_name": None})
    said: list[str] = []
    start: Any = None
    made = tracker.Tracker(config, {}, tmp_path, start, said.append, said.append)
    made.log({"loss": 1.0})
    made.close(0)
    assert said == ["wandb could not be started, going on without it: libstdc++.so.6 is too old"]


def test_a_progress_bar_whose_terminal_goes_is_gone_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with contextlib.redirect_stderr(Terminal()):
        bar = records.Bar(0, 2)
        bar.update({"loss": "1"})
        bar.close()

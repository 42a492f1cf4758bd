"""The folder of a run: one run at a time, whoever dies, and nothing of an earlier run is lost."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resist_ds.errors import UserError
from resist_ds.state.checkpoint import newest_first
from resist_ds.state.folder import PARTIAL, REPLACED, RunFolder
from tests.conftest import _CONTEXT
from tests.run.test_signals import ENDLESS, job, records, trained, until


def hold(path: Path, told: Any, with_child: bool) -> None:
    """Take a folder and keep it; with a child process as the loader processes are."""
    folder = RunFolder(str(path))  # whose end would free the lock
    folder.take()
    child = None
    if with_child:
        _CONTEXT.set_forkserver_preload([])  # its server need not import what ours has
        child = _CONTEXT.Process(target=time.sleep, args=(60,))
        child.start()
    told.put((os.getpid(), child and child.pid))
    time.sleep(60)


@pytest.fixture
def holder() -> Iterator[Callable[..., tuple[Any, int | None]]]:
    """`holder(path)` lets another process take the folder; returns it, and its child's pid."""
    processes: list[Any] = []
    children: list[int] = []

    def start(path: Path, with_child: bool = False) -> tuple[Any, int | None]:
        told = _CONTEXT.Queue()
        process = _CONTEXT.Process(target=hold, args=(path, told, with_child))
        processes.append(process)
        process.start()
        pid, child = told.get(timeout=30)
        assert pid == process.pid
        children.extend([child] if child else [])
        return process, child

    yield start
    for process in processes:
        process.kill()
        process.join(10)
    for child in children:
        try:
            os.kill(child, 9)
        except ProcessLookupError:
            continue


def in_use(path: Path, pid: int) -> str:
    return (
        f"--output_dir {path} is in use by process {pid} on {socket.gethostname()}: "
        "stop that run, or type another folder"
    )


Holder = Callable[..., tuple[Any, int | None]]


def test_second_run_is_told_who_has_the_folder(holder: Holder, tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            RunFolder(str(tmp_path)).take()
        assert str(caught.value) == in_use(tmp_path, process.pid)


def test_run_that_was_refused_does_not_disturb_the_other(holder: Holder, tmp_path: Path) -> None:
    process, _ = holder(tmp_path)
    partial = tmp_path / "checkpoints" / f"{PARTIAL}round-000002-0a"
    partial.mkdir(parents=True)
    refused = RunFolder(str(tmp_path))
    with pytest.raises(UserError):
        refused.take()
    refused.release()
    assert partial.exists()
    assert json.loads((tmp_path / "run.json").read_text())["pid"] == process.pid
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        RunFolder(str(tmp_path)).take()


def test_unreadable_note_of_the_holder(holder: Holder, tmp_path: Path) -> None:
    holder(tmp_path)
    for note in ("", "[]", "{}"):
        (tmp_path / "run.json").write_text(note)
        with pytest.raises(UserError, match="is in use by another process: stop that run"):
            RunFolder(str(tmp_path)).take()


@pytest.mark.parametrize("with_child", [False, True], ids=["alone", "its child lives on"])
def test_killed_run_leaves_the_folder_free(with_child: bool, holder: Holder, tmp_path: Path) -> None:
    process, child = holder(tmp_path, with_child)
    process.kill()
    process.join(10)
    if with_child:
        assert child is not None
        os.kill(child, 0)  # it is there
    folder = RunFolder(str(tmp_path))
    folder.take()
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    folder.release()


def test_release_lets_others_in(tmp_path: Path) -> None:
    first, second = RunFolder(str(tmp_path / "a" / "b")), RunFolder(str(tmp_path / "a" / "b"))
    first.take()
    with pytest.raises(UserError):
        second.take()
    first.release()
    assert not (tmp_path / "a" / "b" / "run.json").exists()
    second.take()
    first.release()  # once more, which is nothing
    with pytest.raises(UserError):
        first.take()
    second.release()


def test_take_removes_what_a_killed_run_left_behind(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for name in (f"{PARTIAL}round-000003-0a", f"{REPLACED}round-000002-0b", "round-000002", "mine"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "file").write_text(name)
    assert [path.name for path in newest_first(checkpoints)] == ["round-000002"]
    folder = RunFolder(str(tmp_path))
    folder.take()
    folder.release()
    assert sorted(path.name for path in checkpoints.iterdir()) == ["mine", "round-000002"]
    assert (checkpoints / "round-000002" / "file").read_text() == "round-000002"


@pytest.mark.parametrize(
    ("below", "reason"), [("", "File exists"), ("runs", "Not a directory"), ("a/b", "Not a directory")]
)
def test_folder_that_cannot_be_made(below: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / below
    with pytest.raises(UserError) as caught:
        RunFolder(str(path)).take()
    assert str(caught.value) == f"--output_dir {path} cannot be written to ({reason}): type another folder"


@pytest.mark.parametrize("name", ["run.lock", "run.json"])
def test_folder_that_cannot_be_written_to(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    first = RunFolder(str(tmp_path))
    with pytest.raises(UserError) as caught:
        first.take()
    assert str(caught.value) == (
        f"--output_dir {tmp_path} cannot be written to (Is a directory): type another folder"
    )
    if name == "run.json":  # a process that goes on must not keep it
        (tmp_path / name).rmdir()
        again = RunFolder(str(tmp_path))
        again.take()
        again.release()


def test_set_aside_moves_records_and_checkpoints(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert folder.set_aside() is None
    folder.metrics.touch()  # a run that ended before its first round
    assert folder.set_aside() is None
    for number in (1, 2):
        (folder.checkpoints / "round-000007").mkdir(parents=True)
        (folder.checkpoints / "round-000007" / "state.json").write_text(f"state {number}")
        folder.metrics.write_text(f"records {number}")
        assert folder.set_aside() == tmp_path / f"earlier-{number}"
        assert not folder.metrics.exists()
        assert not folder.checkpoints.exists()
    (folder.checkpoints / "round-000001").mkdir(parents=True)  # and no records
    assert folder.set_aside() == tmp_path / "earlier-3"
    folder.metrics.write_text("records, and no checkpoint")
    assert folder.set_aside() == tmp_path / "earlier-4"
    for number in (1, 2):
        place = tmp_path / f"earlier-{number}"
        assert (place / "metrics.jsonl").read_text() == f"records {number}"
        assert (place / "checkpoints" / "round-000007" / "state.json").read_text() == f"state {number}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"earlier-{n}" for n in (1, 2, 3, 4)]
    assert [path.name for path in (tmp_path / "earlier-4").iterdir()] == ["metrics.jsonl"]
    assert [path.name for path in (tmp_path / "earlier-3").iterdir()] == ["checkpoints"]


def line(kind: str, round: int) -> str:
    return json.dumps({"kind": kind, "round": round, "train/loss": 0.1 + round}) + "\n"


@pytest.mark.parametrize("torn", ["", '{"kind": "round", "rou', '{"kind": "round", "round": 3'])
@pytest.mark.parametrize("round", [0, 1, 2, 9])
def test_a_run_that_goes_on_keeps_the_records_up_to_its_start(round: int, torn: str, tmp_path: Path) -> None:
    whole = [line("round", 1), line("round", 2), line("eval", 2), line("round", 3), line("eval", 3)]
    folder = RunFolder(str(tmp_path))
    folder.metrics.write_text("".join([*whole, line("summary", 3), torn]))
    assert folder.set_aside_after(round) is None
    kept = [record for record in whole if json.loads(record)["round"] <= round]
    assert folder.metrics.read_text() == "".join(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_goes_on_without_records(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path)).set_aside_after(3) is None
    assert list(tmp_path.iterdir()) == []


def test_holds_tells_its_own_checkpoints_from_others(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "round-000001").mkdir(parents=True)
    folder = RunFolder(str(tmp_path / "run"))
    assert folder.holds(tmp_path / "run" / "checkpoints" / "round-000001")
    assert folder.holds(tmp_path / "link" / "checkpoints" / "round-000001")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "checkpoints" / "round-000002").symlink_to(tmp_path / "elsewhere")
    assert folder.holds(tmp_path / "run" / "checkpoints" / "round-000002")
    (tmp_path / "latest").symlink_to(tmp_path / "run" / "checkpoints" / "round-000001")
    assert folder.holds(tmp_path / "latest")
    assert not folder.holds(tmp_path / "run" / "earlier-1" / "checkpoints" / "round-000001")


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_second_run_into_the_folder_of_one_that_trains(size: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with job(2, tmp_path / "first", output, **ENDLESS) as first:
        until(lambda: len(records(output, "round")) >= 2, "the first run trains")
        with job(size, tmp_path / "second", output) as second:
            assert second.ended() == [2] * size
        assert second.stderr == [f"error: {in_use(output, first.ranks[0].pid)}\n"] + [""] * (size - 1)
        done = len(records(output, "round"))
        until(lambda: len(records(output, "round")) > done, "the first run goes on")
    assert first.stderr == ["", ""]
    (output / "metrics.jsonl").unlink()
    trained(1, tmp_path / "third", output, rounds=1)


def test_checkpoints_that_a_run_has_passed_over_are_set_aside(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    for round in (3, 4, 5):
        (folder.checkpoints / f"round-00000{round}").mkdir(parents=True)
    assert folder.set_aside_after(5) is None
    assert folder.set_aside_after(3) == tmp_path / "earlier-1"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["round-000003"]
    aside = (tmp_path / "earlier-1" / "checkpoints").iterdir()
    assert sorted(path.name for path in aside) == ["round-000004", "round-000005"]

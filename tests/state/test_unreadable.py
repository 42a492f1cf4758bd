"""What cannot be read, or not by this version, is no damage: nothing is passed over or set aside for it."""

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resist_ds import __version__, files
from resist_ds.comm import Comm
from resist_ds.errors import DamagedError, OtherVersionError, RunError, UnreadableError, UserError
from resist_ds.options.config import Config
from resist_ds.state import export as exporting
from resist_ds.state.checkpoint import Checkpoint, newest_first
from resist_ds.state.folder import REPLACED, RunFolder
from resist_ds.state.saver import Saver
from resist_ds.state.start import Start
from tests.conftest import Ranks, run_ranks
from tests.run.test_errors import Outcome
from tests.saved import OPTIONS, checkpoints, digest, loss_log, outcome, train
from tests.state.test_damage import _truncate, change

pytestmark = pytest.mark.ranks

SHARD = "model-00001-of-00001.safetensors"
NEWEST = "round-000002"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank with two checkpoints."""
    folder = tmp_path_factory.mktemp("written") / "run"
    run_ranks(train, 1, {"rounds": 2, "output_dir": str(folder)}, store=folder.with_name("rendezvous"))
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def everything(folder: Path) -> dict[str, bytes]:
    """{path: content} of a run, without the note of who is at work there."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if not p.name.startswith("run.")}


def start(folder: Path, **options: Any) -> Start:
    """What a run begins from, its way made."""
    config = Config(**(OPTIONS | {"resume": "auto", "output_dir": str(folder)} | options))
    start = Start(Comm(), config, RunFolder(str(folder)))
    start.make_way()
    start.close()
    return start


class _Torn(io.FileIO):
    """A file whose disk fails in the middle of it."""

    def read(self, *args: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    readall = read


Fail = Callable[..., list[str]]


def fail_at(name: str, code: int, times: int = 1 << 30, call: str = "open") -> list[str]:
    """From now on a system call on paths that end with `name` fails so many times; returns those that did."""
    owner: Any = io if call in ("open", "read") else os
    real = getattr(owner, "open" if call == "read" else call)
    failed: list[str] = []

    def failing(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).endswith(name) and len(failed) < times:
            failed.append(str(path))
            if call == "read":
                return _Torn(path)
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **options)

    setattr(owner, "open" if call == "read" else call, failing)
    files.PAUSES = (0.0, 0.0, 0.0)
    return failed


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """`fail_at`, until the test ends."""
    for owner, name in ((io, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (files, "PAUSES")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return fail_at


# ------------------------------------------------------------------------------------------------------------
# An error of the disk, or of its server.

FAULTS = [
    ("state.json", errno.ESTALE, "open"),
    ("manifest.json", errno.ESTALE, "open"),
    ("model.safetensors.index.json", errno.ETIMEDOUT, "open"),
    (SHARD, errno.ENFILE, "open"),
    (SHARD, errno.EIO, "read"),
    ("state.json", errno.EIO, "read"),
    (NEWEST, errno.ESTALE, "stat"),
    (NEWEST, errno.EIO, "scandir"),
    ("run/checkpoints", errno.ESTALE, "listdir"),
    ("run/checkpoints", errno.EIO, "stat"),
]


@pytest.mark.parametrize(("name", "code", "call"), FAULTS)
def test_an_error_that_passes_is_waited_for(
    name: str, code: int, call: str, run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(run)
    failed = fail(name, code, 3, call)
    begun = start(run)
    assert begun.position.round == 2 and begun.here and not begun.remarks
    assert len(failed) == 3
    monkeypatch.undo()
    after = everything(run)
    assert before.pop("metrics.jsonl").startswith(after.pop("metrics.jsonl"))  # without the summary
    assert after == before


@pytest.mark.parametrize(("name", "code", "call"), FAULTS)
def test_an_error_that_stays_stops_the_run_and_changes_nothing(
    name: str, code: int, call: str, run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(run)
    failed = fail(name, code, call=call)
    with pytest.raises(UnreadableError) as caught:
        start(run)
    line = str(caught.value)
    assert line.startswith(f"{failed[0]} cannot be read ({os.strerror(code)}, 4 times in a row): "), line
    assert "\n" not in line and caught.value.exit_code == 1
    if NEWEST in failed[0]:
        assert line.endswith(
            f"to go on without it move {run}/checkpoints/{NEWEST} away, to start afresh type --resume never"
        )
    monkeypatch.undo()
    assert everything(run) == before


@pytest.mark.parametrize("resume", ["auto", "never", "PATH"])
def test_a_right_that_is_lacking_is_said_at_once(
    resume: str, run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a run that starts afresh can tell what it would have to set aside."""
    before = everything(run)
    asked = str(run / "checkpoints" / NEWEST) if resume == "PATH" else resume
    failed = fail("run/checkpoints", errno.EACCES, call="listdir")
    with pytest.raises(UnreadableError, match=r"run/checkpoints cannot be read \(Permission denied\): "):
        start(run, resume=asked)
    monkeypatch.undo()
    assert len(failed) == 1 and everything(run) == before


@pytest.mark.parametrize("link", ["checkpoints", f"checkpoints/{NEWEST}"])
def test_a_link_whose_disk_is_not_mounted(link: str, run: Path) -> None:
    place = run.parent / "disk"
    (run / link).rename(place)
    (run / link).symlink_to(place)
    assert start(run).position.round == 2
    place.rename(run.parent / "unmounted")
    with pytest.raises(UnreadableError, match=f"{link} is a link to {place}, where nothing can be found"):
        start(run)


def on_a_bad_server(comm: Comm, folder: Path, options: dict[str, Any], name: str) -> Outcome:
    """The last rank's file handles are stale; what a rank has on its mind stays its own."""
    if comm.rank == comm.size - 1:
        fail_at(name, errno.ESTALE)
    return outcome(comm, folder, options)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", SHARD])
def test_another_rank_that_cannot_read_ends_all_in_one_line(
    name: str, run: Path, ranks: Ranks, tmp_path: Path
) -> None:
    before = everything(run)
    options = {"resume": "auto", "rounds": 3, "override": "rounds", "output_dir": str(run)}
    first, second = ranks(on_a_bad_server, 2, tmp_path, options, name)
    path = run / "checkpoints" / NEWEST / name
    assert (first.code, second) == (1, (1, ""))
    assert first.stderr.startswith(f"error: {path} cannot be read (Stale file handle, 4 times in a row): ")
    assert first.stderr.count("\n") == 1
    assert everything(run) == before


def test_the_tools_tell_damage_from_what_they_cannot_read(
    run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy
    import sys

    from tests import ROOT

    def verify() -> tuple[int, str]:
        path = str(ROOT / "tools" / "verify.py")
        monkeypatch.setattr(sys, "argv", [path, str(run / "checkpoints" / NEWEST)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return int(ended.value.code or 0), capsys.readouterr().err

    assert verify() == (0, "")
    failed = fail(SHARD, errno.EIO, 4, "read")
    code, said = verify()
    assert code == 2 and "cannot be read (Input/output error" in said and len(failed) == 4
    change(run / "checkpoints" / NEWEST / "state.json", lambda c: c.update(format=99))
    assert verify()[0] == 2
    _truncate(run / "checkpoints" / NEWEST / "state.json")
    assert verify()[0] == 1


def test_an_export_whose_source_fails_leaves_nothing(run: Path, fail: Fail, tmp_path: Path) -> None:
    checkpoint = Checkpoint.verified(run / "checkpoints" / NEWEST)
    fail(SHARD, errno.EIO)
    with pytest.raises(UnreadableError, match=f"{SHARD} cannot be read"):
        exporting.export(checkpoint, tmp_path / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ------------------------------------------------------------------------------------------------------------
# Nothing that can be used.


def test_auto_does_not_start_afresh_where_checkpoints_are(run: Path, ranks: Ranks, tmp_path: Path) -> None:
    for round in (1, 2):
        _truncate(run / "checkpoints" / f"round-00000{round}" / "manifest.json")
    before = everything(run)
    options = {"resume": "auto", "rounds": 1, "output_dir": str(run)}
    first, second = ranks(outcome, 2, tmp_path, options)
    assert (first.code, second) == (2, (2, ""))
    damaged = run / "checkpoints" / NEWEST / "manifest.json"
    assert first.stderr.startswith(f"error: --resume auto finds no sound checkpoint: {damaged} is damaged: ")
    assert first.stderr.endswith(
        ", and 1 before it are not sound either; to start afresh type --resume never, which sets aside what "
        "is there\n"
    )
    assert everything(run) == before
    (result,) = ranks(outcome, 1, tmp_path, {**options, "resume": "never"})
    assert result.code == 0 and checkpoints(run / "earlier-1") == ["round-000001", NEWEST]


# ------------------------------------------------------------------------------------------------------------
# Another version's.


def _sealed_otherwise(folder: Path) -> None:
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"state.json": "blake3:00"}, "algorithm": "b"})
    )
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 7}))


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "format": (
        lambda f: change(f / "state.json", lambda c: c.update(format=2, versions={"resist_ds": "9.0"})),
        f" is of format 2, written by resist_ds 9.0, and this version of resist_ds, {__version__}, reads 1",
    ),
    "seal": (_sealed_otherwise, " is of format 7, written by "),
    "lacks": (
        lambda f: change(f / "state.json", lambda c: [c.pop(n) for n in ("samples", "totals")]),
        f" lacks samples, totals, unlike those of this version of resist_ds, {__version__}: it was written "
        f"by resist_ds {__version__}",
    ),
    "has": (lambda f: change(f / "state.json", lambda c: c.update(colour="red")), " has colour, unlike "),
    "optimizer": (
        lambda f: change(f / "state.json", lambda c: c["optimizer"].update(kind="muon")),
        " has optimizer.kind, unlike ",
    ),
    "model": (
        lambda f: change(f / "state.json", lambda c: c.update(model="resnet5")),
        ": unknown --model resnet5",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("last", [False, True], ids=["an older one is sound", "none is"])
def test_another_versions_checkpoint_is_never_passed_over(kind: str, last: bool, run: Path) -> None:
    spoil, said = OTHERS[kind]
    spoil(run / "checkpoints" / NEWEST)
    if last:
        shutil.rmtree(run / "checkpoints" / "round-000001")
    before = everything(run)
    for resume in ("auto", str(run / "checkpoints" / NEWEST)):
        with pytest.raises(OtherVersionError) as caught:
            start(run, resume=resume)
        line = str(caught.value)
        assert line.startswith(f"{run}/checkpoints/{NEWEST}/state.json{said}"), line
        assert "\n" not in line and caught.value.exit_code == 2
        assert ("--resume never" in line) == (resume == "auto")
    assert everything(run) == before


def test_what_a_later_version_counts_or_asks_besides_is_no_reason_to_stop(
    run: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """But an option that is unknown here shaped what was trained, and is told."""
    from resist_ds.state.run_state import config_hash

    def later(content: dict[str, Any]) -> None:
        content["totals"]["joules"] = 3
        content["config"]["postage"] = "paid"
        content["config_hash"] = config_hash(content["config"])

    change(run / "checkpoints" / NEWEST / "state.json", later)
    options = {"resume": "auto", "rounds": 3, "override": "rounds", "output_dir": str(run)}
    (result,) = ranks(outcome, 1, tmp_path, options)
    said = "warning: the checkpoint's run had options that are unknown here: postage (paid)\n"
    assert result == (0, said)
    assert checkpoints(run) == ["round-000001", NEWEST, "round-000003"]


# ------------------------------------------------------------------------------------------------------------
# The records, and what a save leaves behind.


def test_records_that_cannot_be_read_stop_a_run_that_goes_on(
    run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they would go on behind those that it writes again."""
    before = everything(run)
    fail("metrics.jsonl", errno.EIO)
    with pytest.raises(UnreadableError, match=r"metrics\.jsonl cannot be read \(Input/output error"):
        start(run)
    monkeypatch.undo()
    assert everything(run) == before


def test_a_fresh_run_does_not_write_over_records_that_it_cannot_see(
    run: Path, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(run)
    fail("metrics.jsonl", errno.EACCES, call="stat")
    with pytest.raises(UnreadableError, match=r"metrics\.jsonl cannot be read \(Permission denied\)"):
        start(run, resume="never")
    monkeypatch.undo()
    assert everything(run) == before


@pytest.mark.parametrize(
    "odd", [b"\0\0\0\0", b"5", b"[]", b"{}", b'{"kind": "round"}', b"\xff\xfe{", b"[" * 9999]
)
def test_lines_that_are_no_records_are_kept_aside(odd: bytes, run: Path) -> None:
    """A torn last line is what a kill leaves, and nothing to keep."""
    records = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in records if json.loads(line)["kind"] != "summary"]
    (run / "metrics.jsonl").write_bytes(b"".join(kept) + odd)
    assert start(run).remarks == []
    assert (run / "metrics.jsonl").read_bytes() == b"".join(kept)
    spoilt = b"".join([kept[0], odd, b"\n", *kept[1:]])
    (run / "metrics.jsonl").write_bytes(spoilt)
    assert start(run).remarks == [f"records with lines that are none are now in {run}/earlier-1"]
    assert (run / "metrics.jsonl").read_bytes() == b"".join(kept)
    assert (run / "earlier-1" / "metrics.jsonl").read_bytes() == spoilt
    assert len(newest_first(run / "checkpoints")) == 2


def test_a_checkpoint_that_made_way_comes_back_if_its_successor_did_not(run: Path) -> None:
    """A save of the same round that was killed between its two renames."""
    before = digest(run / "checkpoints" / NEWEST)
    (run / "checkpoints" / NEWEST).rename(run / "checkpoints" / f"{REPLACED}{NEWEST}-0a1b2c3d")
    shutil.copytree(
        run / "checkpoints" / "round-000001", run / "checkpoints" / f"{REPLACED}round-000001-00ff"
    )
    folder = RunFolder(str(run))
    folder.take()
    folder.release()
    assert checkpoints(run) == ["round-000001", NEWEST]
    assert digest(run / "checkpoints" / NEWEST) == before


def pruning_fails(comm: Comm, options: dict[str, Any], code: int) -> list[str]:
    """Old checkpoints cannot be looked at while one is saved; returns what has failed."""
    prune, failed = Saver._prune, []

    def without_sight(self: Saver) -> None:
        if not failed:
            failed.extend(fail_at("checkpoints", code, call="listdir"))
        prune(self)

    Saver._prune = without_sight  # type: ignore[method-assign]
    train(comm, options)
    return failed


def test_a_save_is_done_though_old_checkpoints_cannot_be_removed(ranks: Ranks, tmp_path: Path) -> None:
    ranks(pruning_fails, 1, {"rounds": 3, "keep": 1, "output_dir": str(tmp_path)}, errno.EIO)
    assert checkpoints(tmp_path) == ["round-000001", NEWEST, "round-000003"]
    assert [r["round"] for r in loss_log(tmp_path) if r["kind"] == "round"] == [1, 2, 3]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [r["round"] for r in records if r["kind"] == "checkpoint"] == [1, 2, 3]


def test_kinds_of_error() -> None:
    """Who catches damage must not catch these."""
    assert not issubclass(UnreadableError, DamagedError | UserError | OSError)
    assert not issubclass(OtherVersionError, DamagedError)
    assert issubclass(OtherVersionError, RunError)

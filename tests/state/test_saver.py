"""A checkpoint that cannot be written: older ones stay as they are, nothing is left over, the run goes on."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.state import storage
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.storage import Entry
from resist_ds.trainer import Trainer
from tests.conftest import Ranks
from tests.run.test_errors import Outcome
from tests.saved import checkpoints, digest, outcome, tensors, train
from tests.state.test_damage import FILES

pytestmark = pytest.mark.ranks

ROUND = "round-000002"  # the save that fails
WRITTEN_BY = {name: int("00002-of" in name) for name in FILES}  # rank


def fill_disk(name: str, how: str) -> None:
    """The disk is full in the middle of `name`, whenever the checkpoint of `ROUND` is written."""
    write = storage.write

    def limited(path: Path, parts: Any) -> Entry:
        if path.name != name or ROUND not in str(path.parent):
            return write(path, parts)
        if how == "error":  # of a disk that fails
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return write(path, parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    storage.write = limited


def on_full_disk(comm: Comm, folder: Path, options: dict[str, Any], name: str, how: str) -> Outcome:
    fill_disk(name, how)
    return outcome(comm, folder, options)


@pytest.mark.parametrize("background", [False, True], ids=["", "in the background"])
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_while_a_file_is_written(
    name: str, background: bool, ranks: Ranks, tmp_path: Path
) -> None:
    options = {"rounds": 3, "checkpoint_async": background, "output_dir": str(tmp_path / "run")}
    first, second = ranks(on_full_disk, 2, tmp_path, options, name, "limit")
    assert (first.code, second) == (0, (0, ""))
    who = "rank 1: " if WRITTEN_BY[name] else "rank 0: " if name.endswith("safetensors") else ""
    assert first.stderr == (
        f"warning: the checkpoint of round 2 was not written ({who}File too large ({name})); "
        "older ones are as before\n"
    )
    assert checkpoints(tmp_path / "run") == ["round-000001", "round-000003"]
    for kept in checkpoints(tmp_path / "run"):
        Checkpoint.verified(tmp_path / "run" / "checkpoints" / kept).close()


@pytest.mark.parametrize(
    ("how", "reason"), [("limit", "File too large"), ("error", "Input/output error")], ids=["full", "failing"]
)
def test_a_run_that_shall_stop_then(how: str, reason: str, ranks: Ranks, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    ranks(train, 2, {"rounds": 3, "output_dir": str(whole)})
    name = "model-00002-of-00002.safetensors"
    options = {"rounds": 3, "checkpoint_errors": "stop", "output_dir": str(tmp_path / "run")}
    results = ranks(on_full_disk, 2, tmp_path, options, name, how)
    line = f"error: the checkpoint of round 2 was not written (rank 1: {reason} ({name})); "
    assert results == [(1, f"{line}older ones are as before\n"), (1, "")]
    assert checkpoints(tmp_path / "run") == ["round-000001"]
    # nothing was lost: it goes on from there
    ranks(train, 1, {"rounds": 3, "resume": "auto", "output_dir": str(tmp_path / "run")})
    for kept in checkpoints(whole):
        assert digest(tmp_path / "run" / "checkpoints" / kept) == digest(whole / "checkpoints" / kept)


def stopped_on_full_disk(comm: Comm, folder: Path, options: dict[str, Any]) -> Outcome:
    """A signal comes in the round whose save fails."""
    local_steps = Trainer._local_steps

    def with_signal(self: Trainer, round: int, *args: Any) -> Any:
        report = local_steps(self, round, *args)
        return replace(report, signal=signal.SIGTERM) if round == 1 else report

    Trainer._local_steps = with_signal  # type: ignore[method-assign]
    return on_full_disk(comm, folder, options, "state.json", "limit")


def test_a_stop_whose_checkpoint_fails_says_from_where_the_run_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    (result,) = ranks(stopped_on_full_disk, 1, tmp_path, {"rounds": 3, "output_dir": str(tmp_path / "run")})
    assert result.code == 143
    assert result.stderr.splitlines()[-1] == (
        "stopped by SIGTERM after round 2 of 3; --resume auto goes on from round 1"
    )


def test_the_last_checkpoint_is_the_trained_model(ranks: Ranks, tmp_path: Path) -> None:
    """Without it the run was for nothing: that is no warning."""
    options = {"rounds": 2, "output_dir": str(tmp_path / "run")}
    results = ranks(on_full_disk, 2, tmp_path, options, "state.json", "limit")
    assert [r.code for r in results] == [1, 1]
    assert results[0].stderr.startswith(
        "error: the checkpoint of round 2 was not written (File too large (state"
    )
    assert checkpoints(tmp_path / "run") == ["round-000001"]


def with_a_disk_of_its_own(comm: Comm, folder: Path, options: dict[str, Any], made: bool) -> Outcome:
    """The last rank's machine has the same paths, and a disk of its own behind them."""
    write = storage.write_safetensors

    def elsewhere(path: Path, *args: Any) -> Entry:
        there = folder / "other machine" / path.relative_to("/")
        if made:
            there.parent.mkdir(parents=True, exist_ok=True)
        return write(there, *args)

    if comm.rank == comm.size - 1:
        storage.write_safetensors = elsewhere
    return outcome(comm, folder, options)


@pytest.mark.parametrize("made", [False, True])
def test_machines_that_share_no_file_system(made: bool, ranks: Ranks, tmp_path: Path) -> None:
    """The other one cannot write, or writes where rank 0 does not find it."""
    options = {"rounds": 1, "output_dir": str(tmp_path / "run")}
    first, second = ranks(with_a_disk_of_its_own, 2, tmp_path, options, made)
    assert (first.code, second) == (1, (1, ""))
    missing = "No such file or directory (model-00002-of-00002.safetensors)"
    shared = "--output_dir must be on a file system that all machines share"
    assert f"was not written ({'' if made else 'rank 1: '}{missing}: {shared}); " in first.stderr
    assert checkpoints(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2800k", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_with_room_for_one_checkpoint(small_disk: Path, ranks: Ranks, tmp_path: Path) -> None:
    """1.8 MB each: every save after the first finds the disk full, by the kernel's own count."""
    options = {"model": "preact_resnet_small", "rounds": 2, "checkpoint_errors": "stop"}
    first, second = ranks(outcome, 2, tmp_path, {**options, "output_dir": str(small_disk / "run")})
    assert (first.code, second) == (1, (1, ""))
    reason = r"No space left on device \([a-z]+[-.].*\)"
    line = rf"error: the checkpoint of round 2 was not written \((rank [01]: )?{reason}\); .*\n"
    assert re.fullmatch(line, first.stderr)
    assert checkpoints(small_disk / "run") == ["round-000001"]
    Checkpoint.verified(small_disk / "run" / "checkpoints" / "round-000001").close()
    assert len(tensors(small_disk / "run" / "checkpoints" / "round-000001")) == 235

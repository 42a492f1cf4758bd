"""Loader processes that fail: what they had read is read again, and nobody waits for what will not come."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resist_ds.data import images
from resist_ds.data.datasets import load_data
from resist_ds.data.images import Batch, Decode, Files, OnDisk
from resist_ds.data.loader import AHEAD, Stream, check_shared_memory
from resist_ds.data.trouble import Trouble
from resist_ds.errors import DataError, UserError
from resist_ds.options.config import Config

MB = 10**6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(noise.integers(0, 255, (20, 20, 3), np.uint8)).save(place / f"{number:02}.png")
    return Files([str(path) for path in sorted(place.iterdir())], torch.arange(12))


class Unsendable:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


class Lossy(Decode):
    """Some of what it reads cannot be sent."""

    def __getitem__(self, task: Any) -> Any:
        loaded = super().__getitem__(task)
        return (Unsendable(), loaded[1]) if task[0] == 3 and torch.utils.data.get_worker_info() else loaded


class Deadly(Decode):
    """It ends its process."""

    def __getitem__(self, task: Any) -> Any:
        if task[0] == 3 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(task)


SCHEDULE = [(epoch, np.arange(12)[::-1][epoch::5]) for epoch in range(9)]


def alike(batches: list[Batch], expected: list[Batch]) -> bool:
    return len(batches) == len(expected) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.epoch == b.epoch
        for a, b in zip(batches, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("decode", "said"),
    [
        (Lossy(16, 0), "a batch was lost on its way from a loader process ([Errno 28] No space left on"),
        (Deadly(16, 0), "a loader process ended (DataLoader worker (pid"),
    ],
)  # fmt: skip
def test_the_rank_reads_on_when_a_loader_process_fails(files: Files, decode: Decode, said: str) -> None:
    expected = [*OnDisk(files, Decode(16, 0), 0, Trouble()).stream(SCHEDULE, CPU)]
    trouble = Trouble()
    start = time.monotonic()
    assert alike([*OnDisk(files, decode, 2, trouble).stream(iter(SCHEDULE), CPU)], expected)
    assert (
        time.monotonic() - start < 40
    )  # torch looks after its processes every 5 s; a lost batch stood for ever
    line = trouble.take().loader
    assert line is not None and line.startswith(said) and "\n" not in line and not active_children()


@pytest.mark.parametrize("kind", [Decode, Lossy, Deadly])
@pytest.mark.parametrize("processes", [0, 2])
def test_batches_are_the_same_whatever_tasks_they_are_cut_into(
    files: Files, kind: type[Decode], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where loader processes fail in the middle of a batch."""
    schedule = [(epoch, np.arange(12)[: 12 - epoch]) for epoch in range(5)]  # parts of unequal size
    expected = [*OnDisk(files, Decode(16, 0), 0, Trouble()).stream(schedule, CPU)]
    monkeypatch.setattr(images, "TASK", 5)
    trouble = Trouble()
    found = [*OnDisk(files, kind(16, 0), processes, trouble).stream(schedule, CPU)]
    assert alike(found, expected)
    assert [b.samples.tolist() for b in found] == [samples.tolist() for _, samples in schedule]
    assert (trouble.take().loader is not None) == (processes > 0 and kind is not Decode)


@pytest.mark.parametrize("task", [3, 32])
def test_no_more_batches_are_read_ahead_than_shared_memory_was_checked_for(
    files: Files, task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no fewer, so that smaller tasks keep the processes as busy through a pause of the rank."""
    monkeypatch.setattr(images, "TASK", task)
    drawn = 0

    def schedule() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal drawn
        for epoch in range(20):
            drawn += 1
            yield epoch, np.arange(12)

    ahead = []
    for got, _ in enumerate(OnDisk(files, Decode(16, 0), 2, Trouble()).stream(schedule(), CPU), start=1):
        ahead.append(drawn - got)
    assert max(ahead) == AHEAD * 2 and Stream(1).waiting(2) >= max(ahead) + 2


def test_what_keeps_even_the_rank_from_reading_is_one_line(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda path: (_ for _ in ()).throw(MemoryError()))
    stream = OnDisk(files, Decode(16), 0, Trouble()).stream(SCHEDULE, CPU)
    with pytest.raises(DataError, match=r"^cannot read the image .*11.png: MemoryError$"):
        next(stream)


# ------------------------------------------------------------------------------------------------------------
# Shared memory


def has(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = lambda path: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)  # noqa: E731
    monkeypatch.setattr(os, "statvfs", asked)


def test_shared_memory_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = (Stream(10 * MB), Stream(MB, batches=4))
    needed = {0: 0, 1: 44 * MB, 2: 64 * MB, 3: 84 * MB}  # (2 n + 2) × 10 MB, and 4 at most of 1 MB
    for processes, each in needed.items():
        for ranks in (1, 3):
            has(each * ranks + 4096, monkeypatch)
            check_shared_memory(processes, streams, ranks)
            if processes:
                has(each * ranks - 4096, monkeypatch)
                with pytest.raises(UserError) as caught:
                    check_shared_memory(processes, streams, ranks)
                fewer = f"--data_workers {processes - 1}" + (" or fewer" if processes > 1 else "")
                said = f"loader processes ({processes} per rank) need up to {each * ranks // MB} MB of shared"
                assert str(caught.value).startswith(said), str(caught.value)
                assert f"type {fewer}, or give it more (docker run --shm-size " in str(caught.value)


def test_a_system_without_dev_shm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(path: str) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(os, "statvfs", none)
    check_shared_memory(9, (Stream(10**12),), 8)


def test_images_in_memory_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    has(0, monkeypatch)
    load_data(Config(dataset="synthetic", img_size=8)).check_shared_memory(Config(), 4)


@pytest.fixture
def crowded() -> Iterator[list[str]]:
    """The begin of a command for which /dev/shm has 1 MB, while it has what it has for all others."""
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"',
        "sh",
    ]
    try:
        able = subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        able = False
    if not able:
        pytest.skip("needs root, for a /dev/shm of its own")
    yield command


REAL = """
import sys, numpy, torch
from resist_ds.data.images import Decode, Files, OnDisk
from resist_ds.data.loader import Stream, check_shared_memory
from resist_ds.data.trouble import Trouble
from resist_ds.errors import UserError

if __name__ == "__main__":
    try:
        check_shared_memory(2, (Stream(4 * 3 * 224 * 224),), 1)
    except UserError as error:
        print(error)
    trouble = Trouble()
    source = OnDisk(Files(sys.argv[1:], torch.arange(12)), Decode(224, 0), 2, trouble)
    print(sum(len(batch.labels) for batch in source.stream([(0, numpy.arange(4))] * 9, torch.device("cpu"))))
    print(trouble.take().loader)
"""


def test_a_real_dev_shm_that_is_too_small(files: Files, crowded: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(REAL)
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [*crowded, sys.executable, str(script), *files.paths],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    refused, read, lost = ended.stdout.splitlines()
    assert "need up to 4 MB of shared memory on this machine, and /dev/shm has 1 MB free: type" in refused
    assert read == "36"
    assert lost.startswith(
        "a batch was lost on its way from a loader process (unable to allocate shared memory"
    )
    assert lost.endswith("give /dev/shm more room (docker run --shm-size), or type a smaller --data_workers")

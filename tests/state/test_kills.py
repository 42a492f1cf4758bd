"""Killed at any moment, in a save above all, a run that is resumed ends with the bits of one that was not.

Each kill is a SIGKILL drawn from a seed: of a rank, in the middle of one of the system calls of a save; of
one rank or all of them at any time; of a launcher. Resumed, on another number of ranks, the run must come to
the same weights, momentum and loss log. `make soak` does it fifty times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.state import storage
from resist_ds.state.checkpoint import Checkpoint, newest_first
from resist_ds.state.folder import PARTIAL
from resist_ds.state.saver import Saver
from tests import ROOT
from tests.conftest import _CONTEXT, _rank, run_ranks
from tests.run.test_launchers import clean_environment, command, descendants
from tests.saved import OPTIONS, checkpoints, digest, loss_log, train

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]

ROUNDS = 8
RUN: dict[str, Any] = {"model": "preact_resnet_small", "rounds": ROUNDS, "keep": 3}
PATIENCE = 60  # seconds for one attempt


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        where: "save": the rank `rank` kills itself at the `event`-th system call that it makes in a save;
            "rank", "ranks": one or all are killed after `delay` seconds; else the launcher that is killed.
        in_save: whether a launcher is killed as soon as a save is seen.
    """

    where: str
    size: int
    rank: int
    event: int
    delay: float
    in_save: bool
    background: bool


def draw(rng: random.Random, where: str) -> Kill:
    size = rng.choice([1, 2, 3])
    rank = rng.randrange(size)
    event = rng.randrange(60 if rank == 0 else 12)  # a save has about 25 of rank 0 and 6 of each other rank
    return Kill(where, size, rank, event, rng.uniform(0.2, 1.5), rng.random() < 0.5, rng.random() < 0.3)


# ------------------------------------------------------------------------------------------------------------
# In a rank: die at a certain system call of a save.


class Trap:
    """Counts the system calls of saves, and kills this process at one of them, before, after or half-way."""

    def __init__(self, event: int, note: Path):
        self.left = event
        self.note = note
        self.depth = 0

    def set(self) -> None:
        for name in ("start", "_write", "settle"):
            setattr(Saver, name, self._inside(getattr(Saver, name)))
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
            setattr(owner, name, self._event(getattr(owner, name)))
        write = storage.write

        def half(path: Path, parts: Any) -> Any:
            def some() -> Iterator[Any]:
                for part in parts:
                    if self._now():
                        yield memoryview(part)[: len(part) // 2]
                        self._die(f"half of {path.name}")
                    yield part

            return write(path, some())

        storage.write = half

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            self.depth += 1
            try:
                return function(*args)
            finally:
                self.depth -= 1

        return wrapped

    def _event(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            if not self._now():
                return function(*args, **options)
            if self.left % 2:
                function(*args, **options)
            self._die(function.__name__)

        return wrapped

    def _now(self) -> bool:
        self.left -= self.depth > 0
        return self.left < 0

    def _die(self, what: str) -> None:
        self.note.write_text(what)
        os.kill(os.getpid(), signal.SIGKILL)


def play(comm: Comm, options: dict[str, Any], kill: Kill | None, note: Path) -> None:
    if kill and kill.where == "save" and kill.rank == comm.rank:
        Trap(kill.event, note).set()
    train(comm, options)


# ------------------------------------------------------------------------------------------------------------
# An attempt: a run that is resumed, and perhaps killed.


def attempt(options: dict[str, Any], kill: Kill | None, size: int, place: Path) -> bool:
    """Go on until the run is complete or a process is dead; leaves no process.

    Returns:
        whether the kill came before the end.
    """
    results = _CONTEXT.Queue()
    note = place / "note"
    store = str(place / f"store-{time.monotonic_ns()}")
    ranks = [
        _CONTEXT.Process(
            target=_rank, args=(play, r, size, store, results, (options, kill, note)), daemon=True
        )
        for r in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        if kill and kill.where in ("rank", "ranks"):
            time.sleep(kill.delay)
            for process in ranks if kill.where == "ranks" else [ranks[kill.rank]]:
                process.kill()
        deadline = time.monotonic() + PATIENCE
        while all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() < deadline, "hung"
        if kill is None:
            for process in ranks:
                process.join(20)
            errors = [error for _, _, error in (results.get(timeout=5) for _ in ranks) if error]
            assert not errors, errors[0]
        ranks[0 if kill is None else kill.rank].join(PATIENCE)
        return any(process.exitcode == -signal.SIGKILL for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def attempt_launched(options: dict[str, Any], kill: Kill, folder: Path) -> tuple[bool, bool]:
    """Two ranks under a real launcher, which is killed in a later round.

    Returns:
        whether it was killed before the end, and whether that was in a save.
    """
    train_py = ROOT / "train.py"
    typed = [word for name, value in options.items() for word in (f"--{name}", str(value).lower())]
    typed[typed.index("--output_dir") + 1] = str(folder)
    before = len(loss_log(folder)) if (folder / "metrics.jsonl").exists() else 0
    process = subprocess.Popen(
        [*command(kill.where, train_py), *typed],
        cwd=folder.parent,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    saves = folder / "checkpoints"
    family: list[int] = []
    try:
        deadline = time.monotonic() + PATIENCE

        def partial() -> bool:
            return any(name.startswith(PARTIAL) for name in (os.listdir(saves) if saves.exists() else []))

        def begun() -> bool:
            return (folder / "metrics.jsonl").exists() and len(loss_log(folder)) > before

        while process.poll() is None and time.monotonic() < deadline and not begun():
            time.sleep(0.002)
        while kill.in_save and process.poll() is None and time.monotonic() < deadline and not partial():
            pass
        in_save = partial()
        family = descendants(process.pid)
        killed = process.poll() is None
        process.kill()
        process.wait()
        # deepspeed's inner process passes nothing on; its ranks end their round and leave
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in family if Path(f"/proc/{pid}").exists()], "orphans"
        return killed, in_save
    finally:
        for pid in [process.pid, *family]:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody killed."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_ranks(train, 2, RUN | {"output_dir": str(folder)}, store=folder.with_name("store"))
    return folder


def survives(kills: Sequence[Kill], reference: Path, place: Path, rng: random.Random) -> tuple[int, int]:
    """Kill a run again and again, let it end, and compare; returns (kills, those of them in a save)."""
    folder = place / "run"
    options = RUN | {"resume": "auto", "output_dir": str(folder)}
    done = inside = 0
    for kill in kills:
        given = options | {"checkpoint_async": kill.background}
        newest = newest_first(folder / "checkpoints")
        if newest and newest[0].name == f"round-{ROUNDS:06d}":
            shutil.rmtree(folder)  # it was complete before it was killed: once more from the start
        (place / "note").unlink(missing_ok=True)
        if kill.where in ("save", "rank", "ranks"):
            killed = attempt(given, kill, kill.size, place)
            in_save = (place / "note").exists() or any((folder / "checkpoints").glob(f"{PARTIAL}*"))
        else:
            killed, in_save = attempt_launched(OPTIONS | given, kill, folder)
        done, inside = done + killed, inside + (killed and in_save)
        # whatever was there when it died is whole
        for checkpoint in newest_first(folder / "checkpoints"):
            Checkpoint.verified(checkpoint).close()
    attempt(options, None, rng.choice([1, 2, 3]), place)
    names = [f"round-{round:06d}" for round in (ROUNDS - 2, ROUNDS - 1, ROUNDS)]
    assert checkpoints(folder) == checkpoints(reference) == names
    for name in names:
        assert digest(folder / "checkpoints" / name) == digest(reference / "checkpoints" / name), name
    assert loss_log(folder) == loss_log(reference)
    return done, inside


def campaign(count: int, rng: random.Random, kinds: Sequence[str], reference: Path, place: Path) -> None:
    """Runs that are killed once to three times each, until so many kills have come before a run's end."""
    done = inside = i = 0
    while done < count:
        chain = [kinds[(i + k) % len(kinds)] for k in range(rng.choice([1, 2, 3]))]
        i += len(chain)
        kills = [draw(rng, kind) for kind in chain]
        here = place / str(i)
        here.mkdir()
        more, of_them = survives(kills, reference, here, rng)
        done, inside = done + more, inside + of_them
        drawn = ", ".join(f"{k.where} (R = {k.size}, rank {k.rank}, call {k.event})" for k in kills)
        print(f"{done} kills, {inside} of them in a save; last: {drawn}", flush=True)
        assert i < 3 * count, "most kills come too late"
    assert inside >= 0.4 * done


@pytest.mark.timeout(300)
def test_six_kills(reference: Path, tmp_path: Path) -> None:
    kinds = ["save", "rank", "save", "save", "torchrun", "save", "ranks", "save", "save", "save", "rank"]
    campaign(6, random.Random(8), kinds, reference, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fifty_kills(reference: Path, tmp_path: Path) -> None:
    """None of fifty may end in other bits."""
    kinds = ["save", "torchrun", "save", "rank", "save", "accelerate", "save", "ranks", "save", "deepspeed"]
    campaign(50, random.Random(50), kinds, reference, tmp_path)

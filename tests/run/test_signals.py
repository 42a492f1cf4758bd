"""Being asked to stop: the round is finished and saved if the grace allows, and nothing is left running."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.options.config import Config
from resist_ds.signals import Signals
from resist_ds.state import saver
from resist_ds.state.checkpoint import Checkpoint, newest_first
from resist_ds.state.folder import PARTIAL
from tests.conftest import _CONTEXT
from tests.run.test_errors import TINY
from tests.run.test_launchers import (
    JOB,
    OUR_TRACEBACK,
    TRAIN,
    clean_environment,
    command,
    descendants,
    free_port,
)
from tests.saved import digest, loss_log

pytestmark = pytest.mark.ranks

ROUNDS, ASKED = 6, 3  # the request comes in the third round
OPTIONS = TINY | {"workers": 2, "rounds": ROUNDS, "eval_every": 2, "checkpoint_every": 2, "grace": 60.0}
ENDLESS = {"rounds": 1_000_000, "eval_every": 0, "checkpoint_every": 0}
FINISHED = f"stopped by {{}} after round {ASKED} of {ROUNDS}; --resume auto goes on from there\n"
TOO_LONG = "error: stopped by SIGTERM; it took longer than --grace 0.5: what the round trained is lost\n"
SECOND = "error: stopped by {}; a second signal came: what the round trained is lost\n"
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
NOT_BEGUN = "error: stopped by {}; training had not begun\n"


def until(true: Callable[[], Any], what: str, seconds: float = 30) -> None:
    """Poll, and fail where it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------
# On the ranks. They speak to the test through files.


def life(rank: int, size: int, folder: Path, store: str, options: dict[str, Any], plan: str) -> None:
    """What `train.py` does on a rank once its options are parsed, to the end of the process."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    begin(folder, rank)
    torch.set_num_threads(1)
    comm = Comm(init_method=f"file://{store}")
    trainer.Comm = lambda: comm  # type: ignore[assignment,misc]
    if plan:
        PLANS[plan](folder, comm)
    os._exit(trainer.main(Config(**options)))


def begin(folder: Path, rank: int) -> None:
    """Like `train.py`, and its streams go into files."""
    with (folder / f"stderr{rank}").open("w") as stderr, (folder / f"stdout{rank}").open("w") as stdout:
        os.dup2(stderr.fileno(), 2)
        os.dup2(stdout.fileno(), 1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def lonely(folder: Path, port: str) -> None:
    """The life of a rank whose only peer never comes."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    begin(folder, 0)

    def meet() -> Comm:
        (folder / "reached0").touch()
        return Comm()

    trainer.Comm = meet  # type: ignore[assignment,misc]
    os._exit(trainer.main(Config(**OPTIONS, output_dir=str(folder / "run"))))


def requests(folder: Path, rank: int) -> int:
    """How many requests a rank has taken notice of."""
    file = folder / f"requests{rank}"
    return file.stat().st_size if file.exists() else 0


class Counted(Signals):
    """Tells the test how many requests have come."""

    folder: Path

    def _request(self, signum: signal.Signals) -> None:
        super()._request(signum)
        with (self.folder / f"requests{self._launch.rank}").open("a") as file:
            file.write(".")


def in_round(folder: Path, comm: Comm, act: Callable[[], object]) -> None:
    """Let a rank say when it has reached the round, and `act` before it trains."""
    Counted.folder = folder
    trainer.Signals = Counted  # type: ignore[misc]
    train, calls, each = trainer.local_steps, [0], max(1, 2 // comm.size)

    def local_steps(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == (ASKED - 1) * each + 1:
            (folder / f"reached{comm.rank}").touch()
            act()
        return train(*args, **kwargs)

    trainer.local_steps = local_steps


def is_asked(times: int, *those: int) -> Callable[[Path, Comm], None]:
    """Some ranks train on once they have been asked; the others do not wait."""

    def plan(folder: Path, comm: Comm) -> None:
        def asked() -> bool:
            return requests(folder, comm.rank) >= times

        in_round(folder, comm, lambda: comm.rank in those and until(asked, "a request"))

    return plan


def slow_steps(folder: Path, comm: Comm) -> None:
    in_round(folder, comm, lambda: until(lambda: False, "nothing, which may take", 60))


def one_long_call(folder: Path, comm: Comm) -> None:
    in_round(folder, comm, lambda: time.sleep(60))


def slow_other(folder: Path, comm: Comm) -> None:
    """All ranks but the last wait for it, in a collective."""
    in_round(folder, comm, lambda: comm.rank < comm.size - 1 or time.sleep(60))


def slow_save(folder: Path, comm: Comm) -> None:
    """The round is done in time; its checkpoint lacks the last file."""

    def act() -> None:
        until(lambda: requests(folder, comm.rank) >= 1, "a request")
        saver.storage.seal = lambda *args: time.sleep(60)  # type: ignore[assignment]

    in_round(folder, comm, act)


def slow_end(folder: Path, comm: Comm) -> None:
    """All is saved, and a tracker takes its time to close."""
    is_asked(1, 0, 1)(folder, comm)
    trainer.Telemetry.__exit__ = lambda *args: time.sleep(60)  # type: ignore[method-assign,assignment]


def slow_data(folder: Path, comm: Comm) -> None:
    def load_data(config: Config) -> Any:
        (folder / f"reached{comm.rank}").touch()
        time.sleep(60)

    trainer.load_data = load_data


PLANS: dict[str, Callable[[Path, Comm], None]] = {
    "asked rank 0": is_asked(1, 0),
    "asked rank 1": is_asked(1, 1),
    "asked twice": is_asked(2, 0, 1),
    "slow steps": slow_steps,
    "one long call": one_long_call,
    "slow other": slow_other,
    "slow save": slow_save,
    "slow end": slow_end,
    "slow data": slow_data,
}


# ------------------------------------------------------------------------------------------------------------
# In the test.


@dataclass
class Job:
    """Ranks that run, or have run."""

    folder: Path
    ranks: list[Any]

    def reached(self, *those: int) -> None:
        """Wait until these ranks are where the plan says."""
        for rank in those:
            until((self.folder / f"reached{rank}").exists, f"rank {rank} is there")

    def signal(self, signum: int, *those: int) -> None:
        for rank in those:
            os.kill(self.ranks[rank].pid, signum)

    def ended(self, seconds: float = 30) -> list[int]:
        """Exit codes, once all ranks have ended."""
        until(lambda: all(p.exitcode is not None for p in self.ranks), "all ranks have ended", seconds)
        return [p.exitcode for p in self.ranks]

    @property
    def stderr(self) -> list[str]:
        return [(self.folder / f"stderr{rank}").read_text() for rank in range(len(self.ranks))]


@contextmanager
def job(size: int, folder: Path, output: Path, plan: str = "", **options: Any) -> Iterator[Job]:
    """Start ranks; kill what is left of them at the end."""
    folder.mkdir()
    arguments = (folder, str(folder / "rendezvous"), OPTIONS | {"output_dir": str(output)} | options, plan)
    ranks = [_CONTEXT.Process(target=life, args=(r, size, *arguments), daemon=True) for r in range(size)]
    try:
        for process in ranks:
            process.start()
        yield Job(folder, ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join(10)


def trained(size: int, folder: Path, output: Path, **options: Any) -> None:
    """A run to its end."""
    with job(size, folder, output, **options) as run:
        assert (run.ended(60), run.stderr) == ([0] * size, [""] * size)


def sound(output: Path) -> list[int]:
    """The rounds of all checkpoints, newest first, each of which has been verified."""
    rounds = []
    for path in newest_first(output / "checkpoints"):
        checkpoint = Checkpoint.verified(path)
        rounds.append(checkpoint.state.round)
        checkpoint.close()
    return rounds


def last(output: Path) -> Path:
    """The newest checkpoint."""
    return newest_first(output / "checkpoints")[0]


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that are of a kind."""
    file = output / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [r for r in map(json.loads, (line for line in lines if line[-1] == "\n")) if r["kind"] == kind]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(("size", "asked"), [(1, 0), (2, 0), (2, 1)])
def test_round_is_finished_and_saved(size: int, asked: int, signum: signal.Signals, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with job(size, tmp_path / "ranks", output, f"asked rank {asked}") as run:
        run.reached(asked)
        run.signal(signum, asked)
        assert run.ended() == [128 + signum] * size
    assert run.stderr == [FINISHED.format(signum.name)] + [""] * (size - 1)
    assert sound(output) == [ASKED, ASKED - 1]
    assert [r["round"] for r in records(output, "round")] == [1, 2, 3]
    assert records(output, "summary") == []


@pytest.mark.parametrize(("size", "team"), [(2, {}), (4, {"team_size": 2, "team_strategy": "fsdp"})])
def test_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(
    size: int, team: dict[str, Any], tmp_path: Path
) -> None:
    never, stopped = tmp_path / "never", tmp_path / "stopped"
    trained(size, tmp_path / "first", never, **team)
    with job(size, tmp_path / "second", stopped, "asked rank 1", **team) as run:
        run.reached(1)
        run.signal(signal.SIGTERM, 1)
        assert run.ended() == [143] * size
    trained(size, tmp_path / "third", stopped, resume="auto", **team)
    assert sound(stopped)[0] == sound(never)[0] == ROUNDS
    assert digest(last(stopped)) == digest(last(never))
    assert loss_log(stopped) == loss_log(never)
    assert {"train/loss"} < records(never, "round")[-1].keys() and len(
        loss_log(never)
    ) == ROUNDS + ROUNDS // 2


@pytest.mark.parametrize(
    ("size", "plan"),
    [(1, "slow steps"), (2, "one long call"), (2, "slow other"), (2, "slow save"), (4, "slow other")],
)
def test_grace_ends_before_the_round(size: int, plan: str, tmp_path: Path) -> None:
    """Whatever the main thread is doing, in a team's step too, the process ends; the checkpoint before is
    as it was."""
    output = tmp_path / "run"
    with job(size, tmp_path / "ranks", output, plan, grace=0.5, team_size=max(1, size // 2)) as run:
        run.reached(*range(size))
        asked = time.monotonic()
        run.signal(signal.SIGTERM, *range(size))
        assert run.ended(5) == [143] * size
        assert time.monotonic() - asked >= 0.5
    assert run.stderr == [TOO_LONG] + [""] * (size - 1)
    assert sound(output) == [ASKED - 1]
    left = [path.name for path in (output / "checkpoints").glob(f"{PARTIAL}*")]
    assert len(left) == (plan == "slow save")
    if left:  # a half-written checkpoint is in nobody's way
        again, checkpoints = tmp_path / "again", output / "checkpoints"
        trained(size, again, output, resume="auto")
        assert f"{checkpoints / 'round-000002'}: 2 rounds are done" in (again / "stdout0").read_text()
        assert sound(output)[0] == ROUNDS
        assert sorted(path.name for path in checkpoints.iterdir()) == [
            f"round-00000{round}" for round in (2, 4, 6)
        ]


def test_what_was_saved_is_not_called_lost(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with job(2, tmp_path / "ranks", output, "slow end", grace=2.0) as run:
        run.reached(0, 1)
        run.signal(signal.SIGTERM, 0, 1)
        assert run.ended(8) == [143, 143]
    said = "error: stopped by SIGTERM; it took longer than --grace 2: the checkpoint is complete\n"
    assert run.stderr == [said, ""]
    assert sound(output) == [ASKED, ASKED - 1]


@pytest.mark.parametrize("size", [1, 2])
def test_second_signal_ends_the_run_at_once(size: int, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with job(size, tmp_path / "ranks", output, "slow steps") as run:
        run.reached(*range(size))
        run.signal(signal.SIGTERM, *range(size))
        until(lambda: all(requests(run.folder, r) == 1 for r in range(size)), "the first signal is noted")
        time.sleep(1.1)  # an echo comes sooner
        assert [p.exitcode for p in run.ranks] == [None] * size
        run.signal(signal.SIGINT, *range(size))
        assert run.ended(2) == [143] * size
    assert run.stderr == [SECOND.format("SIGTERM")] + [""] * (size - 1)
    assert sound(output) == [ASKED - 1]


def test_echo_of_a_signal_is_the_same_request(tmp_path: Path) -> None:
    """Ctrl-C reaches a rank twice: from the terminal, and from the launcher."""
    output = tmp_path / "run"
    with job(2, tmp_path / "ranks", output, "asked twice") as run:
        run.reached(0, 1)
        for times in (1, 2):
            run.signal(signal.SIGINT, 0, 1)
            until(lambda n=times: all(requests(run.folder, r) == n for r in (0, 1)), "it is noted", 0.9)
        assert run.ended() == [130, 130]
    assert run.stderr == [FINISHED.format("SIGINT"), ""]
    assert sound(output) == [ASKED, ASKED - 1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("size", [1, 2])
def test_signal_before_training_ends_the_run_at_once(
    size: int, signum: signal.Signals, tmp_path: Path
) -> None:
    with job(size, tmp_path / "ranks", tmp_path / "run", "slow data") as run:
        run.reached(*range(size))
        run.signal(signum, *range(size))
        assert run.ended(2) == [128 + signum] * size
    assert run.stderr == [NOT_BEGUN.format(signum.name)] + [""] * (size - 1)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_signal_while_the_ranks_meet_ends_the_run_at_once(tmp_path: Path) -> None:
    process = _CONTEXT.Process(target=lonely, args=(tmp_path, free_port()), daemon=True)
    run = Job(tmp_path, [process])
    try:
        process.start()
        run.reached(0)
        run.signal(signal.SIGTERM, 0)
        assert run.ended(2) == [143]
    finally:
        process.kill()
        process.join(10)
    assert run.stderr == [NOT_BEGUN.format("SIGTERM")]


# ------------------------------------------------------------------------------------------------------------
# Whoever started the ranks ends.


def parent(folder: Path, store: str, options: dict[str, Any], plan: str) -> None:
    """A launcher that starts two ranks and waits for them."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                life(rank, 2, folder, store, options, plan)
            finally:
                os._exit(1)
        pids.append(pid)
    (folder / "pids.new").write_text(json.dumps(pids))
    (folder / "pids.new").rename(folder / "pids")
    for pid in pids:
        os.waitpid(pid, 0)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.mark.parametrize("plan", ["", "slow other", "slow data"], ids=["training", "waiting", "loading"])
def test_ranks_of_a_killed_parent_are_gone(plan: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = OPTIONS | ({} if plan else ENDLESS) | {"output_dir": str(output)}
    launcher = _CONTEXT.Process(
        target=parent, args=(tmp_path, str(tmp_path / "rendezvous"), options, plan), daemon=True
    )
    ranks: list[psutil.Process] = []
    try:
        launcher.start()
        until((tmp_path / "pids").exists, "the ranks have been started")
        ranks = [psutil.Process(pid) for pid in json.loads((tmp_path / "pids").read_text())]
        if plan:
            until(lambda: all((tmp_path / f"reached{r}").exists() for r in range(2)), "the ranks are there")
        else:
            until(lambda: len(records(output, "round")) >= 2, "they train")
        assert all(runs(rank) for rank in ranks)
        launcher.kill()
        until(lambda: not any(runs(rank) for rank in ranks), "no rank is left", 3)
    finally:
        launcher.kill()
        launcher.join(10)
        kill(ranks)
    assert [(tmp_path / f"stderr{rank}").read_text() for rank in range(2)] == ["", ""]


def test_rank_whose_parent_is_killed_during_the_imports_does_not_train(tmp_path: Path) -> None:
    shell = 'python=$1; shift; "$python" "$@" 2>stderr >stdout & echo $! >pid.new; mv pid.new pid; wait'
    ranks: list[psutil.Process] = []
    launcher = subprocess.Popen(
        ["sh", "-c", shell, "sh", sys.executable, str(TRAIN), *JOB, "--output_dir", str(tmp_path / "run")],
        cwd=tmp_path,
        env=clean_environment() | ALONE | {"MASTER_PORT": free_port()},
        stdin=subprocess.DEVNULL,
    )
    try:
        until((tmp_path / "pid").exists, "the rank has been started")
        ranks = [psutil.Process(int((tmp_path / "pid").read_text()))]
        maps = Path(f"/proc/{ranks[0].pid}/maps")
        until(lambda: "libtorch" in maps.read_text(), "it imports torch")
        launcher.kill()
        until(lambda: not runs(ranks[0]), "it is gone")
    finally:
        launcher.kill()
        launcher.wait(10)
        kill(ranks)
    assert (tmp_path / "stderr").read_text() == ""
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------
# Real launchers.


@dataclass
class End:
    """How a launcher ended after a signal."""

    code: int
    stderr: str
    left: list[str]
    output: Path


def interrupt(launcher: str, signum: signal.Signals, options: list[str], place: Path) -> End:
    """Start a run that would never end, and signal the launcher once it trains."""
    output = place / "run"
    prefix = [sys.executable, str(TRAIN)] if launcher == "python" else command(launcher, TRAIN)
    with (place / "stdout").open("w") as stdout, (place / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*prefix, *options, "--output_dir", str(output)],
            cwd=place,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    below: list[psutil.Process] = []
    try:
        until(
            lambda: process.poll() is not None or len(records(output, "round")) >= 2,
            f"{launcher} trains",
            100,
        )
        assert process.poll() is None, (place / "stderr").read_text()
        below = [psutil.Process(pid) for pid in descendants(process.pid)]
        process.send_signal(signum)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and (process.poll() is None or any(runs(p) for p in below)):
            time.sleep(0.05)
        left = [" ".join(p.cmdline()) for p in below if runs(p)]
        return End(process.poll(), (place / "stderr").read_text(), left, output)
    finally:
        below += [psutil.Process(pid) for pid in descendants(process.pid)]
        process.kill()
        process.wait(10)
        kill(below)


def images(root: Path) -> list[str]:
    """Options for files that loader processes decode while the ranks train."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(32):
                pixels = noise.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return ["--dataset", "imagefolder", "--data_dir", str(root), "--cache_mib", "0", "--data_workers", "1"]


LAUNCHES = {
    "torchrun": ("torchrun", signal.SIGTERM),
    "deepspeed": ("deepspeed", signal.SIGTERM),
    "accelerate": ("accelerate", signal.SIGINT),
    "torchrun killed": ("torchrun", signal.SIGKILL),
    "python": ("python", signal.SIGTERM),
    "python, Ctrl-C": ("python", signal.SIGINT),
}
Ends = Callable[[str], End]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    """All launches, two at a time; a test waits for the one that it looks at."""
    endless = [part for name, value in ENDLESS.items() for part in (f"--{name}", str(value))]
    options = [*JOB, *endless, "--checkpoint_every", "5"]
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[End]] = {}
        for name, (launcher, signum) in LAUNCHES.items():
            place = tmp_path_factory.mktemp("launch")
            data = images(place / "data") if name == "torchrun killed" else []
            futures[name] = pool.submit(interrupt, launcher, signum, [*options, *data], place)
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "accelerate", "python", "python, Ctrl-C"])
def test_launcher_that_is_signalled_leaves_a_checkpoint_and_no_process(launcher: str, ends: Ends) -> None:
    end = ends(launcher)
    assert end.left == []
    done = records(end.output, "round")[-1]["round"]
    assert sound(end.output)[0] == done
    signum = LAUNCHES[launcher][1]
    said = f"stopped by {'SIGTERM' if launcher == 'deepspeed' else signum.name} after round {done} of "
    assert end.stderr.count(said) == 1
    assert not OUR_TRACEBACK.search(end.stderr)
    if launcher.startswith("python"):
        assert end.code == 128 + signum
        assert end.stderr == f"{said}1000000; --resume auto goes on from there\n"


def test_launcher_that_is_killed_leaves_sound_checkpoints_and_no_process(ends: Ends) -> None:
    end = ends("torchrun killed")
    assert end.left == []
    assert all(round % 5 == 0 for round in sound(end.output))
    assert not OUR_TRACEBACK.search(end.stderr)


NOBODY_READS = """
import os, signal, time
from resist_ds.launcher import Launch
from resist_ds.signals import Signals
with Signals(60, Launch()) as signals:
    signals.defer()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
"""


def test_second_signal_ends_a_run_whose_terminal_is_gone() -> None:
    """Ctrl-C ends the reader of `train.py 2>&1 | tee log` too; then a message raises, and must not matter."""
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-c", NOBODY_READS], stderr=write, timeout=15)
    os.close(write)
    assert process.returncode == 128 + signal.SIGINT

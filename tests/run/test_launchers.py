"""The four launchers: the same run on one seed, the same mistakes in the same words."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.options.command_line import parse
from resist_ds.trainer import Trainer
from tests import HIDDEN_GPUS, ROOT
from tests.conftest import Ranks

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]  # on busy cores a launch takes its time

TRAIN = ROOT / "train.py"
BIN = Path(sys.executable).parent
# of our own files alone: a launcher may live in .venv
OUR_TRACEBACK = re.compile(f'File "{re.escape(str(ROOT))}/(train.py|resist_ds/)')

# Four workers whoever launches, so that runs on one and on two ranks compare too.
JOB = [
    *("--dataset", "synthetic", "--img_size", "8", "--workers", "4", "--batch_size", "16"),
    *("--local_steps", "2", "--rounds", "3", "--eval_every", "2", "--calibration_samples", "32"),
    *("--seed", "7", "--cpu_threads", "1", "--log_with", "none"),
]
TEAMS = [*JOB, "--team_size", "2"]  # on four ranks
DDP = [*JOB, "--workers", "2", "--strategy", "ddp"]
# An engine under each launcher; tests/engines/test_engines.py has them all.
ENGINES = (("accelerate --config_file", "fsdp"), ("deepspeed", "zero3"), ("torchrun", "zero1"))
TYPO = ["--modle", "preact_resnet_small"]
TYPO_LINE = "error: unknown option --modle (did you mean --model?)"


@dataclass
class Finished:
    """What a launch came to; `metrics` are the lines of metrics.jsonl, if it wrote any."""

    code: int
    stdout: str
    stderr: str
    metrics: list[dict[str, Any]]

    def said(self) -> list[str]:
        """What we said of a mistake, in whichever stream the launcher puts it."""
        return re.findall(r"^error: .*$", self.stdout + self.stderr, re.MULTILINE)

    def our_traceback(self) -> bool:
        return OUR_TRACEBACK.search(self.stdout + self.stderr) is not None


def free_port() -> str:
    """Below those that the system itself gives away, so that nobody gets it before the launcher does."""
    while True:
        port = random.SystemRandom().randrange(15_000, 29_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def command(launcher: str, script: Path, ranks: int = 2) -> list[str]:
    """Launchers default to port 29500, which another job may have."""
    accelerate, deepspeed, torchrun = (str(BIN / name) for name in ("accelerate", "deepspeed", "torchrun"))
    prefix = {
        # Below a shell whose text speaks of more ranks (and holds a byte that is no text): it is no launcher,
        # and nobody asked for them.
        "python": lambda: [
            *("sh", "-c", '"$@"; exit $?; torchrun --nproc_per_node 2 \udcff', "sh", sys.executable)
        ],
        "accelerate": lambda: [
            *(accelerate, "launch", "--multi_gpu", "--num_processes", str(ranks)),
            *("--main_process_port", free_port()),
        ],
        "accelerate --cpu": lambda: [accelerate, "launch", "--cpu", "--num_processes", "2"],
        "accelerate --config_file": lambda: [
            *(accelerate, "launch", "--config_file", str(Path(__file__).parent / "accelerate_fsdp.yaml")),
            *("--main_process_port", free_port()),
        ],
        "deepspeed": lambda: [deepspeed, "--num_gpus", str(ranks), "--master_port", free_port()],
        "torchrun": lambda: [torchrun, "--nproc_per_node", str(ranks), "--master_port", free_port()],
        "torchrun virtual": lambda: [
            *(torchrun, "--nproc_per_node", "2", "--virtual-local-rank", "--master_port", free_port())
        ],
        "torchrun 1": lambda: [torchrun, "--nproc_per_node", "1", "--master_port", free_port()],
    }
    return [*prefix[launcher](), str(script)]


def descendants(pid: int) -> list[int]:
    """Processes below `pid`. torchrun gives each rank a session, so that they are in no common group."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found += parents.get(process, [])
    return found[1:]


def clean_environment() -> dict[str, str]:
    """An environment without traces of another launcher."""
    launchers_own = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "OMP_", "ACCELERATE_", "TORCHELASTIC_", "DS_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith((*launchers_own, "PYTHONPATH"))}
    return environment | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def launch(launcher: str, options: list[str], place: Path, script: Path = TRAIN, ranks: int = 2) -> Finished:
    """Run train.py from an unrelated folder."""
    environment = clean_environment()
    if launcher == "torchrun 1":
        environment["PYTHONIOENCODING"] = "latin-1"  # a terminal that cannot show all of our signs
    if launcher == "torchrun virtual":
        environment["CUDA_VISIBLE_DEVICES"] = "-1,-1"  # it deals them out: to each rank one that is not there
    process = subprocess.Popen(
        [*command(launcher, script, ranks), *options, "--output_dir", str(place / "run")],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        return Finished(-1, stdout, f"{stderr}\n{launcher} hung", [])
    file = place / "run" / "metrics.jsonl"
    metrics = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return Finished(process.returncode, stdout, stderr, metrics)


Launches = Callable[[str], Finished]


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launches]:
    """All launches, two at a time; a test waits for those that it looks at.

    A typo that rank 0 meets a second after the other rank is the hard case: launchers end all ranks as soon
    as one has ended, which must not keep rank 0 from saying why.
    """
    late = tmp_path_factory.mktemp("late") / "late.py"
    late.write_text(
        "import os, runpy, sys, time\n"
        "time.sleep(1.5 * (os.environ['LOCAL_RANK'] == '0'))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    virtual = tmp_path_factory.mktemp("virtual") / "virtual.py"
    virtual.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from resist_ds import trainer\n"
        "load = trainer.Trainer._load_data\n"
        "def with_download(self):\n"
        "    assert os.environ['LOCAL_RANK'] == '0'\n"
        "    object.__setattr__(self.config, 'download', True)\n"
        "    data = load(self)\n"
        "    object.__setattr__(self.config, 'download', False)\n"
        "    return data\n"
        "trainer.Trainer._load_data = with_download\n"
        "trainer.download = lambda config: print('downloads on rank', os.environ['RANK'], flush=True)\n"
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
    )
    jobs: dict[str, tuple[str, list[str], Path]] = {
        "accelerate": ("accelerate", JOB, TRAIN),
        "deepspeed": ("deepspeed", JOB, TRAIN),
        "torchrun": ("torchrun", JOB, TRAIN),
        "torchrun virtual": ("torchrun virtual", JOB, virtual),
        **{f"{name}: ddp": (name, DDP, TRAIN) for name in ("deepspeed", "torchrun")},
        **{f"{name}: {way}": (name, [*DDP, "--strategy", way], TRAIN) for name, way in ENGINES},
        **{f"{name}: teams": (name, TEAMS, TRAIN) for name in ("accelerate", "deepspeed", "torchrun")},
        "python": ("python", JOB, TRAIN),
        "torchrun 1": ("torchrun 1", JOB, TRAIN),
        "accelerate --cpu": ("accelerate --cpu", JOB, TRAIN),
        "python: typo": ("python", TYPO, TRAIN),
        "deepspeed: typo": ("deepspeed", TYPO, TRAIN),
        "accelerate: typo": ("accelerate", TYPO, TRAIN),
        "torchrun: typo": ("torchrun", TYPO, late),
        "accelerate: wish": ("accelerate --config_file", JOB, TRAIN),
    }
    with ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[Finished]] = {
            name: pool.submit(
                launch,
                launcher,
                options,
                tmp_path_factory.mktemp("launch"),
                script,
                4 if options is TEAMS else 2,
            )
            for name, (launcher, options, script) in jobs.items()
        }
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def trained(finished: Finished, ranks: int) -> list[dict[str, Any]]:
    """A run's metrics without what may differ between launchers: times, memory, and where it was written."""
    assert finished.code == 0, finished.stdout + finished.stderr
    kinds = ["round", "round", "eval", "round", "eval", "checkpoint", "summary"]
    assert [m["kind"] for m in finished.metrics] == kinds
    assert finished.metrics[-1]["settings"]["R"] == ranks
    kept = []
    for metrics in finished.metrics:
        settings = {k: v for k, v in metrics.pop("settings", {}).items() if k != "output_dir"}
        timed = (
            "perf/",
            "mem/peak",
            "mem/local",
            "mem/sync",
            "mem/eval",
            "mem/save",
            "mem/reserved",
            "save/",
        )
        kept.append({k: v for k, v in metrics.items() if not k.startswith(timed)} | settings)
        metrics["settings"] = settings
    return kept


def skip_on_gpus() -> None:
    if os.environ[HIDDEN_GPUS] != "0":
        pytest.skip("deepspeed makes the GPUs visible again, on which sums are rounded in another order")


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_two_ranks_give_the_same_run_whoever_launches_them(launcher: str, launches: Launches) -> None:
    run, expected = trained(launches(launcher), ranks=2), trained(launches("torchrun"), ranks=2)
    assert {"train/loss", "eval/loss", "comm/bytes_total", "lr", "seed"} <= set(expected[-1])
    if launcher == "deepspeed":
        skip_on_gpus()
    assert run == expected


def test_ranks_that_are_all_told_that_they_are_the_first_are_counted(launches: Launches) -> None:
    """torchrun --virtual-local-rank sets LOCAL_RANK=0 everywhere: still one rank of a machine downloads."""
    finished = launches("torchrun virtual")
    assert trained(finished, ranks=2) == trained(launches("torchrun"), ranks=2)
    assert re.findall(r"downloads on rank \d", finished.stdout) == ["downloads on rank 0"]
    assert finished.stdout.count("who plays whom") == 1


def test_ddp_gives_the_same_run_whoever_launches_it(launches: Launches) -> None:
    run, expected = trained(launches("deepspeed: ddp"), ranks=2), trained(launches("torchrun: ddp"), ranks=2)
    skip_on_gpus()
    assert run == expected
    assert expected[-1]["strategy"] == "ddp" and expected[-1]["W"] == 2


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_teams_give_the_same_run_whoever_launches_them(launcher: str, launches: Launches) -> None:
    run, expected = trained(launches(f"{launcher}: teams"), ranks=4), trained(launches("torchrun: teams"), 4)
    assert {"comm/bytes_round", "comm/bytes_team", "eval/loss"} <= set(expected[-1])
    if launcher == "deepspeed":
        skip_on_gpus()
    assert run == expected
    said = launches(f"{launcher}: teams").stdout
    assert "W = 4 workers on R = 4 ranks in 2 teams" in said and "team 0 (ranks 0–1): workers 0–1" in said


def in_process(comm: Comm, options: list[str]) -> None:
    trainer = Trainer(comm, parse(options))
    trainer.run()
    trainer.folder.release()


@pytest.mark.parametrize(("launcher", "strategy"), ENGINES)
def test_engines_train_whoever_launches_them(
    launcher: str, strategy: str, launches: Launches, ranks: Ranks, tmp_path: Path
) -> None:
    """To the bit what they do without a launcher, which tests/engines/test_engines.py compares with ddp."""
    run = trained(launches(f"{launcher}: {strategy}"), ranks=2)
    ranks(in_process, 2, [*DDP, "--strategy", strategy, "--progress", "false", "--output_dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(run, lines, strict=True):
        keys = ours.keys() & {"train/loss", "train/accuracy", "eval/loss", "eval/accuracy"}
        assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}
    assert run[-1]["strategy"] == strategy


@pytest.mark.parametrize("launcher", ["torchrun 1", "accelerate --cpu"])
def test_one_rank_gives_the_same_run_whoever_launches_it(launcher: str, launches: Launches) -> None:
    assert trained(launches(launcher), ranks=1) == trained(launches("python"), ranks=1)


def test_one_rank_trains_what_two_ranks_train(launches: Launches) -> None:
    one, two = trained(launches("python"), ranks=1), trained(launches("torchrun"), ranks=2)
    for a, b in zip(one, two, strict=True):
        assert {k for k in a if a[k] != b[k]} <= {k for k in a if k.startswith("comm/")} | {"R", "backend"}


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed", "torchrun"])
def test_first_lines_on_two_ranks(launcher: str, launches: Launches) -> None:
    stdout = launches(launcher).stdout
    assert "W = 4 workers on R = 2 ranks, each with K = 2 of 8 pool blocks" in stdout
    assert "who plays whom: rank 0: workers 0–1; rank 1: workers 2–3" in stdout
    assert stdout.count("who plays whom") == 1  # one rank speaks
    assert "note:" not in stdout


def test_first_lines_on_one_rank(launches: Launches) -> None:
    finished = launches("python")
    assert "W = 4 workers on R = 1 rank, each with K = 2 of 8 pool blocks" in finished.stdout
    assert "who plays whom: rank 0: workers 0–3\n" in finished.stdout
    assert "note:" not in finished.stdout
    assert finished.stderr == ""  # no terminal, so no progress bar; and no warning


def test_accelerate_that_starts_too_few_ranks_says_what_to_type(launches: Launches) -> None:
    """`accelerate launch --cpu --num_processes 2` starts a single process without a word."""
    finished = launches("accelerate --cpu")
    assert "on R = 1 rank" in finished.stdout
    assert "note: the launcher was asked for 2 ranks and started 1" in finished.stdout
    assert "accelerate launch --multi_gpu --num_processes 2 train.py" in finished.stdout


@pytest.mark.parametrize(
    ("launcher", "codes"),
    # torchrun, and accelerate which goes through it, report a failed rank in their own way, with code 1.
    [("python", {2}), ("deepspeed", {2}), ("accelerate", {1, 2}), ("torchrun", {1, 2})],
)
def test_a_typo_is_answered_in_one_line(launcher: str, codes: set[int], launches: Launches) -> None:
    finished = launches(f"{launcher}: typo")
    assert finished.said() == [TYPO_LINE], finished.stdout + finished.stderr
    assert finished.code in codes
    assert not finished.our_traceback()


def test_what_accelerate_launch_asks_for_is_not_passed_over(launches: Launches) -> None:
    """Its file says FSDP, and no option does; with the option (an engine above) it trains."""
    finished = launches("accelerate: wish")
    assert finished.said() == ["error: accelerate launch asks for FSDP: type --strategy fsdp"]
    assert finished.code in {1, 2} and not finished.our_traceback() and not finished.metrics

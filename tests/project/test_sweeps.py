"""wandb sweeps: the files in tools/sweeps under unmodified `wandb sweep` and `wandb agent`; trials alone."""

import base64
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from resist_ds.options.command_line import parse
from tests.run.test_launchers import BIN, OUR_TRACEBACK, ROOT, clean_environment
from tests.run.test_signals import runs, until
from tests.wandb_stub import WandbStub
from tools import trial

SWEEPS = ROOT / "tools" / "sweeps"
FILES = sorted(SWEEPS.glob("*.yaml"))
TINY = {
    **{"dataset": "synthetic", "img_size": 8, "batch_size": 8, "rounds": 2, "eval_every": 2},
    **{"calibration_samples": 32, "workers": 2, "seed": 3},
}
GRID = {"lr": [0.05], "local_steps": [1, 2]}  # neither the preset's
TRIALS = math.prod(map(len, GRID.values()))
ENDLESS = TINY | {"lr": 0.1, "local_steps": 2, "rounds": 1_000_000, "eval_every": 0, "checkpoint_every": 0}
ENDLESS |= {"log_with": "none"}


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


# ------------------------------------------------------------------------------------------------------------
# The files.


def ends(parameter: dict[str, Any]) -> list[Any]:
    """The least and the largest value of a parameter."""
    values = parameter.get("values") or [parameter["min"], parameter["max"]]
    return [min(values), max(values)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_corner_of_a_sweep_is_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load(path)
    assert {"local_steps", "lr", "min_blocks"} <= sweep["parameters"].keys()
    words = sweep["command"][sweep["command"].index("${program}") + 1 : -1]
    for point in itertools.product(*map(ends, sweep["parameters"].values())):
        given = dict(zip(sweep["parameters"], point, strict=True))
        args = create_sweep_command_args({"args": {k: {"value": v} for k, v in given.items()}})["args"]
        config = parse([*words, *args])
        assert {name: getattr(config, name) for name in given} == given
        assert config.dataset == "digits"  # which comes with a package
        assert config.eval_every  # or there is no metric
        assert config.min_blocks <= 8  # the demo's net has no more


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_says_how_to_start_it_and_what_to_start(path: Path) -> None:
    sweep = load(path)
    assert f"wandb sweep tools/sweeps/{path.name}" in path.read_text().split("program:")[0]
    assert sweep["program"] == "train.py"
    assert sweep["metric"] == {"name": "eval/accuracy", "goal": "maximize"}
    launcher = "accelerate" if path.stem == "bayes" else path.stem
    opening = ["${env}", "${interpreter}", "tools/trial.py", launcher, "2", "${program}"]
    assert sweep["command"][: len(opening)] == opening and sweep["command"][-1] == "${args}"
    assert all(isinstance(word, str) and len(shlex.split(word)) == 1 for word in sweep["command"])


def test_there_is_a_grid_for_every_launcher_and_a_search_that_stops_early() -> None:
    files = {path.stem: load(path) for path in FILES}
    assert files.keys() == {*trial.LAUNCHERS, "bayes"}
    assert all(files[launcher]["method"] == "grid" for launcher in trial.LAUNCHERS)
    assert files["bayes"]["method"] == "bayes"
    assert files["bayes"]["early_terminate"]["type"] == "hyperband"


# ------------------------------------------------------------------------------------------------------------
# What a trial becomes.

PROGRAM = ["train.py", "--lr=0.1"]


def test_gpus_of_a_trial_are_those_of_its_launcher() -> None:
    deepspeed = trial.command("deepspeed", 2, "29700", ["1", "GPU-ab"], PROGRAM)
    assert deepspeed[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert "--master_port=29700" in deepspeed and deepspeed[-2:] == PROGRAM
    (world,) = (word.partition("=")[2] for word in deepspeed if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["1", "GPU-ab"]}
    given = {"CUDA_VISIBLE_DEVICES": "0,1,GPU-ab"}
    assert trial.environment(given, ["1", "GPU-ab"], 5) == {"CUDA_VISIBLE_DEVICES": "1,GPU-ab"}
    assert trial.environment({}, [], 5) == {}


def test_launchers_get_ranks_and_port() -> None:
    torchrun = " ".join(trial.command("torchrun", 4, "29700", [], PROGRAM)[1:])
    assert torchrun == "-m torch.distributed.run --nproc_per_node 4 --master_port 29700 train.py --lr=0.1"
    accelerate = " ".join(trial.command("accelerate", 4, "29700", [], PROGRAM))
    assert "-m accelerate.commands.launch --multi_gpu --num_processes 4 " in accelerate
    assert "--main_process_port 29700" in accelerate and accelerate.endswith(" train.py --lr=0.1")
    assert trial.command("accelerate", 1, "29700", ["3"], PROGRAM) == [sys.executable, *PROGRAM]


def test_a_trial_writes_to_a_folder_of_its_own() -> None:
    names = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}
    assert trial.output(PROGRAM, names) == ["--output_dir", "runs/sweeps/s/r"]
    assert trial.output(PROGRAM, {}) == []
    for word in ("--output_dir", "--output-dir=x", "--output_dir=x"):
        assert trial.output([*PROGRAM, word], names) == []


def test_trial_of_a_sweep_goes_online_unless_told_otherwise() -> None:
    sweep = {"WANDB_SWEEP_ID": "s"}
    ours = {"WANDB_MODE": "online", "RESIST_DS_LAUNCHERS": f"{os.getpid()} 5"}
    assert trial.environment(sweep, [], 5) == sweep | ours
    assert trial.environment(sweep | {"WANDB_MODE": "offline"}, [], 5)["WANDB_MODE"] == "offline"


@pytest.mark.parametrize(
    ("devices", "names"),
    [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1, GPU-ab,-1,3", ["1", "GPU-ab"])],
)
def test_gpus_that_a_trial_sees(devices: str, names: list[str]) -> None:
    assert trial.visible({"CUDA_VISIBLE_DEVICES": devices}) == names


def test_gpus_of_a_machine_are_listed_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert trial.visible({}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H (UUID: GPU-a)\n  MIG GPU-7: b\nGPU 1: H'\n")
    tool.chmod(0o755)
    assert trial.visible({}) == ["0", "1"]


# ------------------------------------------------------------------------------------------------------------
# Trials side by side, below a launcher that only says what it was given.

LAUNCHER = """
import os, sys, time
print("GPUs", os.environ["CUDA_VISIBLE_DEVICES"], "port", sys.argv[sys.argv.index("--master_port") + 1])
sys.stdout.flush()
time.sleep(60)
"""


class Trials:
    """Starts trials with GPUs 0 to 3, and reads what they say."""

    def __init__(self, folder: Path):
        package = folder / "torch" / "distributed"
        package.mkdir(parents=True)
        (folder / "torch" / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "run.py").write_text(LAUNCHER)
        self._folder = folder
        self._running: list[subprocess.Popen[str]] = []

    def start(self, ranks: int, *before: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, sys.executable, str(ROOT / "tools" / "trial.py"), "torchrun", str(ranks), "train.py"],
            cwd=self._folder,
            env=clean_environment() | {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "TMPDIR": str(self._folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        self._running.append(process)
        return process

    def end(self) -> None:
        for process in self._running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[Trials]:
    started = Trials(tmp_path)
    yield started
    started.end()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_trials_side_by_side_share_no_gpu_and_no_port(trials: Trials) -> None:
    first, second = trials.start(2), trials.start(2)
    one, two = (re.fullmatch(r"GPUs (\S+) port (\d+)", said(process)) for process in (first, second))
    assert one and two
    assert sorted([one[1], two[1]]) == ["0,1", "2,3"]
    assert one[2] != two[2]
    third = trials.start(1)
    assert said(third) == "waiting for other trials: 1 of the GPUs 0, 1, 2, 3 must be free"
    second.kill()  # by force: nothing is there to give them back
    assert said(third).startswith(f"GPUs {two[1][0]} port")


def test_trial_of_more_ranks_than_gpus_says_what_to_write(trials: Trials) -> None:
    process = trials.start(5)
    assert said(process).startswith("error: 5 ranks need 5 GPUs and 4 can be seen (0, 1, 2, 3): write")
    assert process.wait(10) == 2


def test_trial_that_waits_ends_with_its_agent(trials: Trials) -> None:
    assert said(trials.start(4)).startswith("GPUs 0,1,2,3")
    agent = trials.start(4, "sh", "-c", '"$@"; exit', "sh")
    assert said(agent).startswith("waiting")
    agent.kill()
    assert said(agent) == "error: whoever started this trial has ended"


@pytest.mark.parametrize("words", [[], ["torchrun", "2"], ["mpirun", "2", "x.py"], ["torchrun", "0", "x.py"]])
def test_trial_that_cannot_be_meant(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        trial.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: type: trial.py {accelerate,deepspeed,torchrun} RANKS")


# ------------------------------------------------------------------------------------------------------------
# Whole sweeps, one through each launcher, at the same time on the same machine.


@dataclass
class Sweep:
    """What an agent's life left behind: first the grid, then a trial that is stopped, then its own end.

    Attributes:
        records: metrics.jsonl of every trial of the grid, by run.
        points: what the server asked of every trial.
        moments: looks at the machine: the ports at which the ranks of each trial met, by run.
        stopped: processes of the trial that the server had stopped, after the time that it may take.
        left: processes that outlived the killed agent.
    """

    id: str
    place: Path
    points: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    moments: list[dict[str, set[str]]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    said: str = ""

    def folder(self, run: str) -> Path:
        return self.place / "runs" / "sweeps" / self.id / run


def marked(mark: str, **variables: str) -> list[tuple[psutil.Process, dict[str, str]]]:
    """Processes of which a mark begins so, with these variables: descendants, whoever their parent is."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("RESIST_TEST", "").startswith(mark) and environment | variables == environment:
                found.append((process, environment))
        except psutil.Error:
            continue
    return [(process, environment) for process, environment in found if runs(process)]


def names(processes: list[tuple[psutil.Process, dict[str, str]]]) -> list[str]:
    return [" ".join(process.cmdline()) for process, _ in processes if runs(process)]


def patiently(gone: Callable[[], list[Any]], seconds: float) -> list[Any]:
    """What is left of it after so many seconds, or none earlier."""
    deadline = time.monotonic() + seconds
    while (left := gone()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def rounds(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"kind": "round"') if file.exists() else 0


def life(stub: WandbStub, launcher: str, place: Path) -> Sweep:
    """Start a sweep and an agent, see the grid through, have a trial stopped, kill the agent.

    accelerate's trial is stopped while it trains and loses its agent during the imports, deepspeed's the
    other way round.
    """
    for name in ("tools", "train.py", "ds_configs"):
        (place / name).symlink_to(ROOT / name)
    content = load(SWEEPS / f"{launcher}.yaml")  # with another grid, and nothing else
    content["parameters"] = {k: {"value": v} for k, v in TINY.items()}
    content["parameters"] |= {k: {"values": v} for k, v in GRID.items()}
    (place / "sweep.yaml").write_text(yaml.safe_dump(content))
    machine = f"{stub.url}/"
    mark = machine + launcher
    environment = clean_environment() | stub.environment | {"RESIST_TEST": mark, "HOME": str(place)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    made = subprocess.run(
        [str(BIN / "wandb"), "sweep", "sweep.yaml"],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r"wandb agent \S*/(\w+)", made.stdout + made.stderr)
    assert found, made.stdout + made.stderr
    sweep = Sweep(found[1], place)
    early, late = f"{sweep.id}-{TRIALS}", f"{sweep.id}-{TRIALS + 1}"
    stub.add(sweep.id, ENDLESS, ENDLESS)
    if launcher == "deepspeed":
        stub.stopped.add(early)  # at the agent's first word of it
    with (place / "said").open("w") as stream:
        agent = subprocess.Popen(
            [str(BIN / "wandb"), "agent", sweep.id],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    def look(run: str) -> bool:
        """Whether the server has handed it out; who runs now is noted."""
        assert agent.poll() is None, (place / "said").read_text()
        sweep.moments.append({})
        for _, variables in marked(machine):
            if "MASTER_PORT" in variables and "RANK" in variables:
                ports = sweep.moments[-1].setdefault(variables["WANDB_RUN_ID"], set())
                ports.add(variables["MASTER_PORT"])
        time.sleep(0.5)
        return run in stub.trials[sweep.id]

    try:
        until(lambda: look(early), "the grid is done", 400)
        if launcher == "accelerate":
            until(lambda: rounds(sweep.folder(early)) >= 2, "the trial trains", 100)
            stub.stopped.add(early)
        until(lambda: look(late), "the stopped trial has ended", 100)
        service = f"--pid {agent.pid}"  # of wandb; the agent's own has the variables of its last trial
        sweep.stopped = [n for n in names(marked(mark, WANDB_RUN_ID=early)) if not n.endswith(service)]
        if launcher == "accelerate":
            until(lambda: len(marked(mark, WANDB_RUN_ID=late, LOCAL_WORLD_SIZE="2")) == 2, "ranks start", 100)
        else:
            until(lambda: rounds(sweep.folder(late)) >= 2, "the trial trains", 100)
        agent.kill()
        sweep.left = patiently(lambda: names(marked(mark)), 60)  # the imports come first
    finally:
        agent.kill()
        agent.wait()
        for process, _ in marked(mark):
            process.kill()
    for run, point in stub.trials[sweep.id].items():
        sweep.points[run] = point
        if run not in (early, late):
            lines = (sweep.folder(run) / "metrics.jsonl").read_text().splitlines()
            sweep.records[run] = [json.loads(line) for line in lines]
    sweep.said = (place / "said").read_text()
    return sweep


Lives = Callable[[str], Sweep]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Both sweeps, at the same time; a test waits for the one that it looks at."""
    with WandbStub() as stub, ThreadPoolExecutor(2) as pool:
        futures: dict[str, Future[Sweep]] = {
            launcher: pool.submit(life, stub, launcher, tmp_path_factory.mktemp(launcher))
            for launcher in ("accelerate", "deepspeed")
        }
        yield lambda launcher: futures[launcher].result()
        for future in futures.values():
            future.exception()
        assert stub.unknown == []


both = pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])


@pytest.mark.ranks
@pytest.mark.timeout(900)
@both
def test_every_trial_of_a_grid_ends_with_its_own_metrics(launcher: str, lives: Lives) -> None:
    sweep = lives(launcher)
    assert not OUR_TRACEBACK.search(sweep.said)
    points = [(p["lr"], p["local_steps"]) for run, p in sweep.points.items() if run in sweep.records]
    assert sorted(points) == sorted(itertools.product(GRID["lr"], GRID["local_steps"]))
    for run, records in sweep.records.items():
        assert [record["kind"] for record in records] == ["round", "round", "eval", "checkpoint", "summary"]
        settings = records[-1]["settings"]
        assert {name: settings[name] for name in GRID} == {name: sweep.points[run][name] for name in GRID}
        assert settings["R"] == 2
    assert len({records[-1]["train/loss"] for records in sweep.records.values()}) == TRIALS


@pytest.mark.ranks
@pytest.mark.timeout(900)
@both
def test_rank_0_alone_talks_to_wandb_and_keeps_the_run_of_the_sweep(launcher: str, lives: Lives) -> None:
    sweep = lives(launcher)
    for run in sweep.records:
        (kept,) = (sweep.folder(run) / "wandb").glob("offline-run-*")
        assert kept.name.endswith(f"-{run}")
        content = (kept / f"run-{run}.wandb").read_bytes()
        assert f"\x06{sweep.id}".encode() in content  # its own field, with its length before it
        config = load(sweep.place / "wandb" / f"sweep-{sweep.id}" / f"config-{run}.yaml")
        assert {name: config[name]["value"] for name in GRID} == {n: sweep.points[run][n] for n in GRID}
        assert b"eval/accuracy" in content
    assert len(list(sweep.place.rglob("*.wandb"))) == len(sweep.records)  # no rank has made another one


@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_agents_on_one_machine_have_ports_of_their_own(lives: Lives) -> None:
    moments = [moment for launcher in ("accelerate", "deepspeed") for moment in lives(launcher).moments]
    assert any(len(moment) == 2 for moment in moments)  # they did run at the same time
    for moment in moments:
        assert all(len(ports) == 1 for ports in moment.values())
        assert len(set().union(*moment.values())) == len(moment)


@pytest.mark.ranks
@pytest.mark.timeout(900)
@both
def test_a_trial_that_the_server_stops_leaves_no_process(launcher: str, lives: Lives) -> None:
    sweep = lives(launcher)
    assert sweep.stopped == []
    assert (rounds(sweep.folder(f"{sweep.id}-{TRIALS}")) > 0) == (launcher == "accelerate")


@pytest.mark.ranks
@pytest.mark.timeout(900)
@both
def test_an_agent_that_is_killed_leaves_no_process(launcher: str, lives: Lives) -> None:
    sweep = lives(launcher)
    assert sweep.left == []
    assert (rounds(sweep.folder(f"{sweep.id}-{TRIALS + 1}")) > 0) == (launcher == "deepspeed")

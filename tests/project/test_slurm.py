"""ds_configs/slurm.sh as Slurm runs it, on one machine: Slurm's commands are a line of shell each."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from resist_ds.options.presets import PRESETS
from tests import ROOT, saved
from tests.run.test_launchers import BIN, clean_environment, descendants

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(200),
    pytest.mark.skipif(not shutil.which("bash"), reason="the template is for bash"),
]
SCRIPT = PRESETS / "slurm.sh"
OPTIONS = saved.OPTIONS | {"model": "preact_resnet_small", "rounds": 100_000, "eval_every": 0}
STUBS = {
    # The real one kills its step when it gets a SIGTERM.
    "srun": 'echo "srun $*" >> "$CALLS"; "$@" & echo $! > "$CALLS.step"; trap "kill -KILL $!" TERM; wait $!',
    "scancel": '[ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM "$(cat "$CALLS.step")"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo localhost; echo other; fi',
}


def job_id() -> int:
    """Whose port is free."""
    while True:
        number = random.randrange(10**6)
        with suppress(OSError), socket.create_server(("localhost", 29500 + number % 1000)):
            return number


def test_before_the_time_limit_a_job_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    calls, number = tmp_path / "calls", job_id()
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = clean_environment() | {
        "PATH": os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]]),
        "CALLS": str(calls),
        "SLURM_JOB_ID": str(number),
        "SLURM_JOB_NODELIST": "localhost,other",
        "SLURM_JOB_NUM_NODES": "1",
    }
    options = [f"--{k}={str(v).lower() if v is False else v}" for k, v in OPTIONS.items()]
    with (tmp_path / "said").open("wb") as file:
        job = subprocess.Popen(
            ["bash", str(SCRIPT), *options, "--output_dir", str(tmp_path / "run")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size):
            assert job.poll() is None and time.monotonic() < until, (tmp_path / "said").read_text()
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: does
        code = job.wait(60)
    finally:
        for pid in [*descendants(job.pid), job.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.wait()

    said = (tmp_path / "said").read_text()
    show, srun, requeue = calls.read_text().splitlines()
    assert show == "scontrol show hostnames localhost,other"
    assert f"--nnodes 1 --nproc_per_node 1 --rdzv_id {number} " in srun
    assert f"--rdzv_endpoint localhost:{29500 + number % 1000} " in srun and " --resume auto " in srun
    assert requeue == f"scontrol requeue {number}" and code != 0, said
    done = [json.loads(line)["round"] for line in metrics.read_text().splitlines()]
    assert saved.last(tmp_path / "run").name == f"round-{done[-1]:06d}"  # all that was trained is saved
    assert "SIGTERM" in said


@pytest.mark.parametrize(
    ("code", "limit", "requeued"), [(0, True, False), (1, False, False), (1, True, True)]
)
def test_only_a_job_that_the_limit_stopped_goes_back(
    code: int, limit: bool, requeued: bool, tmp_path: Path
) -> None:
    """Not one that was done, and not one that ended with an error."""
    waits = "touch ready; while :; do sleep 0.1; done"
    step = f"trap 'exit {code}' TERM; echo $$ > $CALLS.step; {waits if limit else f'exit {code}'}"
    stubs = STUBS | {"srun": step}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2"}
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    job = subprocess.Popen(["bash", str(SCRIPT)], cwd=tmp_path, env=clean_environment() | slurm | path)
    until = time.monotonic() + 20
    while limit and not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.02)
    if limit:
        job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert ("scontrol requeue 7" in (tmp_path / "calls").read_text()) == requeued


def test_the_signal_leaves_time_for_the_grace() -> None:
    """Slurm's notice is above torchrun's patience, and that above the default of --grace."""
    from resist_ds.options.config import Config

    text = SCRIPT.read_text()
    notice = int(text.split("--signal=B:USR1@")[1].split()[0])
    patience = int(text.split("--shutdown_timeout ")[1].split()[0])
    assert Config.default("grace") < patience < notice

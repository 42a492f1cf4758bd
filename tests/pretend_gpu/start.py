"""Starts ranks that see pretended GPUs, each a process: there is no way back from believing in them."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, THREADS


@dataclass(frozen=True)
class Job:
    """What some ranks are to do.

    Attributes:
        name: a word of its own.
        gpus: for each rank, which of the machine's GPUs it sees.
        function: called as function(comm, *args); it, its arguments and what it returns are pickled.
    """

    name: str
    gpus: Sequence[Sequence[int]]
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()


def build(folder: Path) -> Path:
    """Compile the library that the ranks preload."""
    library = folder / "pretended.so"
    source = Path(__file__).with_name("runtime.c")
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


class Ranks:
    """The ranks of some jobs, at work at the same time. `folder` is for what they say."""

    def __init__(self, library: Path, folder: Path, jobs: Sequence[Job]):
        self._folder, self._jobs = folder, jobs
        (folder / "jobs").write_bytes(pickle.dumps(list(jobs)))
        environment = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": str(THREADS)}
        environment["DS_ACCELERATOR"] = "cuda"  # whatever other tests have had DeepSpeed find
        command = [sys.executable, "-m", "tests.pretend_gpu", str(folder)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, start_new_session=True
        )

    def results(self, timeout: float = 200) -> dict[str, list[Any]]:
        """{job: what its function returned, by rank}; the test fails where one did not come to its end."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return {job.name: [self._result(job, r) for r in range(len(job.gpus))] for job in self._jobs}

    def _result(self, job: Job, rank: int) -> Any:
        who = f"rank {rank} of {job.name}"
        left = self._folder / f"result-{job.name}-{rank}"
        if not left.exists():
            said = self._folder / f"said-{job.name}-{rank}"
            pytest.fail(f"{who} came to no end: {said.read_text() if said.exists() else 'it never began'}")
        result, error = pickle.loads(left.read_bytes())
        if error is not None:
            pytest.fail(f"{who} failed:\n{error}")
        return result

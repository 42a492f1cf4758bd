"""Starts ranks that see pretended GPUs, each a process of its own: there is no way back from believing in them."""

import os
import pickle
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT, THREADS


def build(folder: Path) -> Path:
    """Compile the library that the ranks preload, which takes two seconds."""
    library = folder / "pretended.so"
    include = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    source = Path(__file__).with_name("native.cpp")
    options = ["-shared", "-fPIC", "-O0", "-std=c++20", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    return library


class Ranks:
    """Ranks at work.

    Args:
        library: that `build` made.
        folder: a new one, for what they say.
        gpus: for each rank, which of the machine's GPUs it sees; none: it computes on the CPU.
        function: to be called as function(comm, *args); it, its arguments and what it returns are pickled.
    """

    def __init__(
        self, library: Path, folder: Path, gpus: Sequence[Sequence[int]], function: Callable[..., Any], *args: Any
    ):
        self._folder = folder
        folder.mkdir(parents=True)
        (folder / "task").write_bytes(pickle.dumps((gpus, function, args)))
        self._processes = []
        for rank, seen in enumerate(gpus):
            environment = {"OMP_NUM_THREADS": str(THREADS)}
            if len(gpus) > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment |= {"WORLD_SIZE": str(len(gpus)), "LOCAL_WORLD_SIZE": str(len(gpus))}
            if seen:
                environment["LD_PRELOAD"] = str(library)
            with (folder / f"said-{rank}").open("w") as said:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.pretend_gpu", str(folder), str(rank)],
                        cwd=ROOT,
                        env=os.environ | environment,
                        stdout=said,
                        stderr=said,
                    )
                )

    def results(self, timeout: float = 100) -> list[Any]:
        """What the function returned on each rank; the test fails where one did not come to its end."""
        deadline = time.monotonic() + timeout
        try:
            for process in self._processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in self._processes:
                process.kill()
        results = []
        for rank in range(len(self._processes)):
            left = self._folder / f"result-{rank}"
            if not left.exists():
                pytest.fail(f"rank {rank} left no result: {(self._folder / f'said-{rank}').read_text()}")
            result, error = pickle.loads(left.read_bytes())
            if error is not None:
                pytest.fail(f"rank {rank} failed:\n{error}")
            results.append(result)
        return results

"""Starts ranks, each a process that sees pretended GPUs."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import ROOT

Runs = dict[str, dict[str, Any]]


def build(folder: Path) -> Path:
    """Compile the library that the ranks preload; about two seconds."""
    library = folder / "pretend.so"
    include = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    command = [
        "g++",
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        "-fPIC",
        "-O0",
        "-std=c++20",
        f"-I{include}",
        "-o",
        str(library),
    ]
    subprocess.run([*command, str(Path(__file__).with_name("native.cpp"))], check=True)
    return library


def start(
    library: Path, folder: Path, gpus: Sequence[Sequence[int]], runs: Runs, timeout: float = 100
) -> list[dict[str, Any]]:
    """Ranks that run the trainer with one set of options after the other; returns what each rank saw.

    Args:
        folder: an empty one, for what they say.
        gpus: for each rank, which of the machine's GPUs it sees; none: it computes on the CPU.
        runs: {name: options of Config}.

    Returns:
        of each rank {name of a run: the fields of `trial.Seen`, or its traceback as "error"}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank, seen in enumerate(gpus):
        task = folder / f"{rank}.json"
        task.write_text(json.dumps({"gpus": list(seen), "runs": runs}))
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(gpus), "LOCAL_WORLD_SIZE": len(gpus)}
        environment = {k: str(v) for k, v in place.items()} if len(gpus) > 1 else {}
        environment |= {"LD_PRELOAD": str(library)} if seen else {}
        command = [sys.executable, "-m", "tests.pretend_gpu", str(task)]
        with (folder / f"{rank}.txt").open("w") as said:
            ranks.append(
                subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=said, stderr=said)
            )
    try:
        for process in ranks:
            process.wait(timeout)
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{rank}.seen").read_text()) for rank in range(len(gpus))]

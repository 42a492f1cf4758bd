"""`python -m tests.pretend_gpu FOLDER`: imports everything once and forks the ranks; see `start`."""

import importlib
import os
import pickle
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.pretend_gpu.start import Job


def live(folder: Path, job: Job, rank: int) -> None:
    """The life of a rank: call the job's function, and leave what it returns."""
    size = len(job.gpus)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    said = os.open(folder / f"said-{job.name}-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    result: Any = None
    error = None
    try:
        from tests.pretend_gpu.device import install

        install(job.gpus[rank])
        from resist_ds.comm import Comm

        comm = Comm(init_method=f"file://{folder / job.name}")
        result = job.function(comm, *job.args)
    except BaseException:
        error = traceback.format_exc()
    left = folder / f"result-{job.name}-{rank}"
    left.with_suffix(".part").write_bytes(pickle.dumps((result, error)))
    left.with_suffix(".part").rename(left)
    if error is None:
        comm.close()  # afterwards: where another rank has failed it may wait for what never comes


def main(folder: Path) -> None:
    jobs: list[Job] = pickle.loads((folder / "jobs").read_bytes())
    for module in (
        "tests.warm",
        "tests.pretend_gpu.device",
        "resist_ds.engines.zero",
        "resist_ds.engines.fsdp",
    ):
        importlib.import_module(module)
    ranks = []
    for job in jobs:
        for rank in range(len(job.gpus)):
            ranks.append(os.fork())
            if not ranks[-1]:
                live(folder, job, rank)
                sys.stdout.flush()
                os._exit(0)
    for process in ranks:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

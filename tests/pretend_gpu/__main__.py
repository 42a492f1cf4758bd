"""`python -m tests.pretend_gpu FOLDER RANK`: the life of a rank; see `start`."""

import pickle
import sys
import traceback
from pathlib import Path


def main(folder: Path, rank: str) -> None:
    """Call the function of the task on this rank, and leave what it returns."""
    gpus, function, args = pickle.loads((folder / "task").read_bytes())
    result, error = None, None
    try:
        if gpus[int(rank)]:
            from tests.pretend_gpu.device import install

            install(gpus[int(rank)])
        from resist_ds.comm import Comm

        comm = Comm(init_method=f"file://{folder / 'rendezvous'}")
        result = function(comm, *args)
    except BaseException:
        error = traceback.format_exc()
    (folder / f"result-{rank}").write_bytes(pickle.dumps((result, error)))
    if error is None:
        comm.close()  # afterwards: where another rank has failed it may wait for what never comes


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

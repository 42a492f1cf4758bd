"""`python -m tests.pretend_gpu TASK.json`: a rank's life on the pretended device; see `start`."""

import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path


def main(task: Path) -> None:
    """Run the trainer as often as the task says, and leave beside it what was seen."""
    asked = json.loads(task.read_text())
    seen: dict[str, object] = {}
    try:
        if asked["gpus"]:
            from tests.pretend_gpu.device import install

            install(asked["gpus"])
        from resist_ds.comm import Comm
        from tests.pretend_gpu.trial import train, watch_local_steps

        comm = Comm(init_method=f"file://{task.parent / 'rendezvous'}")
        watch_local_steps()
        for name, options in asked["runs"].items():
            try:
                seen[name] = asdict(train(comm, options))
            except Exception:
                seen[name] = {"error": traceback.format_exc()}
                if comm.size > 1:  # the others cannot go on
                    break
        else:
            comm.close()
    except BaseException:
        seen["error"] = traceback.format_exc()
    task.with_suffix(".seen").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

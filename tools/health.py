"""Whether the runs in a folder get on: the health check of the container, for the standard library alone.

    python tools/health.py [FOLDER]

A run is at work where `run.json` names a process of this machine that lives. It gets on if it has begun or
has written a record within ten minutes and ten times its longest round. Exit code 1, and a line for each run
that does not; 0 where nothing is at work, too: whether a process ended well is its exit code's to say.
"""

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 600.0  # seconds
TIMES = 10
_TAIL = 1 << 16  # bytes of records that are looked at


def stuck(folder: Path, now: float) -> list[str]:
    """A line for each run below `folder` that has been silent for too long."""
    found = []
    for holder in sorted(folder.rglob("run.json")):
        if not _lives(holder):
            continue
        records = holder.with_name("metrics.jsonl")
        heard = max((file.stat().st_mtime for file in (holder, records) if file.exists()), default=now)
        allowed = PATIENCE + TIMES * _longest(records)
        if now - heard > allowed:
            found.append(
                f"{holder.parent} has written nothing for {now - heard:.0f} s, and {allowed:.0f} s are plenty"
            )
    return found


def _lives(holder: Path) -> bool:
    try:
        who = json.loads(holder.read_text())
        if who["host"] != socket.gethostname():
            return False  # that machine's to say
        os.kill(int(who["pid"]), 0)
    except PermissionError:  # somebody else's process
        return True
    except (OSError, ValueError, KeyError, TypeError):  # ended, or on its way in or out
        return False
    return True


def _longest(records: Path) -> float:
    """Seconds of the longest of the last rounds, evaluations and checkpoints."""
    longest = 0.0
    try:
        with records.open("rb") as file:
            file.seek(max(0, records.stat().st_size - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return longest
    for line in lines:
        with suppress(ValueError, AttributeError, TypeError):  # the first and the last may be half a line
            seconds = (
                v
                for k, v in json.loads(line).items()
                if k.startswith("perf/") and k.endswith(("local_s", "sync_s", "eval_s", "save_s"))
            )
            longest = max(longest, sum(seconds))
    return longest


if __name__ == "__main__":
    lines = stuck(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"), time.time())
    print("\n".join(lines) or "no run is stuck")
    sys.exit(1 if lines else 0)

"""The folder of a run: one run at a time, and what an earlier one left there. No communication.

OUTPUT_DIR/metrics.jsonl          the records
OUTPUT_DIR/checkpoints/           round-000040/ …
OUTPUT_DIR/earlier-1/ …           of runs that were not resumed; damaged checkpoints
OUTPUT_DIR/run.lock, run.json     who is at work here
"""

import json
import os
import shutil
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from resist_ds.errors import UserError
from resist_ds.state.checkpoint import newest_first, round_of

PARTIAL = ".partial-"  # begins the name of a checkpoint that is not complete
REPLACED = ".replaced-"


class RunFolder:
    """`--output_dir`, as rank 0 uses it."""

    def __init__(self, output_dir: str):
        self.path = Path(output_dir).expanduser()
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._holder = self.path / "run.json"
        self._lock = FileLock(self.path / "run.lock")

    def take(self) -> None:
        """Make the folder and keep other runs out until `release`, or until this process ends.

        Raises:
            UserError: it cannot be made, or another run is at work in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        except Timeout:
            raise UserError(
                f"--output_dir {self.path} is in use by {self._who()}: stop that run, or type another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written to ({error.strerror}): type another folder"
            ) from None
        for left in (*self.checkpoints.glob(f"{PARTIAL}*"), *self.checkpoints.glob(f"{REPLACED}*")):
            shutil.rmtree(left, ignore_errors=True)

    def release(self) -> None:
        """Let other runs in."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
            self._lock.release()

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this folder's."""
        return checkpoint.resolve().parent == self.checkpoints.resolve()

    def set_aside(self) -> Path | None:
        """Move what an earlier run left out of the way of a new one; returns where it is now, or None."""
        there = bool(newest_first(self.checkpoints))
        records = self.metrics.exists() and self.metrics.stat().st_size > 0
        if not there and not records:
            return None
        place = self._place()
        if records:
            self.metrics.rename(place / self.metrics.name)
        if there:
            self.checkpoints.rename(place / self.checkpoints.name)
        return place

    def set_aside_after(self, round: int) -> Path | None:
        """Make way for a run that goes on from `round`; returns where newer checkpoints are now, or None.

        Those were passed over because they are damaged; they must neither be taken for this run's later
        nor push out sound ones. Later records are dropped: the run writes them again.
        """
        self._cut_metrics(round)
        newer = [path for path in newest_first(self.checkpoints) if (round_of(path) or 0) > round]
        if not newer:
            return None
        place = self._place()
        (place / self.checkpoints.name).mkdir()
        for path in newer:
            path.rename(place / self.checkpoints.name / path.name)
        return place

    def _place(self) -> Path:
        """A new folder for what is set aside."""
        number = 1
        while (place := self.path / f"earlier-{number}").exists():
            number += 1
        place.mkdir()
        return place

    def _cut_metrics(self, round: int) -> None:
        """Keep the records up to the end of `round` rounds."""
        kept = []
        try:
            lines = self.metrics.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            with suppress(ValueError):  # the last line of a run that was killed may be half a one
                record = json.loads(line)
                if record["kind"] != "summary" and record["round"] <= round:
                    kept.append(line)
        copy = self.metrics.with_name(f".{self.metrics.name}")
        copy.write_text("".join(f"{line}\n" for line in kept))
        os.replace(copy, self.metrics)

    def _who(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

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

from resist_ds.errors import UnreadableError, UserError
from resist_ds.files import content, names, status
from resist_ds.state import storage
from resist_ds.state.checkpoint import newest_first, round_of

PARTIAL = ".partial-"  # begins the name of a checkpoint that is not complete, or no longer
REPLACED = ".replaced-"  # and of one that is whole, and makes way for another of the same round


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
            UnreadableError: it cannot be told what is there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            self._tidy()
        except UnreadableError:
            self.release()
            raise
        except Timeout:
            raise UserError(
                f"--output_dir {self.path} is in use by {self._who()}: stop that run, or type another folder"
            ) from None
        except OSError as error:
            self.release()
            raise UserError(
                f"--output_dir {self.path} cannot be written to ({error.strerror}): type another folder"
            ) from None

    def release(self) -> None:
        """Let other runs in."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._holder.unlink(missing_ok=True)
            self._lock.release()

    def holds(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is one of this folder's."""
        here = self.checkpoints.resolve()  # of a link count where it lies and where it leads
        return here in (checkpoint.parent.resolve(), checkpoint.resolve().parent)

    def set_aside(self) -> Path | None:
        """Move what an earlier run left out of the way of a new one; returns where it is now, or None."""
        there = bool(newest_first(self.checkpoints))
        found = status(self.metrics)  # a run that takes a record for none would write over it
        records = found is not None and found.st_size > 0
        if not there and not records:
            return None
        place = self._place()
        if records:
            self.metrics.rename(place / self.metrics.name)
        if there:
            self.checkpoints.rename(place / self.checkpoints.name)
        return place

    def set_aside_after(self, round: int) -> Path | None:
        """Make way for a run that goes on from `round`; returns where what was no good is now, or None.

        Newer checkpoints were passed over because they are damaged; they must neither be taken for this run's
        later nor push out sound ones. Later records are dropped: the run writes them again. If among those
        before there are lines that are no records, the file as it was is set aside too.
        """
        newer = [path for path in newest_first(self.checkpoints) if (round_of(path) or 0) > round]
        kept, odd = self._records(round)
        place = self._place() if newer or odd else None
        if place and odd:
            shutil.copyfile(self.metrics, place / self.metrics.name)
        if kept is not None:
            copy = self.metrics.with_name(f".{self.metrics.name}")
            copy.unlink(missing_ok=True)
            storage.write(copy, kept)
            os.replace(copy, self.metrics)
        if place and newer:
            (place / self.checkpoints.name).mkdir()
            for path in newer:
                path.rename(place / self.checkpoints.name / path.name)
        return place

    def _tidy(self) -> None:
        """Remove what a run that was killed in a save has left behind, and put back what it had moved."""
        if status(self.checkpoints) is None:
            return
        for name in names(self.checkpoints):
            left = self.checkpoints / name
            if name.startswith(REPLACED):
                target = self.checkpoints / name.removeprefix(REPLACED).rpartition("-")[0]
                if status(target) is None:  # its successor never came
                    left.rename(target)
                    continue
            if name.startswith((PARTIAL, REPLACED)):
                shutil.rmtree(left, ignore_errors=True)

    def _place(self) -> Path:
        """A new folder for what is set aside."""
        number = 1
        while (place := self.path / f"earlier-{number}").exists():
            number += 1
        place.mkdir()
        return place

    def _records(self, round: int) -> tuple[list[bytes] | None, bool]:
        """The lines of metrics.jsonl up to the end of `round` rounds, and whether some are no records.

        The last line of a run that was killed may be half a one: that does not count.
        """
        if status(self.metrics) is None:
            return None, False
        lines = content(self.metrics).splitlines(keepends=True)
        kept, odd = [], []
        for line in lines:
            try:
                record = json.loads(line)
                if record["kind"] != "summary" and record["round"] <= round:
                    kept.append(line.rstrip(b"\r\n") + b"\n")
            except (ValueError, LookupError, TypeError, RecursionError):
                odd.append(line)
        return kept, odd not in ([], lines[-1:])

    def _who(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

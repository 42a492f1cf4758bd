"""What a run tells: metrics.jsonl, a tracker (wandb first), a progress bar. Rank 0 writes.

The keys are the same everywhere.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from resist_ds.comm import Comm
from resist_ds.errors import UserError
from resist_ds.options.config import Config
from resist_ds.state.saver import Saved
from resist_ds.state.start import Start
from resist_ds.telemetry import tracker
from resist_ds.telemetry.meter import Figures, Totals, memory_metrics, round_metrics, slowest


class Bar:
    """The progress bar, where there is a terminal; one that is gone, or strange, ends no run."""

    def __init__(self, done: int, rounds: int):
        self._bar: tqdm[Any] | None = None
        with suppress(Exception):  # TQDM_NCOLS=wide and the like: tqdm takes its options from there too
            self._bar = tqdm(total=rounds, initial=done, unit="round", dynamic_ncols=True, disable=None)

    def update(self, shown: Mapping[str, str]) -> None:
        """One more round is done."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.set_postfix(shown, refresh=False)
                self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()


class Telemetry:
    """Writes records on rank 0, counts totals on all. Use as a context."""

    def __init__(self, comm: Comm, config: Config, rounds: int, path: Path, start: Start):
        """
        Args:
            path: of metrics.jsonl, whose folder exists.
            start: what the run begins from; the records of a run that goes on are continued.
        """
        self._main = comm.rank == 0
        self._config = config
        self._path = path
        self._start = start
        self._file: TextIO | None = None
        self._tracker: tracker.Tracker | None = None
        self._bar: Bar | None = None
        self._rounds = rounds
        self._comm = comm
        self._last: dict[str, Any] = {}
        self._shown: dict[str, str] = {}
        self.totals = Totals.of(start.state.totals) if start.state else Totals()
        self._begun = time.monotonic() - self.totals.wall

    def open(self, settings: Mapping[str, Any]) -> None:
        """Open the run's files and its tracker, on every rank; no communication.

        Args:
            settings: what the tracker shows as the run's configuration.
        """
        config = self._config
        tracker.check(config)
        if self._main:
            try:
                self._file = self._path.open("a" if self._start.here else "w", buffering=1)
            except OSError as error:
                raise UserError(
                    f"--output_dir {config.output_dir} cannot be written to ({error.strerror}): "
                    "type another folder"
                ) from None
            if config.progress:
                self._bar = Bar(self._start.position.round, self._rounds)
            if tracker.is_wanted(config):
                facts = (settings, self._path.parent, self._start)
                self._tracker = tracker.Tracker(config, *facts, self.say, self.warn)

    def round(self, position: Mapping[str, Any], ranks: Sequence[Figures], skipped: int = 0) -> None:
        """A round is done; that of `skipped` workers was dropped."""
        self.totals.add(ranks)
        self.totals.rounds += 1
        self.totals.skipped += skipped
        metrics = round_metrics(ranks)
        if self._config.on_nan == "skip":
            metrics["train/skipped"] = skipped
        if self._config.on_bad_image == "skip":
            metrics["data/unreadable"] = self.totals.unreadable
        self._record("round", {**position, **metrics})
        if self._bar is not None:
            self._shown |= {
                "loss": f"{metrics['train/loss']:.3f}",
                "img/s": f"{metrics['perf/samples_per_s']:.0f}",
            }
            self._bar.update(self._shown)

    def evaluation(
        self, position: Mapping[str, Any], ranks: Sequence[Figures], loss: float, accuracy: float
    ) -> None:
        """The global model was tested."""
        self.totals.add(ranks)
        self.totals.accuracy.append(accuracy)
        metrics = {
            **position,
            "eval/loss": loss,
            "eval/accuracy": accuracy,
            "eval/best_accuracy": max(self.totals.accuracy),
            "perf/eval_s": slowest(ranks, "eval"),
            "comm/bytes_eval": sum(f.sent["eval"] for f in ranks),
            **memory_metrics(ranks),
        }
        self._record("eval", metrics)
        self._shown["test"] = f"{100 * accuracy:.2f}%"

    def checkpoint(self, position: Mapping[str, Any], ranks: Sequence[Figures], saved: Saved) -> None:
        """A checkpoint is complete."""
        self.totals.add(ranks)
        saving = {"perf/save_s": saved.seconds, "save/bytes": saved.size}
        self._record("checkpoint", {**position, **saving, **memory_metrics(ranks)})

    def sync(self) -> None:
        """Have the records so far on the disk, as a checkpoint is about to rely on them."""
        if self._file is not None:
            with suppress(OSError):  # /dev/full and the like; a write says so when it fails
                os.fsync(self._file.fileno())

    def summary(self, settings: Mapping[str, Any]) -> None:
        """The run is done: the last values once more."""
        self._close_bar()  # what is said from here on stands below it
        self._record("summary", {**self._last, "settings": dict(settings)})
        if self._tracker is not None and importlib.util.find_spec("matplotlib") is not None:
            self._tracker.pictures(self._pictures)

    def _pictures(self) -> dict[str, Any]:
        """The pictures of `tools/plot.py`."""
        from resist_ds.telemetry.figures import pictures, pixels, read

        drawn = pictures([read(self._path.parent)])
        return {f"plots/{name}": pixels(figure) for name, figure in drawn.items()}

    def _record(self, kind: str, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to the tracker."""
        self.totals.wall = time.monotonic() - self._begun
        metrics = {**metrics, "perf/wall_s": self.totals.wall, "comm/bytes_total": self.totals.bytes_total}
        peaks = {key: max(v, self._last.get(key, v)) for key, v in metrics.items() if "_gib" in key}
        self._last |= {**metrics, **peaks}  # the summary's peaks are those of the whole run
        if not self._main:
            return
        if self._file is not None:
            # JSON has no NaN: the loss of a run that diverged is null.
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()
            }
            try:
                self._file.write(json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n")
            except OSError as error:  # a full disk, say: the others wait in the next collective
                self.warn(f"cannot write {self._path}: {error.strerror}; going on without it")
                with suppress(OSError):
                    self._file.close()
                self._file = None
        if self._tracker is not None and kind != "summary":
            self._tracker.log(metrics)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal, above the progress bar; from rank 0."""
        if self._main:
            with suppress(OSError, ValueError):  # a reader that is gone does not end the run
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Something that does not stop the run; from rank 0."""
        if self._main:
            with suppress(OSError, ValueError):
                tqdm.write(f"warning: {text}", file=sys.stderr)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_bar()
        if self._file is not None:
            with suppress(OSError):  # of a full disk; the write before has said so
                self._file.close()
        if self._tracker is not None:
            self._tracker.close(getattr(error, "exit_code", 1) if error else 0)

"""What a run tells: metrics.jsonl, a tracker (wandb first), a progress bar. Rank 0 writes.

The keys are the same everywhere. A round's figures come from all ranks: seconds are those of the slowest
rank, bytes are summed, peaks are per rank and of the largest.
"""

import importlib.util
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from tqdm import tqdm

from resist_ds.comm import Comm
from resist_ds.engines.local import Tally
from resist_ds.errors import UserError
from resist_ds.memory import GIB, PeakMemory
from resist_ds.options.config import Config
from resist_ds.state.saver import Saved
from resist_ds.state.start import Start
from resist_ds.telemetry import tracker

SYNC = ("aggregate", "hand_off", "gradients")  # kinds of exchange that training needs
PHASES = ("local", "sync", "eval", "save")


@dataclass
class Figures:
    """One rank's measurements over an interval: a round, or an evaluation.

    Attributes:
        tallies: training tally of each worker that the rank plays.
        seconds, peak, reserved: per phase; bytes of memory.
        sent: bytes sent to other ranks, by kind of exchange.
    """

    tallies: dict[int, Tally] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    reserved: dict[str, int] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)


class Meter:
    """Measures the phases of this rank.

    Attributes:
        baseline: bytes in use before the run has begun: on a CPU, what the imports alone take.
    """

    def __init__(self, comm: Comm):
        self._comm = comm
        self._memory = PeakMemory(comm.device)
        self._figures = Figures()
        self._trained = 0
        self._memory.reset()
        self.baseline, _ = self._memory.read()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase and take its peak of memory; the device is waited for at its end."""
        self._memory.reset()
        start = time.perf_counter()
        yield
        if self._comm.device.type == "cuda":
            torch.cuda.synchronize(self._comm.device)
        self._figures.seconds[name] = time.perf_counter() - start
        self._figures.peak[name], self._figures.reserved[name] = self._memory.read()
        if name == "local":
            self._trained = max(self._trained, self._figures.peak[name])

    @property
    def free(self) -> int:
        """Bytes below the highest peak of training, at the moment."""
        return max(0, self._trained - self._memory.now())

    def tally(self, worker: int, tally: Tally) -> None:
        self._figures.tallies[worker] = tally

    def take(self) -> Figures:
        """The figures since the last call."""
        figures, self._figures = self._figures, Figures()
        figures.sent = Counter(self._comm.ledger)
        self._comm.ledger.clear()
        return figures


def _slowest(ranks: Sequence[Figures], phase: str) -> float:
    return max(f.seconds.get(phase, 0.0) for f in ranks)


def memory_metrics(ranks: Sequence[Figures]) -> dict[str, float]:
    """mem/… keys: peaks over the interval's phases, GiB; of the largest rank, and of each."""
    peaks = [max(f.peak.values()) for f in ranks]
    metrics = {"mem/peak_gib": max(peaks) / GIB}
    metrics["mem/reserved_gib"] = max(max(f.reserved.values()) for f in ranks) / GIB
    for phase in PHASES:
        if any(phase in f.peak for f in ranks):
            metrics[f"mem/{phase}_gib"] = max(f.peak.get(phase, 0) for f in ranks) / GIB
    return metrics | {f"mem/peak_gib/rank{rank}": peak / GIB for rank, peak in enumerate(peaks)}


def round_metrics(ranks: Sequence[Figures]) -> dict[str, float]:
    """train/…, perf/…, comm/… and mem/… keys of a round from all ranks' figures."""
    tallies = dict(sorted(item for f in ranks for item in f.tallies.items())).values()
    images = sum(t.images for t in tallies)
    local, sync = _slowest(ranks, "local"), _slowest(ranks, "sync")
    each = images or math.nan  # a round that was dropped for all workers has no loss
    return {
        "train/loss": math.fsum(t.loss for t in tallies) / each,
        "train/accuracy": sum(t.right for t in tallies) / each,
        "perf/samples_per_s": images / (local + sync),
        "perf/local_s": local,
        "perf/sync_s": sync,
        "comm/bytes_round": sum(f.sent[kind] for f in ranks for kind in SYNC),
        **memory_metrics(ranks),
    }


@dataclass
class Totals:
    """What a run has come to so far, from all ranks' figures.

    Attributes:
        images, seconds: per worker, of its local steps.
        peak: per phase and rank, bytes.
        bytes_round, bytes_total: bytes of synchronisation alone, and of everything.
        skipped: rounds of workers that were dropped (`--on_nan skip`).
        unreadable: images that this process could not read (`--on_bad_image skip`).
        wall: seconds that the run has lasted.
        accuracy: of every evaluation, in order; of a resumed run, the best and the last one before.
    """

    images: Counter[int] = field(default_factory=Counter)
    seconds: Counter[int] = field(default_factory=Counter)
    peak: dict[tuple[str, int], int] = field(default_factory=dict)
    bytes_sync: int = 0
    bytes_total: int = 0
    rounds: int = 0
    skipped: int = 0
    unreadable: int = 0
    wall: float = 0.0
    accuracy: list[float] = field(default_factory=list)

    def to_keep(self) -> dict[str, Any]:
        """What a checkpoint takes along: the totals of the run, not of this process."""
        accuracy = [max(self.accuracy), self.accuracy[-1]] if self.accuracy else []
        kept = {"bytes_total": self.bytes_total, "skipped": self.skipped, "wall": self.wall}
        return {**kept, "accuracy": accuracy}

    def add(self, ranks: Sequence[Figures]) -> None:
        for rank, figures in enumerate(ranks):
            for worker, tally in figures.tallies.items():
                self.images[worker] += tally.images
                self.seconds[worker] += tally.seconds  # type: ignore[assignment]
            for phase, peak in figures.peak.items():
                self.peak[phase, rank] = max(peak, self.peak.get((phase, rank), 0))
            self.bytes_sync += sum(figures.sent[kind] for kind in SYNC)
            self.bytes_total += figures.sent.total()


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
        self._bar: tqdm[Any] | None = None
        self._rounds = rounds
        self._comm = comm
        self._last: dict[str, Any] = {}
        self._shown: dict[str, str] = {}
        self.totals = Totals(**start.state.totals) if start.state else Totals()
        self._begun = time.monotonic() - self.totals.wall

    def open(self, settings: Mapping[str, Any]) -> None:
        """Open the run's files and its tracker, on every rank; no communication.

        Args:
            settings: what the tracker shows as the run's configuration.
        """
        config = self._config
        tracker.check(config)
        # Every rank makes one, as accelerate expects; its process group is the one that comm has made.
        accelerator = Accelerator(
            cpu=self._comm.device.type == "cpu",
            mixed_precision="no",
            log_with=None if config.log_with == "none" else config.log_with,
            project_dir=self._path.parent,
        )
        assert accelerator.num_processes == self._comm.size, (accelerator.num_processes, self._comm.size)
        if self._main:
            try:
                self._file = self._path.open("a" if self._start.here else "w", buffering=1)
            except OSError as error:
                raise UserError(
                    f"--output_dir {config.output_dir} cannot be written to ({error.strerror}): "
                    "type another folder"
                ) from None
            if config.progress:
                done = self._start.position.round
                self._bar = tqdm(
                    total=self._rounds, initial=done, unit="round", dynamic_ncols=True, disable=None
                )
            if config.log_with != "none":
                facts = (settings, self._path.parent, self._start)
                self._tracker = tracker.Tracker(accelerator, config, *facts, self.say, self.warn)

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
            self._bar.set_postfix(self._shown, refresh=False)
            self._bar.update()

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
            "perf/eval_s": _slowest(ranks, "eval"),
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
            with suppress(OSError):  # a reader that is gone does not end the run
                tqdm.write(text, file=sys.stdout)
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Something that does not stop the run; from rank 0."""
        if self._main:
            with suppress(OSError):
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

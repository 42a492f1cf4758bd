"""What is measured: each rank's seconds, bytes and peaks of memory, and what all ranks' come to.

Seconds are those of the slowest rank, bytes are summed, peaks are per rank and of the largest.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from resist_ds.comm import Comm
from resist_ds.engines.local import Tally
from resist_ds.memory import GIB, PeakMemory

SYNC = ("aggregate", "hand_off", "gradients")  # kinds of exchange that training needs
PHASES = ("local", "sync", "eval", "save")


@dataclass
class Figures:
    """One rank's measurements over an interval: a round, or an evaluation.

    Attributes:
        tallies: training tally of each worker that the rank plays.
        seconds, peak, reserved: per phase; bytes of memory. The seconds of `exposed` are what of a
            synchronisation was in front of everybody.
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

    def exposed(self, waited: float, behind: float) -> None:
        """Of a round's synchronisation, which has just been measured: what everybody waited for.

        Args:
            waited: seconds of the local phase that were spent on waiting for the exchange behind it.
            behind: seconds that this took; with 0 all of it is in front of everybody.
        """
        seconds = self._figures.seconds
        seconds["exposed"] = seconds["sync"] + waited
        seconds["local"] -= waited
        seconds["sync"] += max(behind, waited)  # which may have been for ranks that came later

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


def slowest(ranks: Sequence[Figures], phase: str) -> float:
    return max(f.seconds.get(phase, 0.0) for f in ranks)


def in_front(ranks: Sequence[Figures]) -> float:
    """Seconds of a synchronisation that everybody waited for: all of it, if none ran behind local steps."""
    return max(f.seconds.get("exposed", f.seconds.get("sync", 0.0)) for f in ranks)


def tallies_of(ranks: Sequence[Figures]) -> dict[int, Tally]:
    """Each worker's tally; of one that a team has played, its ranks' together."""
    found: dict[int, Tally] = {}
    for figures in ranks:
        for worker, tally in figures.tallies.items():
            found[worker] = found[worker].beside(tally) if worker in found else tally
    return dict(sorted(found.items()))


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
    tallies = tallies_of(ranks).values()
    images = sum(t.images for t in tallies)
    seconds = max(f.seconds.get("local", 0.0) + in_front([f]) for f in ranks)
    each = images or math.nan  # a round that was dropped for all workers has no loss
    return {
        "train/loss": math.fsum(t.loss for t in tallies) / each,
        "train/accuracy": sum(t.right for t in tallies) / each,
        "perf/samples_per_s": images / seconds,
        "perf/local_s": slowest(ranks, "local"),
        "perf/sync_s": slowest(ranks, "sync"),
        "perf/sync_exposed_s": in_front(ranks),
        "comm/bytes_round": sum(f.sent[kind] for f in ranks for kind in SYNC),
        **({"comm/bytes_team": team} if (team := sum(f.sent["team"] for f in ranks)) else {}),
        **memory_metrics(ranks),
    }


@dataclass
class Totals:
    """What a run has come to so far, from all ranks' figures.

    Attributes:
        images, seconds: per worker, of its local steps.
        peak: per phase and rank, bytes.
        bytes_sync, bytes_team, bytes_total: bytes of synchronisation alone, inside teams, and of everything.
        seconds_sync, seconds_exposed: of all synchronisations, and of those what everybody waited for.
        skipped: rounds of workers that were dropped (`--on_nan skip`).
        unreadable: images that this process could not read (`--on_bad_image skip`).
        wall: seconds that the run has lasted.
        accuracy: of every evaluation, in order; of a resumed run, the best and the last one before.
    """

    images: Counter[int] = field(default_factory=Counter)
    seconds: Counter[int] = field(default_factory=Counter)
    peak: dict[tuple[str, int], int] = field(default_factory=dict)
    bytes_sync: int = 0
    bytes_team: int = 0
    bytes_total: int = 0
    seconds_sync: float = 0.0
    seconds_exposed: float = 0.0
    rounds: int = 0
    skipped: int = 0
    unreadable: int = 0
    wall: float = 0.0
    accuracy: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> "Totals":
        """Those that a checkpoint has taken along; what another version counts besides is left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in kept.items() if name in known})

    def to_keep(self) -> dict[str, Any]:
        """What a checkpoint takes along: the totals of the run, not of this process."""
        accuracy = [max(self.accuracy), self.accuracy[-1]] if self.accuracy else []
        kept = {"bytes_total": self.bytes_total, "skipped": self.skipped, "wall": self.wall}
        return {**kept, "accuracy": accuracy}

    def add(self, ranks: Sequence[Figures]) -> None:
        self.seconds_sync += slowest(ranks, "sync")
        self.seconds_exposed += in_front(ranks)
        for worker, tally in tallies_of(ranks).items():
            self.images[worker] += tally.images
            self.seconds[worker] += tally.seconds  # type: ignore[assignment]
        for rank, figures in enumerate(ranks):
            for phase, peak in figures.peak.items():
                self.peak[phase, rank] = max(peak, self.peak.get((phase, rank), 0))
            self.bytes_sync += sum(figures.sent[kind] for kind in SYNC)
            self.bytes_team += figures.sent["team"]
            self.bytes_total += figures.sent.total()

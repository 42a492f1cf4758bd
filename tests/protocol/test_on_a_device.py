"""What evaluation, synchronisation and a checkpoint's copy ask of a GPU, counted on one that is not there.

The pretended device delivers what was copied without blocking only when it was waited for, and finds pinned
memory that was written to too early: so a wait that is missing shows in the numbers that are compared.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from resist_ds.trainer import Trainer
from tests import THREADS, pretend_gpu
from tests.pretend_gpu.record import RECORD, Copy
from tests.pretend_gpu.start import Job, Ranks, build
from tests.saved import digest

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(pretend_gpu.misfit() is not None, reason=str(pretend_gpu.misfit())),
]

OPTIONS: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "model": "preact_resnet_small",
    "batch_size": 64,
    "local_steps": 1,
    "rounds": 2,
    "eval_every": 1,
    "eval_batch_size": 128,  # four batches
    "eval_memory": 1,
    "calibration_samples": 160,  # three groups
    "checkpoint_every": 1,
    "log_with": "none",
    "progress": False,
    "mixed_precision": "no",
    "cpu_threads": THREADS,
}
PLACES = {"alone": [[0]], "each": [[0, 1], [0, 1]], "shared": [[0], [0]]}  # as in test_pretend_gpu
WORKERS = {"alone": (1, 4), "each": (2, 4), "shared": (2, 4)}


@dataclass
class Counts:
    """What a rank asked of the device in its last phase of each kind.

    Attributes:
        copies: {phase: every copy between host and device}.
        blocking: {phase: how often the host waited for the device}, for a copy or otherwise.
        lasting: bytes of host memory that are told as taken by the checkpoint's copy.
    """

    copies: dict[str, list[Copy]] = field(default_factory=dict)
    blocking: dict[str, int] = field(default_factory=dict)
    lasting: int = 0


def watched(comm: Comm, options: dict[str, Any]) -> Counts:
    """A run whose phases are counted."""
    run, counts = Trainer(comm, Config(**options)), Counts()
    phase = run.meter.phase
    package = {"eval": "protocol/evaluate.py", "sync": "protocol/sync.py", "save": "state/snapshot.py"}

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        with phase(name):
            RECORD.clear()
            with RECORD.step():
                pass  # the first one is never recorded
            with RECORD.step():
                yield
            if name in package:
                copies = [
                    c for (c, at), n in RECORD.copies.items() for _ in range(n) if at.file == package[name]
                ]
                waits = sum(n for (_, at), n in RECORD.waits.items() if at.file == package[name])
                counts.copies[name] = copies
                counts.blocking[name] = waits + sum(copy.blocking for copy in copies)

    run.meter.phase = counted  # type: ignore[method-assign]
    run.run()
    run.folder.release()
    counts.lasting = run.saver.copies
    return counts


def all_of(comm: Comm, runs: dict[str, dict[str, Any]]) -> dict[str, Counts]:
    return {name: watched(comm, options) for name, options in runs.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counted")


@pytest.fixture(scope="module")
def counts(folder: Path) -> dict[str, list[Counts]]:
    """{place and W: each rank's}."""
    jobs = []
    for place, gpus in PLACES.items():
        runs = {f"{place} {w}": {"workers": w} for w in WORKERS[place]}
        if place == "alone":
            runs["at once"] = {"workers": 1, "checkpoint_async": False}
        runs = {name: OPTIONS | more | {"output_dir": str(folder / name)} for name, more in runs.items()}
        jobs.append(Job(place, gpus, all_of, (runs,)))
    results = Ranks(build(folder), folder, jobs).results()
    return {name: [rank[name] for rank in ranks] for ranks in results.values() for name in ranks[0]}


CASES = [(place, workers) for place in PLACES for workers in WORKERS[place]]


@pytest.mark.parametrize(("place", "workers"), [case for case in CASES if case[0] != "shared"])
def test_an_evaluation_waits_twice(counts: dict[str, list[Counts]], place: str, workers: int) -> None:
    """For the scores of all batches, and for the statistics; blocks come from pinned memory alone."""
    for rank in counts[f"{place} {workers}"]:
        assert rank.blocking["eval"] == 2
        assert all(copy.pinned for copy in rank.copies["eval"] if copy.to_device)


@pytest.mark.parametrize(("place", "workers"), CASES)
def test_a_synchronisation_queues_its_copies(
    counts: dict[str, list[Counts]], place: str, workers: int
) -> None:
    """It waits at the end of both exchanges where host memory takes part, and for gloo once a pass."""
    for rank in counts[f"{place} {workers}"]:
        assert not any(copy.blocking or not copy.pinned for copy in rank.copies["sync"])
        in_host_memory = workers > len(PLACES[place]) or place == "shared"
        assert bool(rank.copies["sync"]) == in_host_memory
        if place != "shared":
            assert rank.blocking["sync"] == 2 * in_host_memory


def test_bits_do_not_depend_on_where_means_are_taken(counts: dict[str, list[Counts]], folder: Path) -> None:
    """All of four workers: on one rank, on two, over gloo."""
    one, *others = (digest(folder / f"{place} 4" / "checkpoints" / "round-000002") for place in PLACES)
    assert counts and all(other == one for other in others)


def test_a_checkpoint_is_copied_in_runs_into_pinned_memory(
    counts: dict[str, list[Counts]], folder: Path
) -> None:
    """A lone worker owns all that its vector holds: that is one copy, and the files are those without it."""
    (rank,) = counts["alone 1"]
    assert rank.copies["save"] == [Copy(to_device=False, pinned=True, blocking=False)]
    assert rank.lasting.bit_count() == 1  # as torch allocates it
    runs = [digest(folder / name / "checkpoints" / "round-000002") for name in ("alone 1", "at once")]
    assert runs[0] == runs[1]
    for place, workers in CASES:
        for rank in counts[f"{place} {workers}"]:
            assert len(rank.copies["save"]) < 60 and not rank.blocking["save"]

"""Saving: all ranks write their part of a checkpoint, and it appears whole or not at all.

The files go into a partial folder; every rank hashes and syncs what it writes. Once all have reported
success, rank 0 adds the indexes, the state and the manifest, syncs and renames the folder, and removes old
checkpoints last. An error on any rank leaves the older checkpoints as they are and nothing else.
In the background, what is written is a `Snapshot`, and a later round completes the checkpoint.
"""

import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.errors import DamagedError, RunError, UnreadableError
from resist_ds.nets.blueprint import Blueprint, Statistics
from resist_ds.nets.subnet import OptimizerState, StateDict
from resist_ds.state import storage
from resist_ds.state.checkpoint import (
    GROUPS,
    WORKERS,
    all_specs,
    folder_name,
    index_name,
    newest_first,
    shard_name,
    specs_of_workers,
    statistics_names,
)
from resist_ds.state.folder import PARTIAL, REPLACED
from resist_ds.state.run_state import STATE, State
from resist_ds.state.snapshot import Snapshot, Tensors
from resist_ds.state.storage import Entry, Spec


@dataclass
class Written:
    """What a rank reports: its files and what they hold, or why there are none."""

    files: dict[str, Entry] = field(default_factory=dict)
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # {group: {name: file}}
    error: str | None = None


@dataclass(frozen=True)
class Saved:
    """How a save ended.

    Attributes:
        round: of the checkpoint.
        seconds: from its begin to its end, in the background or not.
        size: bytes of all files.
        error: why there is no checkpoint, or None.
    """

    round: int
    seconds: float
    size: int
    error: str | None


class Saver:
    """Writes checkpoints into a folder.

    Args:
        folder: shared by all machines.
        optimizer: the optimizer state that is saved; none where momentum does not outlive a round.
        keep: sound checkpoints that stay.
        background: whether to write in a thread, from a copy.

    Attributes:
        specs: {group: {name: type and shape}} of every tensor of the global model.
        copies: bytes of host memory that the largest copy took so far.
    """

    def __init__(
        self,
        comm: Comm,
        blueprint: Blueprint,
        folder: Path,
        *,
        dtype: torch.dtype,
        optimizer: OptimizerState,
        keep: int,
        background: bool,
    ):
        self._comm = comm
        self.optimizer = optimizer
        self.specs = all_specs(blueprint, dtype, optimizer)
        self._blueprint, self._dtype = blueprint, dtype
        self._folder = folder
        self._keep = keep
        self.background = background
        self._job: _Job | None = None
        self._snapshot = Snapshot(comm.device)

    @property
    def copies(self) -> int:
        return self._snapshot.nbytes

    @property
    def in_flight(self) -> bool:
        """Whether a checkpoint was begun that `settle` has not completed; the same on all ranks."""
        return self._job is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write, so that `settle` need not wait for it."""
        return self._job is None or self._job.thread is None or not self._job.thread.is_alive()

    def start(
        self,
        state: State,
        owned: StateDict,
        statistics: Statistics,
        kept: Mapping[str, Mapping[int, Tensor]],
    ) -> None:
        """Begin a checkpoint; `settle` completes it. Collective: all ranks.

        Args:
            owned: the partitioned state dict of this rank's workers.
            statistics: BatchNorm's, of the whole global model.
            kept: {kind: {worker: what it holds alone}} of those that this rank writes; all ranks have these
                kinds.
        """
        assert not self.in_flight
        started = time.perf_counter()
        partial, error = self._comm.gather(self._make_folder(state.round))[0]
        tensors = _select(self.specs, owned, statistics) | {
            WORKERS: {
                f"{worker}.{kind}": part for kind, parts in kept.items() for worker, part in parts.items()
            }
        }
        alone = specs_of_workers(self._blueprint, self._dtype, self.optimizer, state.workers, kept)
        specs = {**self.specs, WORKERS: alone}
        self._job = job = _Job(state, partial, started, specs, Written(error=error))
        if error is not None:
            return
        if not self.background:
            self._write(job, tensors)
            return
        try:
            tensors, wait = self._snapshot.take(tensors)
        except (MemoryError, RuntimeError) as no_memory:  # the older checkpoints and the run are worth more
            job.written.error = (
                f"rank {self._comm.rank}: no host memory for a copy ({type(no_memory).__name__})"
            )
            return
        job.thread = threading.Thread(target=self._write, args=(job, tensors, wait), name="checkpoint")
        job.thread.start()

    def settle(self) -> Saved:
        """Complete the checkpoint that was begun: wait for all ranks' files. Collective: all ranks."""
        job = self._job
        assert job is not None
        if job.thread is not None:
            job.thread.join()
        everyone = self._comm.gather(job.written)
        error = next((w.error for w in everyone if w.error), None)
        size = 0
        if self._comm.rank == 0:
            size, error = self._finish(job, everyone, error)
        size, error = self._comm.gather((size, error))[0]
        self._job = None
        return Saved(job.state.round, time.perf_counter() - job.started, size, error)

    def _make_folder(self, round: int) -> tuple[Path, str | None]:
        """Rank 0 makes the partial folder; (where it is, error)."""
        partial = self._folder / f"{PARTIAL}{folder_name(round)}-{secrets.token_hex(4)}"
        if self._comm.rank == 0:
            try:
                new = not self._folder.exists()
                partial.mkdir(parents=True)
                if new:
                    storage.sync_folder(self._folder.parent)
            except OSError as error:
                return partial, _reason(error, partial)
        return partial, None

    def _write(self, job: "_Job", tensors: Tensors, wait: Callable[[], None] = lambda: None) -> None:
        """Write this rank's files, after a wait for the tensors; what goes wrong is reported by `settle`."""
        rank, size = self._comm.rank, self._comm.size
        try:
            wait()
            for group in GROUPS:
                if not job.specs[group]:
                    continue
                name = shard_name(group, rank, size)
                specs = {n: job.specs[group][n] for n in tensors[group]}
                job.written.names[group] = dict.fromkeys(specs, name)
                if not specs:  # of a team's ranks one alone writes what its workers hold alone
                    continue
                metadata = {"format": "pt"}
                entry = storage.write_safetensors(job.partial / name, tensors[group].items(), specs, metadata)
                job.written.files[name] = entry
        except Exception as error:  # it must not leave the other ranks waiting
            job.written.error = f"rank {rank}: {_reason(error, job.partial)}"

    def _finish(self, job: "_Job", everyone: list[Written], error: str | None) -> tuple[int, str | None]:
        """On rank 0: put the folder in its place, or remove it; (bytes, why there is no checkpoint)."""
        target = self._folder / folder_name(job.state.round)
        if error is None:
            try:
                size = self._complete(job, everyone)
                self._put(job.partial, target)
            except Exception as failure:
                error = _reason(failure, job.partial)
            else:
                with suppress(OSError, RunError):  # what cannot be removed now is removed another time
                    self._prune()
                return size, None
        shutil.rmtree(job.partial, ignore_errors=True)
        return 0, error

    def _complete(self, job: "_Job", everyone: list[Written]) -> int:
        """Check that the ranks' files are the model, and add what only one rank writes; returns all bytes."""
        files = {name: entry for written in everyone for name, entry in written.files.items()}
        for name, entry in files.items():
            if (job.partial / name).stat().st_size != entry.size:  # not there: another machine's disk
                raise OSError(f"{name} is not what its rank has written")
        for group, specs in job.specs.items():
            if not specs:
                continue
            where = {n: f for written in everyone for n, f in written.names[group].items()}
            count = sum(len(written.names[group]) for written in everyone)
            assert where.keys() == specs.keys() and count == len(specs), (
                "the ranks' tensors are not the model's"
            )
            size = sum(spec.nbytes for spec in specs.values())
            content = {"metadata": {"total_size": size}, "weight_map": {n: where[n] for n in specs}}
            files[index_name(group)] = storage.write_json(job.partial / index_name(group), content)
        files[STATE] = storage.write_json(job.partial / STATE, asdict(job.state))
        files[storage.MANIFEST] = storage.seal(job.partial, files)
        storage.sync_folder(job.partial)
        return sum(entry.size for entry in files.values())

    def _put(self, partial: Path, target: Path) -> None:
        """Rename; a checkpoint of the same round, which was damaged or is the same, makes way."""
        replaced = self._folder / f"{REPLACED}{target.name}-{secrets.token_hex(4)}"
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        storage.sync_folder(self._folder)
        if replaced.exists():
            shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self) -> None:
        """Remove what is older than the newest `keep` checkpoints that are whole; damaged ones count not.

        The newest is the one just written: a resumed run has set aside what was newer. One that cannot be
        read may be sound, but does not count either, so that an older one stays in its place.
        """
        whole = 0
        for path in newest_first(self._folder):
            if whole >= self._keep:
                gone = self._folder / f"{PARTIAL}{path.name}-{secrets.token_hex(4)}"
                with suppress(OSError):  # renamed first: a checkpoint is never there in part
                    path.rename(gone)
                    shutil.rmtree(gone)
                continue
            with suppress(DamagedError, UnreadableError):
                storage.check_listing(path)
                whole += 1


@dataclass
class _Job:
    """A checkpoint on its way."""

    state: State
    partial: Path
    started: float
    specs: dict[str, dict[str, Spec]]
    written: Written
    thread: threading.Thread | None = None


def _select(specs: Mapping[str, Mapping[str, Spec]], owned: StateDict, statistics: Statistics) -> Tensors:
    """The tensors that this rank writes; a BatchNorm's statistics go with its weight."""
    model: dict[str, Tensor] = {}
    optimizer: dict[str, Tensor] = {}
    for name, tensors in owned.items():
        model[name] = tensors["parameter"]
        optimizer |= {
            f"{name}.{kind}": t for kind, t in tensors.items() if f"{name}.{kind}" in specs["optimizer"]
        }
    model |= {
        n: t for n, t in _buffers(specs["model"], statistics) if n.rpartition(".")[0] + ".weight" in owned
    }
    return {"model": model, "optimizer": optimizer}


def _buffers(specs: Mapping[str, Spec], statistics: Statistics) -> Iterator[tuple[str, Tensor]]:
    for norm, values in statistics.items():
        *names, count = statistics_names(norm)
        for name, value in zip(names, values, strict=True):
            yield name, value.to(specs[name].dtype)
        yield count, torch.zeros((), dtype=specs[count].dtype)


def _reason(error: Exception, folder: Path) -> str:
    """What went wrong, and in which file."""
    if isinstance(error, OSError) and error.strerror:
        name = os.path.basename(error.filename) if error.filename else folder.name
        apart = isinstance(error, FileNotFoundError)  # what one rank has made, another does not find
        hint = ": --output_dir must be on a file system that all machines share" if apart else ""
        return f"{error.strerror} ({name}){hint}"
    return f"{type(error).__name__}: {error}"

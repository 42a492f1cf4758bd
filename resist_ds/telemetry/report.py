"""The words of a run: its first lines, which say what will happen, and the table at its end."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from resist_ds import __version__
from resist_ds.comm import Comm
from resist_ds.data.datasets import Data
from resist_ds.engines.timetable import Timetable
from resist_ds.forecast.footprint import Device
from resist_ds.forecast.plan import expected
from resist_ds.forecast.traffic import sent_per_round
from resist_ds.memory import GIB
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, Partition, slots_for
from resist_ds.state.start import Start
from resist_ds.telemetry.meter import PHASES, Totals

SHORT = 50  # local steps of a rank: a run that has no more is over before its prediction


@dataclass(frozen=True)
class Job:
    """The facts of a run.

    Attributes:
        behind: rounds from here on whose exchange runs behind local steps (`--overlap_steps`).
    """

    config: Config
    comm: Comm
    layout: Layout
    blueprint: Blueprint
    data: Data
    timetable: Timetable
    behind: int = 0

    def settings(self) -> dict[str, Any]:
        """Every option, what was derived from them, versions and commit, for the tracker and the summary.

        A folder of this machine is named without the way there, which may name its owner.
        """
        pool = self.blueprint.pool
        packages = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "numpy")
        versions = {"resist_ds": __version__, "python": platform.python_version()}
        return {
            **{name: _shareable(value) for name, value in self.config.to_dict().items()},
            "W": self.layout.workers,
            "R": self.layout.ranks,
            "K": slots_for(self.layout.workers, pool, self.config.least_blocks(pool)),
            "P": pool,
            "total_rounds": self.timetable.rounds,
            "device": self.comm.device.type,
            "backend": self.comm.backend,
            "versions": versions | {name: _version(name) for name in packages},
            "git_commit": _commit() if self.comm.rank == 0 else None,  # rank 0 alone tells it
        }


def opening(job: Job, deal: Partition, start: Start) -> str:
    """What will happen: model and data, W, R and K, who plays what, the device, the start; and hints."""
    config, comm, layout, blueprint, data = job.config, job.comm, job.layout, job.blueprint, job.data
    pool, workers = blueprint.pool, layout.workers
    slots = slots_for(workers, pool, config.least_blocks(pool))
    sub_resnet = blueprint.parameters_held(slots)
    held = config.parameters_held(blueprint.parameters, sub_resnet, comm.size) / blueprint.parameters
    blocks = f"K = {slots} of {pool} pool blocks" if config.way.partitions else f"the pool of {pool} blocks"
    if config.way.spread_parameters:
        blocks = "a share of every tensor"
    size = layout.team_size
    plays = [
        f"{_players(first, size)}: {_span(layout.workers_of(first))}"
        for first in range(0, min(8 * size, layout.ranks), size)
    ]
    more = f", … ({_count(layout.teams, 'rank' if size == 1 else 'team')})" if layout.teams > 8 else ""
    teams = f" in {_count(layout.teams, 'team')} ({config.sharing} inside)" if size > 1 else ""
    lines = [
        f"{config.model}: {blueprint.parameters / 1e6:.2f} M parameters, a pool of P = {pool} blocks",
        f"{data.name}: {data.train_size:,} training and {data.test_size:,} test images, "
        f"{data.num_classes} classes, {data.img_size}×{data.img_size}{_kept(data)}",
        *data.remarks,
        f"W = {_count(workers, 'worker')} on R = {_count(layout.ranks, 'rank')}{teams}, "
        f"each with {blocks}: {100 * held:.0f} % of the parameters",
        f"who plays whom: {'; '.join(plays)}{more}",
        f"device: {_device(comm)}, {_count(config.cpu_threads, 'CPU thread')} per rank, "
        f"{'exchange over ' + comm.backend if comm.size > 1 else 'nothing to send'}",
        f"{_count(job.timetable.rounds, 'round')} of {_length(job.timetable)} × "
        f"{_count(config.batch_size, 'image')} per worker",
    ]
    if config.overlap_steps and workers > 1:
        last, left = _count(config.overlap_steps, "local step"), job.timetable.rounds - start.position.round
        lines.append(
            f"shared is exchanged behind the last {last} of {job.behind} of {_count(left, 'round')}: "
            "not where evaluation, a checkpoint, another K or the end follows"
        )
    steps = (job.timetable.end.step - start.position.step) * len(layout.workers_of(comm.rank))
    if steps > SHORT and (predicted := _predicted(job, slots, deal.slots)):
        lines.append(predicted)
    if start.folder:
        lines.append(f"goes on from {start.folder}: {start.position.round} rounds are done")
    if start.weights:
        lines.append(f"starts from the weights in {start.weights}")
    if config.warmup_rounds > start.position.round:
        lines.append(
            f"the first {_count(config.warmup_rounds, 'round')}: local SGD, each worker holds the full model"
        )
    if config.strategy != "resist":
        lines.append(f"strategy {config.strategy}: {config.way.says}")
    elif workers > 1 and slots == pool:
        lines.append(
            f"note: every worker holds the whole pool of {pool}, so nothing is partitioned (local SGD)"
        )
    asked = _ranks_asked_for()
    if asked is not None and asked > layout.ranks:
        lines.append(
            f"note: the launcher was asked for {asked} ranks and started {layout.ranks}; for {asked} type "
            f"accelerate launch --multi_gpu --num_processes {asked} train.py (without --cpu, also on a CPU)"
        )
    return "\n".join(lines)


def _predicted(job: Job, slots: int, first: int) -> str | None:
    """Memory and bytes, on rank 0, which alone speaks; counting takes it a second or two.

    Args:
        first: slots in the first round, which may be one of warm-up.
    """
    config, comm = job.config, job.comm
    if comm.rank or config.deepspeed_config is not None or config.strategy == "stochastic_depth":
        return None
    device: Device = "cuda" if comm.device.type == "cuda" else "cpu"
    pool = job.blueprint.pool
    trained, most = (slots, max(slots, first)) if config.way.partitions else (pool, pool)
    try:
        found = expected(job.blueprint, config, trained, most, job.layout, job.data.img_size, device)
    except Exception as error:  # what torch cannot do without storage must not end a run that it can do
        return f"predicted: nothing, this net's step cannot be counted ({type(error).__name__})"
    bytes_sent = f"{_megabytes(found.sent)} sent a round by all ranks" if comm.size > 1 else "nothing sent"
    if job.layout.team_size > 1:
        sent, inside = map(_megabytes, (found.sent, found.inside))
        bytes_sent = f"{sent} sent a round between teams and {inside} inside them"
    peak = found.peak + job.data.on_gpu
    kept = f", {found.kept / 2**20:,.0f} MiB a rank in host memory" if found.kept else ""
    return f"predicted: {peak / 2**20:,.0f} MiB of tensors at the peak of a step{kept}, {bytes_sent}"


def closing(
    job: Job, deal: Partition, totals: Totals, baseline: int, copies: Mapping[str, int], checkpoint: Path
) -> str:
    """What did happen: a row per worker, then the run.

    Args:
        copies: bytes of host memory per rank that optional copies took, by the option that asks for them.
        checkpoint: the last one.
    """
    blueprint, layout = job.blueprint, job.layout
    full, way = blueprint.parameters, job.config.way
    held = job.config.parameters_held(full, blueprint.parameters_held(deal.slots), layout.ranks)
    blocks = (
        "spread" if way.spread_parameters else f"{deal.slots if way.partitions else deal.pool} of {deal.pool}"
    )
    rows = [("worker", "rank", "blocks held", "parameters held", *(f"peak {p}" for p in PHASES), "samples/s")]
    for worker in range(layout.workers):
        first = layout.rank_of(worker)
        ranks = range(first, first + layout.team_size)
        rows.append(
            (
                str(worker),
                str(first) if len(ranks) == 1 else f"{first}–{ranks[-1]}",
                blocks,
                f"{held / 1e6:.2f} M of {full / 1e6:.2f} M ({100 * held / full:.0f} %)",
                *(
                    f"{max(totals.peak.get((phase, rank), 0) for rank in ranks) / GIB:.2f} GiB"
                    for phase in PHASES
                ),
                f"{totals.images[worker] / totals.seconds[worker]:.0f}",
            )
        )
    where = "allocated on the GPU" if job.comm.device.type == "cuda" else "resident"
    ours, local_sgd = (
        sent_per_round(blueprint, job.config, layout.workers, least)
        for least in (job.config.min_blocks, deal.pool)
    )
    state = "with momentum" if job.config.optimizer_state == "travel" else "momentum stays behind"
    if way.lockstep:
        state = "gradients, and parameters where they are spread"
    in_front = ""
    if way.averages:
        each, waited = (seconds / totals.rounds for seconds in (totals.seconds_sync, totals.seconds_exposed))
        in_front = f"; {each:.2f} s to synchronise, of which {waited:.2f} s in front of everybody"
    players, inside = f"{layout.ranks} ranks", ""
    if layout.team_size > 1:
        players = _count(layout.teams, "team")
        inside = f", {_megabytes(totals.bytes_team / totals.rounds)} inside them"
    lines = [
        _table(rows),
        f"peaks are those of the rank ({where}); "
        f"{baseline / GIB:.2f} GiB were in use before the run began (imports){_kept(job.data)}",
        *(
            f"  on top, in host memory: {_megabytes(size)} per rank for --{option}"
            for option, size in copies.items()
            if size
        ),
        f"global model: {100 * totals.accuracy[-1]:.2f} % test accuracy "
        f"(best {100 * max(totals.accuracy):.2f} %)",
        f"bytes a round: none, there was one rank{in_front if layout.workers > 1 else ''}"
        if layout.ranks == 1
        else f"bytes a round ({state}): {_megabytes(totals.bytes_sync / totals.rounds)} measured between "
        f"{players}{inside}{in_front}",
    ]
    if layout.workers > 1 and job.config.strategy == "resist":
        per = "rank" if layout.team_size == 1 else "team"
        lines.append(
            f"  planned for one worker per {per}: {_megabytes(ours)}, local SGD {_megabytes(local_sgd)} "
            f"({100 * ours / local_sgd:.0f} %)"
        )
    if totals.skipped:
        lines.append(f"dropped for NaN or Inf: {_count(totals.skipped, 'round')} of a worker")
    if totals.unreadable:
        lines.append(f"could not be read: {_count(totals.unreadable, 'image')}; neighbours stood in")
    lines.append(f"checkpoint: {checkpoint} (tools/export.py makes a plain timm model of it)")
    return "\n".join(lines)


def _shareable(value: Any) -> Any:
    """An option as others may see it, in text that every tracker takes."""
    if not isinstance(value, str):
        return value
    text = value.encode(errors="replace").decode()  # bytes of another encoding, typed, are no text
    if not (os.path.isabs(value) or value.startswith("~") or ".." in Path(value).parts):
        return text
    name = Path(text).name
    return "…" if name in ("..", _home()) or name.startswith("~") else f"…/{name}"


def _home() -> str | None:
    """What the user's folder is called; None for a user without one (a number of a container, say)."""
    try:
        return Path.home().name
    except RuntimeError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # installed by other means than a wheel
        return None


@cache
def _commit() -> str | None:
    """Commit of the checkout that this code is run from, "+" where it was changed; None without one."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> list[str]:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()

    try:
        top, commit = git("rev-parse", "--show-toplevel", "HEAD")
        if Path(top) != root:  # of a project that has us in its environment
            return None
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _kept(data: Data) -> str:
    """What the data take of a GPU's memory, where they do."""
    return f"; {_megabytes(data.on_gpu)} of images stay on the GPU (--gpu_cache_mib)" if data.on_gpu else ""


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _length(timetable: Timetable) -> str:
    """Of a round, in local steps."""
    fewest, most = timetable.config.local_steps, timetable.config.local_steps_max
    if most is None:
        return _count(fewest, "local step")
    return f"{fewest} to {_count(most, 'local step')}, {timetable.mean:.1f} in the mean,"


def _players(first: int, size: int) -> str:
    """A rank, or the ranks of a team."""
    return f"rank {first}" if size == 1 else f"team {first // size} (ranks {first}–{first + size - 1})"


def _span(workers: Sequence[int]) -> str:
    return f"worker {workers[0]}" if len(workers) == 1 else f"workers {workers[0]}–{workers[-1]}"


def _device(comm: Comm) -> str:
    if comm.device.type == "cuda":
        name = torch.cuda.get_device_name(comm.device)
        return f"{name} ({comm.lack})" if comm.lack else name
    return "CPU"


def _ranks_asked_for() -> int | None:
    """How many ranks the launcher above this process was visibly asked for, or None.

    `accelerate launch --cpu --num_processes 2` starts one process without a word.
    """
    try:  # in bytes: a command line may hold any, and so may the name of a program
        parent = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[1]
        command = Path(f"/proc/{int(parent)}/cmdline").read_bytes()
        found = re.search(rb"\0--(?:num_processes|num_gpus|nproc[_-]per[_-]node)[\0=](\d{1,6})\0", command)
    except (OSError, IndexError, ValueError):
        return None
    return int(found.group(1)) if found else None

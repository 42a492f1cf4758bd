"""What ResIST's own machinery costs: each part of it in turn with the same work done barely.

local    the trainer's local step against a bare training loop over a plain net of the same shape
sync     aggregate + hand-off against the bare messages that they send, and against one all-reduce of shared
         plus one all-to-all of the blocks
save     saving in a run against writing and syncing as many bytes
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.engines.local import local_steps
from resist_ds.engines.workers import Workers
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import choose_kernels
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.trainer import Trainer
from tools.benchmark import ranks
from tools.benchmark.counted import CLASSES
from tools.benchmark.limits import Exchange, bare_loop, images

Times = dict[str, list[float]]
OURS = "resist_ds"


def measure(config: Config, part: str, repeats: int, steps: int, *, folder: Path) -> dict[str, Any]:
    """Times of one part, with W = R (one rank for `local`), printed and returned.

    Args:
        steps: local steps in each repeat.
        folder: for checkpoints, on the disk that is to be measured.
    """
    workers = config.workers or 1
    if part == "local":
        found = ranks.run(local, 1, config, repeats, steps)[0]
        show(f"local step, W = {workers}", found["times"], per=steps)
    elif part == "sync":
        found = ranks.run(sync, workers, config, repeats)[0]
        megabytes = found["bytes"] / 1e6
        print(f"\n{megabytes:.1f} MB a round between {workers} ranks, over {found['backend']}")
        show(f"synchronisation, W = R = {workers}", found["times"])
    else:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            found = ranks.run(save, workers, config, repeats, place)[0]
        size, tensors = found["bytes"], found["bytes_tensors"]
        share = size / tensors
        print(f"\n{size / 1e6:.1f} MB a checkpoint, {share:.4f} of its tensors' {tensors / 1e6:.1f} MB")
        show(f"checkpoint, W = R = {workers}", found["times"])
        print(f"  at one a minute: {100 * statistics.median(found['times'][OURS]) / 60:.2f} % of the time")
    return dict(found)


def show(title: str, times: Times, per: int = 1) -> None:
    """One line per side, with the ratio of ours to it: of the medians, and the fastest and slowest pair."""
    print(f"\n{title}")
    for name, values in times.items():
        seconds = [v / per for v in values]
        line = f"  {name:34s} {statistics.median(seconds):8.4f} s [{min(seconds):.4f} … {max(seconds):.4f}]"
        if name != OURS:
            pairs = [a / b for a, b in zip(times[OURS], values, strict=True)]
            ratio = statistics.median(times[OURS]) / statistics.median(values)
            line += f"   ours / this = {ratio:.3f} (pairs: median {statistics.median(pairs):.3f}, "
            fastest = min(times[OURS]) / min(values)
            line += f"{min(pairs):.3f} … {max(pairs):.3f}; of the fastest {fastest:.3f})"
        print(line)


def interleave(sides: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> Times:
    """Time every side once per repeat, in turn, after one uncounted turn each."""
    times: Times = {name: [] for name in sides}
    for turn in range(-1, repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def local(comm: Comm, config: Config, repeats: int, steps: int) -> dict[str, Any]:
    """Our local steps, and a bare loop over a plain net that holds as many pool blocks."""
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    choose_kernels(config)
    assert config.workers is not None
    pool = Blueprint(config.model, CLASSES).pool
    bare_step = bare_loop(
        comm.device, config, sample_partition(config.seed, 0, workers=config.workers, pool=pool).slots
    )

    def bare() -> None:
        for _ in range(steps):
            bare_step()

    return {
        "times": interleave({OURS: our_steps(comm, config, steps), "bare loop": bare}, repeats, comm.device)
    }


def our_steps(comm: Comm, config: Config, steps: int) -> Callable[[], None]:
    """So many local steps of one of W workers, on images that are there."""
    blueprint = Blueprint(config.model, CLASSES)
    assert config.workers is not None
    deal = sample_partition(config.seed, 0, workers=config.workers, pool=blueprint.pool)
    crew = Workers(comm, Layout(1, 1), blueprint, config, deal)
    next(crew.turns())  # its state is in the engine
    x, y = images(config, comm.device)

    def ours() -> None:
        batches: Iterator[tuple[Tensor, Tensor]] = repeat((x, y))
        local_steps(crew.engine, batches, rates=[config.lr] * steps)

    return ours


def sync(comm: Comm, config: Config, repeats: int) -> dict[str, Any]:
    """Aggregate + hand-off of one worker per rank, and bare collectives. Collective: all ranks.

    Returns:
        the seconds of the slowest rank in every repeat.
    """
    torch.set_num_threads(config.cpu_threads or 1)
    exchange = Exchange(comm, config)
    comm.ledger.clear()
    exchange.run()
    sent = sum(comm.gather(comm.ledger.total()))
    layout, deals, workers = exchange.crew.layout, exchange.deals, comm.size
    like = exchange.crew.subnet.vector

    # The same bytes in the two calls that a plain implementation would make: shared, and the blocks at once.
    shared = comm.buffer(layout.shared.exchanged(exchange.travel), like).zero_()
    block = layout.block.exchanged(exchange.travel)
    to = [sum(1 for b in deals[0].blocks[comm.rank] if b in deals[1].blocks[r]) for r in range(workers)]
    fro = [sum(1 for b in deals[0].blocks[r] if b in deals[1].blocks[comm.rank]) for r in range(workers)]
    to[comm.rank] = fro[comm.rank] = 0
    blocks_out = comm.buffer(sum(to) * block, like).zero_()
    blocks_in = comm.buffer(sum(fro) * block, like).zero_()

    def ours() -> None:
        comm.barrier()
        exchange.run()

    def bare() -> None:
        comm.barrier()
        exchange.bare()

    def two_calls() -> None:
        comm.barrier()
        torch.distributed.all_reduce(shared)
        counts = [n * block for n in fro], [n * block for n in to]
        torch.distributed.all_to_all_single(blocks_in, blocks_out, *counts)

    sides = {
        OURS: ours,
        f"its bare messages, in {exchange.messages} batches": bare,
        "one all-reduce + one all-to-all": two_calls,
    }
    of_ranks = comm.gather(interleave(sides, repeats, comm.device))
    times = {name: [max(each) for each in zip(*(t[name] for t in of_ranks), strict=True)] for name in sides}
    return {"times": times, "bytes": sent, "backend": comm.backend}


def save(comm: Comm, config: Config, repeats: int, place: str) -> dict[str, Any]:
    """A run that saves after every round, and bare writes of as many bytes. Collective: all ranks.

    Returns:
        the seconds of every save, and those of the slowest rank of every bare write.
    """
    folder = Path(place) / "run"
    config = replace(
        config,
        local_steps=1,
        rounds=repeats,
        eval_every=0,
        calibration_samples=32,
        checkpoint_every=1,
        checkpoint_async=False,
        keep=1,
        output_dir=str(folder),
    )
    trainer = Trainer(comm, config)
    trainer.run()
    trainer.folder.release()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saves = [record for record in records if record["kind"] == "checkpoint"]
    tensors = sum(spec.nbytes for group in trainer.saver.specs.values() for spec in group.values())

    content = os.urandom(saves[-1]["save/bytes"] // comm.size)
    path = folder / f"bare-{comm.rank}"

    def bare() -> None:
        comm.barrier()
        with path.open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())
        comm.barrier()

    name = "write + fsync of as many bytes"
    of_ranks = comm.gather(interleave({name: bare}, repeats, comm.device)[name])
    if comm.rank == 0:
        shutil.rmtree(folder)
    slowest = [max(each) for each in zip(*of_ranks, strict=True)]
    times = {OURS: [save["perf/save_s"] for save in saves], name: slowest}
    return {"times": times, "bytes": saves[-1]["save/bytes"], "bytes_tensors": tensors}

"""What ResIST's own machinery costs, as ratios measured in one run.

    python tools/bench.py                                     # all, on a CPU or a GPU
    python tools/bench.py --model resnetv2_101 --img_size 64 --workers 2,4,8 --batch_size 2

local step       the trainer's local step against a bare training loop over a plain net of the same shape
synchronisation  aggregate + hand-off against the bare communication that they issue (the same messages and
                 nothing else), and against one all-reduce of shared plus one all-to-all of the blocks
checkpoint       saving in a run, as a share of its time at one a minute, against writing and syncing as many
                 bytes; and the size of a checkpoint over that of its tensors

The two sides take turns, and medians over the repeats are printed with their spread, since machines are
shared and noisy. Synchronisation and checkpoint start their own ranks, one per worker, with torchrun.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.config import Config
from resist_ds.local import local_steps
from resist_ds.models import Blueprint
from resist_ds.partition import Layout, sample_partition
from resist_ds.sync import Synchroniser
from resist_ds.trainer import Trainer
from resist_ds.workers import Workers

Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--workers", default="2,4", help="numbers of workers, separated by commas")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="local steps per repeat")
    parser.add_argument("--optimizer_state", choices=("travel", "reset"), default="travel")
    parser.add_argument("--what", choices=("local", "sync", "save", "all"), default="all")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    parser.add_argument(
        "--rank_results", type=Path, help=argparse.SUPPRESS
    )  # set for the ranks started below
    args = parser.parse_args()

    if args.rank_results is not None:
        times = bench_sync(args) if args.what == "sync" else bench_save(args)
        if times is not None:
            args.rank_results.write_text(json.dumps(times))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{args.model}, batch {args.batch_size}, {args.img_size}², {device}, torch {torch.__version__}, "
          f"{args.repeats} interleaved repeats; seconds are medians [fastest … slowest]")  # fmt: skip
    figures: dict[str, Any] = {
        "arguments": vars(args) | {"output": None},
        "device": device,
        "torch": torch.__version__,
    }
    for workers in map(int, args.workers.split(",")):
        if args.what in ("local", "all"):
            times = bench_local(args, workers)
            figures[f"local W={workers}"] = times
            show(f"local step, W = {workers}", times, ours="resist_ds", per=args.steps)
        if args.what in ("sync", "all"):
            times = start_ranks("sync", workers)
            figures[f"sync W={workers}"] = times
            show(f"synchronisation, W = R = {workers}", times, ours="resist_ds")
        if args.what in ("save", "all"):
            times = start_ranks("save", workers)
            figures[f"save W={workers}"] = times
            show(f"checkpoint, W = R = {workers}", times, ours="resist_ds")
            print(f"  at one a minute: {100 * statistics.median(times['resist_ds']) / 60:.2f} % of the time")
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1, default=str))


def show(title: str, times: Times, ours: str, per: int = 1) -> None:
    """One line per side, with the ratio of ours to it: of the medians, and the fastest and slowest pair."""
    print(f"\n{title}")
    for name, values in times.items():
        seconds = [v / per for v in values]
        line = f"  {name:34s} {statistics.median(seconds):8.4f} s [{min(seconds):.4f} … {max(seconds):.4f}]"
        if name != ours:
            pairs = [a / b for a, b in zip(times[ours], values, strict=True)]
            ratio = statistics.median(times[ours]) / statistics.median(values)
            line += f"   ours / this = {ratio:.3f} (pairs: median {statistics.median(pairs):.3f}, "
            line += (
                f"{min(pairs):.3f} … {max(pairs):.3f}; of the fastest {min(times[ours]) / min(values):.3f})"
            )
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


def config_of(args: argparse.Namespace, workers: int) -> Config:
    return Config(
        model=args.model,
        dataset="synthetic",
        img_size=args.img_size,
        batch_size=args.batch_size,
        workers=workers,
        optimizer_state=args.optimizer_state,
        log_with="none",
    )


def bench_local(args: argparse.Namespace, workers: int) -> Times:
    """Our local steps, and a bare loop over a plain net that holds as many pool blocks."""
    comm = Comm()
    config, blueprint = config_of(args, workers), Blueprint(args.model, num_classes=10)
    deal = sample_partition(0, 0, workers=workers, pool=blueprint.pool)
    crew = Workers(comm, Layout(1, 1), blueprint, config, deal)
    worker = next(crew.turns())
    plain = blueprint.subnet(deal.slots).to_empty(device=comm.device).train()
    plain.load_state_dict(crew.subnet.module.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=comm.device)
    y = torch.arange(args.batch_size, device=comm.device) % 10

    def ours() -> None:
        batches: Iterator[tuple[Tensor, Tensor]] = repeat((x, y))
        local_steps(crew.subnet, worker, batches, rates=[config.lr] * args.steps, config=config)

    def bare() -> None:
        for _ in range(args.steps):
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return interleave({"resist_ds": ours, "bare loop": bare}, args.repeats, comm.device)


def start_ranks(what: str, workers: int) -> Times:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "times.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={workers}",
        ]
        command += [
            __file__,
            *sys.argv[1:],
            f"--rank_results={results}",
            f"--workers={workers}",
            f"--what={what}",
        ]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        times: Times = json.loads(results.read_text())
        return times


def bench_sync(args: argparse.Namespace) -> Times | None:
    """Aggregate + hand-off of one worker per rank, and bare collectives. Collective: all ranks.

    Returns:
        on rank 0, the seconds of the slowest rank in every repeat.
    """
    comm = Comm()
    workers = comm.size
    config, blueprint, layout = (
        config_of(args, workers),
        Blueprint(args.model, num_classes=10),
        Layout(workers, workers),
    )
    deals = [sample_partition(0, r, workers=workers, pool=blueprint.pool) for r in range(2)]
    crew = Workers(comm, layout, blueprint, config, deals[0])
    travel = config.optimizer_state == "travel"
    sync = Synchroniser(
        comm, layout, crew.layout, blueprint.pool, budget=config.transit_mib << 20, travel=travel
    )

    calls: list[tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]] = []
    exchange = comm.exchange

    def recorded(sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], kind: str) -> None:
        calls.append((sends, receives))
        exchange(sends, receives, kind)

    def ours() -> None:
        comm.barrier()
        sync.aggregate(crew.vectors, deals[0])
        sync.hand_off(crew.vectors, deals[0], deals[1])

    comm.exchange = recorded  # type: ignore[method-assign]
    ours()
    comm.exchange = exchange  # type: ignore[method-assign]
    comm.ledger.clear()
    ours()
    sent = sum(comm.gather(comm.ledger.total()))
    like = crew.subnet.vector

    def bare() -> None:
        comm.barrier()
        for sends, receives in calls:
            comm.exchange(sends, receives, "bench")

    # The same bytes in the two calls that a plain implementation would make: shared, and the blocks at once.
    shared = comm.buffer(crew.layout.shared.exchanged(travel), like).zero_()
    block = crew.layout.block.exchanged(travel)
    to = [sum(1 for b in deals[0].blocks[comm.rank] if b in deals[1].blocks[r]) for r in range(workers)]
    fro = [sum(1 for b in deals[0].blocks[r] if b in deals[1].blocks[comm.rank]) for r in range(workers)]
    to[comm.rank] = fro[comm.rank] = 0
    blocks_out = comm.buffer(sum(to) * block, like).zero_()
    blocks_in = comm.buffer(sum(fro) * block, like).zero_()

    def two_calls() -> None:
        comm.barrier()
        torch.distributed.all_reduce(shared)
        counts = [n * block for n in fro], [n * block for n in to]
        torch.distributed.all_to_all_single(blocks_in, blocks_out, *counts)

    sides = {
        "resist_ds": ours,
        f"its bare messages, in {len(calls)} batches": bare,
        "one all-reduce + one all-to-all": two_calls,
    }
    times = interleave(sides, args.repeats, comm.device)
    ranks = comm.gather(times)
    comm.close()
    if comm.rank:
        return None
    print(f"\n{sent / 1e6:.1f} MB a round between {workers} ranks, over {comm.backend}")
    return {name: [max(each) for each in zip(*(t[name] for t in ranks), strict=True)] for name in sides}


def bench_save(args: argparse.Namespace) -> Times | None:
    """A run that saves after every round, and bare writes of as many bytes. Collective: all ranks.

    Returns:
        on rank 0, the seconds of every save, and those of the slowest rank of every bare write.
    """
    comm = Comm()
    folder = Path(comm.gather(tempfile.mkdtemp(dir="."))[0]).resolve()
    config = replace(
        config_of(args, comm.size),
        local_steps=1,
        rounds=args.repeats,
        eval_every=0,
        calibration_samples=32,
        checkpoint_every=1,
        checkpoint_async=False,
        keep=1,
        progress=False,
        output_dir=str(folder),
    )
    trainer = Trainer(comm, config)
    with contextlib.redirect_stdout(io.StringIO()):
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
    ranks = comm.gather(interleave({name: bare}, args.repeats, comm.device)[name])
    comm.close()
    if comm.rank:
        return None
    shutil.rmtree(folder)
    size = saves[-1]["save/bytes"]
    print(f"\n{size / 1e6:.1f} MB a checkpoint, {size / tensors:.4f} of its tensors' {tensors / 1e6:.1f} MB")
    slowest = [max(each) for each in zip(*ranks, strict=True)]
    return {"resist_ds": [save["perf/save_s"] for save in saves], name: slowest}


if __name__ == "__main__":
    main()

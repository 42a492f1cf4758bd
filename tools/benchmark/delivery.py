"""What the data take: images per second of each way to a batch on the device, against a local step's.

in memory        decoded images that wait on the host, and on the GPU where there is one
image folder     JPEGs, decoded by 0, 1, 2, ... loader processes; whole, and as small as they are seen
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from resist_ds.comm import Comm
from resist_ds.data.datasets import Data, load_data
from resist_ds.data.images import OnDisk
from resist_ds.nets.precision import choose_kernels
from resist_ds.options.config import Config
from tools.benchmark import ranks
from tools.benchmark.asked import cores
from tools.benchmark.micro import Times, interleave, our_steps
from tools.benchmark.photos import Whole, make_photos

STEP = "local step"


def measure(config: Config, repeats: int, steps: int, *, photos: Path | None) -> dict[str, object]:
    """Times of `steps` batches by each way and of as many local steps, printed and returned.

    Args:
        photos: an image folder; default: one of noise in a temporary folder.
    """
    with tempfile.TemporaryDirectory() as place:
        if photos is None:
            photos = Path(place)
            make_photos(photos, max(config.batch_size, 64))
        found = ranks.run(ways, 1, config, repeats, steps, photos)[0]
    step = found["times"][STEP]
    print(f"\ndelivery of {steps} batches of {config.batch_size}, W = {config.workers}; images/s")
    for name, seconds in found["times"].items():
        rate, *ends = (steps * config.batch_size / f(seconds) for f in (statistics.median, max, min))
        line = f"  {name:44s} {rate:9.1f} [{ends[0]:.1f} … {ends[1]:.1f}]"
        if name != STEP:
            line += f"   {statistics.median(step) / statistics.median(seconds):8.2f} × the step's"
            line += f"; first batch after {1000 * statistics.median(found['first'][name]):.0f} ms"
        print(line)
    return dict(found)


def ways(comm: Comm, config: Config, repeats: int, steps: int, photos: Path) -> dict[str, object]:
    """Seconds of `steps` local steps, and of as many batches each way, the start of its processes included.

    Returns:
        "times": {name: seconds of every repeat}; "first": {name: of those, until the first batch was there}.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    choose_kernels(config)
    first: Times = {}
    sides: dict[str, Callable[[], None]] = {STEP: our_steps(comm, config, steps)}
    for name, data in _delivered(config, comm.device, photos).items():
        first[name] = []
        sides[name] = _drawn(data, config, comm.device, steps, first[name])
    times = interleave(sides, repeats, comm.device)
    return {"times": times, "first": {name: seconds[1:] for name, seconds in first.items()}}


def _delivered(config: Config, device: torch.device, photos: Path) -> dict[str, Data]:
    """The ways, by their names."""
    host = load_data(config)
    data = {"in memory, on the host": host}
    if device.type != "cpu":
        data["in memory, on the GPU"] = host.placed(device, config.gpu_cache_mib)
    files = replace(
        config,
        dataset="imagefolder",
        data_dir=str(photos),
        img_size=host.img_size,
        cache_mib=0,
        num_classes=None,
    )
    for processes in [0, *(2**n for n in range(int(math.log2(cores())) + 1))]:
        folder = load_data(replace(files, data_workers=processes))
        assert isinstance(folder.train, OnDisk)
        words = f"image folder, {processes} process{'' if processes == 1 else 'es'}"
        whole = Whole(folder.img_size, folder.train.decode.seed)
        data[f"{words}, decoded whole"] = replace(folder, train=replace(folder.train, decode=whole))
        data[f"{words}, as small as seen"] = folder
    return data


def _drawn(
    data: Data, config: Config, device: torch.device, steps: int, first: list[float]
) -> Callable[[], None]:
    """Takes so many batches; each time in an epoch of its own, of which nothing was read ahead or drawn."""
    dtype, epochs = getattr(torch, config.dtype), count()

    def side() -> None:
        start, epoch = time.perf_counter(), next(epochs)
        samples = np.random.default_rng(epoch).permutation(data.train_size)
        schedule = ((epoch, batch) for batch in np.resize(samples, (steps, config.batch_size)))
        batches = data.train_batches(schedule, device, dtype, config.channels_last)
        next(batches)
        first.append(time.perf_counter() - start)
        for _ in batches:
            pass

    return side

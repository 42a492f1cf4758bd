"""What a local step reaches: images per second, eager, compiled and graphed, and of what the device could.

Of a worker's sub-ResNet and of the full net; ours beside a bare loop over timm's plain net of the same shape.
What the device could is measured: its rate in one large matrix product, in the precision of the step.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import autocast, choose_kernels
from resist_ds.options.config import Config
from resist_ds.protocol.partition import slots_for
from tools.benchmark import ranks
from tools.benchmark.asked import MODES
from tools.benchmark.counted import CLASSES, multiply_adds
from tools.benchmark.limits import bare_loop
from tools.benchmark.micro import OURS, interleave, our_steps

BARE = "bare loop"


def measure(config: Config, repeats: int, steps: int, *, modes: Sequence[str]) -> dict[str, Any]:
    """Seconds of `steps` steps in each mode, a process for each net and mode; printed and returned.

    Args:
        modes: of `asked.MODES`; none: all on a GPU, eager on a CPU.
    """
    nets = {"sub-ResNet": config, "full net": replace(config, workers=1, min_blocks=0)}
    modes = modes or (tuple(MODES) if torch.cuda.device_count() else ("eager",))
    print(f"\nlocal step, W = {config.workers}, {config.mixed_precision}: images/s, ours and of a bare loop")
    found: dict[str, Any] = {}
    for net, given in nets.items():
        for mode in modes:
            tried = replace(given, compile=mode != "eager", compile_mode=MODES[mode])
            each = ranks.run(one, 1, tried, repeats, steps)[0]
            found[f"{net}, {mode}"] = each
            _show(f"{net}, K = {each['slots']}, {mode}", each, steps * config.batch_size)
    for net in nets:
        eager, *rest = (statistics.median(found[f"{net}, {mode}"]["times"][OURS]) for mode in modes)
        for mode, seconds in zip(modes[1:], rest, strict=True):
            print(f"  {net}: {mode} is {eager / seconds:.2f} × as fast as {modes[0]}")
    return found


def _show(name: str, each: dict[str, Any], images: int) -> None:
    ours, bare = each["times"][OURS], each["times"][BARE]
    rate, slowest, fastest = (images / f(ours) for f in (statistics.median, max, min))
    done = each["flops"] * rate
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    plain = images / statistics.median(bare)
    print(
        f"  {name:30s} {rate:9.1f} [{slowest:.1f} … {fastest:.1f}]   bare {plain:9.1f}"
        f"   ours takes {ratio:.3f} × its time   {done / 1e12:7.2f} TFLOP/s, "
        f"{100 * done / each['product']:.0f} % of a product's {each['product'] / 1e12:.1f}"
    )


def one(comm: Comm, config: Config, repeats: int, steps: int) -> dict[str, Any]:
    """Seconds of one net in one mode.

    Returns:
        "slots": K; "times": {side: seconds of `steps` steps, of every repeat}; "flops": of a step, per image,
        two for a multiply-add; "product": floating-point operations a second in a large matrix product.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    choose_kernels(config)
    blueprint = Blueprint(config.model, CLASSES)
    slots = slots_for(config.workers or 1, blueprint.pool, config.min_blocks)
    step = bare_loop(comm.device, config, slots)

    def bare() -> None:
        for _ in range(steps):
            step()

    times = interleave({OURS: our_steps(comm, config, steps), BARE: bare}, repeats, comm.device)
    flops = multiply_adds(blueprint, slots, config) / config.batch_size
    return {"slots": slots, "times": times, "flops": flops, "product": product(config, comm.device)}


def product(config: Config, device: torch.device) -> float:
    """Floating-point operations a second in the product of two large square matrices; the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, config.dtype)) for _ in range(2))
    seconds = []
    with autocast(config, device):
        a, b = a @ a, b @ b  # in the precision of the step from here on
        for _ in range(10):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            _ = a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))

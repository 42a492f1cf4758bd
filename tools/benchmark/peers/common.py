"""What every peer gets and is asked: the same net, data and optimizer of the local steps; its seconds."""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from resist_ds.comm import Comm
from resist_ds.data.datasets import load_data
from resist_ds.data.order import Order
from resist_ds.errors import RunError
from resist_ds.memory import PeakMemory
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import choose_kernels
from resist_ds.options.config import Config
from tools.benchmark import link
from tools.benchmark.counted import CLASSES, measured_rounds
from tools.benchmark.limits import plain_net


def begin(comm: Comm, config: Config) -> tuple[nn.Module, torch.optim.Optimizer]:
    """timm's full net, of the same values on every rank, and torch's own optimizer of it."""
    torch.set_num_threads(config.cpu_threads)
    choose_kernels(config)
    torch.manual_seed(config.seed)
    net = plain_net(config.model, Blueprint(config.model, CLASSES).pool, comm.device)
    return net, optimizer_of(config, list(net.parameters()), decorated=True)


def batches(comm: Comm, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that a worker of ours would see, this rank being the worker of its number."""
    data = load_data(config).placed(comm.device, config.gpu_cache_mib)
    order = Order(config.seed, data.train_size, comm.size, config.batch_size)
    assert config.rounds is not None
    schedule = (order.batch(step, comm.rank) for step in range(config.rounds * config.local_steps))
    return data.train_batches(schedule, comm.device, torch.float32, channels_last=False)


def timed(
    comm: Comm, config: Config, step: Callable[[Tensor, Tensor], Tensor], *, exchanges: int = 1
) -> dict[str, Any]:
    """Take all local steps, what is exchanged between them included. Collective: all ranks.

    Args:
        step: one local step on (images, labels); returns the loss.
        exchanges: steps of a round in which the ranks meet.

    Returns:
        of the rounds that count: "seconds"; "step_s": of a step in which nobody meets, the median, or None
        where there are too few of those; "wire": bytes that left by this rank's link, or None without one;
        and "peak": bytes, of all steps.
    """
    assert config.rounds is not None
    source = batches(comm, config)
    counted = measured_rounds(config)
    clock, sent = [], []
    memory = PeakMemory(comm.device)
    memory.reset()  # what building the net took is no part of a step, as ours is measured too
    comm.barrier()
    for number in range(config.rounds):
        if number == counted.start:
            sent.append(link.bytes_sent())
            clock.append(_now(comm))
        for _ in range(config.local_steps):
            loss = step(*next(source))
            if number in counted:
                clock.append(_now(comm))
    sent.append(link.bytes_sent())
    peak, _ = memory.read()
    if not torch.isfinite(loss):
        raise RunError(f"its loss on rank {comm.rank} is {loss.item()}: its steps are no measure of anything")
    steps = [after - before for before, after in pairwise(clock)]
    plain = 2 * exchanges < config.local_steps
    return {
        "seconds": clock[-1] - clock[0],
        "step_s": statistics.median(steps) if plain else None,
        "wire": None if None in sent else sent[1] - sent[0],  # type: ignore[operator]
        "peak": peak,
    }


def _now(comm: Comm) -> float:
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
    return time.perf_counter()


def check_same(comm: Comm, net: nn.Module) -> None:
    """Raises `RunError` where the ranks hold different parameters. Collective: all ranks.

    A peer that forgives a failed synchronisation would otherwise be measured without one.
    """
    norms = comm.gather([parameter.double().norm().item() for parameter in net.parameters()])
    if any(norm != norms[0] for norm in norms):
        raise RunError("its ranks hold different parameters after a synchronisation: it did not take place")

"""What a strategy's speed is held against: bare loops and bare collectives; and where its memory goes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from resist_ds.comm import Comm
from resist_ds.engines.local import local_steps
from resist_ds.engines.workers import Workers
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.optimizer import optimizer_of
from resist_ds.nets.precision import autocast, choose_kernels
from resist_ds.options.config import Config
from resist_ds.protocol.partition import Layout, sample_partition
from resist_ds.protocol.sync import Synchroniser
from resist_ds.trainer import Trainer
from tools.benchmark.counted import CLASSES

STEPS = 20  # of a bare loop at most, after three that do not count
EXCHANGES = 3  # of a bare collective, after one that does not count


def bare(comm: Comm, config: Config, slots: int, sent: float, once_a_round: bool) -> dict[str, float]:
    """Seconds of this rank's bare loops and bare exchanges. Collective: all ranks.

    Every rank runs its loop at the same time, so that cores are shared as in a run.

    Args:
        slots: K of the strategy.
        sent: bytes of one of its exchanges, over all ranks.
        once_a_round: whether an exchange is an exchange plan's: its messages are then sent barely, too.

    Returns:
        "loop", "full_loop": a step of a plain net of the strategy's shape, and of the full net; "all_reduce":
        one that moves as many bytes; "messages": the plan's.
    """
    torch.set_num_threads(config.cpu_threads)
    choose_kernels(config)
    pool = Blueprint(config.model, CLASSES).pool
    loops = [bare_loop(comm.device, config, number) for number in sorted({slots, pool})]
    each = _timed(comm, loops, min(STEPS, config.local_steps), warm_up=3)
    del loops
    times = {"loop": each[0], "full_loop": each[-1]}
    (times["all_reduce"],) = _timed(comm, [_all_reduce(comm, sent)], EXCHANGES)
    if once_a_round:
        (times["messages"],) = _timed(comm, [Exchange(comm, config).bare], EXCHANGES)
    return times


def _all_reduce(comm: Comm, size: float) -> Callable[[], object]:
    """An all-reduce that, as a ring, moves `size` bytes over all ranks."""
    elements = max(1, round(size / (2 * (comm.size - 1) * torch.float32.itemsize)))
    buffer = comm.buffer(elements, torch.empty(0, device=comm.device)).zero_()
    return lambda: torch.distributed.all_reduce(buffer)


def _timed(comm: Comm, sides: Sequence[Callable[[], object]], times: int, warm_up: int = 1) -> list[float]:
    """Mean seconds of each side, in turn, all ranks at once. Collective: all ranks."""
    seconds = [0.0] * len(sides)
    for turn in range(-warm_up, times):
        for i, side in enumerate(sides):
            if turn == 0 and i == 0:
                comm.barrier()
            start = time.perf_counter()
            side()
            if comm.device.type == "cuda":
                torch.cuda.synchronize(comm.device)
            seconds[i] += time.perf_counter() - start if turn >= 0 else 0.0
    return [total / times for total in seconds]


def bare_loop(device: torch.device, config: Config, slots: int) -> Callable[[], None]:
    """A step as one would write it for a plain net with so many pool blocks, on images that are there."""
    net = plain_net(config.model, slots, device).to(getattr(torch, config.dtype))
    net = net.to(memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    # A small rate: the numbers must stay finite, and cost the same.
    optimizer = optimizer_of(replace(config, lr=1e-4), list(net.parameters()))
    forward = torch.compile(net, mode=config.compile_mode) if config.compile else net
    x, y = images(config, device)

    def step() -> None:
        with autocast(config, device):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_net(model: str, slots: int, device: torch.device) -> nn.Module:
    """timm's own net with so many pool blocks, initialised; no code of ours runs in its steps."""
    net = Blueprint(model, CLASSES).subnet(slots).to_empty(device=device).train()
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if tensor.ndim > 1:
                nn.init.kaiming_normal_(tensor)
            else:
                tensor.fill_(1.0 if name.endswith(("weight", "running_var")) else 0.0)
    return net


def images(config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of noise."""
    side = config.img_size or 32
    x = torch.randn(config.batch_size, 3, side, side, device=device, dtype=getattr(torch, config.dtype))
    if config.channels_last:  # as a run's batches are
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.arange(config.batch_size, device=device) % CLASSES


class Exchange:
    """One synchronisation of a run, and its messages without anything else.

    Attributes:
        messages: number of batches in which they are sent.
    """

    def __init__(self, comm: Comm, config: Config):
        """Record the messages of one synchronisation. Collective: all ranks."""
        blueprint = Blueprint(config.model, CLASSES)
        assert config.workers is not None
        layout = Layout(config.workers, comm.size)
        least = config.least_blocks(blueprint.pool)
        self.deals = [
            sample_partition(config.seed, r, workers=config.workers, pool=blueprint.pool, min_blocks=least)
            for r in range(2)
        ]
        self.crew = Workers(comm, layout, blueprint, config, self.deals[0])
        self.travel = config.optimizer_state == "travel"
        self._comm = comm
        self._sync = Synchroniser(
            comm,
            layout,
            self.crew.layout,
            blueprint.pool,
            budget=config.transit_mib << 20,
            travel=self.travel,
            compact=config.wire == "compact",
            vectors=self.crew.vectors,
        )
        self._calls: list[tuple[Any, Any]] = []
        exchange = comm.exchange

        def recorded(sends: Any, receives: Any, kind: str) -> None:
            self._calls.append((sends, receives))
            exchange(sends, receives, kind)

        comm.exchange = recorded  # type: ignore[method-assign]
        self.run()
        comm.exchange = exchange  # type: ignore[method-assign]
        self.messages = len(self._calls)

    def run(self) -> None:
        """Aggregate and hand off. Collective: all ranks."""
        self._sync.aggregate(self.crew.vectors, self.deals[0])
        self._sync.hand_off(self.crew.vectors, self.deals[0], self.deals[1])

    def bare(self) -> None:
        """The same messages, and nothing else. Collective: all ranks."""
        for sends, receives in self._calls:
            self._comm.exchange(sends, receives, "bench")


def categories(comm: Comm, config: Config) -> dict[str, int] | str:
    """Where the peak of a local step's memory goes, bytes of this rank. Collective: all ranks.

    For strategies that keep plain parameters and gradients. torch's tracker sees every tensor's storage.
    Parameters and optimizer state share one here, and what an optimizer allocates besides, the tracker takes
    for its state: both are told apart by that storage's size.

    Returns:
        bytes by category at the moment of the peak; or why there are none.
    """
    trainer = Trainer(comm, config)
    try:
        assert isinstance(trainer.workers, Workers)
        subnet = trainer.workers.subnet
        next(trainer.workers.turns())  # its state is in the engine
        x, y = images(config, comm.device)
        engine = trainer.workers.engine

        def step() -> None:
            local_steps(engine, repeat((x, y)), rates=[0.0])

        step()
        tracker = MemTracker()
        tracker.track_external(subnet.module, subnet.optimizer)
        with tracker:
            step()
    finally:
        trainer.folder.release()
    found = tracker.get_tracker_snapshot("peak")[comm.device]
    named = {getattr(kind, "value", str(kind)): size for kind, size in found.items()}
    state = subnet.vector.nbytes
    besides = named.pop("Parameter") + named.pop("Optstate") - state
    if besides < 0:
        return f"absent: the tracker misses {-besides} bytes of parameters and optimizer state"
    return {"parameters and optimizer state": state, "optimizer's temporaries": besides, **named}

"""What a user would pick instead of this package: peers, in the same comparison.

Each in a small file of its own, by its public API alone, as its documentation shows it. This module imports
none of them: a mistake is answered at once, and what is not installed is missed only where it is named.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from resist_ds.errors import RunError
from resist_ds.options.config import Config

if TYPE_CHECKING:  # a mistake is answered without waiting for torch
    from resist_ds.comm import Comm

Settings = dict[str, Any]


def _nothing(settings: Settings, local_steps: int) -> None:
    """For peers whose settings cannot be wrong."""


def _of_diloco(settings: Settings, local_steps: int) -> str | None:
    """What torchft would refuse when ranks have started."""
    fragments, delay, alpha = (
        settings[name] for name in ("fragments", "fragment_sync_delay", "fragment_update_alpha")
    )
    if fragments < 1 or local_steps % fragments:
        return f"fragments is {fragments}: type a divisor of --local_steps {local_steps}"
    if not 0 <= delay < local_steps // fragments:
        most = local_steps // fragments - 1
        return f"fragment_sync_delay is {delay}: type a number from 0 to {most}, steps of a fragment less one"
    if not 0 <= alpha <= 1:
        return f"fragment_update_alpha is {alpha}: type a number from 0 to 1"
    return None


@dataclass(frozen=True)
class Peer:
    """A way to train of another package.

    Attributes:
        package: its name in the registry.
        says: what it does and by which settings, for the report.
        settings: its own that may be typed, by its own words, and what its documentation recommends.
        wrong: what cannot be meant, in words, of settings and local steps.
    """

    package: str
    says: str
    settings: Settings = field(default_factory=dict)
    wrong: Callable[[Settings, int], str | None] = _nothing


_TORCHFT = (
    "a LighthouseServer on rank 0 (min_replicas = ranks, quorum_tick_ms 100, join_timeout_ms 10000), a "
    "Manager and a TCPStore on every rank (min_replica_size = ranks, init_sync off, as all begin alike), "
    "ProcessGroupGloo, time-outs of 10 minutes"
)
PEERS = {
    "accelerate_local_sgd": Peer(
        "accelerate",
        "accelerate.local_sgd.LocalSGD in Accelerator.accumulate, of a model and optimizer from "
        "Accelerator.prepare; local_sgd_steps = local steps; parameters are averaged, momentum stays",
    ),
    "torchft_local_sgd": Peer(
        "torchft",
        "torchft.local_sgd.LocalSGD; sync_every = local steps; parameters are averaged, momentum stays; "
        f"{_TORCHFT}, asynchronous quorum",
    ),
    "torchft_diloco": Peer(
        "torchft",
        "torchft.local_sgd.DiLoCo; sync_every = local steps; outer optimizer SGD with Nesterov's momentum; "
        f"backup on the device; {_TORCHFT}, synchronous quorum; should_quantize off: FP8 by Triton kernels, "
        "which need a GPU",
        {
            "outer_lr": 0.7,
            "outer_momentum": 0.9,
            "fragments": 1,
            "fragment_sync_delay": 0,
            "fragment_update_alpha": 0.0,
            "use_bucketization": False,
        },
        _of_diloco,
    ),
}


def lack(name: str) -> str | None:
    """Why a peer cannot be run here, in words; None: it can be tried."""
    package = PEERS[name].package
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed (pip install 'resist-ds[bench]')"
    return None


def train(comm: "Comm", config: Config, name: str, settings: Settings) -> dict[str, Any]:
    """One run of a peer. Collective: all ranks.

    Returns:
        what `common.timed` does; "baseline": bytes that were held before; "version", "device", "backend".
    """
    import torch

    from resist_ds.memory import PeakMemory

    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:  # of its own parts: another release than the one that this was tried with
        raise RunError(f"{PEERS[name].package} cannot be imported: {' '.join(str(error).split())}") from None
    memory = PeakMemory(comm.device)
    memory.reset()
    baseline, _ = memory.read()
    figures: dict[str, Any] = module.train(comm, config, **settings)
    gpu = comm.device.type == "cuda"
    return figures | {
        "baseline": baseline,
        "version": version(PEERS[name].package),
        "device": torch.cuda.get_device_name(comm.device) if gpu else "CPU",
        "backend": comm.backend,
    }

"""How the ranks of a job find each other, what is said while some are still missing, and who of them then
turn out to sit on one machine or on one GPU.

torch's own `env://` waits half an hour without a word. Here the same store is opened at the same address
(rank 0 listens, or torchrun does), and every rank counts itself in it: so it can be said who is missing.
"""

import socket
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore

from resist_ds.errors import RunError, UserError
from resist_ds.launcher import Launch

PATIENCE = 10.0  # seconds until it is said first who is missing
AGAIN = 60.0  # seconds until it is said again
LOOK = 0.2  # seconds between two looks, at most
BOOT = Path("/proc/sys/kernel/random/boot_id")


class Identity(NamedTuple):
    """What tells machines and GPUs apart, whatever a launcher has numbered or made visible.

    Attributes:
        machine: name and boot: machines of one name differ in the boot, containers of a machine in the name.
        gpu: of the device on which the rank computes, unique in the world; None for the CPU.
    """

    machine: str
    gpu: str | None

    @classmethod
    def of(cls, device: torch.device) -> "Identity":
        """That of a rank which computes on `device`."""
        host, boot = socket.gethostname(), ""
        with suppress(OSError):  # Linux alone has it
            boot = BOOT.read_text().strip()
        if device.type != "cuda":
            return cls(f"{host} {boot}", None)
        card = torch.cuda.get_device_properties(device)
        uuid = getattr(card, "uuid", None)  # under MIG that of the instance
        if uuid is not None:
            return cls(f"{host} {boot}", str(uuid))
        bus = [getattr(card, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        return cls(f"{host} {boot}", f"{boot or host} {device.index if None in bus else bus}")


@dataclass(frozen=True)
class Place:
    """Where a rank sits.

    Attributes:
        local_rank, local_size: r and R on its machine, as counted.
        sharing: the ranks that compute on its GPU, itself among them; none on a CPU.
    """

    local_rank: int
    local_size: int
    sharing: tuple[int, ...]


def places(identities: Sequence[Identity]) -> list[Place]:
    """The place of every rank, from every rank's identity."""
    machines: defaultdict[str, list[int]] = defaultdict(list)
    gpus: defaultdict[str | None, list[int]] = defaultdict(list)
    for rank, (machine, gpu) in enumerate(identities):
        machines[machine].append(rank)
        gpus[gpu].append(rank)
    return [
        Place(machines[machine].index(rank), len(machines[machine]), () if gpu is None else tuple(gpus[gpu]))
        for rank, (machine, gpu) in enumerate(identities)
    ]


def lack(found: Sequence[Place]) -> str | None:
    """Why not every rank has a GPU of its own, in words; None where each has one, or none has any."""
    for place in found:
        if len(place.sharing) > 1:
            return f"ranks {place.sharing[0]} and {place.sharing[1]} have the same one"
    without = [rank for rank, place in enumerate(found) if not place.sharing]
    return f"rank {without[0]} has none" if 0 < len(without) < len(found) else None


def meet(launch: Launch, timeout: timedelta) -> Store:
    """The store at which the ranks find each other, when all have come to it. Collective: all ranks.

    Args:
        timeout: how long to wait for the others, and how long the store then waits for anything.

    Raises:
        RunError: some have not come in time.
    """
    host, port = launch.address
    waiting = _Waiting(launch, timeout.total_seconds())
    listens = launch.rank == 0 and not launch.agent_store
    if not listens:
        _reach(host, port, waiting)
    try:
        # Who listens needs no name for that: with a wrong one torch's client would try for half an hour.
        store: Store = TCPStore(
            "127.0.0.1" if listens else host,
            port,
            launch.size,
            listens,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=listens,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT is {port}, and another process of this machine listens there: start with another "
            "one (torchrun --master_port, accelerate launch --main_process_port, deepspeed --master_port)"
        ) from None
    # torchrun's store outlives its ranks: what those of an earlier start have left there is not for these.
    store = PrefixStore(f"attempt-{launch.attempt}", store)
    arrivals = PrefixStore("arrivals", store)
    if arrivals.add("count", 1) >= launch.size:
        arrivals.set("complete", "")
    pause = LOOK / 64
    while not arrivals.check(["complete"]):  # its `wait` would write lines of its own when time is up
        missing = launch.size - arrivals.add("count", 0)
        waiting.over(f"{missing} of {launch.size} ranks", aloud=launch.local_rank == 0)
        time.sleep(pause)
        pause = min(LOOK, 2 * pause)
    return PrefixStore("default_pg", store)  # as torch would name it


def _reach(host: str, port: int, waiting: "_Waiting") -> None:
    """Wait until somebody listens. (torch's client would write lines of its own at every try.)"""
    while True:
        try:
            socket.create_connection((host, port), timeout=waiting.seconds).close()
            return
        except OSError as error:
            reason = error.strerror or "no answer"
        # Ranks that reach no store know nothing of each other: all of a machine say so, the first one first.
        waiting.over(f"rank 0, which is not there ({reason}),", aloud=True)
        time.sleep(LOOK)


class _Waiting:
    """When to say who is missing, and when to give up."""

    def __init__(self, launch: Launch, timeout: float):
        self._launch = launch
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._word = time.monotonic() + (PATIENCE if launch.local_rank == 0 else AGAIN)

    @property
    def seconds(self) -> float:
        """How long to wait now."""
        return max(0.1, min(self._word, self._end) - time.monotonic())

    def over(self, whom: str, *, aloud: bool) -> None:
        """Some time is over: say for whom we wait, if it is time for that.

        Raises:
            RunError: it was too long.
        """
        now = time.monotonic()
        where = "{}:{}".format(*self._launch.address)
        if now >= self._end:
            raise RunError(f"rank {self._launch.rank} has waited {self._timeout:g} s for {whom} at {where}")
        if now < self._word:
            return
        self._word = now + AGAIN
        if aloud:
            with suppress(OSError, ValueError):  # nobody may be reading
                print(
                    f"waiting for {whom} at {where}, as RANK, WORLD_SIZE and MASTER_ADDR say; without a "
                    "launcher, unset them",
                    file=sys.stderr,
                    flush=True,
                )

"""How the ranks of a job find each other, and what is said while some are still missing.

torch's own `env://` waits half an hour without a word. Here the same store is opened at the same address
(rank 0 listens, or torchrun does), and every rank counts itself in it: so it can be said who is missing.
"""

import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore

from resist_ds.errors import RunError, UserError
from resist_ds.launcher import Launch

PATIENCE = 10.0  # seconds until it is said first who is missing
AGAIN = 60.0  # seconds until it is said again
LOOK = 0.2  # seconds between two looks, at most


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

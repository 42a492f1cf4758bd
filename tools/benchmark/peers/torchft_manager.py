"""What both peers of torchft stand on: a lighthouse on rank 0, and on every rank a manager that asks it.

Each rank is a replica group of its own, as in torchft's examples/localsgd and examples/diloco.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import nn
from torch.distributed import TCPStore
from torchft import Manager, ProcessGroupGloo
from torchft.coordination import LighthouseServer

from resist_ds.comm import Comm
from resist_ds.errors import RunError

PATIENCE = timedelta(minutes=10)  # for all parameters on the slowest of links
TICK_MS, JOIN_MS = 100, 10_000  # its examples' own
HEARTBEAT_MS = 60_000  # a rank that has no core to itself is not a dead one


@contextmanager
def manager(
    comm: Comm, net: nn.Module, optimizer: torch.optim.Optimizer, *, use_async_quorum: bool
) -> Iterator[Manager]:
    """This rank's. Collective: all ranks, both ways."""
    if comm.device.type != "cpu":
        raise RunError("torchft was tried on CPUs only: run it where no GPU is visible")
    address = _address()
    lighthouse = None
    if comm.rank == 0:
        lighthouse = LighthouseServer(
            bind="0.0.0.0:0",
            min_replicas=comm.size,
            quorum_tick_ms=TICK_MS,
            join_timeout_ms=JOIN_MS,
            heartbeat_timeout_ms=HEARTBEAT_MS,
        )
    port = comm.gather(lighthouse and lighthouse.address().rsplit(":", 1)[1])[0]
    host = comm.gather(address)[0]
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    made = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=lambda kept: (
            net.load_state_dict(kept["net"]),
            optimizer.load_state_dict(kept["optimizer"]),
        ),
        state_dict=lambda: {"net": net.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=comm.size,
        use_async_quorum=use_async_quorum,
        timeout=PATIENCE,
        quorum_timeout=PATIENCE,
        connect_timeout=PATIENCE,
        rank=0,
        world_size=1,
        store_addr=address,
        store_port=store.port,
        lighthouse_addr=f"http://{host}:{port}",
        replica_id=f"rank_{comm.rank}",
        hostname=address,
        init_sync=False,  # all begin with the same values
    )
    try:
        yield made
        comm.barrier()  # nobody leaves while another may ask it
    finally:
        made.shutdown(wait=False)
        if lighthouse is not None:
            lighthouse.shutdown()


def check_commits(made: Manager, expected: int) -> None:
    """Raises `RunError` where a synchronisation failed, which torchft forgives."""
    if made.current_step() != expected:
        raise RunError(
            f"{made.current_step()} of {expected} synchronisations took place; the ranks' logs say why"
        )


def _address() -> str:
    """This rank's own on the way to rank 0: in the network of --link, or on this machine alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:  # which sends nothing
        way.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))
        return str(way.getsockname()[0])

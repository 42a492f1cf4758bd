"""A slow network on one machine: every rank, or team, in a network namespace, behind a limited link.

    rank 0 ─ eth0 ═ port0 ┐
    rank 1 ─ eth0 ═ port1 ┼ bridge        each end of every veth pair sends through `tc tbf`
    rank 2 ─ eth0 ═ port2 ┘

So a rank sends and receives at the given rate at most, both at once, as on a switch. The ranks of a team
share one namespace, as those of a machine do, and reach each other without the link. Namespaces and links
have no names and lie on no disk: open descriptors of this process hold them, and the kernel removes them
together with the last process that has one open or lives in one, however it ends, SIGKILL included.

Linux and root only. Latency is the machine's own, some tens of microseconds.
"""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from resist_ds.errors import RunError, UserError

if TYPE_CHECKING:  # a mistake is answered without waiting for torch
    from resist_ds.comm import Comm

INTERFACE = "eth0"  # a rank's end of its link
BURST = (
    256 << 10
)  # bytes that may go at once: above the 64 KiB that TCP hands to a device, for fast rates 2 ms
_QUEUE_MS = 50  # of the limiter: what waits longer is lost, and TCP slows down
_PORT = 29400
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def rate(text: str) -> int:
    """Bits a second of `--link`'s value, such as 1gbit, 250mbit or 2.5gbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.strip().lower())
    bits = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1e6 <= bits <= 1e11:
        raise UserError(f"--link is {text!r}: type a rate from 1mbit to 100gbit, for instance 1gbit")
    return round(bits)


def check() -> None:
    """Raises `UserError` where this process cannot make such a network."""
    if sys.platform != "linux":
        raise UserError("--link needs Linux's network namespaces: leave it out")
    if os.geteuid() != 0:
        raise UserError("--link needs root, to make network namespaces: type sudo, or leave it out")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UserError(f"--link needs the command {tool}: install iproute2, or leave it out")


class Link:
    """The network of `size` machines at `bits` a second each way. Use as a context.

    Args:
        ranks: on each machine.

    Attributes:
        bits: a second, each way.
        addresses: of each machine.
        environment: variables by which gloo and NCCL find the way.
    """

    def __init__(self, size: int, bits: int, ranks: int = 1):
        assert 1 <= size <= 250, size
        self.bits = bits
        self._ranks = ranks
        self.addresses = [f"10.77.0.{rank + 1}" for rank in range(size)]
        self.environment = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "MASTER_ADDR": self.addresses[0],
            # Ranks on one machine would go past the network, through memory.
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_IB_DISABLE": "1",
        }
        self._namespaces: list[int] = []

    def __enter__(self) -> "Link":
        try:
            hub = self._namespace()
            for _ in self.addresses:
                self._namespace()
            with _inside(hub):
                _commands("ip", ["link add bridge type bridge", "link set bridge up"])
            for rank in range(len(self.addresses)):
                self._connect(hub, rank)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def identities(self) -> list[str]:
        """The kernel's name of each namespace, the bridge's first, as in /proc/PID/ns/net: `net:[…]`."""
        return [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in self._namespaces]

    def enter(self, rank: int) -> None:
        """Move this process into the namespace of a rank's machine, before it has threads or sockets."""
        _setns(self._namespaces[1 + rank // self._ranks])

    def _namespace(self) -> int:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _call("unshare", _NEW_NETWORK)
            self._namespaces.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        finally:
            _setns(home)
            os.close(home)
        return self._namespaces[-1]

    def _connect(self, hub: int, rank: int) -> None:
        """Both ends of a rank's link, each made inside its namespace: the machine's own never sees them."""
        there = self._namespaces[1 + rank]
        port, far = f"port{rank}", f"/proc/{os.getpid()}/fd/{there}"
        limit = f"root tbf rate {self.bits}bit burst {BURST} latency {_QUEUE_MS}ms"
        with _inside(hub):
            make = f"link add {port} type veth peer name {INTERFACE} netns {far}"
            _commands("ip", [make, f"link set {port} master bridge up"])
            _commands("tc", [f"qdisc add dev {port} {limit}"])
        with _inside(there):
            address = f"addr add {self.addresses[rank]}/24 dev {INTERFACE}"
            _commands("ip", ["link set lo up", address, f"link set {INTERFACE} up"])
            _commands("tc", [f"qdisc add dev {INTERFACE} {limit}"])

    def _close(self) -> None:
        while self._namespaces:
            os.close(self._namespaces.pop())


def measure(comm: "Comm", addresses: list[str], size: int) -> float | None:
    """Every machine sends `size` bytes and some to the next, at once, by plain TCP. Collective: all ranks.

    Args:
        addresses: of the machines.

    Returns:
        on a machine's first rank, bytes a second at which `size` of them arrived there. The first to come are
        not timed: a limiter that has rested lets a burst pass.
    """
    machine, other = divmod(comm.rank, comm.size // len(addresses))
    if other:
        comm.barrier()
        comm.barrier()
        return None
    here, there = addresses[machine], addresses[(machine + 1) % len(addresses)]
    with socket.create_server((here, _PORT)) as server:
        comm.barrier()
        with socket.create_connection((there, _PORT)) as out, server.accept()[0] as into:
            sender = threading.Thread(target=out.sendall, args=(bytes(2 * BURST + size),), daemon=True)
            sender.start()
            _receive(into, 2 * BURST)
            start = time.perf_counter()
            _receive(into, size)
            seconds = time.perf_counter() - start
            sender.join()
    comm.barrier()
    return size / seconds


def _receive(connection: socket.socket, size: int) -> None:
    while size:
        got = len(connection.recv(min(size, 1 << 20)))
        if not got:
            raise RunError("a measured transfer over the link broke off")
        size -= got


def bytes_sent() -> int | None:
    """Bytes that have left by this process's link so far, headers included; None where it has none."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:")]
    return int(found[0][8]) if found else None


@contextmanager
def _inside(namespace: int) -> Iterator[None]:
    """This thread, and the processes that it starts, live in another network namespace for a while."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _setns(namespace)
        yield
    finally:
        _setns(home)
        os.close(home)


def _commands(tool: str, lines: list[str]) -> None:
    """Run several commands of `ip` or `tc` by one process."""
    done = subprocess.run(
        [tool, "-batch", "-"], input="\n".join(lines) + "\n", text=True, capture_output=True
    )
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise RunError(f"the network of --link could not be made: {tool} says: {said}")


def _setns(namespace: int) -> None:
    _call("setns", namespace, _NEW_NETWORK)


def _call(name: str, *args: int) -> None:
    """A system call that Python has from 3.12 on."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        number = ctypes.get_errno()
        raise RunError(f"the network of --link could not be made: {name}: {os.strerror(number)}")

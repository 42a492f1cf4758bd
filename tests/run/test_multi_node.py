"""Two nodes: network namespaces joined by a cable, one launcher and one rank in each, one shared folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from resist_ds.options.presets import PRESETS
from tests import saved
from tests.conftest import Ranks, run_ranks
from tests.run.test_launchers import BIN, TRAIN, clean_environment, descendants
from tools.benchmark.link import INTERFACE, Link

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
        reason="two nodes on one machine need Linux, root, ip and tc (iproute2)",
    ),
]

PATIENCE = 200  # seconds
ROUNDS = 3
OPTIONS: dict[str, Any] = saved.OPTIONS | {
    "model": "preact_resnet_small",
    "rounds": ROUNDS,
    "schedule": "constant",
    "eval_every": 0,
    "keep": 3,
}
ENDLESS = 100_000


class Job:
    """A launcher's two processes, one on each node, which write to one folder.

    Attributes:
        run: that folder.
        nodes: the launchers, that of rank 0 first.
    """

    def __init__(self, place: Path, net: Link, command: Callable[[int], list[str]], rounds: int = ROUNDS):
        self.run = place / "run"
        self._streams = [place / f"node{node}" for node in (0, 1)]
        given = OPTIONS | {"rounds": rounds, "output_dir": self.run}
        options = [
            f"--{name}={str(value).lower() if value is False else value}" for name, value in given.items()
        ]
        self.nodes: list[subprocess.Popen[bytes]] = []
        for node, stream in enumerate(self._streams):
            with stream.open("wb") as file:
                self.nodes.append(
                    subprocess.Popen(
                        [*command(node), *options],
                        cwd=place,
                        env=clean_environment() | {"GLOO_SOCKET_IFNAME": INTERFACE},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        preexec_fn=lambda node=node: net.enter(node),  # a fork has but one thread
                    )
                )

    def said(self, node: int) -> str:
        return self._streams[node].read_text(errors="replace")

    def records(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, so far."""
        with suppress(OSError):
            return [
                json.loads(line)
                for line in (self.run / "metrics.jsonl").read_text().splitlines(True)
                if line.endswith("\n")
            ]
        return []

    def processes(self) -> list[int]:
        """All that run on the two nodes, launchers included."""
        return [pid for node in self.nodes for pid in (node.pid, *descendants(node.pid))]

    def wait(self) -> list[int]:
        """The launchers' exit codes; they are killed if they do not end."""
        try:
            return [node.wait(PATIENCE) for node in self.nodes]
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"a launcher hung:\n{self.said(0)}\n{self.said(1)}")

    def kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All three launchers at the same time, as most of it is waiting for imports."""
    with Link(2, 10**10) as net:  # bits a second: no limit to speak of
        first, second = net.addresses
        hosts = tmp_path_factory.mktemp("hosts") / "hostfile"
        hosts.write_text((PRESETS / "hostfile").read_text().replace("slots=4", "slots=1"))
        hosts.write_text(hosts.read_text().replace("node0", first).replace("node1", second))

        def torchrun(node: int) -> list[str]:
            return [
                *(str(BIN / "torchrun"), "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "job"),
                *("--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first}:29400"),
                # Both nodes have this machine's name, so that it tells neither who it is.
                *("--rdzv_conf", f"is_host={str(node == 0).lower()}", "--local_addr", net.addresses[node]),
                str(TRAIN),
            ]

        def accelerate(node: int) -> list[str]:
            return [
                *(str(BIN / "accelerate"), "launch"),
                *("--config_file", str(PRESETS / "accelerate_two_nodes.yaml"), "--num_processes", "2"),
                *("--machine_rank", str(node), "--main_process_ip", first, str(TRAIN)),
            ]

        def deepspeed(node: int) -> list[str]:
            return [
                *(str(BIN / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", "--node_rank", str(node)),
                *("--master_addr", first, "--master_port", "29600", str(TRAIN)),
            ]

        started = {
            "torchrun": Job(tmp_path_factory.mktemp("torchrun"), net, torchrun, ENDLESS),
            "accelerate": Job(tmp_path_factory.mktemp("accelerate"), net, accelerate),
            "deepspeed": Job(tmp_path_factory.mktemp("deepspeed"), net, deepspeed),
        }
        yield started
        for job in started.values():
            job.kill()


def trained(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the first rounds came to, in figures that no clock decides."""
    keys = ("round", "lr", "samples_seen", "train/loss", "train/accuracy", "comm/bytes_round")
    return [{key: record[key] for key in keys} for record in records if record["kind"] == "round"][:ROUNDS]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks on one node."""
    place = tmp_path_factory.mktemp("one_node")
    run_ranks(saved.train, 2, OPTIONS | {"output_dir": str(place / "run")}, store=place / "rendezvous")
    found = trained([json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()])
    assert len(found) == ROUNDS and all(record["comm/bytes_round"] > 0 for record in found)
    return found


def test_the_death_of_a_node_ends_the_other_and_one_node_goes_on(
    jobs: dict[str, Job], expected: list[dict[str, Any]], ranks: Ranks
) -> None:
    job = jobs["torchrun"]  # looked at first: as long as it runs it keeps the others waiting
    until = time.monotonic() + PATIENCE
    while len(trained(job.records())) < ROUNDS:
        assert time.monotonic() < until and job.nodes[0].poll() is None, job.said(0) + job.said(1)
        time.sleep(0.1)
    assert trained(job.records()) == expected

    there = job.processes()
    assert len(there) >= 4  # two launchers, two ranks
    job.nodes[1].kill()
    codes = job.wait()
    assert codes == [1, -signal.SIGKILL]
    (line,) = re.findall(r"^error: .*$", job.said(0), re.MULTILINE)
    assert line.startswith("error: rank 0 lost another rank, whose own message or exit says why")
    assert "who plays whom" in job.said(0)
    until = time.monotonic() + 10
    while left := [pid for pid in there if runs(pid)]:
        assert time.monotonic() < until, f"processes {left} are left"
        time.sleep(0.1)

    done = int(saved.last(job.run).name.removeprefix("round-"))
    assert done >= ROUNDS - 1  # the last one may have been on its way
    more = {"rounds": done + 1, "override": "rounds", "resume": "auto", "output_dir": str(job.run)}
    ranks(saved.train, 1, OPTIONS | more)
    assert job.records()[-1]["round"] == done + 1 and job.records()[-1]["settings"]["R"] == 1


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_two_nodes_train_what_one_trains(
    launcher: str, jobs: dict[str, Job], expected: list[dict[str, Any]]
) -> None:
    job = jobs[launcher]
    assert job.wait() == [0, 0], job.said(0) + job.said(1)
    assert trained(job.records()) == expected
    assert job.records()[-1]["kind"] == "summary" and job.records()[-1]["settings"]["R"] == 2
    assert "who plays whom: rank 0: workers 0–1; rank 1: workers 2–3" in job.said(0)
    assert "who plays whom" not in job.said(1)  # one rank speaks
    shards = {file.name for file in saved.last(job.run).glob("model-*")}
    assert shards == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, which waits for its parent alone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_launch_file_is_for_two_machines() -> None:
    found = yaml.safe_load((PRESETS / "accelerate_two_nodes.yaml").read_text())
    one = yaml.safe_load((PRESETS / "accelerate_one_node.yaml").read_text())
    assert found["num_machines"] == 2 and found["num_processes"] == 2 * one["num_processes"]
    assert found["main_process_port"]  # a free one would be known to the first machine alone

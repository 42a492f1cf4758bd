"""Where a process stands among the ranks: what the launcher's variables say, and how the ranks meet."""

import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist_ds import launcher, rendezvous, trainer
from resist_ds.comm import Comm
from resist_ds.engines.parallel import Inside, data_parallel
from resist_ds.errors import RunError, UserError
from resist_ds.launcher import Launch
from resist_ds.options.config import Config
from resist_ds.rendezvous import Identity, Place, lack, places
from tests.conftest import _CONTEXT
from tests.run.test_errors import TINY
from tests.run.test_signals import begin, until

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **MEET}
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
PLACE = ("node0", "29500")
LET = "or let a launcher set them (torchrun, accelerate launch, deepspeed)"
NO_RANKS = "start torchrun once on each machine (ds_configs/slurm.sh does), or, for one process, unset "

PLACES: dict[str, tuple[dict[str, str], Launch]] = {
    "plain python": ({}, Launch()),
    "torchrun": (TORCHRUN | AGENT, Launch(3, 4, 1, 2, True, True, PLACE)),
    "deepspeed": (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", **MEET},
        Launch(1, 2, 1, 2, True, False, PLACE),
    ),
    "one rank of a launcher": (
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", **MEET},
        Launch(launched=True, place=PLACE),
    ),
    "accelerate's single process": ({"MASTER_ADDR": "127.0.0.1"}, Launch(place=("127.0.0.1", None))),
    "Kubernetes, a process on each machine": (
        {"RANK": "1", "WORLD_SIZE": "3", **MEET},
        Launch(1, 3, 0, 3, False, False, PLACE),
    ),
    "a local rank of one, left over": ({"LOCAL_RANK": "0"}, Launch()),
    "a world of one, left over": ({"WORLD_SIZE": "1"}, Launch()),
    "a batch script that may start four": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launch()),
    "a step of one task": ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "PMI_SIZE": "1"}, Launch()),
    "torchrun below srun and mpirun": (
        TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        Launch(3, 4, 1, 2, True, False, PLACE),
    ),
    "a word of somebody else's": ({"LOCAL_SIZE": "large"}, Launch()),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_launchers_variables_are_a_place(name: str) -> None:
    environment, place = PLACES[name]
    assert Launch.read(environment) == place
    launcher.check(environment)
    assert launcher.answers(environment) == (place.local_rank == 0)


WRONG: dict[str, tuple[dict[str, str], str]] = {
    "RANK": ({"RANK": "1"}, f"RANK is 1 and WORLD_SIZE is not set: unset RANK, {LET}"),
    "empty": ({"RANK": ""}, f"RANK is empty: unset RANK, {LET}"),
    "word": ({"LOCAL_RANK": "none"}, f"LOCAL_RANK is 'none', which is no number: unset LOCAL_RANK, {LET}"),
    "LOCAL_RANK": (
        {"LOCAL_RANK": "-1"},
        f"LOCAL_RANK is -1 and WORLD_SIZE is not set: unset LOCAL_RANK, {LET}",
    ),
    "WORLD_SIZE": ({"WORLD_SIZE": "4"}, f"WORLD_SIZE is 4 and RANK is not set: unset WORLD_SIZE, {LET}"),
    "none": ({"WORLD_SIZE": "0"}, f"WORLD_SIZE is 0: unset WORLD_SIZE, {LET}"),
    "too large": (TORCHRUN | {"RANK": "4"}, f"RANK is 4 and WORLD_SIZE is 4: unset RANK, {LET}"),
    "local rank too large": (
        TORCHRUN | {"LOCAL_RANK": "2"},
        f"LOCAL_RANK is 2 and LOCAL_WORLD_SIZE is 2: unset LOCAL_RANK, {LET}",
    ),
    "machine too large": (
        TORCHRUN | {"LOCAL_WORLD_SIZE": "8"},
        f"LOCAL_WORLD_SIZE is 8 and WORLD_SIZE is 4: unset LOCAL_WORLD_SIZE, {LET}",
    ),
    "nowhere": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node0"},
        f"WORLD_SIZE is 2 and MASTER_PORT is not set: unset WORLD_SIZE, {LET}",
    ),
    "empty address": (
        TORCHRUN | {"LOCAL_RANK": "0", "MASTER_ADDR": " "},
        f"WORLD_SIZE is 4 and MASTER_ADDR is empty: unset WORLD_SIZE, {LET}",
    ),
    "no port": (
        TORCHRUN | {"LOCAL_RANK": "0", "MASTER_PORT": "65536"},
        f"MASTER_PORT is 65536 and a port lies between 1 and 65535: unset MASTER_PORT, {LET}",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        "OMPI_COMM_WORLD_SIZE is 2 and WORLD_SIZE is not set: mpirun makes no ranks of its processes; "
        f"{NO_RANKS}OMPI_COMM_WORLD_SIZE",
    ),
    "srun": (
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        "SLURM_STEP_NUM_TASKS is 8 and WORLD_SIZE is not set: srun makes no ranks of its processes; "
        f"{NO_RANKS}SLURM_STEP_NUM_TASKS",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_variables_that_do_not_fit_are_named(name: str) -> None:
    environment, line = WRONG[name]
    with pytest.raises(UserError) as error:
        launcher.check(environment)
    assert str(error.value) == line
    assert launcher.answers(environment)


@pytest.mark.parametrize("which", ["OMPI_COMM_WORLD_RANK", "SLURM_PROCID"])
def test_one_of_several_processes_answers_first(which: str) -> None:
    size = {"OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID": "SLURM_STEP_NUM_TASKS"}[which]
    assert [launcher.answers({size: "2", which: rank}) for rank in "01"] == [True, False]


NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "PMI_SIZE", *MEET)


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(-1, 5).map(str) | st.text(max_size=4)))
def test_any_variables_are_a_place_or_one_line(environment: dict[str, str]) -> None:
    try:
        launcher.check(environment)
        place = Launch.read(environment)
    except UserError as error:
        assert "\n" not in str(error) and "unset" in str(error)
    else:
        assert 0 <= place.local_rank < place.local_size <= place.size
        assert 0 <= place.rank < place.size
        assert place.size == 1 or 0 < place.address[1] < 65536


# ------------------------------------------------------------------------------------------------------------
# Who sits where

OWN, HOST = None, "node0 b00t"
# Every rank's identity, every rank's place, and why not every rank has a GPU of its own.
SEATS: dict[str, tuple[list[Identity], list[Place], str | None]] = {
    "four ranks that each see one of four GPUs, as cuda:0": (
        [Identity(HOST, gpu) for gpu in "abcd"],
        [Place(rank, 4, (rank,)) for rank in range(4)],
        OWN,
    ),
    "four ranks on two GPUs": (
        [Identity(HOST, gpu) for gpu in "abab"],
        [Place(0, 4, (0, 2)), Place(1, 4, (1, 3)), Place(2, 4, (0, 2)), Place(3, 4, (1, 3))],
        "ranks 0 and 2 have the same one",
    ),
    "two machines without GPUs, ranks dealt in turn": (
        [Identity(machine, None) for machine in ("node0 b00t", "node1 b001", "node0 b00t", "node1 b001")],
        [Place(0, 2, ()), Place(0, 2, ()), Place(1, 2, ()), Place(1, 2, ())],
        OWN,
    ),
    "two machines of one name": (
        [Identity(f"node0 {boot}", gpu) for boot, gpu in (("b00t", "a"), ("b001", "b"), ("b00t", "c"))],
        [Place(0, 2, (0,)), Place(0, 1, (1,)), Place(1, 2, (2,))],
        OWN,
    ),
    "two containers of a machine, which are given the same GPU": (
        [Identity("left b00t", "a"), Identity("right b00t", "b"), Identity("right b00t", "a")],
        [Place(0, 1, (0, 2)), Place(0, 2, (1,)), Place(1, 2, (0, 2))],
        "ranks 0 and 2 have the same one",
    ),
    "machines with and without a GPU": (
        [Identity("node0 b00t", "a"), Identity("node1 b001", None), Identity("node2 b002", None)],
        [Place(0, 1, (0,)), Place(0, 1, ()), Place(0, 1, ())],
        "rank 1 has none",
    ),
    "a single rank with a GPU": ([Identity(HOST, "a")], [Place(0, 1, (0,))], OWN),
}


@pytest.mark.parametrize("name", SEATS)
def test_places_are_counted_by_machine_and_gpu(name: str) -> None:
    identities, found, why = SEATS[name]
    assert places(identities) == found
    assert lack(found) == why


def test_who_shares_a_gpu_is_named_where_a_strategy_needs_one_for_each_rank() -> None:
    """DDP, FSDP2 and ZeRO communicate over NCCL alone, which has no two ranks on one GPU."""
    line = "--strategy ddp needs a GPU for every rank, and ranks 0 and 2 have the same one: start fewer ranks"
    crowded: Any = SimpleNamespace(lack="ranks 0 and 2 have the same one")
    everyone: Any = SimpleNamespace(size=4)
    with pytest.raises(UserError, match=f"^{line}$"):
        data_parallel(Inside(crowded, everyone, "--strategy ddp", "gradients"), torch.nn.Linear(1, 1))


CARD = {"pci_domain_id": 0, "pci_bus_id": 0x17, "pci_device_id": 2}
CARDS: dict[str, tuple[dict[str, Any], str]] = {
    "UUID": (CARD | {"uuid": "1f3c-77"}, "1f3c-77"),
    "a build without": (CARD, "b00t [0, 23, 2]"),
    "an older one yet": ({}, "b00t 1"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_gpu_is_known_by_its_uuid_else_by_where_it_is_plugged_in(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    properties, gpu = CARDS[name]
    (tmp_path / "boot_id").write_text("b00t\n")
    monkeypatch.setattr(rendezvous, "BOOT", tmp_path / "boot_id")
    monkeypatch.setattr(socket, "gethostname", lambda: "node0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    assert Identity.of(torch.device("cuda", 1)) == (HOST, gpu)
    assert Identity.of(torch.device("cpu")) == (HOST, None)
    monkeypatch.setattr(rendezvous, "BOOT", tmp_path / "none")
    assert Identity.of(torch.device("cpu")) == ("node0 ", None)


# ------------------------------------------------------------------------------------------------------------
# Meeting


@pytest.fixture
def port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = str(server.getsockname()[1])
    yield number


def arrive(rank: int, size: int, local_rank: int, folder: Path, port: str) -> None:
    """The life of a rank that meets the others."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    begin(folder, rank)
    rendezvous.PATIENCE = 1.0
    comm = Comm()
    (folder / f"met{rank}").write_text(str(comm.gather(rank)))
    comm.close()


def test_who_is_missing_is_said_once_and_then_all_meet(port: str, tmp_path: Path) -> None:
    """Ranks 0 and 1 are on one machine, rank 2 comes late from another."""
    ranks = [
        _CONTEXT.Process(target=arrive, args=(rank, 3, local, tmp_path, port), daemon=True)
        for rank, local in ((0, 0), (1, 1), (2, 0))
    ]
    for rank in (1, 0):
        ranks[rank].start()
    said = tmp_path / "stderr0"
    until(lambda: said.exists() and "\n" in said.read_text(), "rank 0 says who is missing")
    ranks[2].start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert [(tmp_path / f"met{rank}").read_text() for rank in range(3)] == ["[0, 1, 2]"] * 3
    line = f"waiting for 1 of 3 ranks at 127.0.0.1:{port}, as RANK, WORLD_SIZE and MASTER_ADDR say; "
    assert said.read_text() == f"{line}without a launcher, unset them\n"
    assert [(tmp_path / f"stderr{rank}").read_text() for rank in (1, 2)] == ["", ""]


def place(rank: int, size: int, port: str) -> Launch:
    return Launch(rank, size, rank, size, True, False, ("127.0.0.1", port))


def test_ranks_that_never_come_are_waited_for_aloud_and_not_for_ever(
    port: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As for a whole set of variables that another job has left."""
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    monkeypatch.setattr(rendezvous, "AGAIN", 0.2)
    with pytest.raises(RunError, match=rf"^rank 0 has waited 0\.5 s for 3 of 4 ranks at 127.0.0.1:{port}$"):
        rendezvous.meet(place(0, 4, port), timedelta(seconds=0.5))
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.startswith("waiting for 3 of 4 ranks at ") for line in lines)


def test_rank_0_that_is_not_there_is_waited_for_aloud_and_not_for_ever(
    port: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rendezvous, "AGAIN", 0.2)
    missing = rf"rank 0, which is not there \(Connection refused\), at 127.0.0.1:{port}"
    with pytest.raises(RunError, match=f"^rank 1 has waited 0.5 s for {missing}$"):
        rendezvous.meet(place(1, 4, port), timedelta(seconds=0.5))
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(line.startswith("waiting for rank 0, which is not there (Connection") for line in lines)


def test_a_rank_0_whose_address_is_another_machines_waits_aloud(
    port: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It listens all the same; a client of torch's would try to reach that address for half an hour."""
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.2)
    launch = Launch(0, 2, 0, 2, True, False, ("no.such.host.invalid", port))
    with pytest.raises(RunError, match=r"^rank 0 has waited 0\.5 s for 1 of 2 ranks at no\.such"):
        rendezvous.meet(launch, timedelta(seconds=0.5))
    assert capfd.readouterr().err.startswith("waiting for 1 of 2 ranks at no.such.host.invalid:")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as server:
        taken = str(server.getsockname()[1])
        with pytest.raises(UserError, match=f"^MASTER_PORT is {taken}, and another process of this machine"):
            rendezvous.meet(place(0, 2, taken), timedelta(seconds=5))


def only_rank(folder: Path, variables: dict[str, str], options: dict[str, Any]) -> None:
    """A run by itself; notes down whom it has joined and where it listens, while it still runs."""
    os.environ |= variables
    begin(folder, 0)
    closing = trainer.report.closing

    def look(*args: Any) -> str:
        connections = psutil.Process().net_connections("inet")
        listens = [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]
        (folder / "looked").write_text(f"{torch.distributed.is_initialized()} {listens}")
        return closing(*args)

    trainer.report.closing = look  # type: ignore[assignment]
    os._exit(trainer.main(Config(**options)))


@pytest.mark.parametrize("log_with", ["none", "tensorboard"])
def test_a_world_of_one_joins_nobody_and_opens_no_port(log_with: str, port: str, tmp_path: Path) -> None:
    """accelerate's trackers, too, would join what they find in the environment."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options = TINY | {"log_with": log_with, "output_dir": str(tmp_path / "run")}
    rank = _CONTEXT.Process(target=only_rank, args=(tmp_path, variables, options))
    rank.start()
    rank.join(60)
    assert rank.exitcode == 0, (tmp_path / "stderr0").read_text()
    assert (tmp_path / "looked").read_text() == "False []"
    assert any((tmp_path / "run").rglob("events.out.*")) == (log_with == "tensorboard")

"""What the host does where NCCL carries the exchanges: it waits for no transfer that cannot end.

No GPU is needed: the operations are fakes, or gloo's, and the comm is told that they are NCCL's.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resist_ds import comm as comm_module
from resist_ds.comm import Comm
from resist_ds.errors import RunError
from tests import ROOT
from tests.conftest import _CONTEXT
from tests.run import test_signals


class Work:
    """One that is done when it has been looked at so many times."""

    def __init__(self, events: list[str], looks: float):
        self._events, self._looks = events, looks

    def wait(self) -> None:
        self._events.append("the stream waits")

    def is_completed(self) -> bool:
        self._looks -= 1
        return self._looks < 0


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, events: list[str]) -> Callable[[Work], Comm]:
    """A rank of two with a GPU each, whose operations come to this work."""

    def make(work: Work) -> Comm:
        comm = Comm()
        comm.size, comm.buffer_device = 2, torch.device("cuda", 0)
        assert comm.backend == "nccl"

        def begin(*args: Any, **kwargs: Any) -> Any:
            events.append("begun")
            return work if kwargs else [work]

        dist = SimpleNamespace(
            irecv=None, isend=None, P2POp=lambda *a, **k: a, batch_isend_irecv=begin, broadcast=begin
        )
        monkeypatch.setattr(comm_module, "deepspeed_comm", lambda: dist)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda one: events.append("all have come"))
        return comm

    return make


def exchange(comm: Comm) -> None:
    comm.exchange([(torch.zeros(4), 1)], [(torch.zeros(4), 1)], "test")


def broadcast(comm: Comm) -> None:
    comm.broadcast(torch.zeros(4), 1, "test")()


@pytest.mark.parametrize("operation", [exchange, broadcast])
def test_an_operation_is_begun_then_all_have_come_and_then_it_is_waited_for(
    operation: Callable[[Comm], None], told: Callable[[Work], Comm], events: list[str]
) -> None:
    work = Work(events, looks=40)
    operation(told(work))
    assert events == ["begun", "all have come", "the stream waits"]
    assert work._looks == -1  # to its end, and no further


def test_a_broadcast_is_on_its_way_before_anybody_waits(
    told: Callable[[Work], Comm], events: list[str]
) -> None:
    """Streamed evaluation computes with a block while the next one comes."""
    wait = told(Work(events, looks=0)).broadcast(torch.zeros(4), 1, "test")
    assert events == ["begun"]
    wait()
    assert events == ["begun", "all have come", "the stream waits"]


@pytest.mark.parametrize("operation", [exchange, broadcast])
def test_a_transfer_that_does_not_end_is_given_up_in_one_line(
    operation: Callable[[Comm], None],
    told: Callable[[Work], Comm],
    events: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(comm_module, "PATIENCE", 0.2)
    start = time.monotonic()
    with pytest.raises(
        RunError, match=r"^rank 0: an exchange over NCCL .* has not ended in 0\.2 s: "
    ) as error:
        operation(told(Work(events, looks=float("inf"))))
    assert 0.2 <= time.monotonic() - start < 2
    assert error.value.alone and "\n" not in str(error.value)


def test_who_has_nothing_to_move_comes_too(told: Callable[[Work], Comm], events: list[str]) -> None:
    told(Work(events, looks=0)).exchange([], [], "test")
    assert events == ["all have come"]


# ------------------------------------------------------------------------------------------------------------
# Two ranks, gloo in NCCL's place.


def ends(life: Callable[[int, Path], None], folder: Path) -> None:
    """Rank 0 ends with exit code 1, and soon, after rank 1 has killed itself."""
    pair = [_CONTEXT.Process(target=life, args=(rank, folder), daemon=True) for rank in range(2)]
    for process in pair:
        process.start()
    pair[1].join(60)
    pair[0].join(10)
    codes = [process.exitcode for process in pair]
    for process in pair:
        process.kill()
    assert codes == [1, -signal.SIGKILL]


def over_nccl() -> None:
    Comm.backend = property(lambda self: "nccl")  # type: ignore[assignment,method-assign]


def idle(rank: int, folder: Path) -> None:
    """Rank 1 ends between two exchanges; rank 0 has nothing to move in the next one."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    comm = Comm(init_method=f"file://{folder / 'rendezvous'}")
    assert (comm.local_rank, comm.local_size) == (rank, 2)  # whatever LOCAL_RANK says
    over_nccl()
    theirs = torch.zeros(3)
    comm.exchange([(torch.ones(3), 1 - rank)], [(theirs, 1 - rank)], "test")
    assert theirs.tolist() == [1, 1, 1]
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        comm.exchange([], [], "test")
    except RunError as error:
        (folder / "said").write_text(str(error))
        os._exit(1)


def test_a_rank_that_has_ended_is_noticed_before_nccl_is_waited_for(tmp_path: Path) -> None:
    ends(idle, tmp_path)
    lost = r"rank 0 lost another rank, whose own message or exit says why \((Connection|Read|Write) .*\)"
    assert re.fullmatch(lost, (tmp_path / "said").read_text())


def train(rank: int, folder: Path) -> None:
    """train.py on a rank."""
    test_signals.PLANS["stuck"] = stuck
    options = test_signals.OPTIONS | {"output_dir": str(folder / "run")}
    test_signals.life(rank, 2, folder, str(folder / "rendezvous"), options, "stuck")


def stuck(folder: Path, comm: Comm) -> None:
    """From the third round on rank 1 ends in an exchange that both have come to, and rank 0's never does."""
    over_nccl()
    comm_module.PATIENCE = 1.0
    finish = Comm._finish

    def break_off() -> None:
        def finish_never(self: Comm, works: Any) -> None:
            finish(self, [])  # both have come
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            never = SimpleNamespace(wait=lambda: None, is_completed=lambda: False)
            torch.distributed.all_reduce = lambda one: None
            finish(self, [never])

        Comm._finish = finish_never  # type: ignore[method-assign]

    test_signals.in_round(folder, comm, break_off)


def test_a_run_whose_exchange_hangs_ends_with_one_line(tmp_path: Path) -> None:
    """Through train.py's own end, which waits for nothing that still stands on a GPU."""
    ends(train, tmp_path)
    stderr = (tmp_path / "stderr0").read_text()
    said = "error: rank 0: an exchange over NCCL that all ranks have come to has not ended in 1 s: "
    assert stderr.startswith(said) and stderr.count("\n") == 1


def test_deepspeed_does_not_try_to_build_its_ops_where_the_accelerator_is_a_gpu() -> None:
    """It would say of each that there is no compiler for it, on every rank."""
    code = (
        "from resist_ds.comm import deepspeed_comm; deepspeed_comm()\n"
        "import deepspeed.ops; print('__compatible_ops__' in vars(deepspeed.ops))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cuda"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (found.stdout, found.returncode) == ("False\n", 0), found.stderr

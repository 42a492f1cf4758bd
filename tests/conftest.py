"""Runs a function on several ranks: warm processes, gloo over a file, and a time-out that kills a hang."""

import faulthandler
import gc
import multiprocessing
import os
import queue
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests import HIDDEN_GPUS, THREADS

settings.register_profile("shared machine", deadline=None)  # an example's time says nothing on a busy core
settings.load_profile("shared machine")

# Forked from one process that has imported everything once: a rank starts in milliseconds instead of 5 s.
_CONTEXT = multiprocessing.get_context("forkserver")

Ranks = Callable[..., list[Any]]
HANGS = 75  # seconds, below the time-out of run_ranks


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is looked at: which device it is for, and who hears signals.

    What the tests ask for in bits is promised for CPUs, so they run there on every machine; those of GPUs,
    which `pytest -m gpu` selects, say what holds on these.
    """
    _CONTEXT.set_forkserver_preload(["tests.warm"])
    if config.getoption("markexpr") == "gpu":
        # What has asked CUDA itself cannot be forked, its ranks would be refused; NVML may be asked.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    else:
        os.environ.setdefault(HIDDEN_GPUS, str(torch.cuda.device_count()))
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A script's background job inherits deaf ears for SIGINT, and so would all that the tests signal.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that may take long, as their time-outs say, come first, then those of many tests.

    So the last ones leave no core idle for long; `--no-loadscope-reorder` has pytest-xdist keep this order.
    """
    patience: dict[Path, float] = {}
    for item in items:
        asked = item.get_closest_marker("timeout")
        patience[item.path] = max(patience.get(item.path, 0.0), asked.args[0] if asked else 0.0)
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-patience[item.path], -tests[item.path], item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of GPUs are skipped, visibly, where none is seen."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU (where there is one, pytest -m gpu runs it)")


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, results: Any, args: tuple[Any, ...]
) -> None:
    """The life of one rank."""
    if size > 1:  # one rank is started as by plain python, without a launcher's variables
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    faulthandler.dump_traceback_later(HANGS, exit=False)  # so that a hang says where it is
    gc.freeze()  # a collection need not look through what was imported, which takes it 0.3 s
    from resist_ds.comm import Comm

    torch.set_num_threads(THREADS)
    try:
        comm = Comm(init_method=f"file://{store}")
        results.put((rank, function(comm, *args), None))
        comm.close()  # afterwards: after a failure it may wait for what never comes
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, store: Path, timeout: float = 90
) -> list[Any]:
    """Call `function(comm, *args)`, importable and picklable, on `size` ranks; returns what each returned.

    Results travel as pickles: tensors as numpy arrays or through files, please.
    """
    results = _CONTEXT.Queue()
    ranks = [
        _CONTEXT.Process(target=_rank, args=(function, rank, size, str(store), results, args), daemon=True)
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    returned: dict[int, Any] = {}
    try:
        while len(returned) < size:
            try:
                rank, result, error = results.get(timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            except queue.Empty:
                dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in returned]
                if dead:
                    pytest.fail(f"ranks {dead} died, exit codes {[ranks[r].exitcode for r in dead]}")
                if time.monotonic() > deadline:
                    missing = sorted(set(range(size)) - set(returned))
                    pytest.fail(f"ranks {missing} of {size} hung for {timeout} s")
                continue
            if error is not None:
                pytest.fail(f"rank {rank} of {size} failed:\n{error}")
            returned[rank] = result
        for process in ranks:
            process.join(10)
    finally:
        for process in ranks:
            process.kill()
    return [returned[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def fixed_threads() -> Iterator[None]:
    """As many threads as a rank has: results compare to the bit; for small nets more would only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """`ranks(function, size, *args)` calls `function(comm, *args)` on `size` ranks; returns what they did."""

    def run(function: Callable[..., Any], size: int, *args: Any, timeout: float = 90) -> list[Any]:
        store = tmp_path_factory.mktemp("store") / "rendezvous"
        return run_ranks(function, size, *args, store=store, timeout=timeout)

    return run

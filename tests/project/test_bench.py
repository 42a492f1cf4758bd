"""tools/bench.py: figures come from the runs' records, links are slow, and nothing is left behind."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from resist_ds.comm import Comm
from resist_ds.data import images
from resist_ds.errors import RunError, Stopped, UserError
from resist_ds.options.command_line import parse
from resist_ds.options.config import Config
from tests import ROOT
from tests.conftest import _CONTEXT
from tools import bench
from tools.benchmark import counted, link, peers, photos, ranks, tables, variants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
ranks_needed = pytest.mark.ranks
root_needed = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"),
    reason="network namespaces need root, ip and tc",
)
TINY = ["--model=preact_resnet_small", "--img_size=8", "--batch_size=2", "--local_steps=2", "--workers=2"]
PATIENCE = 100  # seconds


class Started:
    """A function in a session of its own, forked from the tests' warm process; its output goes to files."""

    def __init__(self, folder: Path, function: Callable[..., object], *args: object):
        self._folder = folder
        self._process = _CONTEXT.Process(target=_apart, args=(folder, function, args))
        self._process.start()
        self.pid = self._process.pid or 0

    def ended(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); killed if it does not end."""
        self._process.join(PATIENCE)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            pytest.fail(f"did not end; {self.said('stderr')}")
        return self._process.exitcode, self.said("stdout"), self.said("stderr")

    def said(self, stream: str) -> str:
        return (self._folder / stream).read_text()


def _apart(folder: Path, function: Callable[..., object], args: Sequence[object]) -> None:
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    try:
        code = function(*args)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.exit(code)  # type: ignore[arg-type]


def started_bench(folder: Path, *options: str) -> Started:
    return Started(folder, bench.main, [*TINY, f"--output_dir={folder / 'out'}", *options])


# ------------------------------------------------------------------------------------------------------------
# Figures


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two strategies, twice each; behind links where that is possible."""
    folder = tmp_path_factory.mktemp("bench")
    linked = [] if root_needed.args[0] else ["--link=100mbit"]
    code, out, err = started_bench(folder, "--strategies=resist,ddp", "--repeats=2", *linked).ended()
    assert (code, err) == (0, ""), err
    raw = json.loads((folder / "out" / "bench.json").read_text())
    return SimpleNamespace(folder=folder / "out", raw=raw, out=out)


def records(compared: SimpleNamespace, run: dict[str, Any]) -> list[dict[str, Any]]:
    path = compared.folder / "runs" / f"{run['repeat'] + 1}-{run['strategy']}" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@ranks_needed
def test_figures_are_those_of_the_runs_records(compared: SimpleNamespace) -> None:
    order = [(run["repeat"], run["strategy"]) for run in compared.raw["runs"]]
    assert order == [(0, "resist"), (0, "ddp"), (1, "ddp"), (1, "resist")]
    assert compared.raw["seeds"] == [0, 1]
    for run in compared.raw["runs"]:
        lines = records(compared, run)
        assert lines[-1]["settings"]["strategy"] == run["strategy"]
        assert lines[-1]["settings"]["seed"] == run["seed"] == run["repeat"]
        first, second = (line for line in lines if line["kind"] == "round")  # the first is a warm-up
        assert (
            run["bytes_round"] == second["comm/bytes_round"] and run["bytes_step"] * 2 == run["bytes_round"]
        )
        seconds = second["perf/wall_s"] - first["perf/wall_s"]
        assert run["samples_per_s"] == pytest.approx(2 * 2 * 2 / seconds)
        assert run["local_step_s"] == second["perf/local_s"] / 2 and run["sync_s"] == second["perf/sync_s"]
        peak = max(r["mem/peak_gib"] for r in (first, second)) * 2**30
        assert run["peak_train_bytes"] == pytest.approx(peak - run["baseline_bytes"], abs=4e6)  # of one rank
        assert 0 < run["peak_train_bytes"] < run["baseline_bytes"]
        assert not list(compared.folder.glob("runs/*/run/checkpoints"))


@ranks_needed
def test_ratios_and_shares_follow_from_the_raw_figures(compared: SimpleNamespace) -> None:
    raw, summary = compared.raw, compared.raw["summary"]
    for figure in tables.FIGURES:
        for strategy in ("resist", "ddp"):
            found = summary[strategy][figure.key]
            if "sync" in figure.key or figure.key == "waited_share":  # ddp's is in its local step
                assert found["ratio"] is None and (found["median"] is None) == (strategy == "ddp")
                continue
            values = [run[figure.key] for run in raw["runs"] if run["strategy"] == strategy]
            baseline = [run[figure.key] for run in raw["runs"] if run["strategy"] == "ddp"]
            assert found["min"] <= found["median"] <= found["max"]
            assert found["median"] == statistics.median(values)
            assert found["ratio"] == pytest.approx(statistics.median(values) / statistics.median(baseline))
            runs = [run for run in raw["runs"] if run["strategy"] == strategy]
            quotients = [tables.limit_of(raw, run, figure.key) / run[figure.key] for run in runs]
            shares = [1 / quotient if figure.more else quotient for quotient in quotients]
            assert found["share"] == pytest.approx(statistics.median(shares))


@ranks_needed
def test_limits_follow_from_the_bare_work_beside_a_run(compared: SimpleNamespace) -> None:
    for run in compared.raw["runs"]:
        assert run["steps"] == 2
        bare, facts = run["bare"], compared.raw["facts"]["strategies"][run["strategy"]]
        exchange = min(bare["all_reduce"], bare.get("messages", bare["all_reduce"]))
        step = (bare["loop"] + exchange / 2) if run["strategy"] == "resist" else max(bare["loop"], exchange)
        limits = {figure.key: tables.limit_of(compared.raw, run, figure.key) for figure in tables.FIGURES}
        assert limits["samples_per_s"] == pytest.approx(4 / step)  # two workers, two images each
        assert limits["local_step_s"] == bare["loop"] and limits["sync_s"] == exchange
        assert limits["bytes_round"] == facts["moved_bytes"][run["repeat"]] == 2 * limits["bytes_step"]
        assert limits["peak_train_bytes"] == limits["peak_eval_bytes"] == facts["held_bytes"]


@ranks_needed
def test_limits_are_reached_in_bytes_and_above_in_memory(compared: SimpleNamespace) -> None:
    facts = compared.raw["facts"]["strategies"]
    for strategy in ("resist", "ddp"):
        found = compared.raw["summary"][strategy]
        assert 0.99 < found["bytes_round"]["share"] <= 1  # padding is all that is moved besides
        assert 0 < found["peak_train_bytes"]["share"] < 1
    assert facts["ddp"]["multiply_add_share"] == 1 and facts["ddp"]["slots"] == compared.raw["facts"]["pool"]
    assert 0.5 < facts["resist"]["multiply_add_share"] < 0.8
    assert facts["ddp"]["held_bytes"] == 3 * 4 * facts["ddp"]["parameters"]  # with gradients and momentum
    for run in compared.raw["runs"]:
        assert (run["bare"]["loop"] == run["bare"]["full_loop"]) == (run["strategy"] == "ddp")
        assert min(run["bare"].values()) > 0 and ("messages" in run["bare"]) == (run["strategy"] == "resist")
    memory = compared.raw["memory_by_category"]
    assert memory["ddp"].startswith("absent")
    assert memory["resist"].pop("Total") == sum(memory["resist"].values())
    assert memory["resist"]["parameters and optimizer state"] >= 2 * 4 * facts["resist"]["parameters"]


@ranks_needed
def test_report_and_picture(compared: SimpleNamespace) -> None:
    report = (compared.folder / "bench.md").read_text()
    assert report in compared.out
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(tables.FIGURES) and all(line.count("|") == 5 for line in table)
    assert "| resist | ddp | limit |" in table[0] and "absent: figures of a GPU" in report
    with Image.open(compared.folder / "bench.png") as picture:
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


# ------------------------------------------------------------------------------------------------------------
# Variants of a strategy, and peers


def _config(*options: str) -> Config:
    return parse(["--workers=2", "--rounds=2", "--local_steps=10", *options])


def test_a_variant_has_its_own_options_and_the_rest_of_all() -> None:
    config = _config("--min_blocks=3", "--optimizer_state=reset", "--lr=0.5")
    text = "resist,resist:min_blocks=0:local_steps=4,local_sgd:optimizer_state=travel,ddp,resist:compile"
    found = variants.read_all(text, config, 2)
    assert [v.name for v in found] == text.split(",")
    assert found[0].config == config
    assert found[1].config == replace(config, min_blocks=0, local_steps=4)
    assert found[2].config == replace(config, strategy="local_sgd", min_blocks=0, optimizer_state="travel")
    assert found[3].config == replace(config, strategy="ddp", min_blocks=0, optimizer_state="travel")
    assert found[4].config == replace(config, compile=True)
    assert [v.once_a_round for v in found] == [True, True, True, False, True]


def test_a_variant_says_what_travels_and_when() -> None:
    config = _config("--wire=compact", "--overlap_steps=2")
    found = variants.read_all("resist,resist:wire=exact:overlap_steps=0,ddp,torchft_local_sgd", config, 2)
    assert [(v.config.wire, v.config.overlap_steps) for v in found] == [("compact", 2), *[("exact", 0)] * 3]
    # A round more, behind whose steps nothing hides, since an evaluation follows.
    assert [v.config.rounds for v in found] == [3, 2, 2, 2]
    assert [counted.measured_rounds(v.config) for v in found] == [range(1, 2)] * 4


@ranks_needed
def test_the_limit_of_an_overlap_hides_shared_alone(compared: SimpleNamespace) -> None:
    raw = copy.deepcopy(compared.raw)
    run = next(run for run in raw["runs"] if run["strategy"] == "resist")
    of = raw["facts"]["strategies"]
    assert 0.1 < of["resist"]["blocks_share"] < 0.9 and of["ddp"]["blocks_share"] == 0
    run["bare"] |= {"loop": 1.0, "messages": 10.0, "all_reduce": 20.0}
    of["resist"]["blocks_share"] = 0.25
    for steps, waited in ((0, 10), (1, 9), (7, 3), (8, 2.5), (20, 2.5)):
        raw["variants"]["resist"]["options"]["overlap_steps"] = steps
        images = raw["workers"] * 2 * run["steps"]
        limit = tables.limit_of(raw, run, "samples_per_s")
        assert limit == pytest.approx(images / (run["steps"] + waited)), steps


def test_names_of_variants_are_good_for_files() -> None:
    (found,) = variants.read_all("resist:run_name=of/two parts:lr=1e-3", _config(), 2)
    assert found.file == "resist-run_name=of-two-parts-lr=1e-3"


def test_a_peer_has_what_it_can_use_of_our_options_and_its_own() -> None:
    config = _config("--min_blocks=3", "--lr=0.5", "--eval_every=0", "--log_with=none", "--dataset=synthetic")
    text = "resist,torchft_diloco:local_steps=8:fragments=4:fragment_sync_delay=1:use_bucketization=true"
    found = variants.read_all(text, config, 2)[1]
    own = peers.PEERS["torchft_diloco"].settings
    assert (own["outer_lr"], own["outer_momentum"]) == (0.7, 0.9)
    typed = {"fragments": 4, "fragment_sync_delay": 1, "use_bucketization": True}
    assert found.peer == "torchft_diloco" and found.settings == own | typed
    expected = replace(config, strategy="local_sgd", min_blocks=0, local_steps=8)
    assert found.config == expected and found.once_a_round


def _bench_with_peers_that_fail(*options: str) -> int:
    """A peer that has a defect on one rank, and one that nobody has."""

    def train(comm: Comm, config: object) -> None:
        comm.barrier()
        if comm.rank == 1:
            raise ZeroDivisionError("of no | use")
        comm.barrier()

    sys.modules["tools.benchmark.peers.broken"] = SimpleNamespace(train=train)  # type: ignore[assignment]
    peers.PEERS["broken"] = peers.Peer("torch", "does not run")
    peers.PEERS["nowhere"] = peers.Peer("no-such-package", "is not there")
    return bench.main(options)


@ranks_needed
def test_peers_stand_beside_ours_and_say_why_they_do_not_run(tmp_path: Path) -> None:
    names = ["local_sgd:optimizer_state=reset", "accelerate_local_sgd", "broken", "nowhere"]
    options = ["--repeats=2", "--local_steps=4", f"--output_dir={tmp_path / 'out'}"]
    linked = [] if root_needed.args[0] else ["--link=100mbit"]
    arguments = [*TINY, *options, *linked, f"--strategies={','.join(names)}"]
    code, _, err = Started(tmp_path, _bench_with_peers_that_fail, *arguments).ended()
    assert (code, err) == (0, ""), err
    raw = json.loads((tmp_path / "out" / "bench.json").read_text())
    ours, theirs, *_ = names
    assert [run["strategy"] for run in raw["runs"]] == [ours, theirs, theirs, ours]  # and no other try
    assert raw["failed"]["nowhere"].startswith("no-such-package is not installed")
    assert "ZeroDivisionError" in raw["failed"]["broken"]
    assert (tmp_path / "out" / "runs" / "1-local_sgd-optimizer_state=reset" / "run").is_dir()
    for run in raw["runs"]:
        waited = run["sync_exposed_s"]
        local, round_s = 4 * run["local_step_s"], 2 * 2 * 4 / run["samples_per_s"]
        # Ours are each the slowest rank's, and who is slow in one was fast in the other: they bear no sum.
        assert run["strategy"] == ours or round_s == pytest.approx(local + waited, rel=1e-6)
        assert run["waited_share"] == pytest.approx(waited / round_s, rel=1e-6)
        assert 0 < run["peak_train_bytes"] < run["baseline_bytes"]
        if run["strategy"] == theirs:
            assert run["package"].startswith("accelerate ") and run["sync_s"] is None
            assert (run["bytes_round"] is None) == (not linked)
        elif linked:  # parameters and nothing else, as ours were asked: the same bytes, with TCP's headers
            sent = next(r["bytes_round"] for r in raw["runs"] if r["strategy"] == theirs)
            assert 1 < sent / run["bytes_round"] < 1.4
    report = (tmp_path / "out" / "bench.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(tables.FIGURES) and all(line.count("|") == 7 for line in table)
    assert "did not run: no-such-package is not installed" in table[2] and "of no / use" in table[2]
    assert "Accelerator.prepare" in report and "**Did not run: no-such-package" in report


@ranks_needed
@pytest.mark.skipif(peers.lack("torchft_diloco") is not None, reason="torchft is not installed: extra bench")
def test_peers_of_torchft_run(tmp_path: Path) -> None:
    names = ["resist", "torchft_local_sgd", "torchft_diloco:fragments=2", "torchft_diloco"]
    options = ["--repeats=1", "--local_steps=4", f"--strategies={','.join(names)}"]
    linked = [] if root_needed.args[0] else ["--link=100mbit"]
    code, _, err = started_bench(tmp_path, *options, *linked).ended()
    assert (code, err) == (0, ""), err
    raw = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert raw["failed"] == {} and [run["strategy"] for run in raw["runs"]] == names
    assert all(run["samples_per_s"] > 0 for run in raw["runs"])


def test_a_net_is_cut_into_fragments_of_about_one_size() -> None:
    pytest.importorskip("torchft", reason="torchft is not installed: extra bench")
    from torch import nn

    from tools.benchmark.peers.torchft_diloco import cut

    net = nn.Sequential(*[nn.Linear(9, 9) for _ in range(8)])
    assert cut(net, 1) == [net]
    for number in (2, 3, 4, 8):
        parts = cut(net, number)
        found = [parameter for part in parts for parameter in part.parameters()]
        assert len(parts) == number and list(map(id, found)) == list(map(id, net.parameters()))
        assert {len(list(part.children())) for part in parts} <= {8 // number, -(-8 // number)}


def _different(comm: Comm) -> str:
    import torch

    from tools.benchmark.peers.common import check_same

    net = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(net.weight, 1)
    torch.nn.init.constant_(net.bias, 1)
    check_same(comm, net)
    torch.nn.init.constant_(net.bias, 1 + comm.rank * 1e-6)
    try:
        check_same(comm, net)
    except RunError as error:
        return str(error)
    return "nothing"


def _asked_whether_they_agree() -> None:
    said = ranks.run(_different, 2)
    assert said == ["its ranks hold different parameters after a synchronisation: it did not take place"] * 2


@ranks_needed
def test_a_peer_that_has_not_synchronised_is_found_out(tmp_path: Path) -> None:
    code, _, err = Started(tmp_path, _asked_whether_they_agree).ended()
    assert code in (None, 0), err


# ------------------------------------------------------------------------------------------------------------
# Ranks and their network


def _meet(comm: Comm, deed: str) -> int:
    if comm.rank == comm.size - 1:
        if deed == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "hangs":
            time.sleep(PATIENCE)
        if deed == "has a defect":
            raise ZeroDivisionError("of no use")
        if deed == "refuses":
            raise UserError("type something else")
    comm.barrier()
    return comm.rank


def _errors_of_ranks() -> None:
    assert ranks.run(_meet, 2, "returns") == [0, 1]
    for deed, kind, said in (
        ("dies", RunError, "rank 1 died with exit code -9"),
        ("hangs", RunError, "rank 0, 1 of 2 did not return in time and was killed"),
        ("has a defect", RunError, "rank 1 failed with ZeroDivisionError: of no use"),
        ("refuses", UserError, "type something else"),
    ):
        try:
            ranks.run(_meet, 2, deed, timeout=1.5 if deed == "hangs" else PATIENCE)
        except RunError as error:
            assert type(error) is kind and str(error) == said, error
        else:
            raise AssertionError(deed)
        assert not ranks._CONTEXT.active_children()


@ranks_needed
def test_what_happens_to_a_rank_is_one_line(tmp_path: Path) -> None:
    code, _, err = Started(tmp_path, _errors_of_ranks).ended()
    assert code in (None, 0), err


def _stopped_in_a_fork() -> None:
    """A signal that comes in a fork's callbacks, which drop what its handler raises."""
    signal.signal(signal.SIGTERM, lambda *_: ranks.stop(Stopped("stopped", signal.SIGTERM)))
    os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        ranks.run(_meet, 2, "hangs")
    except Stopped:
        assert not ranks._CONTEXT.active_children()
    else:
        raise AssertionError("it went on")


@ranks_needed
def test_a_signal_in_a_fork_is_not_lost(tmp_path: Path) -> None:
    code, _, err = Started(tmp_path, _stopped_in_a_fork).ended()
    assert code in (None, 0) and not err, err


def _look(comm: Comm, size: int) -> dict[str, Any]:
    """What a rank sees of its network, and the seconds that `size` bytes take each way."""
    import torch

    addresses = json.loads(subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True).stdout)
    sent, received = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    comm.barrier()
    before, start = link.bytes_sent() or 0, time.perf_counter()
    comm.exchange([(sent, 1 - comm.rank)], [(received, 1 - comm.rank)], "test")
    seconds = time.perf_counter() - start
    comm.barrier()  # what this rank sent has left its queue, too
    return {
        "namespace": os.readlink("/proc/self/ns/net"),
        "addresses": {
            a["ifname"]: [i["local"] for i in a["addr_info"] if i["family"] == "inet"] for a in addresses
        },
        "seconds": seconds,
        "wire": (link.bytes_sent() or 0) - before,
        "arrived": int(received.max()) == 0,
    }


def _rates(out: str) -> None:
    found: dict[str, Any] = {}
    for text in ("50mbit", "400mbit"):
        with link.Link(2, link.rate(text)) as network:
            found[text] = {
                "identities": network.identities,
                "addresses": network.addresses,
                "ranks": ranks.run(_look, 2, 2_000_000, network=network),
            }
    Path(out).write_text(json.dumps(found))


@ranks_needed
@root_needed
def test_a_link_is_as_slow_as_asked(tmp_path: Path) -> None:
    code, _, err = Started(tmp_path, _rates, str(tmp_path / "found")).ended()
    assert code in (None, 0), err
    for text, found in json.loads((tmp_path / "found").read_text()).items():
        assert [rank["namespace"] for rank in found["ranks"]] == found["identities"][1:]
        assert len({*found["identities"], os.readlink("/proc/self/ns/net")}) == 4
        for rank, seen in enumerate(found["ranks"]):
            assert seen["addresses"] == {"lo": ["127.0.0.1"], "eth0": [found["addresses"][rank]]}
            least = 8 * (2_000_000 - link.BURST) / link.rate(text)
            assert least <= seen["seconds"], text
            assert seen["arrived"] and 1 < seen["wire"] / 2_000_000 < 1.1
    times = {text: min(s["seconds"] for s in found["ranks"]) for text, found in
             json.loads((tmp_path / "found").read_text()).items()}  # fmt: skip
    assert times["50mbit"] > 2 * times["400mbit"]


@ranks_needed
@root_needed
def test_the_link_of_a_comparison_was_measured(compared: SimpleNamespace) -> None:
    found = compared.raw["link"]
    assert found["bits_per_s"] == 100_000_000 and len(set(found["namespaces"])) == 2
    assert all(10 < rate < 101 for rate in found["mbit_per_s"])
    for run in compared.raw["runs"]:  # what the ledger counts did go by the link, and little else
        assert 1 < run["bytes_wire"] / run["bytes_total"] < 1.5
    assert "100 Mbit/s each way; measured" in compared.out


# ------------------------------------------------------------------------------------------------------------
# Nothing is left


def holders(namespaces: set[str]) -> list[str]:
    """Whatever keeps one of these network namespaces: processes in it, open descriptors, mounts."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [process / "ns" / "net", *(process / "fd").iterdir()]
            found += [str(path) for path in links if os.readlink(path) in namespaces]
            mounts = (process / "mountinfo").read_text()
            found += [f"{process}/mountinfo {name}" for name in namespaces if name in mounts]
        except OSError:  # it has just ended
            continue
    return found


def session(leader: int) -> list[int]:
    """Processes of a session, zombies aside."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(of) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def ranks_of(process: Started) -> dict[str, int]:
    """{network: rank} of the bench's ranks, once there are two."""
    deadline = time.monotonic() + PATIENCE
    here = os.readlink("/proc/self/ns/net")
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()  # ip and tc have another
    while time.monotonic() < deadline:
        there: dict[str, int] = {}
        for pid in set(session(process.pid)) - {process.pid}:
            with suppress(OSError):  # it has just ended
                forked = Path(f"/proc/{pid}/cmdline").read_bytes() == command
                there |= {os.readlink(f"/proc/{pid}/ns/net"): pid} if forked else {}
        there.pop(here, None)
        if len(there) == 2:
            return there
        time.sleep(0.01)
    pytest.fail(f"no ranks in namespaces: {process.said('stderr')}")


def interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@ranks_needed
@root_needed
@pytest.mark.parametrize(
    ("number", "whole_group", "code", "said"),
    [
        (signal.SIGINT, True, 130, "stopped by SIGINT; all ranks are ended\n"),  # as a terminal's Ctrl-C
        (signal.SIGTERM, False, 143, "stopped by SIGTERM; all ranks are ended\n"),
        (signal.SIGKILL, False, -9, ""),
        (None, False, 1, "died with exit code -9"),  # a rank is killed
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL", "a rank dies"],
)
def test_nothing_is_left(
    number: signal.Signals | None, whole_group: bool, code: int, said: str, tmp_path: Path
) -> None:
    before = interfaces(), sorted(os.listdir("/run/netns")) if Path("/run/netns").exists() else []
    process = started_bench(tmp_path, "--strategies=resist,ddp", "--repeats=9", "--link=1gbit")
    there = ranks_of(process)
    namespaces = set(there)
    assert holders(namespaces)
    assert before[0] == interfaces()
    if number is None:
        os.kill(min(there.values()), signal.SIGKILL)
    elif whole_group:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    ended, _, err = process.ended()
    assert ended == code and said in err and err.count("\n") == (1 if said else 0), err
    deadline = time.monotonic() + (5 if number == signal.SIGKILL else 1)
    while (session(process.pid) or holders(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session(process.pid) and not holders(namespaces)
    after = interfaces(), sorted(os.listdir("/run/netns")) if Path("/run/netns").exists() else []
    assert after == before


# ------------------------------------------------------------------------------------------------------------
# Wrong calls


@pytest.fixture
def handlers() -> Iterator[None]:
    """The tool's signal handlers are not for the tests."""
    before = {number: signal.getsignal(number) for number in ranks.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--strategies resist,nonsense --workers 2", "--strategies names 'nonsense': type some of resist"),
        (
            "--strategies ddp --workers 4 --ranks 2",
            "--strategies ddp has one worker per rank: type --ranks 4",
        ),
        ("--strategies stochastic_depth --workers 2", "--strategies stochastic_depth has one worker"),
        ("--strategies resist --workers 1", "--workers is 1: a comparison needs 2 or more"),
        ("--strategies resist --workers 4 --ranks 1", "--ranks is 1: a comparison needs 2 or more"),
        ("--strategies resist --workers 2 --ranks 3", "--ranks 3 is more than --workers 2"),
        ("--strategies resist --workers 2,4", "--workers of a comparison is one number"),
        ("--strategies resist", "--workers of a comparison is one number"),
        ("--strategies resist --workers two", "--workers is 'two': type a whole number"),
        ("--strategies resist,resist --workers 2", "--strategies names one twice"),
        ("--strategies resist:wire --workers 2", "--strategies resist:wire: --wire needs a value"),
        ("--strategies ddp,resist:wier=2 --workers 2", "--strategies resist:wier=2: unknown option --wier"),
        ("--strategies resist:lr=fast --workers 2", "--strategies resist:lr=fast: --lr is 'fast'"),
        ("--strategies resist:overlap_steps=50 --workers 2", "--strategies resist:overlap_steps=50: --over"),
        ("--strategies ddp:wire=compact --workers 2", "--strategies ddp:wire=compact: --wire is for"),
        ("--strategies resist:seed=1 --workers 2", "--strategies resist:seed=1: --seed is not for one of"),
        ("--strategies resist:keep=2 --workers 2", "--strategies resist:keep=2: --keep is not for one of"),
        ("--strategies resist:lr=1:lr=2 --workers 2", "--strategies resist:lr=1:lr=2: it names an option"),
        ("--strategies resist: --workers 2", "--strategies resist:: unknown option --"),
        ("--strategies torchft_diloco --workers 2", "--strategies names peers alone"),
        ("--strategies resist,torchft_diloco --workers 2 --dtype float64", "--dtype is not for torchft_dil"),
        (
            "--strategies accelerate_local_sgd --workers 4 --ranks 2",
            "--strategies accelerate_local_sgd has one worker per rank",
        ),
        *(
            (
                f"--strategies resist,torchft_diloco:{wrong} --workers 2",
                f"--strategies torchft_diloco:{wrong}: {said}",
            )
            for wrong, said in (
                ("fragments=3", "fragments is 3: type a divisor of --local_steps 50"),
                ("fragments=two", "fragments is 'two': type a whole number"),
                ("use_bucketization=2", "use_bucketization is '2': type true or false"),
                ("fragment_sync_delay=50", "fragment_sync_delay is 50: type a number from 0 to 49"),
                ("fragment_update_alpha=2", "fragment_update_alpha is 2.0: type a number from 0 to 1"),
                ("wire=compact", "'wire' is no option of it: type some of outer_lr"),
                ("lr=x", "--lr is 'x'"),
            )
        ),
        ("--strategies resist --workers 2 --link fast", "--link is 'fast': type a rate"),
        ("--strategies resist --workers 2 --link 0gbit", "--link is '0gbit': type a rate"),
        ("--strategies resist --workers 2 --link 1gbit", "--link needs root"),
        ("--strategies resist --workers 2 --repeats 0", "--repeats is 0: type a number above 0"),
        ("--strategies resist --workers 2 --repeats x", "argument --repeats: invalid int value: 'x'"),
        ("--strategies resist --workers 2 --rounds null", "--rounds is null"),
        ("--strategies resist --workers 2 --dataset digits", "--dataset is not for the benchmarks"),
        ("--strategies resist --workers 2 --strategy ddp", "--strategy is not for the benchmarks"),
        ("--strategies resist --workers 2 --batch_sise 4", "unknown option --batch_sise"),
        ("--strategies resist --workers 2 --what local", "--what is not for a comparison"),
        ("--what nonsense", "--what is 'nonsense': type some of local,sync,save,data,step"),
        ("--what local --data_dir photos", "--data_dir is for --what data"),
        ("--modes eager", "--modes is for --what step"),
        ("--what step --modes fast", "--modes names 'fast': type some of eager,compiled,graphed"),
        ("--strategies resist --workers 2 --data_dir photos", "--data_dir is for --what data"),
        ("--link 1gbit", "--link is for a comparison"),
    ],
)
def test_wrong_calls_are_one_line(
    options: str,
    line: str,
    handlers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert bench.main(options.split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {line}") and said.err.count("\n") == 1 and said.out == ""


@ranks_needed
def test_every_way_to_a_batch_stands_beside_the_local_step(tmp_path: Path) -> None:
    photos.make_photos(tmp_path / "photos", 4, (40, 30))
    options = ("--what=data", "--repeats=2", "--steps=3", f"--data_dir={tmp_path / 'photos'}")
    code, out, err = started_bench(tmp_path, *options).ended()
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "out" / "machinery.json").read_text())["data W=2"]
    ways = [
        f"image folder, {processes}, {decoded}"
        for processes in ("0 processes", "1 process")
        for decoded in ("decoded whole", "as small as seen")
    ]
    assert {"local step", "in memory, on the host", *ways} <= found["times"].keys()
    assert found["first"].keys() == found["times"].keys() - {"local step"}
    step = statistics.median(found["times"]["local step"])
    for name, first in found["first"].items():
        seconds = found["times"][name]
        assert all(0 < a <= b for a, b in zip(first, seconds, strict=True)) and len(seconds) == 2
        line = next(line for line in out.splitlines() if line.strip().startswith(name))
        rate, ratio = re.search(r" ([\d.]+) \[.* ([\d.]+) × the step's", line).groups()  # type: ignore[union-attr]
        assert float(rate) == pytest.approx(3 * 2 / statistics.median(seconds), abs=0.051)
        assert float(ratio) == pytest.approx(step / statistics.median(seconds), abs=0.0051)


@ranks_needed
def test_images_a_second_of_a_step_stand_beside_a_bare_loop(tmp_path: Path) -> None:
    code, out, err = started_bench(tmp_path, "--what=step", "--repeats=2", "--steps=3").ended()
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "out" / "machinery.json").read_text())["step W=2"]
    assert found.keys() == {"sub-ResNet, eager", "full net, eager"}
    assert [each["slots"] for each in found.values()] == [4, 8]
    for name, each in found.items():
        net, mode = name.split(", ")
        line = next(line for line in out.splitlines() if f"{net}, K = {each['slots']}, {mode}" in line)
        ours = statistics.median(each["times"]["resist_ds"])
        rate, flops, share = re.search(r"eager +([\d.]+) .* ([\d.]+) TFLOP/s, (\d+) %", line).groups()  # type: ignore[union-attr]
        assert float(rate) == pytest.approx(3 * 2 / ours, abs=0.051)
        done = each["flops"] * 3 * 2 / ours
        assert float(flops) == pytest.approx(done / 1e12, abs=0.0051)
        assert int(share) == pytest.approx(100 * done / each["product"], abs=0.51)
    sub, full = (each["flops"] for each in found.values())
    assert 0.4 < sub / full < 0.7


def test_whole_is_every_pixel() -> None:
    assert images.Decode(8).cut(4000, 3000, 0, 0).reduction == 8
    assert photos.Whole(8).cut(4000, 3000, 0, 0).reduction == 1
    assert photos.Whole(224, seed=0).cut(4000, 3000, 0, 0).reduction == 1


@ranks_needed
def test_what_a_rank_refuses_is_one_line_too(tmp_path: Path) -> None:
    process = started_bench(tmp_path, "--strategies=resist,ddp", "--model=resnet9000")
    code, out, err = process.ended()
    assert code == 2 and out == ""
    assert err.startswith("error: unknown --model resnet9000") and err.count("\n") == 1, err
    assert not session(process.pid)


def test_a_mistake_is_answered_without_torch() -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "tools/bench.py",
        "--strategies",
        "nonsense",
        "--workers=2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "error: --strategies names 'nonsense'" in done.stderr
    assert " torch\n" not in done.stderr

"""tools/bench.py: figures come from the runs' records, links are slow, and nothing is left behind."""

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from resist_ds.comm import Comm
from resist_ds.data import images
from resist_ds.errors import RunError, Stopped, UserError
from tests import ROOT
from tests.conftest import _CONTEXT
from tools import bench
from tools.benchmark import link, photos, ranks, tables

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
        assert run["samples_per_s"] == pytest.approx(second["perf/samples_per_s"])
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
            if figure.key == "sync_s":  # ddp's is in its local step: no baseline has one
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

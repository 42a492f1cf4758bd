"""Trackers: one run per job, with all that metrics.jsonl has and nothing that is nobody's business."""

import contextlib
import getpass
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resist_ds.comm import Comm
from resist_ds.telemetry import records as telemetry
from resist_ds.telemetry import tracker
from tests import ROOT
from tests.conftest import Ranks
from tests.telemetry.test_records import OPTIONS, R, W, records, train
from tests.wandb_server import Server, serving

pytestmark = pytest.mark.ranks

KEY = "0123456789abcdef" * 2 + "01234567"  # of the form of a key for wandb
AXES = {"global_step", "samples_seen", "round", "perf/wall_s", "comm/bytes_total"}
PICTURES = {"accuracy", "memory", "blocks"}  # those of tools/plot.py


def alone(place: Path, **variables: str) -> dict[str, str]:
    """Variables for a machine with no login and no key; the empty ones are to be removed."""
    for name in ("home", "cwd"):
        (place / name).mkdir(exist_ok=True)
    theirs = {n: "" for n in os.environ if n.startswith("WANDB_") or n.lower() in ("netrc", "no_proxy")}
    return theirs | {"HOME": str(place / "home")} | variables


def train_in(
    comm: Comm,
    options: dict[str, Any],
    variables: dict[str, str],
    start: float = 20,
    close: float = 30,
    pictures: bool = False,
) -> str:
    """A run in that environment; returns what this rank printed, warnings included.

    Args:
        pictures: whether to draw them, which takes longer than the run.
    """
    if not pictures:
        telemetry.Telemetry._pictures = lambda self: {}  # type: ignore[method-assign]
    for name, value in variables.items():
        os.environ[name] = value
        if not value:
            del os.environ[name]
    os.chdir(Path(variables["HOME"]).parent / "cwd")
    tracker.START, tracker.CLOSE = start, close
    with contextlib.redirect_stderr(io.StringIO()) as warned:
        return train(comm, options) + warned.getvalue()


def sync(folder: Path, place: Path, server: Server) -> None:
    """`wandb sync`, as a user types it, with the server for wandb's."""
    command = [
        str(Path(sys.executable).with_name("wandb")),
        "sync",
        *map(str, (folder / "wandb").glob("*run-*")),
    ]
    variables = os.environ | alone(place, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
    environment = {name: value for name, value in variables.items() if value}
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Finished syncing" in done.stderr, done.stderr


def same_figures(rows: list[dict[str, Any]], folder: Path) -> None:
    """The server has every record of metrics.jsonl, each with all axes."""
    figures = [row for row in rows if not any(name.startswith("plots/") for name in row)]
    written = [record for record in records(folder) if record["kind"] != "summary"]
    assert len(figures) == len(written)
    for row, record in zip(figures, written, strict=True):
        del record["kind"]
        assert set(record) >= AXES
        assert {name: row[name] for name in record} == pytest.approx(record)


def nothing_private(server: Server, place: Path) -> None:
    """Neither path, host, user nor key is in what the server was sent (`wandb sync` says where wandb is)."""
    told = b"\n".join(body for path, body in server.received if "/otel/" not in path)
    told = told.replace(str(Path(sys.executable).with_name("wandb")).encode(), b"")
    paths = (str(place), str(ROOT), os.path.expanduser("~") + "/")
    for private in (*paths, KEY, f'"{getpass.getuser()}"', f'"{socket.gethostname()}"'):
        assert private.encode() not in told, private
    assert not server.run().get("host")


def test_wandb_is_one_offline_run_of_rank_0(ranks: Ranks, tmp_path: Path) -> None:
    """`wandb sync` accepts it; it has all figures, options and pictures, and no path, host or user."""
    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "wandb", "run_name": "tiny", "output_dir": str(folder)}
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        proxies = {name: url for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")}
        printed = ranks(train_in, R, options, alone(tmp_path, WANDB_BASE_URL=url, **proxies), 20, 30, True)
        nobody.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has called
            nobody.accept()
    assert "warning" not in printed[0]
    (offline,) = (folder / "wandb").glob("*run-*")
    assert offline.name.startswith("offline-run-")
    assert not [*(tmp_path / "cwd").iterdir()]
    assert {path.name for path in (tmp_path / "home").iterdir()} <= {".cache", ".config"}  # wandb's own logs

    with serving() as server:
        sync(folder, tmp_path, server)
    (identity,) = server.history()
    same_figures(server.history()[identity], folder)
    run = server.run()
    assert (run["displayName"], run["groupName"]) == ("tiny", "preact_resnet_small synthetic")
    assert run["jobType"] == "resist" and run["tags"] == ["resist", f"W={W}", f"R={R}", "K=3"]
    settings = records(folder)[-1]["settings"]
    config = {name: entry["value"] for name, entry in json.loads(run["config"]).items()}
    assert {name: config[name] for name in settings} == settings
    assert config["output_dir"] == "…/run" and set(config["versions"]) > {"torch", "deepspeed", "python"}
    assert config["git_commit"] is None or len(config["git_commit"]) >= 40
    metrics = config["_wandb"]["m"]
    (others,) = (metric for metric in metrics if metric.get("2") == "*")
    assert metrics[others["5"] - 1]["1"] == "global_step"  # what everything else is drawn over
    assert {metric.get("1") for metric in metrics} >= AXES
    best = max(record["eval/accuracy"] for record in records(folder) if record["kind"] == "eval")
    assert server.summary()["eval/best_accuracy"] == best
    drawn = {Path(name).name.split("_")[0] for name in server.files() if name.endswith(".png")}
    assert drawn == PICTURES

    nothing_private(server, tmp_path)


def test_a_job_is_one_run_however_often_it_is_resumed(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "wandb", "output_dir": str(folder), "rounds": 1}
    ranks(train_in, 1, options, alone(tmp_path))
    ranks(train_in, 1, options | {"rounds": 2, "resume": "auto", "override": "rounds"}, alone(tmp_path))
    first, second = sorted(path.name for path in (folder / "wandb").glob("*run-*"))
    assert (
        first.rpartition("-")[2] == second.rpartition("-")[2] == (folder / "tracker_run").read_text().strip()
    )
    # The clock goes on too: from where the checkpoint was begun, and its own record comes when it is done.
    wall = [record["perf/wall_s"] for record in records(folder) if record["kind"] != "checkpoint"]
    assert wall == sorted(wall)

    ranks(train_in, 1, options, alone(tmp_path))  # another job in the same folder
    assert len({path.name.rpartition("-")[2] for path in (folder / "wandb").glob("*run-*")}) == 2


def test_what_a_sweep_has_decided_is_kept(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"log_with": "wandb", "output_dir": str(tmp_path / "run"), "rounds": 1}
    given = {
        "WANDB_RUN_ID": "trial7",
        "WANDB_RUN_GROUP": "ours",
        "WANDB_TAGS": "a,b",
        "WANDB_JOB_TYPE": "search",
    }
    ranks(train_in, 1, options, alone(tmp_path, **given, WANDB_MODE="offline"))
    with serving() as server:
        sync(tmp_path / "run", tmp_path, server)
    run = server.run()
    assert run["name"] == "trial7"
    assert (run["groupName"], run["tags"], run["jobType"]) == ("ours", ["a", "b"], "search")


def test_an_online_run_reaches_the_server(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "wandb", "wandb_project": "mine", "output_dir": str(folder)}
    with serving() as server:
        environment = alone(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        (printed,) = ranks(train_in, 1, options, environment)
    assert f"wandb: {server.url}/somebody/" in printed and "warning" not in printed
    (rows,) = server.history().values()
    same_figures(rows, folder)
    run = server.run()
    assert server.asked("UpsertBucket")[0]["project"] == "mine"
    assert run["program"] == "train.py"
    nothing_private(server, tmp_path)
    assert KEY not in "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("server_that", ["hangs", "refuses", "has no key"])
def test_a_server_that_does_not_answer_neither_stops_nor_slows_training(
    server_that: str, ranks: Ranks, tmp_path: Path
) -> None:
    """The run goes on offline, and what it wrote can be synchronised later."""
    folder, patience = tmp_path / "run", 8.0 if server_that == "hangs" else 20.0
    options = OPTIONS | {"log_with": "wandb", "wandb_project": "mine", "output_dir": str(folder)}
    with serving() as server:
        server.silent = server_that == "hangs"
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        url = f"http://127.0.0.1:{port}" if server_that == "refuses" else server.url
        key = {} if server_that == "has no key" else {"WANDB_API_KEY": KEY}
        (printed,) = ranks(train_in, 1, options, alone(tmp_path, WANDB_BASE_URL=url, **key), patience)
    assert printed.count("warning: wandb is offline (") == 1 and printed.count("warning:") == 1
    assert ("there is no key, type wandb login" in printed) == (server_that == "has no key")
    assert "global model: " in printed
    assert bool(server.received) == (server_that == "hangs")
    assert list((folder / "wandb").glob("*run-*/*.wandb"))
    if server_that != "hangs":
        return
    # It was still being waited for when training was done; the other two come to the same folder.
    assert records(folder)[-1]["perf/wall_s"] < patience
    with serving() as later:
        sync(folder, tmp_path, later)
    (rows,) = (rows for rows in later.history().values() if rows)
    same_figures(rows, folder)


def test_a_server_that_hangs_at_the_end_delays_no_more_than_the_limit(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "wandb", "wandb_project": "mine", "output_dir": str(folder)}
    with serving() as server:
        answer = server.answer

        def until_it_has_begun(request: dict[str, Any]) -> dict[str, Any]:
            server.silent = request.get("operationName") == "UpsertBucket"
            return answer(request)

        server.answer = until_it_has_begun  # type: ignore[method-assign]
        environment = alone(tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY=KEY)
        begun = time.monotonic()
        (printed,) = ranks(train_in, 1, options, environment, 20, 3)
        assert time.monotonic() - begun < 40  # else it waits for wandb, which waits for ever
    assert f"warning: wandb has not taken everything after 3 s; {folder}/metrics.jsonl has it all" in printed
    assert records(folder)[-1]["kind"] == "summary"


def test_tensorboard_has_the_figures_at_their_steps(ranks: Ranks, tmp_path: Path) -> None:
    """Those of the run that goes on too, once each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "tensorboard", "output_dir": str(folder), "rounds": 2}
    (printed,) = ranks(train_in, 1, options, alone(tmp_path), 20, 30, True)
    again = {"rounds": 3, "resume": "auto", "override": "rounds"}
    (printed_again,) = ranks(train_in, 1, options | again, alone(tmp_path))
    assert "warning" not in printed + printed_again
    events = EventAccumulator(str(folder / "resist_ds"))
    events.Reload()
    written = records(folder)
    for name in ("train/loss", "eval/accuracy", "perf/samples_per_s", "comm/bytes_total"):
        expected = [(r["global_step"], r[name]) for r in written if name in r and r["kind"] != "summary"]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in expected], name
    assert set(events.Tags()["images"]) == {f"plots/{name}" for name in PICTURES}
    hyperparameters = next(folder.rglob("hparams.yml")).read_text()
    assert "local_steps: 2" in hyperparameters and str(tmp_path) not in hyperparameters


def test_trackio_has_the_figures_at_their_steps(ranks: Ranks, tmp_path: Path) -> None:
    import sqlite3

    folder = tmp_path / "run"
    options = OPTIONS | {"log_with": "trackio", "output_dir": str(folder), "run_name": "tiny"}
    (printed,) = ranks(
        train_in, 1, options, alone(tmp_path, TRACKIO_DIR=str(tmp_path / "trackio")), 20, 30, True
    )
    assert "warning" not in printed
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "resist_ds.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"tiny-{(folder / 'tracker_run').read_text().strip()}"}
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    figures = [(step, metrics) for step, metrics in logged if "global_step" in metrics]
    written = [record for record in records(folder) if record["kind"] != "summary"]
    assert [step for step, _ in figures] == [record["global_step"] for record in written]
    for (_, metrics), record in zip(figures, written, strict=True):
        del record["kind"]
        assert {name: metrics[name] for name in record} == record
    assert {name for _, metrics in logged for name in metrics} >= {f"plots/{name}" for name in PICTURES}


class _Tracker:
    """A tracker that fails at one of its calls."""

    name = "wandb"

    def __init__(self, fails_at: str):
        self.fails_at = fails_at
        self.tracker = SimpleNamespace(define_metric=lambda *a, **k: None)

    def log(self, *args: Any, **kwargs: Any) -> None:
        self._call("log")

    def log_images(self, *args: Any, **kwargs: Any) -> None:
        self._call("log_images")

    def finish(self) -> None:
        self._call("finish")

    def _call(self, what: str) -> None:
        if what == self.fails_at:
            raise ConnectionError("the line is dead")


def train_with_failing_tracker(comm: Comm, options: dict[str, Any], fails_at: str) -> str:
    """On rank 0, where trackers live, one fails."""

    def init(self: Any, *args: Any, **kwargs: Any) -> _Tracker:
        if fails_at == "init":
            raise ConnectionError("the line is dead")
        return _Tracker(fails_at)

    tracker.Tracker._init = init  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()) as warned:
        return train(comm, options) + warned.getvalue()


@pytest.mark.parametrize("fails_at", ["init", "log", "log_images", "finish"])
def test_a_tracker_that_fails_does_not_stop_the_run(fails_at: str, ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"log_with": "wandb", "output_dir": str(tmp_path)}
    printed = ranks(train_with_failing_tracker, R, options, fails_at)
    assert printed[0].count("warning: wandb ") == 1
    assert "the line is dead" in printed[0]
    assert "global model: " in printed[0]
    kinds = ["round", "round", "eval", "round", "eval", "checkpoint", "summary"]
    assert [r["kind"] for r in records(tmp_path)] == kinds

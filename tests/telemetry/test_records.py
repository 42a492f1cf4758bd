"""What a run tells: metrics.jsonl, one tracker run per job, the first lines and the closing table."""

import contextlib
import io
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from resist_ds.comm import Comm
from resist_ds.data.order import Position
from resist_ds.engines.local import Tally
from resist_ds.forecast import plan
from resist_ds.memory import GIB
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.telemetry import report
from resist_ds.telemetry.meter import Figures, round_metrics
from resist_ds.telemetry.records import Telemetry
from resist_ds.trainer import Trainer
from tests.conftest import Ranks, run_ranks

pytestmark = pytest.mark.ranks

W, R, K, P = 3, 2, 3, 8
BATCH, STEPS = 8, 2

OPTIONS: dict[str, Any] = {
    "dataset": "synthetic",
    "img_size": 8,
    "workers": W,
    "batch_size": BATCH,
    "local_steps": STEPS,
    "rounds": 3,
    "schedule": "cosine",
    "eval_every": 2,
    "calibration_samples": 32,
    "cpu_threads": 1,
    "log_with": "none",
    "progress": False,
}

# What the documentation promises, by the kind of line.
POSITION = {
    *("kind", "round", "global_step", "samples_seen", "perf/wall_s", "comm/bytes_total"),
    *("lr", "mem/params_held", "mem/params_full"),
}
MEMORY = {"mem/peak_gib", "mem/peak_gib/rank0", "mem/peak_gib/rank1"}
TRAIN = {
    "train/loss",
    "train/accuracy",
    "perf/samples_per_s",
    "perf/local_s",
    "perf/sync_s",
    "perf/sync_exposed_s",
}
EVAL = {"eval/loss", "eval/accuracy", "eval/best_accuracy", "perf/eval_s", "comm/bytes_eval"}
BYTES = {"comm/bytes_round"}
# What comes on top: the peak of each phase, what torch has reserved on a GPU, and the summary's own.
EXTRA_ROUND = {"mem/local_gib", "mem/sync_gib", "mem/reserved_gib"}
SAVE = {"perf/save_s", "save/bytes", "mem/save_gib"}
EXTRA_EVAL = {"mem/eval_gib", "mem/reserved_gib"}
KEYS = {
    "round": POSITION | MEMORY | TRAIN | BYTES | EXTRA_ROUND,
    "eval": POSITION | MEMORY | EVAL | EXTRA_EVAL,
}
KEYS["checkpoint"] = POSITION | MEMORY | SAVE | {"mem/reserved_gib"}
KEYS["summary"] = KEYS["round"] | KEYS["eval"] | SAVE | {"settings"}


def train(comm: Comm, options: dict[str, Any]) -> str:
    """A run; returns what this rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Trainer(comm, Config(**options)).run()
    return printed.getvalue()


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, which must be JSON to the letter (Python's own reader lets NaN pass)."""

    def reject(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=reject) for line in lines]


class Run:
    """A finished run on two ranks, with a line of each kind more than once."""

    def __init__(self, folder: Path, store: Path):
        self.folder = folder
        self.printed = run_ranks(train, R, OPTIONS | {"output_dir": str(folder)}, store=store)
        self.records = records(folder)
        self.rounds = [r for r in self.records if r["kind"] == "round"]
        self.evals = [r for r in self.records if r["kind"] == "eval"]
        self.summary = self.records[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(
        tmp_path_factory.mktemp("runs") / "made" / "for me", tmp_path_factory.mktemp("store") / "store"
    )


# ------------------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_one_line_per_round_evaluation_and_run(run: Run) -> None:
    kinds = [(r["kind"], r["round"]) for r in run.records]
    rounds = [("round", 1), ("round", 2), ("eval", 2), ("round", 3), ("eval", 3)]
    assert kinds == [*rounds, ("checkpoint", 3), ("summary", 3)]


@pytest.mark.parametrize("kind", KEYS)
def test_the_keys_are_the_documented_ones(kind: str, run: Run) -> None:
    for record in run.records:
        if record["kind"] == kind:
            assert set(record) == KEYS[kind]


def test_positions_follow_from_the_options(run: Run) -> None:
    for record in run.records:
        assert record["global_step"] == record["round"] * STEPS
        assert record["samples_seen"] == record["round"] * STEPS * W * BATCH
    last_steps = (1, 3, 5)  # of 6: the lr is that of a round's last step
    cosine = [0.01 * (1 + math.cos(math.pi * step / 6)) / 2 for step in last_steps]
    assert [r["lr"] for r in run.rounds] == pytest.approx(cosine)


def test_bytes_add_up(run: Run) -> None:
    total = 0
    for record in (r for r in run.records if r["kind"] in ("round", "eval")):
        moved = record["comm/bytes_round" if record["kind"] == "round" else "comm/bytes_eval"]
        assert moved > 0
        total += moved
        assert record["comm/bytes_total"] == total
    assert run.summary["comm/bytes_total"] == total


def test_figures_of_training_are_means_over_the_images(run: Run) -> None:
    for record in run.rounds:
        assert 1.5 < record["train/loss"] < 4  # ln 10 = 2.3, hardly trained
        right = record["train/accuracy"] * STEPS * W * BATCH
        assert right == pytest.approx(round(right), abs=1e-9)
        busy = STEPS * W * BATCH / record["perf/samples_per_s"]  # of the slowest rank in both
        parts = record["perf/local_s"], record["perf/sync_exposed_s"]
        assert max(parts) < busy <= sum(parts) * (1 + 1e-9)
        assert min(record["perf/local_s"], record["perf/sync_s"]) > 0
    for record in run.evals:
        right = record["eval/accuracy"] * 512
        assert right == pytest.approx(round(right), abs=1e-9)
        assert 1.5 < record["eval/loss"] < 4
        assert record["perf/eval_s"] > 0


def test_peaks_are_of_the_largest_rank_and_phase(run: Run) -> None:
    names = [f"mem/{phase}_gib" for phase in ("local", "sync", "eval", "save")]
    for record in run.records:
        peaks = [record[f"mem/peak_gib/rank{rank}"] for rank in range(R)]
        phases = [record[name] for name in names if name in record]
        assert record["mem/peak_gib"] == max(peaks) == max(phases)
        assert min(peaks) > 0


def figures(tallies: dict[int, Tally], seconds: float, peak: int, **sent: int) -> Figures:
    return Figures(tallies, {"local": seconds, "sync": 1.0}, {"sync": peak}, {"sync": peak}, Counter(sent))


def test_the_figures_of_all_ranks_become_one_line() -> None:
    """Images are summed, the slowest rank counts, the largest peak counts, bytes are summed by kind."""
    one = figures({0: Tally(8.0, 2, 4, 1.0)}, 2.0, 3 * GIB, aggregate=5, hand_off=7, eval=1000)
    two = figures({1: Tally(1.0, 4, 4, 1.0), 2: Tally(3.0, 0, 4, 1.0)}, 3.0, GIB, aggregate=50)
    metrics = round_metrics([one, two])
    assert (metrics["train/loss"], metrics["train/accuracy"]) == (1.0, 0.5)
    assert (metrics["perf/local_s"], metrics["perf/sync_s"]) == (3.0, 1.0)
    assert metrics["perf/sync_exposed_s"] == 1.0  # none of it ran behind local steps
    assert metrics["perf/samples_per_s"] == 12 / (3.0 + 1.0)
    two.seconds["exposed"] = one.seconds["exposed"] = 0.25
    hidden = round_metrics([one, two])
    assert (hidden["perf/sync_s"], hidden["perf/sync_exposed_s"]) == (1.0, 0.25)
    assert hidden["perf/samples_per_s"] == 12 / (3.0 + 0.25)
    assert metrics["comm/bytes_round"] == 5 + 7 + 50
    assert metrics["mem/peak_gib"] == metrics["mem/sync_gib"] == metrics["mem/peak_gib/rank0"] == 3
    assert metrics["mem/peak_gib/rank1"] == 1


def write_three_rounds(comm: Comm, options: dict[str, Any]) -> None:
    start = SimpleNamespace(state=None, here=False, position=Position())
    path = Path(options["output_dir"]) / "metrics.jsonl"
    with Telemetry(comm, Config(**options), 3, path, start) as opened:  # type: ignore[arg-type]
        opened.open({})
        for peak in (1, 5, 2):
            opened.round({}, [figures({0: Tally(1.0, 1, 1, 1.0)}, 1.0, peak * GIB)])
        opened.summary({})


def test_the_summary_has_the_peaks_of_the_whole_run(ranks: Ranks, tmp_path: Path) -> None:
    ranks(write_three_rounds, 1, OPTIONS | {"output_dir": str(tmp_path)})
    peaks = [(r["mem/peak_gib"], r["mem/sync_gib"], r["mem/peak_gib/rank0"]) for r in records(tmp_path)]
    assert peaks == [(1, 1, 1), (5, 5, 5), (2, 2, 2), (5, 5, 5)]


def test_the_summary_repeats_the_end_and_says_how_it_came_about(run: Run) -> None:
    last = {**run.rounds[-1], **run.evals[-1]}
    assert run.summary["perf/wall_s"] >= last["perf/wall_s"] > sum(r["perf/local_s"] for r in run.rounds)
    for name, value in last.items():
        if name not in ("kind", "perf/wall_s") and "_gib" not in name:
            assert run.summary[name] == value
    assert run.summary["eval/best_accuracy"] == max(r["eval/accuracy"] for r in run.evals)
    settings = run.summary["settings"]
    options = Config(**OPTIONS, output_dir=f"…/{run.folder.name}").to_dict()  # no path of this machine
    assert {name: settings[name] for name in options} == options
    assert {name: settings[name] for name in "WRKP"} == {"W": W, "R": R, "K": K, "P": P}
    assert (settings["total_rounds"], settings["device"]) == (3, "cpu")
    assert settings["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_parameters_held_of_a_known_model(ranks: Ranks, tmp_path: Path) -> None:
    """Counted on timm's own net: what is left of it without the blocks that the worker does not hold."""
    net = timm.create_model("resnetv2_34", num_classes=10, device="meta")
    full = sum(p.numel() for p in net.parameters())
    block = sum(p.numel() for p in net.stages[2].blocks[1].parameters())
    known = {"model": "resnetv2_34", "workers": 4, "rounds": 1, "local_steps": 1}  # P = 5, so K = 2
    ranks(train, 1, OPTIONS | known | {"output_dir": str(tmp_path)})
    for record in records(tmp_path):
        assert (record["mem/params_full"], record["mem/params_held"]) == (full, full - 3 * block)


def test_a_diverged_run_writes_json_all_the_same(ranks: Ranks, tmp_path: Path) -> None:
    ranks(train, 1, OPTIONS | {"lr": 1e30, "on_nan": "skip", "output_dir": str(tmp_path)})
    assert [r["train/loss"] for r in records(tmp_path) if r["kind"] == "round"] == [None] * 3


# ------------------------------------------------------------------------------------------------------------
# What stands on the terminal


def test_only_rank_0_speaks(run: Run) -> None:
    assert run.printed[0]
    assert run.printed[1] == ""


def test_the_first_lines_say_what_will_happen(run: Run) -> None:
    opening = run.printed[0].partition("\nworker ")[0]
    assert f"W = {W} workers on R = {R} ranks, each with K = {K} of {P} pool blocks" in opening
    assert "who plays whom: rank 0: workers 0–1; rank 1: worker 2" in opening
    assert "2,048 training and 512 test images, 10 classes, 8×8" in opening
    assert f"3 rounds of {STEPS} local steps × {BATCH} images per worker" in opening
    assert re.search(r"^device: .*1 CPU thread per rank, exchange over (gloo|nccl)$", opening, re.MULTILINE)


def test_the_closing_table_has_a_row_per_worker(run: Run) -> None:
    table = run.printed[0].partition("\nworker ")[2].splitlines()
    held, full = run.summary["mem/params_held"], run.summary["mem/params_full"]
    for worker, row in enumerate(table[2 : 2 + W]):
        words = row.split()
        rank = worker * R // W
        assert words[:2] == [str(worker), str(rank)]
        assert f"{K} of {P}" in row
        assert f"{held / 1e6:.2f} M of {full / 1e6:.2f} M ({100 * held / full:.0f} %)" in row
        peaks = [float(gib) for gib in re.findall(r"([\d.]+) GiB", row)]
        assert len(peaks) == 4 and int(words[-1]) > 0
        assert max(peaks) == round(run.summary[f"mem/peak_gib/rank{rank}"], 2)
    assert not table[2 + W].lstrip()[0].isdigit()


def test_the_closing_lines_state_accuracy_and_bytes(run: Run) -> None:
    closing = run.printed[0].partition("\nworker ")[2]
    accuracy, best = run.summary["eval/accuracy"], run.summary["eval/best_accuracy"]
    assert f"global model: {100 * accuracy:.2f} % test accuracy (best {100 * best:.2f} %)" in closing
    mean = sum(r["comm/bytes_round"] for r in run.rounds) / len(run.rounds)
    assert f"bytes a round (with momentum): {mean / 1e6:,.1f} MB measured between 2 ranks; " in closing
    each, waited = (
        sum(r[f"perf/{k}_s"] for r in run.rounds) / len(run.rounds) for k in ("sync", "sync_exposed")
    )
    assert f"; {each:.2f} s to synchronise, of which {waited:.2f} s in front of everybody" in closing
    planned = re.search(r"one worker per rank: ([\d.]+) MB, local SGD ([\d.]+) MB \((\d+) %\)", closing)
    assert planned is not None
    ours, local_sgd, share = map(float, planned.groups())
    # Local SGD with a ring all-reduce: each of W workers sends 2(W−1)/W of parameters and momentum.
    assert local_sgd == pytest.approx(2 * (W - 1) * run.summary["mem/params_full"] * 2 * 4 / 1e6, rel=0.03)
    assert share == pytest.approx(100 * ours / local_sgd, abs=1) and share < 100
    assert re.search(r"[\d.]+ GiB were in use before the run began", closing)
    assert f"checkpoint: {run.folder}/checkpoints/round-000003 (tools/export.py makes" in closing
    assert "on top" not in closing and "dropped" not in closing


def test_optional_copies_and_dropped_rounds_are_reported(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"on_nan": "skip", "checkpoint_async": True, "lr": 1e30, "workers": 2, "rounds": 2}
    (printed, _) = ranks(train, 2, options | {"output_dir": str(tmp_path)})
    full, held = 226_258, 154_522  # parameters: K = 4 of 8
    copies = dict(re.findall(r"in host memory: ([\d.]+) MB per rank for --(\w+)", printed))
    by_option = {option: float(megabytes) for megabytes, option in copies.items()}
    assert by_option["on_nan"] == pytest.approx(8 * held / 1e6, abs=0.1)
    assert by_option["checkpoint_async"] == pytest.approx(8 * full / 2 / 1e6, abs=0.15)
    assert "dropped for NaN or Inf: 4 rounds of a worker" in printed


def opening(comm: Comm, options: dict[str, Any], images_on: str = "cpu") -> str:
    report.expected = plan.expected  # see tests/warm.py
    trainer = Trainer(comm, Config(**options))
    data = trainer.data.placed(torch.device(images_on), 1024)
    facts = (trainer.config, comm, trainer.net.layout, trainer.net.blueprint, data, trainer.timetable)
    behind = sum(trainer._steps_behind(round) > 0 for round in range(trainer.rounds))
    return report.opening(report.Job(*facts, behind), trainer.net.deal, trainer.start)


@pytest.mark.parametrize("strategy", ["resist", "local_sgd", "ddp", "fsdp", "zero2"])
def test_the_first_lines_predict_memory_and_bytes(strategy: str, ranks: Ranks, tmp_path: Path) -> None:
    """As tools/plan.py does, on whose figures tests/forecast/test_plan.py is strict."""
    options = OPTIONS | {"output_dir": str(tmp_path), "workers": 2, "strategy": strategy}
    (text, silent) = ranks(opening, 2, options)
    assert "predicted" not in silent  # only rank 0 takes the time
    peak, sent = re.search(r"^predicted: (\S+) MiB of .* (\S+) MB sent a round", text, re.M).groups()  # type: ignore[union-attr]
    config = Config(**options)
    question = plan.Question(Blueprint(config.model, 10), config, 8, (2,), 1e9, 1e9, device="cpu")
    expected = plan.Plan(question).predict(strategy, 2)
    assert float(peak) == pytest.approx(expected.peak / 2**20, abs=0.51)
    assert float(sent) == pytest.approx(expected.sent_round / 1e6, abs=0.051)


def test_the_first_lines_say_how_many_rounds_overlap(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"output_dir": str(tmp_path), "workers": 2, "rounds": 9, "eval_every": 4}
    options |= {"overlap_steps": 1, "warmup_rounds": 2, "checkpoint_every": 5}
    (text, _) = ranks(opening, 2, options)  # not behind rounds 2 (K), 4 and 8, 5, 9
    assert "\nshared is exchanged behind the last 1 local step of 4 of 9 rounds: " in text


def test_images_on_a_gpu_are_part_of_its_memory(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"output_dir": str(tmp_path), "img_size": 32}
    ((here,), (there,)) = (ranks(opening, 1, options, images_on) for images_on in ("cpu", "meta"))
    size = 2560 * (3 * 32 * 32 + 8)
    assert f"32×32; {size / 1e6:.1f} MB of images stay on the GPU (--gpu_cache_mib)" in there
    peaks = [int(re.search(r"^predicted: (\d+) MiB", text, re.M)[1]) for text in (here, there)]  # type: ignore[index]
    assert peaks[1] - peaks[0] == pytest.approx(size / 2**20, abs=1) and "GPU" not in here.splitlines()[1]


def test_warm_up_rounds_count_in_the_predicted_memory(ranks: Ranks, tmp_path: Path) -> None:
    peaks = []
    for rounds in (0, 1):
        options = OPTIONS | {
            "output_dir": str(tmp_path),
            "workers": 4,
            "img_size": 32,
            "warmup_rounds": rounds,
        }
        (text,) = ranks(opening, 1, options)
        peaks.append(int(re.search(r"^predicted: (\d+) MiB", text, re.M)[1]))  # type: ignore[index]
    assert peaks[1] > peaks[0]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("runs/mine", "runs/mine"),
        ("/data/photos", "…/photos"),
        ("~/photos", "…/photos"),
        ("~", "…"),
        ("~somebody", "…"),
        (str(Path.home()), "…"),
        ("../..", "…"),
        (f"../{Path.home().name}", "…"),
        ("../photos", "…/photos"),
        ("caf\udce9", "caf?"),  # a byte that is no text
        (3, 3),
        (None, None),
    ],
)
def test_what_others_may_see_of_an_option(typed: Any, told: Any) -> None:
    assert report._shareable(typed) == told


def opening_without_prediction(comm: Comm, options: dict[str, Any]) -> str:
    plan.expected = lambda *args: 1 / 0  # type: ignore[assignment]
    return opening(comm, options)


def test_a_prediction_that_fails_ends_no_run(ranks: Ranks, tmp_path: Path) -> None:
    (text,) = ranks(opening_without_prediction, 1, OPTIONS | {"output_dir": str(tmp_path)})
    assert "predicted: nothing, this net's step cannot be counted (ZeroDivisionError)" in text


def test_a_pool_too_small_to_partition_is_announced(ranks: Ranks, tmp_path: Path) -> None:
    place = {"output_dir": str(tmp_path)}
    (text,) = ranks(opening, 1, OPTIONS | place | {"model": "resnetv2_18", "workers": 2})
    assert "W = 2 workers on R = 1 rank, each with K = 1 of 1 pool blocks: 100 % of the parameters" in text
    assert "note: every worker holds the whole pool of 1, so nothing is partitioned (local SGD)" in text
    (text,) = ranks(opening, 1, OPTIONS | place)
    assert "note:" not in text


# ------------------------------------------------------------------------------------------------------------
# Trackers


def test_without_a_tracker_there_is_only_the_file(run: Run) -> None:
    left = sorted(path.name for path in run.folder.iterdir())
    assert left == ["checkpoints", "metrics.jsonl", "run.json", "run.lock"]  # nobody has released it here


def threads_beside_accelerate(comm: Comm, options: dict[str, Any]) -> int:
    """Its state, which a tracker needs, counts cores where OMP_NUM_THREADS says nothing."""
    os.environ.pop("OMP_NUM_THREADS", None)  # as deepspeed and python leave it
    trainer = Trainer(comm, Config(**options))
    before = dict(os.environ)
    with Telemetry(comm, trainer.config, 1, trainer.folder.metrics, trainer.start) as opened:
        opened.open({})
    assert dict(os.environ) == before
    return torch.get_num_threads()


def test_accelerate_leaves_the_threads_as_they_were_set(ranks: Ranks, tmp_path: Path) -> None:
    options = OPTIONS | {"cpu_threads": 3, "output_dir": str(tmp_path), "log_with": "tensorboard"}
    assert ranks(threads_beside_accelerate, 2, options) == [3, 3]


def test_rounds_that_grow_are_announced_with_their_mean(ranks: Ranks, tmp_path: Path) -> None:
    (text,) = ranks(opening, 1, OPTIONS | {"output_dir": str(tmp_path), "local_steps_max": 9})
    # ⌊2 / rate²⌋ at 1, 3/4 and 1/4 of the peak
    assert "\n3 rounds of 2 to 9 local steps, 4.7 in the mean, × 8 images per worker\n" in text

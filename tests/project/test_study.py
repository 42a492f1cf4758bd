"""tools/study.py: what it runs next, what it records, and that its tables say what the records say."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resist_ds.errors import UserError
from tests import ROOT
from tools.accuracy import arms, costs, records, tables
from tools.accuracy.due import Design, Trial, due
from tools.accuracy.records import Record
from tools.study import STUDY

TOOL = ROOT / "tools" / "study.py"
DATA = "50,000 and 10,000 images of 10 classes"


# ------------------------------------------------------------------------------------------------------------
# Arms


def test_an_arm_is_a_strategy_and_its_options() -> None:
    ours, ddp, alone, depth = arms.read_all(
        "resist:workers=8:local_steps=20,ddp:batch_size=32,ddp:workers=1,stochastic_depth", STUDY, pool=22
    )
    assert ours.options == {"workers": "8", "local_steps": "20", "strategy": "resist"} and ours.workers == 8
    whole = {"batch_size": "128", "accumulation_steps": "4", "workers": "1", "strategy": "ddp"}
    assert ddp.options == whole and ddp.workers == 4  # of four workers, in one
    assert alone.options == {"workers": "1", "strategy": "ddp"} and alone.workers == 1
    assert depth.options == {"workers": "1", "min_blocks": "6", "strategy": "stochastic_depth"}
    assert (ours.lr, arms.read("resist:lr=0.3", STUDY, 22).lr) == (None, 0.3)


def test_the_whole_study_has_every_arm_once() -> None:
    found = arms.read_all(arms.whole_study(), STUDY, pool=22)
    assert len(found) == len({arm.name for arm in found}) == 3 * (4 * 3 + 1) + 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resits", "'resits': type some of resist, local_sgd, stochastic_depth, ddp"),
        ("zero1", "'zero1'"),
        ("resist:wire", "'wire' is no option=value"),
        ("resist:seed=3", "'seed=3' is no option=value"),
        ("resist:wire=exact:wire=compact", "'wire=compact' is no"),
        ("resist:workers=no", "its workers is no"),
        ("ddp:batch_size=x", "its batch_size is x"),
        ("resist:overlap_steps=5", "--overlap_steps is 5: type less than --local_steps 5"),
        ("resist:wire=loose", "resist:wire=loose: --wire"),
        ("resist,resist", "names resist twice"),
    ],
)
def test_a_wrong_arm_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        arms.read_all(text, STUDY, pool=22)
    assert says in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# What is due


def design(names: str, **changes: object) -> Design:
    found = Design(STUDY, DATA, arms.read_all(names, STUDY, pool=22), (0.1, 0.2, 0.4), (5.0, 10.0), (0, 1))
    return replace(found, **changes)  # type: ignore[arg-type]


def ended(trial: Trial, accuracy: float | None) -> Record:
    options = records.telling({**STUDY, **trial.arm.options, "lr": str(trial.lr)})
    facts = {"K": 6, "P": 22, "rounds": 10, "steps": 50, "workers": trial.arm.workers, "images": 12800}
    place = trial.lr, trial.passes, trial.seed
    return Record(trial.arm.name, options, records.telling(STUDY), DATA, *place, accuracy, 1.0, facts)


def play(design: Design, accuracy: dict[float, float]) -> list[tuple[str, float, float, int]]:
    """Every run that a study makes, one after the other, where accuracy depends on the rate alone."""
    done: list[Record] = []
    while left := due(design, done):
        done.append(ended(left[0], accuracy[left[0].lr]))
    return [(record.arm, record.lr, record.passes, record.seed) for record in done]


def test_the_best_rate_has_all_seeds_and_lengths() -> None:
    made = play(design("resist,ddp"), {0.1: 0.5, 0.2: 0.6, 0.4: 0.5})
    grid = [(arm, lr, 5.0, 0) for arm in ("resist", "ddp") for lr in (0.1, 0.2, 0.4)]
    assert made[:6] == grid
    rest = [(5.0, 1), (10.0, 0), (10.0, 1)]  # all arms with a seed before the next one
    assert made[6:] == [(arm, 0.2, *what) for what in rest for arm in ("resist", "ddp")]


@pytest.mark.parametrize(
    ("accuracy", "beyond"),
    [
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.7, 0.8: 0.6}, [0.8]),
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.7, 0.8: 0.8, 1.6: 0.9}, [0.8, 1.6]),  # and no further
        ({0.1: 0.7, 0.2: 0.6, 0.4: 0.5, 0.05: 0.6}, [0.05]),
        ({0.1: 0.5, 0.2: 0.6, 0.4: 0.6}, []),  # of equal ones the lower
    ],
)
def test_a_grid_moves_where_its_end_is_best(accuracy: dict[float, float], beyond: list[float]) -> None:
    made = play(design("resist", seeds=(0,), lengths=(5.0,)), accuracy)
    assert [lr for _, lr, *_ in made] == [0.1, 0.2, 0.4, *beyond]


def test_a_rate_that_meets_nan_is_never_best() -> None:
    asked = design("resist", seeds=(0,), lengths=(5.0,))
    grid = due(asked, [])
    done = [ended(trial, value) for trial, value in zip(grid, (0.1, 0.2, None), strict=True)]
    assert due(asked, done) == []
    (runs,) = tables.grouped(done).values()
    assert tables.chosen(runs)[0].any.lr == 0.2


def test_two_names_of_a_run_are_one_run() -> None:
    asked = design("resist,resist:workers=4", seeds=(0,), lengths=(5.0,))
    assert [(t.arm.name, t.lr) for t in due(asked, [])] == [("resist", lr) for lr in (0.1, 0.2, 0.4)]


def test_what_is_typed_for_all_is_not_for_every_strategy() -> None:
    study = {**STUDY, "wire": "compact", "min_blocks": "8", "accumulation_steps": "2"}
    ours, local, ddp = arms.read_all("resist,local_sgd,ddp", study, pool=22)
    assert ours.options == {"strategy": "resist"}
    assert local.options == {"strategy": "local_sgd", "min_blocks": "0"}
    assert (ddp.options["wire"], ddp.options["accumulation_steps"]) == ("exact", "8")


def test_a_fixed_rate_needs_no_grid_and_shares_its_runs() -> None:
    asked = design("resist:lr=0.2", lengths=(5.0,))
    assert [(t.lr, t.seed) for t in due(asked, [])] == [(0.2, 0), (0.2, 1)]
    done = [ended(trial, 0.5) for trial in due(design("resist"), [])]
    assert [(t.lr, t.seed) for t in due(asked, done)] == [(0.2, 1)]  # seed 0 was of the grid


# ------------------------------------------------------------------------------------------------------------
# Records, tables


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    written = [ended(trial, 0.25) for trial in due(design("resist"), [])]
    for record in written:
        records.append(path, record)
    assert records.load(path) == written
    records.append(path, replace(written[0], accuracy=0.5))  # of another machine, say: the first one counts
    assert records.load(path) == written
    with path.open("a") as file:
        file.write('{"arm": "resist"')
    with pytest.raises(UserError, match="line 5, is no record"):
        records.load(path)


def test_a_folder_and_a_number_of_threads_make_no_other_run() -> None:
    (trial, *_) = due(design("resist"), [])
    one = replace(ended(trial, 0.5), options={**STUDY, **trial.arm.options, "data_dir": "here"})
    other = replace(one, options={**one.options, "data_dir": "there", "cpu_threads": "2", "lr": "0.1"})
    assert one.key == other.key == trial.key(design("resist"))
    assert one.key not in (replace(one, seed=1).key, replace(one, data="others").key)


def measured(arm: str, accuracies: dict[float, list[float]], **facts: int) -> list[Record]:
    """Runs of an arm by their passes, at rate 0.2."""
    (found,) = arms.read_all(arm, STUDY, pool=22)
    return [
        replace(record, facts={**record.facts, **facts})
        for passes, values in accuracies.items()
        for seed, value in enumerate(values)
        for record in [ended(Trial(found, 0.2, passes, seed), value)]
    ]


def test_tables_have_means_deviations_and_bounds() -> None:
    done = measured("resist", {5.0: [0.60, 0.62], 10.0: [0.70, 0.70]})
    done += measured("ddp", {5.0: [0.64], 20.0: [0.72]}, K=22)
    images = tables.equal_images(done, lambda record: 0.5)
    assert images[2:] == [
        "| `ddp` | 0.2 | 22 of 22 | 0.50 | 64.00 (1) | – | 72.00 (1) |",
        "| `resist` | 0.2 | 6 of 22 | 0.50 | 61.00 ± 1.41 (2) | 70.00 ± 0.00 (2) | – |",
    ]
    measures = [("images", lambda r: r.passes), ("time", lambda r: r.passes * (r.arm == "ddp" or 0.25))]
    (ddp, resist) = tables.equal_cost(done, measures, 10.0)[2:]
    assert resist == "| `resist` | 70.0 | 70.0 |"
    assert ddp == "| `ddp` | 68.0 | ≤ 64.0 |"  # half way between 5 and 20 in the logarithm; 2.5 is below 5
    assert tables.rates(done)[2:] == ["| `resist` | 61.00 ± 1.41 (2) |", "| `ddp` | 64.00 (1) |"]


def test_accuracy_at_a_cost() -> None:
    points = [(4.0, 70.0), (1.0, 60.0)]
    assert [tables.accuracy_at(points, cost) for cost in (0.5, 1, 2, 4, 5)] == [
        (60.0, "≤ "),
        (60.0, ""),
        (pytest.approx(65.0), ""),
        (70.0, ""),
        (70.0, "≥ "),
    ]


def test_costs_are_those_of_the_net_that_the_narrow_one_stands_for() -> None:
    (ours,), (ddp,) = measured("resist", {5.0: [0.6]}), measured("ddp", {5.0: [0.6]}, K=22, workers=4)
    assert 0.4 < costs.share(ours) < 0.6 and costs.share(ddp) == 1
    fast, slow = costs.Device(1e13, 1e15), costs.Device(1e13, 125e6)
    # 33 blocks of two 3×3 convolutions, all of 64² · 32² products; both passes take three times the first.
    forwards = 33 * 2 * 9 * 64**2 * 32**2
    assert costs.seconds(ddp, fast) == pytest.approx(50 * 64 * 3 * forwards / 1e13, rel=0.05)
    assert costs.seconds(ours, fast) / costs.seconds(ddp, fast) == pytest.approx(costs.share(ours), rel=0.1)
    # 992 MB a step and 928 a round, by four links (RESULTS).
    assert costs.seconds(ddp, slow) == pytest.approx(50 * 992.4 / 4 / 125, rel=0.01)
    extra = costs.seconds(ours, slow) - costs.seconds(ours, fast)
    assert extra == pytest.approx(10 * 928 / 4 / 125, rel=0.02)
    hidden = replace(ours, options={**ours.options, "overlap_steps": "1"})
    step = costs.seconds(ours, fast) / 50
    assert costs.seconds(hidden, slow) == pytest.approx(costs.seconds(ours, slow) - 10 * step)
    many = replace(ours, options={**ours.options, "overlap_steps": "4000", "local_steps": "4001"})
    shown = costs.seconds(many, slow) - costs.seconds(ours, fast)  # blocks, in front of everybody
    assert shown == pytest.approx(0.2 * extra, rel=0.03)


# ------------------------------------------------------------------------------------------------------------
# The tool


def study(*options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, options)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of noise, 16 training images and 4 to test with."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 2)):
        for kind in ("a", "b"):
            folder = tmp_path / "images" / part / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                    folder / f"{i}.png"
                )
    return tmp_path / "images"


@pytest.mark.timeout(240)
def test_a_study_goes_on_and_reports_its_runs(images: Path, tmp_path: Path) -> None:
    small = "--model=preact_resnet_small --img_size=8 --batch_size=4 --local_steps=1 --calibration_samples=16"
    place = ("--data_dir", images, "--output_dir", tmp_path / "study", "--jobs", 2, "--workers=2")
    what = (*place, *small.split(), "--rates=1e-3", "--passes=1", "--seeds=3")
    first = study(*what, "--arms=resist,stochastic_depth:lr=1e30", "--picture", tmp_path / "p" / "study.png")
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "p" / "study.png").stat().st_size > 10_000
    found = {record.arm: record for record in records.load(tmp_path / "study" / "records.jsonl")}
    assert found["stochastic_depth:lr=1e30"].accuracy is None
    ours = found["resist"]
    (folder,) = (tmp_path / "study").glob("resist-lr0.001-passes1-seed3-*[0-9a-f]")
    summary = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert ours.accuracy == summary["eval/accuracy"] and ours.facts["K"] == 4 and ours.seed == 3
    assert (summary["settings"]["workers"], summary["settings"]["lr"]) == (2, 1e-3)
    shown = f"{100 * summary['eval/accuracy']:.2f}"
    assert f"{folder.name}: {shown} %" in first.stdout
    row = f"| `resist` | 0.001 | 4 of 8 | {costs.share(ours):.2f} | {shown} (1) |"
    assert row in first.stdout
    assert re.search(r"^stochastic_depth-lr=1e30-lr1e\+30-passes1-seed3-\w+: NaN$", first.stdout, re.M)

    two = study("--report", "--records", tmp_path / "study" / "records.jsonl", "--only", 2)
    assert two.returncode == 2 and "--only is 2: " in two.stderr and "holds studies 1 to 1" in two.stderr

    again = study(
        *what, "--arms=resist,resist:workers=2", "--only", 1
    )  # nothing is missing, by whatever name
    assert again.returncode == 0 and "seed3-" not in again.stdout and row in again.stdout


def differs(record: Record) -> set[str]:
    """Options in which a run differs from others of its study, beside rate, length, seed and strategy."""
    own = {name for name, value in record.options.items() if record.study.get(name) != value}
    return own - {*records.VARIED, "strategy"}


def test_published_figures_are_those_of_the_published_records() -> None:
    found = records.load(ROOT / "docs" / "study.jsonl")
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    table = text.partition("## The compact wire: time and accuracy")[2].partition("\n## ")[0]
    nets = ("preact_resnet_small", "preact_resnet101_narrow")
    rows = [row for row in table.splitlines() if row.startswith(("| exact", "| `--wire", "| compact"))]
    assert len(rows) == 4
    for row in rows:
        what, *cells = (cell.strip() for cell in row.strip("| ").split("|"))
        wire, overlap = "exact" if "exact" in what else "compact", "2" if "overlap" in what else "0"
        for net, cell in zip(nets, cells, strict=True):
            runs = [
                record
                for record in found
                if (record.options["model"], record.lr, record.passes) == (net, 0.4, 5)
                and record.options["strategy"] == "resist"
                and differs(record) <= {"wire", "overlap_steps"}
                and ("mixed_precision" in record.options) == net.endswith("narrow")
                and record.options.get("wire", "exact") == wire
                and record.options.get("overlap_steps", "0") == overlap
            ]
            assert cell == (tables.Runs(tuple(runs)).cell.removesuffix(" (3)") if runs else "–"), row


def test_the_published_report_and_picture_are_those_of_the_published_records() -> None:
    """`python tools/study.py --report --records docs/study.jsonl --picture FILE`, as docs/study.md says."""
    done = study("--report", "--records", ROOT / "docs" / "study.jsonl")
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert done.returncode == 0 and text.partition("\n### ")[2] == done.stdout.partition("### ")[2]
    found = records.by_study(records.load(ROOT / "docs" / "study.jsonl"))
    (narrow,) = [
        runs for name, runs in found.items() if "101_narrow" in name and "mixed_precision" not in name
    ]
    with Image.open(ROOT / "docs" / "accuracy.png") as picture:
        assert picture.info["Description"] == records.fingerprint(narrow)

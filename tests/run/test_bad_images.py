"""A run that meets what it cannot read: its round is completed and saved; skips are reproducible."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from resist_ds.comm import Comm
from resist_ds.data import images
from resist_ds.data.loader import load
from resist_ds.data.order import Order
from resist_ds.data.trouble import TOLD, Hearing, News
from resist_ds.errors import DataError
from tests.conftest import Ranks
from tests.run.test_errors import TINY, Outcome, image_folder, outcome
from tests.run.test_first_hour import call

RUN: dict[str, Any] = TINY | {
    "dataset": "imagefolder",
    "img_size": 72,
    "workers": 2,
    "batch_size": 4,
    "rounds": 3,
    "local_steps": 2,
    "eval_every": 0,
    "calibration_samples": 8,
    "checkpoint_every": 0,
}
ORDER = Order(seed=0, samples=48, workers=2, batch_size=4)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[Path]]:
    """48 training images, and 8 to test."""
    return image_folder(tmp_path / "data", train=48, test=8)


def due(round: int, worker: int) -> int:
    """A sample that a worker meets in its second step of a round (the first is 1), and nobody before."""
    sample = int(ORDER.batch(2 * round - 1, worker)[1][2])
    assert sample not in [s for step in range(2 * round - 1) for w in (0, 1) for s in ORDER.batch(step, w)[1]]
    return sample


def tensors(checkpoint: Path) -> dict[str, np.ndarray]:
    """All that a checkpoint holds, however many ranks have written it."""
    return {
        name: values for file in checkpoint.glob("*.safetensors") for name, values in load_file(file).items()
    }


def assert_same(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys() != set()
    for name, values in a.items():
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def said(outcomes: list[Outcome]) -> str:
    """What the first rank said, and nobody else."""
    assert [o.stderr for o in outcomes[1:]] == [""] * (len(outcomes) - 1)
    return outcomes[0].stderr


@pytest.mark.ranks
def test_a_bad_image_costs_no_round_and_skips_are_the_same_on_any_ranks(
    ranks: Ranks, data: dict[str, list[Path]], tmp_path: Path
) -> None:
    """Met in round 2 by worker 1, with another in the same round, and one of the test set at the end."""
    bad = [data["train"][due(2, 1)], data["train"][due(2, 0)]]
    content = [path.read_bytes() for path in bad]
    for path in (*bad, data["val"][5]):
        path.write_bytes(path.read_bytes()[:4000])
    options = RUN | {"data_dir": str(tmp_path / "data")}
    skip = options | {"on_bad_image": "skip", "checkpoint_every": 1, "keep": 9}
    first = str(min(bad))
    records = []
    for size in (1, 2):
        run, other = tmp_path / f"stop{size}", tmp_path / f"skip{size}"
        outcomes = ranks(outcome, size, tmp_path, options | {"output_dir": str(run)})
        line = said(outcomes)
        assert [o.code for o in outcomes] == [1] * size
        assert (
            line.startswith(f"error: cannot read the image {first}: ")
            and " (and 1 more). Replace it, " in line
        )
        assert line.endswith("; --resume auto goes on from there\n") and line.count("\n") == 1
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["round-000002"]

        outcomes = ranks(outcome, size, tmp_path, skip | {"output_dir": str(other)})
        told = said(outcomes).splitlines()
        assert [o.code for o in outcomes] == [0] * size
        assert [line.split(": ")[1] for line in told] == [
            f"cannot read the image {path}" for path in (*sorted(bad), data["val"][5])
        ]
        assert all(
            line.startswith("warning: ") and line.endswith("its neighbour stands in for it") for line in told
        )
        assert "could not be read: 3 images; neighbours stood in\n" in (tmp_path / "stdout0").read_text()
        lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
        assert [line["data/unreadable"] for line in lines if line["kind"] == "round"] == [0, 2, 2]
        records.append([line.get("eval/loss") for line in lines])
        assert_same(run / "checkpoints/round-000002", other / "checkpoints/round-000002")
    assert records[0] == records[1]
    for round in (2, 3):
        assert_same(*(tmp_path / f"skip{n}/checkpoints/round-{round:06}" for n in (1, 2)))

    for path, sound in zip(bad, content, strict=True):  # the user mends two of the three
        path.write_bytes(sound)
    again = options | {"output_dir": str(tmp_path / "stop2"), "resume": "auto"}
    line = said(outcomes := ranks(outcome, 2, tmp_path, again))
    assert [o.code for o in outcomes] == [1, 1] and f"cannot read the image {data['val'][5]}: " in line
    assert (tmp_path / "stop2" / "checkpoints" / "round-000003").is_dir()


@pytest.mark.ranks
def test_ranks_in_lockstep_complete_the_round_too(
    ranks: Ranks, data: dict[str, list[Path]], tmp_path: Path
) -> None:
    bad = data["train"][due(2, 1)]
    bad.write_bytes(b"")
    options = RUN | {"data_dir": str(tmp_path / "data"), "strategy": "ddp", "workers": None}
    outcomes = ranks(outcome, 2, tmp_path, options | {"output_dir": str(tmp_path / "run")})
    assert said(outcomes).startswith(f"error: cannot read the image {bad}: ")
    assert [o.code for o in outcomes] == [1, 1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["round-000002"]


def without_loaders(comm: Comm, folder: Path, options: dict[str, Any]) -> Outcome:
    """A run whose rank 1 loses its loader processes at its third batch."""

    def broken(read: Any, tasks: Any, processes: int, pin: bool, per_batch: int = 1) -> Any:
        for number, loaded in enumerate(load(read, tasks, 0, pin)):
            if processes and number == 2 and comm.rank == 1:
                raise DataError("a loader process ended (killed): try fewer --data_workers")
            yield loaded

    images.load = broken
    return outcome(comm, folder, options)


@pytest.mark.ranks
def test_a_loader_that_fails_ends_the_run_when_the_round_is_saved(
    ranks: Ranks, data: dict[str, list[Path]], tmp_path: Path
) -> None:
    options = RUN | {"data_dir": str(tmp_path / "data"), "data_workers": 1, "checkpoint_every": 1}
    outcomes = ranks(without_loaders, 2, tmp_path, options | {"output_dir": str(tmp_path / "run")})
    line = (
        "error: a loader process ended (killed): try fewer --data_workers; --resume auto goes on from there\n"
    )
    assert said(outcomes) == line
    assert [o.code for o in outcomes] == [1, 1]
    whole = ranks(outcome, 2, tmp_path, options | {"output_dir": str(tmp_path / "whole"), "data_workers": 0})
    assert [o.code for o in whole] == [0, 0]
    assert_same(*(tmp_path / name / "checkpoints" / "round-000002" for name in ("run", "whole")))
    assert not (tmp_path / "run" / "checkpoints" / "round-000003").exists()


def crowded(comm: Comm, folder: Path, options: dict[str, Any]) -> Outcome:
    """A run on a machine whose /dev/shm is small."""
    real = os.statvfs
    small = SimpleNamespace(f_bavail=2048, f_frsize=4096)
    os.statvfs = lambda path: small if path == "/dev/shm" else real(path)  # type: ignore[assignment,return-value]
    return outcome(comm, folder, options)


@pytest.mark.ranks
def test_shared_memory_that_is_too_small_is_said_before_anything_is_done(
    ranks: Ranks, data: dict[str, list[Path]], tmp_path: Path
) -> None:
    options = RUN | {"data_dir": str(tmp_path / "data"), "img_size": 224, "batch_size": 8, "data_workers": 1}
    outcomes = ranks(crowded, 2, tmp_path, options | {"output_dir": str(tmp_path / "run")})
    # Per rank four batches of 8 images, and at most one of 8 for calibration or one of 8 for the test.
    assert said(outcomes) == (
        "error: loader processes (1 per rank) need up to 13 MB of shared memory on this machine, and "
        "/dev/shm has 8 MB free: type --data_workers 0, or give it more (docker run --shm-size 25m)\n"
    )
    assert [o.code for o in outcomes] == [2, 2]


def test_what_all_ranks_make_of_what_they_hear() -> None:
    many = [News({f"{n:02}": f"line {n:02}" for n in range(start, 14, 2)}) for start in (0, 1)]
    hearing = Hearing("skip")
    told, ends = hearing.hear(many)
    assert (
        told[:TOLD] == [f"line {n:02}; its neighbour stands in for it" for n in range(TOLD)] and ends is None
    )
    assert told[TOLD:] == ["more than 10 images cannot be read: tools/check_data.py names all"]
    assert ends is None and hearing.hear(many) == ([], None) and hearing.images == 14
    assert hearing.hear([News({"x": "line x"}), News(loader="broken")]) == ([], "broken")
    assert Hearing("stop").hear([News(), News()]) == ([], None)
    told, ends = Hearing("stop").hear([News(loader="broken"), *many])
    assert told == [] and ends is not None and ends.startswith("line 00 (and 13 more). Replace it, ")


def test_check_data_names_what_a_run_would_meet(data: dict[str, list[Path]], tmp_path: Path) -> None:
    call_it = ["tools/check_data.py", str(tmp_path / "data")]
    assert call(call_it, tmp_path) == (
        0,
        "class      train        val\ncat           24          4\ndog           24          4\n"
        "all 56 images can be read\n",
        "",
    )
    data["train"][3].write_bytes(b"")
    data["val"][6].write_bytes(data["val"][6].read_bytes()[:4000])
    Image.new("RGB", (9, 9), (255, 255, 255)).save(data["train"][5])
    Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 40).save(data["train"][6])
    (tmp_path / "data" / "train" / "cat" / "x.gif").write_bytes(b"")
    code, stdout, stderr = call([*call_it, "--threads", "2"], tmp_path)
    lines = stdout.splitlines()
    assert (code, stderr) == (1, "")
    for line, path in zip(lines, (data["train"][3], data["val"][6]), strict=False):
        assert line.startswith(f"cannot read the image {path}: ")
    assert lines[2:] == [
        "class      train        val",
        "cat           23          4",
        "dog           24          3",
        "left out of train/: 1 .gif",
        f"1 of a single colour: {data['train'][5]}",
        f"1 almost black (no value above 15 of 255): {data['train'][6]}",
        "54 of 56 images can be read",
    ]

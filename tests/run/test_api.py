"""The Python API: a loop of one's own trains what train.py trains, and the README's lines run."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from resist_ds import ResIST, api
from resist_ds.comm import Comm
from resist_ds.errors import RunError, UserError
from resist_ds.options.config import Config
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.trainer import Trainer
from tests import ROOT, THREADS
from tests.conftest import Ranks
from tests.oracle import arrays

pytestmark = pytest.mark.ranks

W, STEPS, ROUNDS = 3, 2, 3
SHARED: dict[str, Any] = {
    "workers": W,
    "seed": 5,
    "lr": 0.05,
    "cpu_threads": THREADS,
    "calibration_samples": 40,
    "eval_batch_size": 64,
}
TRAIN: dict[str, Any] = {
    **SHARED,
    **{"model": "preact_resnet_small", "num_classes": 10, "dataset": "synthetic", "img_size": 8},
    **{"batch_size": 8, "local_steps": STEPS, "rounds": ROUNDS, "schedule": "constant", "eval_every": 0},
    **{"log_with": "none", "progress": False},
}


def as_train_py(comm: Comm, folder: str, wire: str) -> tuple[float, float, Any]:
    trainer = Trainer(comm, Config(**TRAIN, wire=wire, output_dir=folder))
    result = trainer.run()
    assert result is not None
    return result.loss, result.accuracy, arrays(trainer.workers.owned(trainer.net.deal))


def own_loop(comm: Comm, folder: str, stop: int = ROUNDS, **options: Any) -> tuple[Any, ...]:
    """The same run on the same batches by a loop of one's own; until round `stop`."""
    api.Comm = lambda: comm  # type: ignore[assignment,misc]
    batches_of = Trainer(comm, Config(**TRAIN, output_dir=f"{folder}-batches"))
    batches_of.folder.release()
    data = batches_of.data
    with ResIST("preact_resnet_small", num_classes=10, output_dir=folder, **SHARED, **options) as resist:
        comm.close = lambda: None  # type: ignore[method-assign]  # the caller does it
        for round in range(resist.round, stop):
            for worker in resist.workers():
                steps = range(round * STEPS, (round + 1) * STEPS)
                schedule = (batches_of.order.batch(step, worker.index) for step in steps)
                for x, y in data.train_batches(schedule, resist.device, torch.float32, False):
                    F.cross_entropy(worker.module(x), y).backward()
                    worker.optimizer.step()
                    worker.optimizer.zero_grad()
            resist.synchronise()
        every = np.arange(data.train_size)
        plain = data.train_images(every, resist.device, torch.float32, False)
        tests = [*data.test_batches([np.arange(data.test_size)], resist.device, torch.float32, False)]
        train = TensorDataset(plain, torch.zeros(len(plain)))
        loss, accuracy = resist.evaluate(TensorDataset(*tests[0]), train)
        saved = resist.save()
        net = resist._net
        return loss, accuracy, arrays(net.workers.owned(net.deal)), str(saved)


@pytest.mark.numerical
@pytest.mark.parametrize(("size", "wire"), [(1, "exact"), (2, "exact"), (2, "compact")])
def test_a_loop_of_ones_own_trains_what_train_py_trains(
    size: int, wire: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Bit for bit; also when it is stopped and resumed, and what it saves is a checkpoint like any other."""
    expected = ranks(as_train_py, size, str(tmp_path / "train"), wire)
    ranks(of_one_round, size, str(tmp_path / "own"), wire)
    found = ranks(resumed, size, str(tmp_path / "own"), wire)
    for (loss, accuracy, owned), (own_loss, own_accuracy, own_owned, _) in zip(expected, found, strict=True):
        assert (own_loss, own_accuracy) == (loss, accuracy)
        assert own_owned.keys() == owned.keys()
        for name, tensors in owned.items():
            for kind, values in tensors.items():
                assert np.array_equal(own_owned[name][kind], values), (name, kind)
    checkpoint = Checkpoint.verified(Path(found[0][3]))
    assert (checkpoint.state.round, checkpoint.state.workers) == (ROUNDS, W)
    checkpoint.close()


def of_one_round(comm: Comm, folder: str, wire: str) -> tuple[Any, ...]:
    return own_loop(comm, folder, 1, wire=wire)


def resumed(comm: Comm, folder: str, wire: str) -> tuple[Any, ...]:
    return own_loop(comm, folder, wire=wire, resume="auto")


def reset_by_train_py(comm: Comm, folder: str) -> Any:
    trainer = Trainer(comm, Config(**TRAIN, optimizer_state="reset", output_dir=folder))
    trainer.run()
    return arrays(trainer.workers.owned(trainer.net.deal))


def reset_by_own_loop(comm: Comm, folder: str) -> Any:
    return own_loop(comm, folder, optimizer_state="reset")[2]


def test_momentum_is_reset_where_train_py_resets_it(ranks: Ranks, tmp_path: Path) -> None:
    (expected,) = ranks(reset_by_train_py, 1, str(tmp_path / "train"))
    (found,) = ranks(reset_by_own_loop, 1, str(tmp_path / "own"))
    for name, tensors in expected.items():
        assert np.array_equal(found[name]["parameter"], tensors["parameter"]), name


def used_again(comm: Comm, folder: str) -> list[str]:
    """Three rounds, then a new job of one round in the same folder; what there is after each."""
    there = []
    for rounds in (3, 1):
        api.Comm = lambda: comm  # type: ignore[assignment,misc]
        comm.close = lambda: None  # type: ignore[method-assign]
        options: dict[str, Any] = {"num_classes": 10, "workers": 1, "cpu_threads": 1, "output_dir": folder}
        with ResIST("preact_resnet_small", **options) as resist:
            for _ in range(rounds):
                for _ in resist.workers():
                    pass
                resist.synchronise()
                saved = resist.save()
            assert saved.is_dir()
        there.append(str(sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())))
    return there


def test_a_new_job_in_a_used_folder_sets_the_old_checkpoints_aside(ranks: Ranks, tmp_path: Path) -> None:
    (there,) = ranks(used_again, 1, str(tmp_path))
    assert there == ["['round-000001', 'round-000002', 'round-000003']", "['round-000001']"]
    assert len([*(tmp_path / "earlier-1" / "checkpoints").iterdir()]) == 3


def spoilt(comm: Comm, folder: str) -> tuple[str, bool]:
    """A worker that meets Inf; and whether the folder is free after a wrong call."""
    api.Comm = lambda: comm  # type: ignore[assignment,misc]
    comm.close = lambda: None  # type: ignore[method-assign]
    kept = []  # as a notebook keeps the last error, and with it what was half made
    for _ in range(2):  # the second call would find the folder taken
        with pytest.raises(UserError, match="min_blocks 9 is more") as wrong:
            ResIST("preact_resnet_small", num_classes=10, output_dir=folder, min_blocks=9)
        kept.append(wrong)
    with (
        pytest.raises(RunError) as caught,
        ResIST("preact_resnet_small", num_classes=10, output_dir=folder, workers=2) as resist,
    ):
        for worker in resist.workers():
            if worker.index == 1:
                with torch.no_grad():
                    next(worker.module.parameters()).fill_(float("inf"))
        resist.synchronise()
    return str(caught.value), not (Path(folder) / "checkpoints").exists()


def test_inf_is_never_averaged(ranks: Ranks, tmp_path: Path) -> None:
    for said, nothing_saved in ranks(spoilt, 2, str(tmp_path)):
        assert said.startswith("worker 1 met NaN or Inf in round 1: nothing of it was averaged")
        assert nothing_saved


def readme(comm: Comm, folder: Path) -> tuple[float, str]:
    """The README's lines, with data of their own."""
    (source,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "import ResIST" in block
    )
    assert len(source.splitlines()) <= 16
    api.Comm = lambda: comm  # type: ignore[assignment,misc]
    comm.close = lambda: None  # type: ignore[method-assign]
    os.chdir(folder)
    images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 10
    samples = TensorDataset(images, labels)

    def batches(worker: int, round: int) -> Any:
        return [(images[worker::8], labels[worker::8])] * 2

    names: dict[str, Any] = {"F": F, "train": samples, "test": samples, "batches": batches}
    exec(
        compile(source.replace("range(resist.round, 100)", "range(resist.round, 2)"), "README.md", "exec"),
        names,
    )
    return names["accuracy"], str(sorted(p.name for p in folder.rglob("round-*")))


def test_the_lines_of_the_readme(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks(readme, 2, tmp_path)
    assert found[0] == found[1]
    assert 0 <= found[0][0] <= 1 and found[0][1] == "['round-000001', 'round-000002']"


def mistakes(comm: Comm, folder: str) -> list[str]:
    api.Comm = lambda: comm  # type: ignore[assignment,misc]
    said = []
    wrong: list[dict[str, Any]] = [{"epochs": 3}, {"strategy": "ddp"}, {"workers": 1}, {"min_blocks": 9}]
    for place, options in enumerate(wrong):
        with pytest.raises(UserError) as caught:
            ResIST("preact_resnet_small", num_classes=10, output_dir=f"{folder}/{place}", **options)
        said.append(str(caught.value))
    with (
        pytest.raises(RunError) as early,
        ResIST("preact_resnet_small", num_classes=10, output_dir=f"{folder}/early", workers=2) as resist,
    ):
        for _ in resist.workers():
            break
        resist.synchronise()
    return [*said, str(early.value)]


def test_mistakes_are_named_in_one_line(ranks: Ranks, tmp_path: Path) -> None:
    both = ranks(mistakes, 2, str(tmp_path))
    assert both[0] == both[1]
    option, strategy, workers, blocks, early = both[0]
    assert option.startswith("ResIST has no option epochs: its options are workers, ")
    assert strategy == "ResIST trains by strategy resist or local_sgd, not by ddp"
    assert workers.startswith("--workers 1 is less than the 2 ranks")
    assert blocks.startswith("--min_blocks 9 is more than preact_resnet_small has")
    assert early == "synchronise() before worker 0 had its turn: go through all of workers() first"

"""What a worker alone holds is in its checkpoint: rounding errors, and steps behind which an exchange ran."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resist_ds.comm import Comm
from resist_ds.errors import DamagedError
from resist_ds.options.config import Config
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.run_state import config_hash
from resist_ds.trainer import Trainer
from tests.conftest import Ranks, run_ranks
from tests.saved import OPTIONS, checkpoints, last, outcome, tensors, train
from tests.state.test_checkpoint import assert_same_run, resumed
from tests.state.test_damage import change, refused, seal

pytestmark = pytest.mark.ranks

BY_CLOCK = {"checkpoint_every": 0, "checkpoint_minutes": 0.0, "eval_every": 0}  # such rounds may overlap
BASE = {"workers": 3, "rounds": 4, "local_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "compact": {**BASE, "wire": "compact"},
    "overlap": {**BASE, **BY_CLOCK, "overlap_steps": 1},
    "both": {**BASE, **BY_CLOCK, "wire": "compact", "overlap_steps": 1, "optimizer": "adamw", "lr": 1e-3},
    "reset": {**BASE, **BY_CLOCK, "wire": "compact", "overlap_steps": 1, "optimizer_state": "reset"},
}
HELD = {
    "compact": ["error"],
    "overlap": ["shared"],
    "both": ["error", "shared"],
    "reset": ["error", "shared"],
}
INDEX = "workers.safetensors.index.json"
SHARDS = [f"workers-0000{rank}-of-00002.safetensors" for rank in (1, 2)]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs on two ranks, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def whole(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp("whole") / "run"
            run_ranks(train, 2, {**KINDS[kind], "output_dir": str(folder)}, store=folder.with_name("store"))
            assert len(checkpoints(folder)) == BASE["rounds"]
        return made[kind]

    return whole


def held(checkpoint: Path) -> dict[str, np.ndarray]:
    """What workers alone held, by a reader of its own."""
    files = checkpoint.glob("workers-*.safetensors")
    return {name: array for file in files for name, array in load_file(file).items()}


@pytest.mark.parametrize(
    ("kind", "at", "size"),
    [
        ("compact", 1, 3),
        ("compact", 3, 1),
        ("overlap", 2, 1),
        ("both", 1, 2),
        ("both", 2, 3),
        ("reset", 2, 1),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str, at: int, size: int, wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = resumed(ranks, size, wholes(kind), at, tmp_path / "run", **KINDS[kind])
    assert_same_run(folder, wholes(kind), at)


@pytest.mark.parametrize("kind", ["compact", "both"])
def test_written_in_the_background_it_is_the_same(
    kind: str, wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    ranks(train, 3, {**KINDS[kind], "checkpoint_async": True, "output_dir": str(tmp_path)})
    assert_same_run(tmp_path, wholes(kind), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there(kind: str, wholes: Callable[[str], Path]) -> None:
    for name in checkpoints(wholes(kind)):
        folder = wholes(kind) / "checkpoints" / name
        Checkpoint.verified(folder).close()
        found = held(folder)
        ends = name == checkpoints(wholes(kind))[-1]  # the last round ends with nothing on its way
        kinds = [k for k in HELD[kind] if not (ends and k == "shared")]
        assert found.keys() == {f"{worker}.{k}" for worker in range(3) for k in kinds}
        for k in kinds:
            first, *others = (found[f"{worker}.{k}"] for worker in range(3))
            assert first.dtype == np.float32 and first.any()
            assert not any(np.array_equal(first, other) for other in others)
            assert {array.shape for array in others} == {first.shape}
        if kinds:
            index = json.loads((folder / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
            assert index["weight_map"].keys() == found.keys()
        else:
            assert not list(folder.glob("workers*"))


def test_the_model_is_what_all_agreed_on(wholes: Callable[[str], Path]) -> None:
    """A checkpoint's first tensor of shared is no worker's own, but near what each has made of it."""
    folder = wholes("both") / "checkpoints" / "round-000002"
    weight = tensors(folder)["conv1.0.weight"].ravel()
    own = [held(folder)[f"{worker}.shared"] for worker in range(3)]
    found = [np.lib.stride_tricks.sliding_window_view(each, len(weight)) for each in own]
    near = [np.abs(windows - weight).max(1).min() for windows in found]
    assert all(0 < distance < 0.05 * np.abs(weight).max() for distance in near), near


def test_other_workers_start_without(wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path) -> None:
    folder = shutil.copytree(wholes("both"), tmp_path / "run")
    shutil.rmtree(last(folder))
    options = {**KINDS["both"], "workers": 2, "resume": "auto", "output_dir": str(folder)}
    first, second = ranks(outcome, 2, tmp_path, options)
    assert (first.code, second) == (0, (0, ""))
    assert first.stderr == (
        "warning: what each of the checkpoint's 3 workers held alone is dropped: its rounding errors and its "
        "last steps on shared\n"
    )
    assert held(last(folder)).keys() == {"0.error", "1.error"}


def test_another_wire_is_refused_unless_it_is_meant(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = shutil.copytree(wholes("compact"), tmp_path / "run")
    shutil.rmtree(last(folder))
    options = {**KINDS["compact"], "wire": "exact", "resume": "auto", "output_dir": str(folder)}
    (result,) = ranks(outcome, 1, tmp_path, options)
    assert result == (
        2,
        "error: the checkpoint's run had other options: --wire is exact and was compact; type the old ones, "
        "or --override wire\n",
    )
    (result,) = ranks(outcome, 1, tmp_path, {**options, "override": "wire"})
    assert result == (
        0,
        "warning: what each of the checkpoint's 3 workers held alone is dropped: its rounding errors\n",
    )
    assert not list(last(folder).glob("workers*"))
    more = {**KINDS["compact"], "rounds": 5, "override": "wire,rounds"}
    (result,) = ranks(outcome, 1, tmp_path, {**more, "resume": "auto", "output_dir": str(folder)})
    assert result == (0, "")  # errors of nothing begin at zero
    assert held(last(folder)).keys() == {"0.error", "1.error", "2.error"}


# ------------------------------------------------------------------------------------------------------------
# Of a team, whose lanes have it in parts.

TEAM: dict[str, dict[str, Any]] = {
    f"{way}, {kind}": {**KINDS[kind], "team_size": 2, "team_strategy": way}
    for way, kind in (("ddp", "both"), ("fsdp", "both"), ("fsdp", "reset"))
}


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs of two teams of two, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def whole(case: str) -> Path:
        if case not in made:
            folder = made[case] = tmp_path_factory.mktemp("team") / "run"
            run_ranks(train, 4, {**TEAM[case], "output_dir": str(folder)}, store=folder.with_name("store"))
            found = held(folder / "checkpoints" / "round-000002")
            kinds = HELD[case.split(", ")[1]]
            assert found.keys() == {f"{worker}.{kind}" for worker in range(3) for kind in kinds}
        return made[case]

    return whole


@pytest.mark.parametrize(
    ("case", "size"),  # in one team, or in two
    [("ddp, both", 2), ("ddp, both", 4), ("fsdp, both", 2), ("fsdp, reset", 4)],
)
def test_a_team_s_resumed_run_is_the_uninterrupted_one(
    case: str, size: int, teams: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = resumed(ranks, size, teams(case), 2, tmp_path / "run", **TEAM[case])
    assert_same_run(folder, teams(case), 2)


def taken_up(comm: Comm, options: dict[str, Any]) -> dict[str, np.ndarray]:
    """What this rank's workers hold alone as a resumed run begins, whole, on the first rank of each team."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    trainer.folder.release()
    net = trainer.net
    assert net.sync.differences is not None
    parts = {
        "error": net.sync.differences.error,
        "shared": net.overlap.shared_parts(trainer.workers.vectors),
    }
    return {
        f"{worker}.{kind}": values.numpy().copy()
        for kind, of in parts.items()
        for worker, values in net._alone.whole(kind, of).items()  # type: ignore[arg-type]
    }


@pytest.mark.parametrize(
    ("way", "number", "size", "other"),
    [
        ("ddp", 2, 1, "ddp"),
        ("fsdp", 1, 1, "ddp"),
        ("ddp", 3, 3, "fsdp"),  # rows that do not divide
        ("fsdp", 4, 2, "ddp"),
        ("ddp", 2, 2, "fsdp"),
    ],
)
def test_other_teams_take_up_what_workers_held_alone(
    way: str,
    number: int,
    size: int,
    other: str,
    teams: Callable[[str], Path],
    ranks: Ranks,
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(teams(f"{way}, both"), tmp_path / "run")
    for name in ("round-000003", "round-000004"):
        shutil.rmtree(folder / "checkpoints" / name)
    options = {**KINDS["both"], "batch_size": 12, "override": "batch_size", "resume": "auto"}
    options |= {"team_size": size, "team_strategy": other, "output_dir": str(folder)}
    found = [rank for rank in ranks(taken_up, number, options) if rank]
    assert len(found) == number // size
    state = {name: values for rank in found for name, values in rank.items()}
    wanted = held(last(folder))
    assert state.keys() == wanted.keys() == {f"{w}.{k}" for w in range(3) for k in ("error", "shared")}
    for name, values in state.items():
        np.testing.assert_array_equal(values.view(np.uint32), wanted[name].view(np.uint32), name)
        assert values.any()


def test_a_team_writes_what_one_rank_would(ranks: Ranks, tmp_path: Path) -> None:
    """Steps on shared behind an exchange, in float64: of teams, and of one rank in micro-batches."""
    options = {**KINDS["overlap"], "rounds": 2, "dtype": "float64", "batch_size": 16}
    found = {}
    for name, size, more in (
        ("alone", 1, {"accumulation_steps": 2}),
        ("ddp", 4, {"team_size": 2}),
        ("fsdp", 2, {"team_size": 2, "team_strategy": "fsdp"}),
    ):
        ranks(train, size, {**options, **more, "output_dir": str(tmp_path / name)})
        found[name] = held(tmp_path / name / "checkpoints" / "round-000001")
    wanted = found.pop("alone")
    assert wanted.keys() == {f"{worker}.shared" for worker in range(3)}
    for way, state in found.items():
        assert state.keys() == wanted.keys()
        for name, values in state.items():
            error = np.linalg.norm(values - wanted[name]) / np.linalg.norm(wanted[name])
            assert error <= 1e-10, f"{way}: {name} is off by {error:.1e} of its norm"
            assert np.linalg.norm(wanted[name] - wanted["0.shared"]) > 0 or name == "0.shared"


# ------------------------------------------------------------------------------------------------------------
# What is not as it was written.


@pytest.fixture
def copy(wholes: Callable[[str], Path], tmp_path: Path) -> Path:
    """One to spoil, of both kinds."""
    name = "round-000002"
    return Path(shutil.copytree(wholes("both") / "checkpoints" / name, tmp_path / name))


@pytest.mark.parametrize("name", [INDEX, *SHARDS])
def test_a_spoilt_file(name: str, copy: Path) -> None:
    sound = (copy / name).read_bytes()
    for place in (0, len(sound) // 2, len(sound) - 1):
        spoilt = bytearray(sound)
        spoilt[place] ^= 1
        (copy / name).write_bytes(spoilt)
        assert "its bytes are not those" in refused(copy, name)
    (copy / name).unlink()
    assert refused(copy, name) == f"{copy / name} is missing"
    seal(copy)  # by somebody who then seals it
    refused(copy, name, INDEX, *SHARDS)


EDITS: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "a name is gone": (lambda names: names.pop("1.error"), f"{INDEX} lacks 1.error"),
    "another name is gone": (lambda names: names.pop("2.shared"), f"{INDEX} lacks 2.shared"),
    "a worker too many": (
        lambda names: names.update({"3.error": SHARDS[0]}),
        "names 3.error, which a run of 3 workers does not have",
    ),
    "in the other shard": (lambda names: names.update({"0.error": SHARDS[1]}), "do not agree about 0.error"),
    "all of a kind": (
        lambda names: [names.pop(f"{w}.shared") for w in range(3)],
        f"{INDEX}: total_size is ",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_index_of_other_workers(edit: str, copy: Path) -> None:
    spoil, said = EDITS[edit]
    change(copy / INDEX, lambda content: spoil(content["weight_map"]))
    assert said in refused(copy, INDEX, *SHARDS)


@pytest.mark.parametrize("kind", ["error", "shared"])
def test_a_tensor_of_another_shape_or_type(kind: str, copy: Path) -> None:
    sound = load_file(copy / SHARDS[0])
    name = f"0.{kind}"
    length = len(sound[name])
    for spoilt, what in (
        (sound[name][:-32].copy(), f"float32[{length - 32}]"),
        (sound[name].view(np.float64), f"float64[{length // 2}]"),
    ):
        save_file({**sound, name: spoilt}, copy / SHARDS[0], {"format": "pt"})
        seal(copy)
        said = f"{name} is {what}, and a run of 3 workers has float32[{length}]"
        assert said in refused(copy, SHARDS[0])


def test_a_group_that_its_run_cannot_have_written(wholes: Callable[[str], Path], copy: Path) -> None:
    """Sealed anew, with the state of a run on the exact wire that never overlapped."""

    def edit(content: Any) -> None:
        content["config"].update(wire="exact", overlap_steps=0)
        content["config_hash"] = config_hash(content["config"])

    change(copy / "state.json", edit)
    with pytest.raises(DamagedError, match=r"workers.* is part of no index"):
        Checkpoint.verified(copy)


def test_before_there_was_such_a_group(ranks: Ranks, tmp_path: Path) -> None:
    """A state that knows neither option is that of an exact run."""
    ranks(train, 1, {"rounds": 1, "output_dir": str(tmp_path)})

    def edit(content: Any) -> None:
        del content["config"]["wire"], content["config"]["overlap_steps"]
        content["config_hash"] = config_hash(content["config"])

    change(last(tmp_path) / "state.json", edit)
    assert not list(last(tmp_path).glob("workers*"))
    Checkpoint.verified(last(tmp_path)).close()
    ranks(train, 1, {"rounds": 2, "resume": "auto", "override": "rounds", "output_dir": str(tmp_path)})
    assert last(tmp_path).name == "round-000002"

"""State that survives: resumed runs are the uninterrupted ones to the bit, on other ranks and other W."""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from resist_ds.comm import Comm
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.subnet import Worker
from resist_ds.options.config import Config
from resist_ds.protocol.partition import slots_for
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.run_state import config_hash
from resist_ds.trainer import Trainer
from tests import oracle
from tests.conftest import Ranks, run_ranks
from tests.saved import OPTIONS, checkpoints, digest, loss_log, outcome, tensors, train

pytestmark = pytest.mark.ranks


Run = Callable[[Comm, dict[str, Any]], None]


def resumed(
    ranks: Ranks, size: int, whole: Path, at: int, folder: Path, run: Run = train, **options: Any
) -> Path:
    """The run of `whole`, as it was after `at` rounds, resumed on so many ranks; returns its folder."""
    shutil.copytree(whole, folder)
    for name in checkpoints(folder):
        if name > f"round-{at:06d}":
            shutil.rmtree(folder / "checkpoints" / name)
    ranks(run, size, {"resume": "auto", "output_dir": str(folder), **options})
    return folder


def assert_same_run(folder: Path, whole: Path, at: int) -> None:
    """Every checkpoint from `at` on has the same bits, and so have the records."""
    names = [name for name in checkpoints(whole) if name > f"round-{at:06d}"]
    assert [name for name in checkpoints(folder) if name > f"round-{at:06d}"] == names != []
    for name in names:
        assert digest(folder / "checkpoints" / name) == digest(whole / "checkpoints" / name), name
    assert loss_log(folder) == loss_log(whole)


# ------------------------------------------------------------------------------------------------------------
# The same W: bit for bit.

KINDS: dict[str, dict[str, Any]] = {
    # 2,048 images, 128 a round: an epoch has four rounds
    "momentum": {"local_steps": 4, "batch_size": 32},
    "reset": {"optimizer_state": "reset"},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "lr_warmup_steps": 5, "channels_last": True},
    "fp16": {"mixed_precision": "fp16", "lr": 0.01},
    "warm-up": {"warmup_rounds": 3, "min_blocks": 3, "workers": 3},
    "longer rounds": {"rounds": None, "epochs": 0.3, "local_steps_max": 6},  # 2, 2, 2, 3, 6, 6 local steps
}


FIRST_SCALE = 2.0**10  # so far from fp16's limit that nothing overflows unless it is made to


def overflows(comm: Comm, options: dict[str, Any]) -> None:
    """Worker w meets Inf in the first local step of round w. (Where fp16 itself does is the kernels'.)"""
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=FIRST_SCALE)  # type: ignore[assignment,misc]
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    engine, now = trainer.workers.engine, {"round": -1, "due": False}
    load, step, local_steps = engine.load, engine.step, trainer._local_steps
    weights = next(engine.subnet.module.parameters())  # type: ignore[attr-defined]

    def of_round(round: int, *rest: Any) -> Any:
        now["round"] = round
        return local_steps(round, *rest)

    def loaded(worker: Worker) -> None:
        now["due"] = worker.index == now["round"]
        load(worker)

    def stepped(*args: Any) -> Any:
        hook = weights.register_hook(lambda grad: grad.fill_(math.inf) if now["due"] else grad)
        done = step(*args)
        hook.remove()
        now["due"] = False
        return done

    trainer._local_steps, engine.load, engine.step = of_round, loaded, stepped  # type: ignore[method-assign]
    trainer.run()
    trainer.folder.release()


RUNS: dict[str, Run] = {"fp16": overflows}  # the others: plainly


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted runs on two ranks, each made when it is first asked for."""
    made: dict[str, Path] = {}

    def whole(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp("whole") / "run"
            options = {**KINDS[kind], "output_dir": str(folder)}
            run_ranks(RUNS.get(kind, train), 2, options, store=folder.with_name("store"))
            assert len(checkpoints(folder)) == OPTIONS["rounds"]
        return made[kind]

    return whole


@pytest.mark.parametrize(("at", "size"), [(1, 2), (2, 1), (3, 4), (5, 3)])
def test_a_resumed_run_is_the_uninterrupted_one(
    at: int, size: int, wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = resumed(ranks, size, wholes("momentum"), at, tmp_path / "run", **KINDS["momentum"])
    assert_same_run(folder, wholes("momentum"), at)


@pytest.mark.numerical
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "momentum"])
def test_other_kinds_of_state_too(
    kind: str, at: int, wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    run = RUNS.get(kind, train)
    folder = resumed(ranks, 1 + at % 2, wholes(kind), at, tmp_path / "run", run, **KINDS[kind])
    assert_same_run(folder, wholes(kind), at)


def test_written_in_the_background_it_is_the_same(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    """At most one is in flight; each is a snapshot of its moment, whatever training does meanwhile."""
    options = {**KINDS["momentum"], "checkpoint_async": True, "output_dir": str(tmp_path)}
    ranks(train, 2, options)
    whole = wholes("momentum")
    assert checkpoints(tmp_path) == checkpoints(whole)
    for name in checkpoints(whole):
        Checkpoint.verified(tmp_path / "checkpoints" / name).close()
        assert digest(tmp_path / "checkpoints" / name) == digest(whole / "checkpoints" / name), name
    assert loss_log(tmp_path) == loss_log(whole)


def test_a_complete_run_has_nothing_to_do(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(wholes("momentum"), folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    options = {**KINDS["momentum"], "resume": "auto", "output_dir": str(folder)}
    (result,) = ranks(outcome, 1, tmp_path, options)
    assert result == (0, "")
    assert (tmp_path / "stdout0").read_text() == "nothing to do: the run is complete (round 6 of 6)\n"
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before


def test_what_a_checkpoint_says_of_itself(wholes: Callable[[str], Path]) -> None:
    folder = wholes("momentum") / "checkpoints"
    state = json.loads((folder / "round-000003" / "state.json").read_text())
    assert (state["round"], state["step"], state["samples"]) == (3, 12, 3 * 4 * 4 * 32)
    assert (state["epoch"], state["offset"]) == (0, 1536)
    assert (state["workers"], state["slots"], state["pool"], state["test_scale"]) == (4, 2, 7, 2 / 7)
    assert state["statistics_round"] == 2
    assert state["config_hash"] == config_hash(state["config"])
    assert not {"output_dir", "data_dir", "resume"} & state["config"].keys()
    assert str(folder) not in (folder / "round-000003" / "state.json").read_text()
    last = json.loads((folder / "round-000006" / "state.json").read_text())
    assert last["statistics_round"] == 6 and (last["epoch"], last["offset"]) == (1, 1024)


@pytest.mark.numerical
def test_loss_scales_belong_to_the_state(wholes: Callable[[str], Path]) -> None:
    path = wholes("fp16") / "checkpoints" / "round-000003" / "state.json"
    scales = json.loads(path.read_text())["loss_scales"]
    found = [
        (scale["scale"], scale["_growth_tracker"]) for scale in scales
    ]  # good steps since the last bad one
    assert found == [(FIRST_SCALE / 2, 5), (FIRST_SCALE / 2, 3), (FIRST_SCALE / 2, 1), (FIRST_SCALE, 6)]


def test_writers_are_balanced(ranks: Ranks, tmp_path: Path) -> None:
    options = {"model": "preact_resnet_small", "rounds": 1, "output_dir": str(tmp_path)}
    ranks(train, 4, options)
    files = (tmp_path / "checkpoints").glob("*/optimizer-*.safetensors")
    parts = [[array.nbytes for array in load_file(file).values()] for file in files]
    sizes = [sum(part) for part in parts]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= max(max(part) for part in parts) < sum(sizes) / 4


# ------------------------------------------------------------------------------------------------------------
# Another W and another R: nothing is lost.

Links = list[tuple[int, int]]  # (W, R) of one run after the other


@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    st.lists(
        st.integers(1, 8).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, min(w, 3)))),
        min_size=3,
        max_size=4,
    )
)
@example([(4, 3), (2, 1), (8, 2), (3, 3)])
def test_any_chain_of_workers_and_ranks(
    ranks: Ranks, tmp_path_factory: pytest.TempPathFactory, links: Links
) -> None:
    conserve(ranks, links, tmp_path_factory.mktemp("chain"))


def held(comm: Comm, options: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """What this rank's workers own after a resume and before a step."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    owned = trainer.workers.owned(trainer.net.deal)
    trainer.folder.release()
    return oracle.arrays(owned)


def conserve(ranks: Ranks, links: Links, folder: Path) -> None:
    """Go on for two rounds at a time at learning rate 0, each time with other workers on other ranks."""
    initial: dict[str, np.ndarray] = {}
    for link, (workers, size) in enumerate(links):
        options = {
            **{"lr": 0.0, "weight_decay": 0.0, "workers": workers, "rounds": 2 * link + 2, "batch_size": 4},
            **{"override": "rounds", "output_dir": str(folder), "resume": "auto", "eval_every": 0},
        }
        if link:  # every tensor, momentum too, comes back to exactly one owner
            before = tensors(folder / "checkpoints" / f"round-{2 * link:06d}")
            owned = [item for rank in ranks(held, size, options) for item in rank.items()]
            parts = {n if k == "parameter" else f"{n}.{k}": a for n, t in owned for k, a in t.items()}
            assert len(parts) == sum(len(t) for _, t in owned)
            assert parts.keys() == {name for name in before if "running_" not in name and "num_b" not in name}
            assert all(parts[name].tobytes() == before[name].tobytes() for name in parts)
        ranks(train, size, options)
        for round in (2 * link + 1, 2 * link + 2):
            now = folder / "checkpoints" / f"round-{round:06d}"
            assert len(list(now.glob("model-*.safetensors"))) == size
            found = tensors(now)
            weights = {n: a for n, a in found.items() if "running_" not in n and "momentum_buffer" not in n}
            initial = initial or weights
            assert weights.keys() == initial.keys()
            assert all(a.tobytes() == initial[n].tobytes() for n, a in weights.items()), (links, round)
            assert any(a.any() for n, a in found.items() if "momentum_buffer" in n), "nothing was trained"
            state = json.loads((now / "state.json").read_text())
            assert (state["workers"], state["slots"]) == (workers, slots_for(workers, 7))
            assert state["test_scale"] == slots_for(workers, 7) / 7
    samples = sum(2 * OPTIONS["local_steps"] * workers * 4 for workers, _ in links)
    assert state["samples"] == samples == [line["samples_seen"] for line in loss_log(folder)][-1]
    assert [line["round"] for line in loss_log(folder) if line["kind"] == "round"] == list(
        range(1, 2 * len(links) + 1)
    )


def test_without_a_word_the_checkpoints_workers_go_on(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = resumed(ranks, 1, wholes("momentum"), 5, tmp_path / "run", **KINDS["momentum"], workers=None)
    assert_same_run(folder, wholes("momentum"), 5)
    options = {**KINDS["momentum"], "workers": None, "resume": "auto", "output_dir": str(folder)}
    results = ranks(outcome, 5, tmp_path, options)
    assert results[0].stderr == (
        "error: --workers 4 of the checkpoint is less than the 5 ranks: "
        "type --workers 5 or more, or start fewer ranks\n"
    )


def test_the_learning_rate_goes_on_where_it_was(ranks: Ranks, tmp_path: Path) -> None:
    """Half of the images are seen by four workers, the other half by two, in twice as many rounds."""
    options = {"rounds": None, "epochs": 1.0, "batch_size": 32, "local_steps": 4, "output_dir": str(tmp_path)}
    ranks(train, 1, {**options, "workers": 4})  # 4 rounds of 512 images
    whole = loss_log(tmp_path)
    for name in checkpoints(tmp_path)[2:]:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    ranks(train, 1, {**options, "workers": 2, "resume": "auto"})
    rounds = [line for line in loss_log(tmp_path) if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == [1, 2, 3, 4, 5, 6]
    assert [line["samples_seen"] for line in rounds] == [512, 1024, 1280, 1536, 1792, 2048]
    assert rounds[:2] == [line for line in whole if line["kind"] == "round"][:2]
    rates = [line["lr"] for line in rounds]
    # at the last step of a round: 32 W images before its end
    seen = [512 - 128, 1024 - 128, 1280 - 64, 1536 - 64, 1792 - 64, 2048 - 64]
    assert rates == [0.05 * 0.5 * (1 + np.cos(np.pi * s / 2048)) for s in seen]


def test_the_learning_rate_goes_on_under_rounds_too(ranks: Ranks, tmp_path: Path) -> None:
    """Half of the rounds by two workers, half by six, who see thrice the images in as many steps."""
    options = {"rounds": 4, "batch_size": 32, "local_steps": 4, "output_dir": str(tmp_path)}
    ranks(train, 1, {**options, "workers": 2})
    whole = [line["lr"] for line in loss_log(tmp_path) if line["kind"] == "round"]
    for name in checkpoints(tmp_path)[2:]:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    ranks(train, 1, {**options, "workers": 6, "resume": "auto"})
    assert [line["lr"] for line in loss_log(tmp_path) if line["kind"] == "round"] == whole


def test_rounds_go_on_growing_from_the_images_seen(ranks: Ranks, tmp_path: Path) -> None:
    """Two rounds by four workers, the rest by two, who take more of them for as many images."""
    options = {**KINDS["longer rounds"], "local_steps": 3, "local_steps_max": 20, "output_dir": str(tmp_path)}
    ranks(train, 1, options)
    for name in checkpoints(tmp_path)[2:]:
        shutil.rmtree(tmp_path / "checkpoints" / name)
    ranks(train, 1, {**options, "workers": 2, "resume": "auto"})
    rounds = [line for line in loss_log(tmp_path) if line["kind"] == "round"]
    samples, steps = 0, []
    for number, line in enumerate(rounds):
        rate = np.cos(np.pi / 2 * samples / (0.3 * 2048)) ** 2  # where the round begins, over the peak
        steps.append(line["train/local_steps"])
        assert steps[-1] == min(20, int(3 / rate**2))
        samples += steps[-1] * 8 * (4 if number < 2 else 2)
        assert (line["samples_seen"], line["global_step"]) == (samples, sum(steps))
    assert samples >= 0.3 * 2048 > samples - steps[-1] * 16 and steps == [3, 3, 4, 7, 20]


# ------------------------------------------------------------------------------------------------------------
# What is refused, and what is set aside.


def test_other_options_are_refused_field_by_field(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    shutil.copytree(wholes("momentum"), tmp_path / "run")
    base = {**KINDS["momentum"], "resume": "auto", "output_dir": str(tmp_path / "run"), "rounds": 7}

    def error(**options: Any) -> str:
        results = ranks(outcome, 2, tmp_path, {**base, **options})
        assert [(r.code, r.stderr) for r in results[1:]] == [(2, "")]
        assert results[0].code == 2
        return results[0].stderr

    assert error(lr=0.1, nesterov=True) == (
        "error: the checkpoint's run had other options: --rounds is 7 and was 6, --lr is 0.1 and was 0.05, "
        "--nesterov is true and was false; type the old ones, or --override rounds,lr,nesterov\n"
    )
    assert error(override="rounds", batch_size=16) == (
        "error: the checkpoint's run had other options: --batch_size is 16 and was 32; type the old ones, or "
        "--override rounds,batch_size\n"
    )
    assert error(override="rounds,model", model="preact_resnet_small") == (
        "error: --model is preact_resnet_small, and the checkpoint's is resist_test_basic: type that, "
        "or start from an export of it, by --from_pretrained\n"
    )
    assert checkpoints(tmp_path / "run") == checkpoints(wholes("momentum"))
    ranks(train, 2, {**base, "override": "lr,rounds", "lr": 0.1})
    assert checkpoints(tmp_path / "run")[-1] == "round-000007"


def test_another_optimizer_starts_its_state_at_zero(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder = shutil.copytree(wholes("momentum"), tmp_path / "run")
    options = {**KINDS["momentum"], "optimizer": "adamw", "rounds": 7, "override": "rounds,optimizer"}
    (result,) = ranks(outcome, 1, tmp_path, {**options, "resume": "auto", "output_dir": str(folder)})
    assert result == (0, "warning: optimizer state that the checkpoint lacks starts at zero\n")
    found = tensors(folder / "checkpoints" / "round-000007")
    assert {float(a) for n, a in found.items() if n.endswith(".step")} == {4.0}


def test_a_fresh_run_sets_an_earlier_one_aside(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):
        (result,) = ranks(outcome, 1, tmp_path, {"rounds": 1, "output_dir": str(folder)})
        assert result.code == 0
    said = f"warning: the records and checkpoints of an earlier run are now in {folder}/earlier-1\n"
    assert result.stderr == said
    assert checkpoints(folder) == checkpoints(folder / "earlier-1") == ["round-000001"]
    assert loss_log(folder) == loss_log(folder / "earlier-1")


def test_auto_starts_afresh_where_there_is_nothing(ranks: Ranks, tmp_path: Path) -> None:
    (result,) = ranks(
        outcome, 1, tmp_path, {"rounds": 1, "resume": "auto", "output_dir": str(tmp_path / "run")}
    )
    assert result == (0, "")


def test_an_older_checkpoint_is_for_another_folder(
    wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    """In its own folder the newer ones would be taken for this run's by the next auto."""
    whole = wholes("momentum")
    path = whole / "checkpoints" / "round-000003"
    options = {**KINDS["momentum"], "resume": str(path)}
    (result,) = ranks(outcome, 1, tmp_path, {**options, "output_dir": str(whole)})
    assert result.code == 2
    newest = whole / "checkpoints" / "round-000006"
    assert result.stderr == (
        f"error: --resume {path}: {newest} is newer; "
        "type --resume auto, or another --output_dir to branch off\n"
    )
    branch = tmp_path / "branch"
    ranks(train, 1, {**options, "output_dir": str(branch)})
    assert checkpoints(branch) == ["round-000004", "round-000005", "round-000006"]
    for name in checkpoints(branch):
        assert digest(branch / "checkpoints" / name) == digest(whole / "checkpoints" / name)


def test_a_folder_that_is_no_checkpoint(wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path) -> None:
    whole = wholes("momentum")
    one = f"holds checkpoints: type one of them, --resume {whole}/checkpoints/round-000006"
    for path, code, line in (
        (tmp_path / "none", 2, "--resume {}: no such folder; type never, auto or the folder of a checkpoint"),
        (whole, 2, f"--resume {{}} {one}"),
        (whole / "checkpoints", 2, f"--resume {{}} {one}"),
        (tmp_path, 1, "{}/manifest.json is missing"),
    ):
        (result,) = ranks(outcome, 1, tmp_path, {"resume": str(path), "output_dir": str(tmp_path / "run")})
        assert result == (code, f"error: {line.format(path)}\n")


# ------------------------------------------------------------------------------------------------------------
# When, and how many stay.


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        # 2,048 images, 640 a round: the 4th, 7th and 10th round end an epoch (2,560; 4,480; 6,400)
        ({"checkpoint_every": None}, [4, 7, 10]),
        ({"checkpoint_every": 0}, [10]),
        ({"checkpoint_every": 4}, [4, 8, 10]),
        ({"checkpoint_every": 1, "keep": 2}, [9, 10]),
        ({"checkpoint_every": None, "checkpoint_minutes": 1000.0}, [10]),
        ({"checkpoint_every": 0, "checkpoint_minutes": 0.0}, [*range(1, 11)]),
    ],
)
def test_when_checkpoints_are_taken(
    options: dict[str, Any], rounds: list[int], ranks: Ranks, tmp_path: Path
) -> None:
    run = {"rounds": 10, "batch_size": 80, "eval_every": 0, "output_dir": str(tmp_path)}
    ranks(train, 1, {**run, **options})
    assert checkpoints(tmp_path) == [f"round-{round:06d}" for round in rounds]
    state = json.loads((tmp_path / "checkpoints" / "round-000010" / "state.json").read_text())
    assert state["statistics_round"] == 10  # the last one always follows an evaluation


@pytest.mark.parametrize("spoil", ["delete", "flip"])
def test_damaged_checkpoints_do_not_count_among_those_kept(
    spoil: str, wholes: Callable[[str], Path], ranks: Ranks, tmp_path: Path
) -> None:
    """Nor do those whose damage only a full check finds push out the sound ones."""
    folder = shutil.copytree(wholes("momentum"), tmp_path / "run")
    for name in ("round-000004", "round-000005", "round-000006"):
        shard = next((folder / "checkpoints" / name).glob("model-*"))
        content = shard.read_bytes()
        shard.unlink()
        if spoil == "flip":
            shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    options = {**KINDS["momentum"], "resume": "auto", "keep": 2, "output_dir": str(folder)}
    ranks(train, 1, {**options, "rounds": 4, "schedule": "constant", "override": "rounds,schedule"})
    assert checkpoints(folder) == ["round-000003", "round-000004"]
    for name in checkpoints(folder):
        Checkpoint.verified(folder / "checkpoints" / name).close()
    assert checkpoints(folder / "earlier-1") == ["round-000004", "round-000005", "round-000006"]


# ------------------------------------------------------------------------------------------------------------
# Other tools read it without us.


def test_hugging_face_reads_a_checkpoint(wholes: Callable[[str], Path]) -> None:
    folder = wholes("momentum") / "checkpoints" / "round-000006"
    net = timm.create_model(oracle.resist_test_basic.__name__, num_classes=10)
    huggingface_hub.load_torch_model(net, folder, strict=True)
    found = tensors(folder)
    assert all(found[name].tobytes() == t.numpy().tobytes() for name, t in net.state_dict().items())
    assert sum("momentum_buffer" in name for name in found) == len(list(net.parameters()))


def test_a_state_is_in_the_format_of_the_documentation(wholes: Callable[[str], Path]) -> None:
    folder = wholes("momentum") / "checkpoints" / "round-000006"
    for group in ("model", "optimizer"):
        index = json.loads((folder / f"{group}.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {f"{group}-0000{r}-of-00002.safetensors" for r in (1, 2)}
        parts = [t for n, t in tensors(folder).items() if n in index["weight_map"]]
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in parts)
    blueprint = Blueprint(OPTIONS["model"], 10)
    names = {f"{name}.momentum_buffer" for name in blueprint.shapes}
    assert index["weight_map"].keys() == names
    os.umask(umask := os.umask(0))
    modes = {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert modes == {oct(0o666 & ~umask)}  # readable by whom the umask allows

"""A model leaves the trainer as a plain timm state dict, and such a file can be where training starts."""

import json
import runpy
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import create_conv2d
from torch import Tensor, nn

from resist_ds.comm import Comm
from resist_ds.data.datasets import load_data
from resist_ds.errors import RunError
from resist_ds.nets.blueprint import CIFAR_NETS, Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol import evaluate
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.export import export
from resist_ds.trainer import Trainer
from tests import ROOT, oracle
from tests.conftest import Ranks, run_ranks
from tests.saved import OPTIONS, loss_log, outcome, tensors, train

pytestmark = pytest.mark.ranks


FAMILIES = {
    "pre-activation, basic": oracle.resist_test_wide.__name__,
    "pre-activation, bottleneck": oracle.resist_test_pre_bottleneck.__name__,
    "post-activation, basic": oracle.resist_test_basic.__name__,
    "post-activation, bottleneck": oracle.resist_test_bottleneck.__name__,
    "CIFAR": "preact_resnet_small",
}


def plain_timm(model: str) -> nn.Module:
    """The whole net by stock timm; the CIFAR nets in the two lines of the documentation."""
    if model not in CIFAR_NETS:
        return timm.create_model(model, num_classes=10)
    layers, channels = CIFAR_NETS[model]
    net = timm.create_model(
        "resnetv2_34", layers=layers, channels=channels, stem_chs=channels[0], num_classes=10
    )
    net.stem = nn.Sequential(OrderedDict(conv=create_conv2d(3, channels[0], 3)))
    return net


def train_and_look(comm: Comm, options: dict[str, Any]) -> np.ndarray | None:
    """A run; returns the logits [test images, classes] of the last streamed evaluation, on one rank."""
    seen: list[Tensor] = []
    after = evaluate._Walk.after

    def recorded(walk: Any, x: Tensor) -> Tensor:
        seen.append(after(walk, x))
        return seen[-1]

    evaluate._Walk.after = recorded  # type: ignore[method-assign]
    train(comm, options)
    return torch.cat(seen).numpy() if comm.rank == 0 else None


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(model, checkpoint, logits of its streamed evaluation) after a few rounds that moved the weights."""
    folder = tmp_path_factory.mktemp("trained")
    model = FAMILIES[request.param]
    options = {
        "model": model,
        "rounds": 4,
        "local_steps": 4,
        "lr": 0.1,
        "eval_every": 0,
        "checkpoint_every": 0,
    }
    options |= {"img_size": 32, "calibration_samples": 256, "output_dir": str(folder)}
    (logits,) = run_ranks(train_and_look, 1, options, store=folder / "store")
    yield model, folder / "checkpoints" / "round-000004", logits


@torch.no_grad()
def logits_of(net: nn.Module) -> np.ndarray:
    """Of the test set, by plain PyTorch."""
    data = load_data(Config(dataset="synthetic", img_size=32))
    place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, "channels_last": False}
    ((images, _),) = data.test_batches([np.arange(data.test_size)], **place)
    return net.eval()(images).numpy()


@pytest.mark.numerical
def test_the_export_in_stock_timm_is_the_model_that_was_tested(trained: Any, tmp_path: Path) -> None:
    model, checkpoint, logits = trained
    assert export(Checkpoint.verified(checkpoint), tmp_path / "net.safetensors") == ()
    net = plain_timm(model)
    net.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    exported = logits_of(net)
    assert exported.shape == logits.shape == (512, 10)
    assert logits.std() > 0.1, "a net that says nothing would agree with anything"
    assert np.abs(exported - logits).max() <= 1e-5

    # not by chance: without the scale it is another model
    export(Checkpoint.verified(checkpoint), tmp_path / "raw.safetensors", fold=False)
    net.load_state_dict(load_file(tmp_path / "raw.safetensors"), strict=True)
    assert np.abs(logits_of(net) - logits).max() > 1e-3


@pytest.mark.numerical
def test_a_team_s_checkpoint_is_exported_as_any_other(ranks: Ranks, tmp_path: Path) -> None:
    """Whose tensors its ranks held in rows: plain timm has the test loss that the run has reported."""
    options = {"workers": 3, "team_size": 2, "team_strategy": "fsdp", "rounds": 2, "img_size": 32, "lr": 0.1}
    ranks(train, 4, {**options, "output_dir": str(tmp_path)})
    export(Checkpoint.verified(tmp_path / "checkpoints" / "round-000002"), tmp_path / "net.safetensors")
    net = plain_timm(OPTIONS["model"])
    net.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    logits = torch.from_numpy(logits_of(net))
    labels = torch.as_tensor(load_data(Config(dataset="synthetic", img_size=32)).test.labels)
    *_, reported = (line for line in loss_log(tmp_path) if line["kind"] == "eval")
    assert F.cross_entropy(logits.double(), labels).item() == pytest.approx(reported["eval/loss"], rel=1e-5)


@pytest.mark.numerical
def test_folding_changes_the_ends_of_the_branches_alone(trained: Any, tmp_path: Path) -> None:
    model, checkpoint, _ = trained
    export(Checkpoint.verified(checkpoint), tmp_path / "net.safetensors")
    export(Checkpoint.verified(checkpoint), tmp_path / "raw.safetensors", fold=False)
    found, raw, folded = (
        tensors(checkpoint),
        load_file(tmp_path / "raw.safetensors"),
        load_file(tmp_path / "net.safetensors"),
    )
    blueprint = Blueprint(model, 10)
    ends = tuple(f"{blueprint.block_prefix(b)}{blueprint.branch_end}." for b in range(blueprint.pool))
    scale = json.loads((checkpoint / "state.json").read_text())["test_scale"]
    changed = 0
    for name, tensor in raw.items():
        assert torch.equal(tensor, torch.from_numpy(found[name]))
        end = name.startswith(ends) and name.endswith((".weight", ".bias"))
        assert torch.equal(folded[name], tensor * scale if end else tensor), name
        changed += end
    assert changed >= blueprint.pool and scale < 1
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["residual_scale_folded"] == "true"
        assert file.metadata()["format"] == "pt"


# ------------------------------------------------------------------------------------------------------------
# Training from such a file.


def start(comm: Comm, options: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """What the workers own before the first step."""
    trainer = Trainer(comm, Config(**(OPTIONS | options)))
    owned = trainer.workers.owned(trainer.net.deal)
    trainer.folder.release()
    return oracle.arrays(owned)


@pytest.mark.numerical
def test_the_global_model_that_training_starts_from_is_the_one_in_the_file(
    trained: Any, tmp_path: Path, ranks: Ranks
) -> None:
    """At learning rate 0 its test loss is that of the run which exported it, with whatever W."""
    model, checkpoint, _ = trained
    export(Checkpoint.verified(checkpoint), tmp_path / "net.safetensors")
    run = checkpoint.parent.parent
    tested = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = next(line["eval/loss"] for line in tested if line["kind"] == "eval")
    options = {"model": model, "img_size": 32, "calibration_samples": 256, "workers": 2, "rounds": 1}
    options |= {"lr": 0.0, "weight_decay": 0.0, "from_pretrained": str(tmp_path / "net.safetensors")}
    ranks(train, 2, {**options, "output_dir": str(tmp_path / "run")})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (loss,) = [line["eval/loss"] for line in map(json.loads, lines) if line["kind"] == "eval"]
    assert loss == pytest.approx(expected, abs=1e-5)


def test_weights_that_are_not_folded_come_back_bit_for_bit(
    trained: Any, tmp_path: Path, ranks: Ranks
) -> None:
    model, checkpoint, _ = trained
    export(Checkpoint.verified(checkpoint), tmp_path / "raw.safetensors", fold=False)
    options = {
        "model": model,
        "from_pretrained": str(tmp_path / "raw.safetensors"),
        "output_dir": str(tmp_path),
    }
    owned = [item for rank in ranks(start, 2, options) for item in rank.items()]
    found = tensors(checkpoint)
    assert len(owned) == len({name for name, _ in owned}) == len(Blueprint(model, 10).shapes)
    for name, state in owned:
        assert state["parameter"].tobytes() == found[name].tobytes()
        assert not state["momentum_buffer"].any()


BASIC = OPTIONS["model"]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file as anybody has it: half precision, no metadata."""
    torch.manual_seed(0)
    state = {n: t.half() if t.is_floating_point() else t for n, t in plain_timm(BASIC).state_dict().items()}
    save_file(state, tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def test_another_class_count_renews_the_head_and_says_so(plain: Path, tmp_path: Path, ranks: Ranks) -> None:
    options = {
        "from_pretrained": str(plain),
        "num_classes": 12,
        "rounds": 1,
        "output_dir": str(tmp_path / "run"),
    }
    (result,) = ranks(outcome, 1, tmp_path, options)
    assert result == (0, "warning: fc.weight and fc.bias start anew: the file's head has another size\n")
    (owned,) = ranks(start, 1, {**options, "output_dir": str(tmp_path / "other")})
    file, fresh = load_file(plain), Blueprint(BASIC, 12).initial_shared(0)
    for name, state in owned.items():
        if name.startswith("fc."):
            assert np.array_equal(state["parameter"], fresh[name].numpy())
        elif ".bn2." not in name or not name.startswith("layer3"):
            assert np.array_equal(state["parameter"], file[name].float().numpy())
    assert owned["fc.weight"]["parameter"].shape[0] == 12


def test_files_that_will_not_do(plain: Path, tmp_path: Path, ranks: Ranks) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    lacking = load_file(plain)
    del lacking["layer3.2.conv1.weight"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    save_file({**load_file(plain), "extra.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    torch.save({}, tmp_path / "net.pth")
    spoilt = load_file(plain)
    spoilt["layer3.3.bn1.bias"][0] = float("nan")
    torch.save({"state_dict": spoilt}, tmp_path / "nan.pth")
    model = "is not of --model resist_test_basic"
    for path, line in (
        ("none.safetensors", "no such file"),
        ("text.safetensors", "is neither a safetensors file nor one that torch.save has written"),
        ("net.pth", "holds no tensors by name (nothing)"),
        (
            "lacking.safetensors",
            f"{model}: layer3.2.conv1.weight is missing, and the model has [16, 16, 3, 3]",
        ),
        ("extra.safetensors", f"{model}, which has no extra.weight"),
        ("nan.pth", "layer3.3.bn1.bias holds NaN or Inf"),
    ):
        options = {"from_pretrained": str(tmp_path / path), "output_dir": str(tmp_path / "run")}
        first, second = ranks(outcome, 2, tmp_path, options)
        assert first.code == second.code == 2 and second.stderr == ""
        assert first.stderr.startswith(f"error: --from_pretrained {tmp_path / path}") and line in first.stderr
        assert first.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# The tools.


Tool = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """`tool(name, *arguments)` runs a tool in this process; returns (exit code, stdout, stderr)."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        path = str(ROOT / "tools" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(path, run_name="__main__")
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


def test_the_tools(tmp_path: Path, ranks: Ranks, tool: Tool) -> None:
    options = {"model": "preact_resnet_small", "rounds": 3, "eval_every": 2, "output_dir": str(tmp_path)}
    ranks(train, 2, options)
    folder = tmp_path / "checkpoints"
    sound = tool("verify", folder / "round-000003")
    assert sound[::2] == (0, "")
    assert sound[1].startswith(
        "sound: preact_resnet_small at the start of round 3 (192 samples seen), W = 4, "
    )

    out = tmp_path / "net.safetensors"
    made = tool("export", folder / "round-000003", out)
    assert made == (0, f"{out}: preact_resnet_small, 10 classes, {out.stat().st_size / 1e6:,.1f} MB\n", "")
    plain_timm("preact_resnet_small").load_state_dict(load_file(out), strict=True)
    again = tool("export", folder / "round-000003", out)
    assert again == (2, "", f"error: {out} exists: type another name\n")

    old = tool("export", folder / "round-000001", tmp_path / "old.safetensors", "--fold", "false")
    assert old[0] == 0
    assert old[2].startswith(
        "warning: BatchNorm's statistics were never estimated, and the weights of round 1"
    )

    with (folder / "round-000003" / "state.json").open("a") as file:
        file.write(" ")
    for name, arguments in (("verify", ()), ("export", (tmp_path / "other.safetensors",))):
        code, stdout, stderr = tool(name, folder / "round-000003", *arguments)
        assert (code, stdout, stderr.count("\n")) == (1, "", 1)
        assert stderr.startswith(f"error: {folder}/round-000003/state.json is damaged")
    assert not list(tmp_path.glob("*other*"))


def test_a_tool_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "verify.py"), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nothing: no such folder\n")


def test_an_export_that_cannot_be_written_leaves_nothing(trained: Any, tmp_path: Path) -> None:
    _, checkpoint, _ = trained
    with pytest.raises(RunError, match="cannot be written"):
        export(Checkpoint.verified(checkpoint), tmp_path / "none" / "net.safetensors")
    assert not list(tmp_path.iterdir())

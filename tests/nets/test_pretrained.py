"""Weights from elsewhere: whatever a file looks like, it is read right or refused in words that help."""

import argparse
import io
import json
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import PretrainedCfg
from torch import Tensor, nn

from resist_ds.errors import RunError, UserError
from resist_ds.nets import timm_weights
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.pretrained import Pretrained
from resist_ds.nets.weights import Weights
from tests import oracle

State = dict[str, Tensor]
BASIC = oracle.resist_test_basic.__name__


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    return Blueprint(BASIC, 10)


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    net = timm.create_model(BASIC, num_classes=10)
    # timm begins with zeros where a branch ends, of which any multiple is the same.
    return {n: t + torch.rand_like(t) if t.is_floating_point() else t for n, t in net.state_dict().items()}


def read(path: Path, blueprint: Blueprint, scale: float = 1.0) -> tuple[State, list[str]]:
    """All parameters that training would start from, and what is said."""
    source = Pretrained(path, blueprint, seed=0, scale=scale)
    found = {name: tensors["parameter"].clone() for name, tensors in source.shared()}
    for block in range(blueprint.pool):
        prefix = blueprint.block_prefix(block)
        found |= {prefix + name: tensors["parameter"] for name, tensors in source.block(block)}
    source.close()
    return found, source.remarks


def assert_read(found: State, state: State, blueprint: Blueprint, besides: tuple[str, ...] = ()) -> None:
    assert found.keys() == blueprint.shapes.keys()
    for name in found.keys() - set(besides):
        assert torch.equal(found[name], state[name].float()), name


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


# what is saved, and what is said of it
FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda s: s, ""),
    "parameters": (lambda s: {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()}, ""),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3, "best": None}, "state_dict is what is read"),
    "torchvision's": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1), "lr_scheduler": {"last": 3}},
        "model is what is read",
    ),
    "timm's, with an average": (
        lambda s: {"state_dict": other(s), "state_dict_ema": s, "optimizer": {"state": {0: torch.ones(2)}}},
        "state_dict_ema is what is read",
    ),
    "the tutorial's": (lambda s: {"model_state_dict": s, "loss": 0.5}, "model_state_dict is what is read"),
    "one of a kind": (lambda s: {"net": s, "rng": torch.ones(3)}, "net is what is read"),
    "beside a model's name": (
        lambda s: {"model": {"name": "resnet"}, "weights": {"best": s}},
        "weights.best is what is read",
    ),
    "wrapped twice": (lambda s: {"model": {"state_dict": s}}, "model.state_dict is what is read"),
    "ddp": (lambda s: prefixed(s, "module."), "module. is taken off the names"),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), "_orig_mod. is taken off the names"),
    "compiled ddp": (lambda s: prefixed(s, "_orig_mod.module."), "_orig_mod.module. is taken off the names"),
    "a trainer's": (
        lambda s: {"state_dict": prefixed(s, "model.") | {"loss.weight": torch.ones(3)}},
        "state_dict is what is read, model. is taken off the names, 1 other tensor is left out",
    ),
    "a ddp trainer's": (
        lambda s: prefixed(s, "module.backbone."),
        "module. is taken off the names, backbone. is taken off the names",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_files_as_people_have_them(form: str, state: State, blueprint: Blueprint, tmp_path: Path) -> None:
    save, said = FORMS[form]
    content, path = save(state), tmp_path / "net.pth"
    torch.save(content, path)
    found, remarks = read(path, blueprint)
    assert_read(found, state, blueprint)
    assert remarks == ([f"{path}: {said}"] if said else [])
    if all(isinstance(value, Tensor) for value in content.values()):  # the same in the other format
        save_file({n: t.detach() for n, t in content.items()}, tmp_path / "net.safetensors")
        found, remarks = read(tmp_path / "net.safetensors", blueprint)
        assert_read(found, state, blueprint)
        assert remarks == ([f"{tmp_path}/net.safetensors: {said}"] if said else [])


def test_the_old_format_is_read_and_its_cost_is_said(
    state: State, blueprint: Blueprint, tmp_path: Path
) -> None:
    torch.save({"state_dict": state}, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    found, remarks = read(tmp_path / "old.pth.tar", blueprint)
    assert_read(found, state, blueprint)
    assert len(remarks) == 1 and "every rank holds all of it in memory" in remarks[0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_pth_is_mapped_and_not_read_whole(tmp_path: Path) -> None:
    """Opened and read in part, it takes no memory of its own but for the part."""

    def anonymous() -> int:
        return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10

    size = 64 << 20
    torch.save({"large": torch.ones(size // 4), "small": torch.ones(3)}, tmp_path / "net.pth")
    before = anonymous()
    weights = Weights(tmp_path / "net.pth")
    assert weights.tensor("small").tolist() == [1, 1, 1]
    assert anonymous() - before < size // 4
    assert weights.shapes == {"large": (size // 4,), "small": (3,)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype: torch.dtype, state: State, blueprint: Blueprint, tmp_path: Path) -> None:
    """Halves are widened, exactly; doubles stay what they are, for a run in float64."""
    cast = {n: (t / 3).to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    torch.save(cast, tmp_path / "net.pth")
    found, _ = read(tmp_path / "net.pth", blueprint)
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(tensor, cast[name].to(tensor.dtype)), name


def test_a_block_that_two_workers_hold_is_scaled_once(
    state: State, blueprint: Blueprint, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "net.pth")
    source = Pretrained(tmp_path / "net.pth", blueprint, seed=0, scale=0.25)
    for _ in range(2):
        values = {name: tensors["parameter"] for name, tensors in source.block(1)}
        for name, tensor in values.items():
            factor = 4 if name.startswith(f"{blueprint.branch_end}.") else 1
            assert torch.equal(tensor, state[blueprint.block_prefix(1) + name] * factor), name


@pytest.mark.parametrize("where", ["missing", "of another size", "outside the net"])
def test_a_head_that_does_not_fit_starts_anew(
    where: str, state: State, blueprint: Blueprint, tmp_path: Path
) -> None:
    head = {n: t for n, t in state.items() if n in blueprint.head}
    body = {n: t for n, t in state.items() if n not in blueprint.head}
    content: State = body
    if where == "of another size":
        content = state | {n: torch.zeros(12, *t.shape[1:]) for n, t in head.items()}
    if where == "outside the net":
        content = prefixed(body, "backbone.") | prefixed(head, "head.")
    torch.save(content, tmp_path / "net.pth")
    found, remarks = read(tmp_path / "net.pth", blueprint)
    assert_read(found, state, blueprint, besides=blueprint.head)
    fresh = blueprint.initial_shared(0)
    assert all(torch.equal(found[name], fresh[name]) for name in blueprint.head)
    why = "has another size" if where == "of another size" else "is missing"
    assert remarks[-1] == f"fc.weight and fc.bias start anew: the file's head {why}"


# ------------------------------------------------------------------------------------------------------------
# What cannot be used.


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def _zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names:
            file.writestr(name, b"x" * 100)
    return buffer.getvalue()


def _saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def _script() -> bytes:
    """What torch takes for a TorchScript archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, text in (
            ("data.pkl", b"\x80\x02N."),
            ("constants.pkl", b"\x80\x02)."),
            ("version", b"3\n"),
        ):
            file.writestr(f"net/{name}", text)
    return buffer.getvalue()


_TENSORS = {"weight": torch.ones(64, 64)}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty: download or copy it again"),
    "four bytes": (
        b"PK\x03\x04",
        "is damaged or cut off (PytorchStreamReader failed reading zip archive: not a ZIP archive): download "
        "or copy it again",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102400\n",
        "is a Git LFS pointer, not the weights: type git lfs pull in its repository",
    ),
    "page": (
        b"\n <!DOCTYPE html>\n<html><head><title>Sign in</title>",
        "is a web page, not the weights: download it again, from the link to the file itself",
    ),
    "xml": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "is a web page, not the weights: download it again, from the link to the file itself",
    ),
    "json": (
        json.dumps({"weight_map": {}}).encode(),
        "is JSON, not the weights: type the file of the tensors",
    ),
    "text": (b"lr: 0.1\n", "is neither a safetensors file nor one that torch.save has written"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "is packed (gzip): unpack it, and type the file that was in it"),
    "tar": (
        b"net.pth".ljust(257, b"\0") + b"ustar\0" + bytes(300),
        "is packed (tar): unpack it, and type the file that was in it",
    ),
    "hdf": (
        b"\x89HDF\r\n\x1a\n" + bytes(50),
        "is an HDF5 file (Keras?), and PyTorch's weights are asked for",
    ),
    "npz": (
        _zip_of("conv1.npy"),
        "is an archive of NumPy arrays, and PyTorch's weights are asked for",
    ),
    "zip": (_zip_of("photo.png"), "is damaged or cut off ("),
    "half": (_saved(_TENSORS)[:9000], "is damaged or cut off ("),
    "half, old": (_saved(_TENSORS, _use_new_zipfile_serialization=False)[:9000], "is damaged or cut off ("),
    "pickle": (pickle.dumps({"a": 1}), "is damaged or cut off (a pickle, but none of tensors): "),
    "module": (
        _saved(nn.Linear(2, 2)),
        "holds a pickled torch.nn.modules.linear.Linear beside or instead of plain tensors: nothing of the "
        "kind is unpickled here, since it may run code; save net.state_dict() alone",
    ),
    "numpy": (_saved({"state_dict": _TENSORS, "best": np.float64(1)}), "holds a pickled numpy."),
    "code": (_saved({"state_dict": _TENSORS, "x": _Code()}), "holds a pickled posix.mkdir beside"),
    "code, old": (
        _saved({"x": _Code()}, _use_new_zipfile_serialization=False),
        "holds a pickled posix.mkdir beside",
    ),
    "script": (_script(), "is a TorchScript program: save its state_dict() alone"),
    "list": (_saved([torch.ones(2)]), "holds no tensors by name (list): save net.state_dict()"),
    "nothing": (_saved({}), "holds no tensors by name (nothing): save net.state_dict()"),
    "numbers": (_saved({"epoch": 3, "lr": 0.1}), "holds no tensors by name (epoch, lr): save "),
    "two nets": (
        _saved({"student": _TENSORS, "teacher": _TENSORS}),
        "holds several nets (student, teacher): write one of them into a file of its own",
    ),
    "cut safetensors": (
        (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],',
        "is damaged or cut off (",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_holds_no_weights(
    kind: str, blueprint: Blueprint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = BAD[kind]
    path = tmp_path / "weights"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Pretrained(path, blueprint, seed=0, scale=1.0)
    line = str(caught.value)
    assert line.startswith(f"--from_pretrained {path} {said}") and "\n" not in line and len(line) < 400, line
    assert not (tmp_path / "executed").exists()


def test_a_folder_says_what_to_type(blueprint: Blueprint, tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(UserError) as caught:
            Pretrained(tmp_path, blueprint, seed=0, scale=1.0)
        return str(caught.value).removeprefix(f"--from_pretrained {tmp_path} is a folder: ")

    assert said() == "type a file of weights"
    (tmp_path / "pytorch_model.bin").touch()
    assert said() == f"type the file in it, {tmp_path}/pytorch_model.bin"
    (tmp_path / "manifest.json").touch()
    assert said().startswith(f"if it is a checkpoint of ours, type --resume {tmp_path}, or export it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_file_is_named_at_once(
    value: float, state: State, blueprint: Blueprint, tmp_path: Path
) -> None:
    """In whatever tensor it is that training would start from; in one that it does not, it does no harm."""
    for name in ("conv1.0.weight", "layer3.2.bn1.bias"):
        spoilt = {n: t.clone() for n, t in state.items()}
        spoilt[name].view(-1)[-1] = value
        torch.save(prefixed(spoilt, "module."), tmp_path / "net.pth")
        with pytest.raises(UserError) as caught:
            read(tmp_path / "net.pth", blueprint)
        assert str(caught.value).startswith(
            f"--from_pretrained {tmp_path}/net.pth: module.{name} holds NaN or Inf: "
        )
    spoilt = {n: t * value if "running" in n else t for n, t in state.items()}
    torch.save(spoilt | {"fc.weight": torch.full((3, 64), value)}, tmp_path / "net.pth")
    assert_read(read(tmp_path / "net.pth", blueprint)[0], state, blueprint, besides=blueprint.head)


def test_weights_that_are_whole_numbers(state: State, blueprint: Blueprint, tmp_path: Path) -> None:
    torch.save(state | {"conv1.0.weight": state["conv1.0.weight"].to(torch.int8)}, tmp_path / "net.pth")
    with pytest.raises(
        UserError, match=r"conv1\.0\.weight is of torch\.int8, and weights are plain floating"
    ):
        read(tmp_path / "net.pth", blueprint)


def test_a_file_of_another_model(state: State, blueprint: Blueprint, tmp_path: Path) -> None:
    small = Blueprint("preact_resnet_small", 10)
    path = tmp_path / "net.pth"

    def said(content: State) -> str:
        torch.save(content, path)
        with pytest.raises(UserError) as caught:
            Pretrained(path, blueprint, seed=0, scale=1.0)
        return str(caught.value).removeprefix(f"--from_pretrained {path} is not of --model {BASIC}")

    foreign = {name: torch.zeros(shape) for name, shape in small.shapes.items()}
    assert said(prefixed(foreign, "module.")) == (
        ": conv1.0.weight is missing, and the model has [4, 3, 3, 3]; "
        "its tensors are those of --model preact_resnet_small"
    )
    assert said({n: t for n, t in state.items() if n != "layer3.2.conv1.weight"}) == (
        ": layer3.2.conv1.weight is missing, and the model has [16, 16, 3, 3]"
    )
    assert said(state | {"conv1.0.weight": torch.zeros(4, 1, 3, 3)}) == (
        ": conv1.0.weight is [4, 1, 3, 3], and the model has [4, 3, 3, 3]"
    )
    assert said(state | {"extra.weight": torch.zeros(1)}) == ", which has no extra.weight"
    torch.save(prefixed(state, "encoder_q.") | prefixed(state, "encoder_k."), path)
    with pytest.raises(UserError, match=r"holds several nets \(encoder_k\., encoder_q\.\)"):
        Pretrained(path, blueprint, seed=0, scale=1.0)
    save_file(foreign, tmp_path / "net.safetensors", {"model": "mine"})
    with pytest.raises(UserError, match=r"; it was exported from --model mine$"):
        Pretrained(tmp_path / "net.safetensors", blueprint, seed=0, scale=1.0)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["pth", "old", "safetensors"]))
def test_whatever_has_happened_to_a_file_the_answer_is_one_line(
    data: st.DataObject, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "net"
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(4)}
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pth")
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] ^= data.draw(st.integers(0, 255))
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        weights = Weights(path)
        for name in weights.shapes:
            weights.tensor(name)
    except UserError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------------------------
# timm's own.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub's, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, repository: str, name: str, revision: str = "main") -> Path:
    """A file as huggingface_hub keeps it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text("c" * 40)
    path = folder / "snapshots" / ("c" * 40) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def test_timms_own_are_found_in_its_cache(cache: Path) -> None:
    with pytest.raises(UserError) as caught:
        timm_weights.find("resnet50")
    assert str(caught.value) == (
        f"--from_pretrained timm: the weights timm/resnet50.a1_in1k are not in {cache}: "
        "type --download to fetch them"
    )
    pickled = put(cache, "timm/resnet50.a1_in1k", "pytorch_model.bin")
    assert timm_weights.find("resnet50") == pickled
    safe = put(cache, "timm/resnet50.a1_in1k", "model.safetensors")
    assert timm_weights.find("resnet50") == safe
    timm_weights.fetch("resnet50")  # nothing to fetch
    tagged = put(cache, "timm/resnet50.tv_in1k", "model.safetensors")
    assert timm_weights.find("resnet50.tv_in1k") == tagged


def test_a_register_of_ones_own(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A revision, a name of its own, a file."""
    source = PretrainedCfg(hf_hub_id="me/net@v2", hf_hub_filename="best.pth")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: source)
    put(cache, "me/net", "best.pth", revision="main")
    with pytest.raises(UserError, match="are not in"):
        timm_weights.find("net")
    path = put(cache, "me/net", "best.pth", revision="v2")
    assert timm_weights.find("net") == path
    source = PretrainedCfg(file=str(tmp_path / "mine.pth"))
    assert timm_weights.find("net") == tmp_path / "mine.pth"


@pytest.mark.parametrize("model", ["preact_resnet_small", "resnetv2_152"])
def test_a_model_of_which_timm_has_none(model: str) -> None:
    for ask in (timm_weights.find, timm_weights.fetch):
        with pytest.raises(UserError) as caught:
            ask(model)
        assert str(caught.value) == (
            f"--from_pretrained timm: timm has no pretrained weights of --model {model}; it has some of "
            "resnetv2_18, resnetv2_34, resnetv2_50, resnetv2_101, resnet50, resnet101, resnet152"
        )


def test_without_a_network_a_download_ends_in_one_line(cache: Path) -> None:
    with pytest.raises(RunError) as caught:
        timm_weights.fetch("resnet50")
    line = str(caught.value)
    assert line.startswith("could not download the weights timm/resnet50.a1_in1k: ") and "\n" not in line
    assert "offline" in line


def test_no_net_that_can_be_partitioned_has_its_weights_renamed_by_timm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """timm renames some models' tensors on loading; here a file's names are the model's."""
    from timm.models import resnet, resnetv2

    asked: list[Any] = []
    for module in (resnet, resnetv2):
        build = module.build_model_with_cfg

        def seen(*args: Any, build: Any = build, **options: Any) -> Any:
            asked.append(options.get("pretrained_filter_fn"))
            return build(*args, **options)

        monkeypatch.setattr(module, "build_model_with_cfg", seen)
    for model in timm_weights.TESTED:
        timm.create_model(model, device="meta")
    assert asked == [None] * len(timm_weights.TESTED)

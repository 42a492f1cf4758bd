"""A checkpoint that is not what was written is refused before anything is read from it, naming the file."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resist_ds.errors import DamagedError
from resist_ds.state.checkpoint import Checkpoint
from resist_ds.state.storage import MANIFEST
from tests.conftest import Ranks, run_ranks
from tests.saved import checkpoints, outcome, tensors, train

pytestmark = pytest.mark.ranks

FILES = [
    *(f"{group}-0000{rank}-of-00002.safetensors" for group in ("model", "optimizer") for rank in (1, 2)),
    *("model.safetensors.index.json", "optimizer.safetensors.index.json", "state.json", "manifest.json"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("damage")
    options = {"rounds": 2, "output_dir": str(folder)}
    run_ranks(train, 2, options, store=folder / "rendezvous")
    return folder / "checkpoints" / "round-000002"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """One to spoil."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def refused(checkpoint: Path, *names: str) -> str:
    """What is said of a spoilt checkpoint; one of `names` must be in it."""
    with pytest.raises(DamagedError) as caught:
        Checkpoint.verified(checkpoint)
    line = str(caught.value)
    assert "\n" not in line and any(str(checkpoint / name) in line for name in names), line
    return line


def test_these_are_the_files(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted(FILES)
    Checkpoint.verified(written).close()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(name: str, copy: Path) -> None:
    """In the header, the padding, the data; at both ends and at random places, one at a time."""
    path = copy / name
    sound = path.read_bytes()
    places = [0, 7, 8, len(sound) // 2, len(sound) - 2, len(sound) - 1]
    places += np.random.default_rng(len(name)).integers(0, len(sound), 20).tolist()
    for i, place in enumerate(places):
        spoilt = bytearray(sound)
        spoilt[place] ^= 1 << i % 8
        path.write_bytes(spoilt)
        refused(copy, name)
    path.write_bytes(sound)
    Checkpoint.verified(copy).close()


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _swap_two_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    a, b = 20, next(i for i in range(21, len(content)) if content[i] != content[20])
    content[a], content[b] = content[b], content[a]
    path.write_bytes(content)


def _link_to_a_copy(path: Path) -> None:
    elsewhere = path.parent.parent / f"copy of {path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil", [Path.unlink, _truncate, _halve, _empty, _append, _swap_two_bytes, _link_to_a_copy, _folder]
)
@pytest.mark.parametrize("name", FILES)
def test_a_spoilt_file(name: str, spoil: Callable[[Path], None], copy: Path) -> None:
    spoil(copy / name)
    refused(copy, name)


@pytest.mark.parametrize("first", FILES)
def test_two_files_that_have_changed_places(first: str, copy: Path) -> None:
    for second in FILES:
        if second != first:
            for a, b in ((first, "aside"), (second, first), ("aside", second)):
                (copy / a).rename(copy / b)
            refused(copy, first, second)
            for a, b in ((first, "aside"), (second, first), ("aside", second)):
                (copy / a).rename(copy / b)
    Checkpoint.verified(copy).close()


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", ".hidden", "notes.txt", "folder/"])
def test_a_file_too_many(name: str, copy: Path) -> None:
    if name.endswith("/"):
        (copy / name).mkdir()
    else:
        (copy / name).write_bytes(b"")
    refused(copy, name.rstrip("/"))


def test_a_file_of_the_checkpoint_before(written: Path, copy: Path) -> None:
    before = written.parent / "round-000001"
    for name in FILES:
        shutil.copy(before / name, copy / name)
        # the manifest of another checkpoint fits none of these files
        refused(copy, *(FILES if name == MANIFEST else [name]))
        shutil.copy(written / name, copy / name)


def test_a_checkpoint_under_another_ones_name(written: Path, tmp_path: Path) -> None:
    assert "its folder is called round-000009" in refused(
        Path(shutil.copytree(written, tmp_path / "round-000009")), "state.json"
    )
    Checkpoint.verified(Path(shutil.copytree(written, tmp_path / "best"))).close()  # any other name will do


# ------------------------------------------------------------------------------------------------------------
# Somebody who seals what he has changed: hashes do not help, and names must.


def seal(folder: Path) -> None:
    """Write a manifest that fits whatever is there."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            content = path.read_bytes()
            files[path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest: dict[str, Any] = {"files": files}
    manifest["sha256"] = hashlib.sha256((json.dumps(manifest, indent=1) + "\n").encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def test_sealing_again_changes_nothing(written: Path, copy: Path) -> None:
    seal(copy)
    assert (copy / MANIFEST).read_bytes() == (written / MANIFEST).read_bytes()


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    seal(path.parent)


INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{rank}-of-00002.safetensors" for rank in (1, 2)]


@pytest.mark.parametrize(
    "file", ["../round-000001/" + SHARDS[0], "/etc/passwd", "", ".", "..", "state.json", "nothing", None, 3]
)
def test_an_index_that_leads_elsewhere(file: object, copy: Path) -> None:
    (copy.parent / "round-000001").mkdir()
    shutil.copy(copy / SHARDS[0], copy.parent / "round-000001")
    change(copy / INDEX, lambda c: c["weight_map"].update({"conv1.0.weight": file}))
    refused(copy, INDEX, "state.json")


def test_a_manifest_that_leads_elsewhere(copy: Path) -> None:
    outside = copy.parent / "outside.safetensors"
    shutil.copy(copy / SHARDS[0], outside)
    for name in ("../outside.safetensors", str(outside), ".."):
        content = json.loads((copy / MANIFEST).read_text())
        del content["sha256"]
        content["files"][name] = content["files"][SHARDS[0]]
        content["sha256"] = hashlib.sha256((json.dumps(content, indent=1) + "\n").encode()).hexdigest()
        (copy / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
        refused(copy, MANIFEST)
        seal(copy)


def test_a_linked_shard_in_a_new_manifest(copy: Path) -> None:
    _link_to_a_copy(copy / SHARDS[1])
    seal(copy)
    assert "no plain file" in refused(copy, SHARDS[1])


INDEX_EDITS: dict[str, Callable[[Any], None]] = {
    "a name is gone": lambda c: c["weight_map"].pop("fc.bias"),
    "a name too many": lambda c: c["weight_map"].update({"fc.extra": SHARDS[0]}),
    "a name in the other shard": lambda c: c["weight_map"].update(
        {"fc.bias": SHARDS[c["weight_map"]["fc.bias"] == SHARDS[0]]}
    ),
    "another size": lambda c: c["metadata"].update(total_size=c["metadata"]["total_size"] + 4),
    "no map": lambda c: c.pop("weight_map"),
    "a list for a map": lambda c: c.update(weight_map=[]),
    "no metadata": lambda c: c.pop("metadata"),
}


@pytest.mark.parametrize("edit", INDEX_EDITS)
def test_an_index_of_another_model(edit: str, copy: Path) -> None:
    change(copy / INDEX, INDEX_EDITS[edit])
    refused(copy, INDEX, *SHARDS)


def test_shards_that_have_changed_places_under_a_new_manifest(copy: Path) -> None:
    for a, b in ((SHARDS[0], "aside"), (SHARDS[1], SHARDS[0]), ("aside", SHARDS[1])):
        (copy / a).rename(copy / b)
    seal(copy)
    refused(copy, *SHARDS)


@pytest.mark.parametrize("what", ["type", "shape", "name"])
def test_a_tensor_of_another_kind(what: str, copy: Path) -> None:
    found = load_file(copy / SHARDS[0])
    name = next(n for n, array in found.items() if array.ndim == 4)
    array = found.pop(name)
    if what == "type":
        found[name] = array.view(np.int32)
    elif what == "shape":
        found[name] = array.reshape(array.shape[::-1])
    else:
        found[name + "s"] = array
    save_file(found, copy / SHARDS[0], {"format": "pt"})
    seal(copy)
    assert ("I32" if what == "type" else name) in refused(copy, SHARDS[0])


STATE_EDITS: dict[str, Callable[[Any], None]] = {
    "round": lambda c: c.update(round=3),
    "config": lambda c: c["config"].update(lr=1.0),
    "config_hash": lambda c: c.update(config_hash="0" * 64),
    "model": lambda c: c.update(model="resnet50"),
    "classes": lambda c: c.update(num_classes=11),
    "dtype": lambda c: c.update(dtype="float64"),
    "no dtype": lambda c: c.update(dtype="nn"),
    "optimizer": lambda c: c.update(optimizer={"vectors": ["exp_avg"], "counter": None}),
    "no optimizer": lambda c: c.update(optimizer={"vectors": [], "counter": None}),
    "odd optimizer": lambda c: c.update(optimizer=3),
    "no config": lambda c: c.update(config={}),
    "a number for a text": lambda c: c.update(model=50),
    "a text for a number": lambda c: c.update(step="4"),
    "an odd config": lambda c: c.update(config=None),
}


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_a_state_of_another_run(edit: str, copy: Path) -> None:
    change(copy / "state.json", STATE_EDITS[edit])
    refused(copy, *FILES)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"files": 3}'])
@pytest.mark.parametrize("name", ["state.json", INDEX, MANIFEST])
def test_json_that_is_none_of_ours(name: str, content: bytes, copy: Path) -> None:
    (copy / name).write_bytes(content)
    if name != MANIFEST:
        seal(copy)
    refused(copy, name)


# ------------------------------------------------------------------------------------------------------------
# What a run does with it.


def resume(comm: Any, options: dict[str, Any]) -> str:
    """Resume; returns the error."""
    try:
        train(comm, options)
    except DamagedError as error:
        return str(error)
    return ""


def test_an_explicit_path_that_is_damaged_is_an_error_on_all_ranks(copy: Path, ranks: Ranks) -> None:
    _truncate(copy / SHARDS[1])
    run = copy.parent / "run"
    errors = ranks(resume, 2, {"resume": str(copy), "rounds": 4, "output_dir": str(run)})
    assert errors == [errors[0]] * 2
    assert errors[0].startswith(f"{copy / SHARDS[1]} is damaged: it has ")
    assert not (run / "metrics.jsonl").exists()


def test_auto_falls_back_and_says_so(written: Path, tmp_path: Path, ranks: Ranks) -> None:
    folder = tmp_path / "run"
    shutil.copytree(written.parent.parent, folder)
    before = tensors(folder / "checkpoints" / "round-000002")
    _append(folder / "checkpoints" / "round-000002" / "state.json")
    options = {"resume": "auto", "rounds": 2, "output_dir": str(folder)}
    first, second = ranks(outcome, 2, tmp_path, options)
    assert (first.code, second) == (0, (0, ""))
    warnings = first.stderr.splitlines()
    assert re.fullmatch(
        f"warning: {folder}/checkpoints/round-000002/state.json is damaged: it has .*; "
        "trying the checkpoint before it",
        warnings[0],
    )
    assert warnings[1:] == [f"warning: checkpoints that are not sound are now in {folder}/earlier-1"]
    assert checkpoints(folder / "earlier-1") == ["round-000002"]
    said = (tmp_path / "stdout0").read_text()
    assert f"goes on from {folder}/checkpoints/round-000001: 1 rounds are done" in said
    assert checkpoints(folder) == ["round-000001", "round-000002"]
    Checkpoint.verified(folder / "checkpoints" / "round-000002").close()  # which is now a sound one
    after = tensors(folder / "checkpoints" / "round-000002")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)

"""Files that are whole or not there: written, hashed and synced here, and checked before they are read.

A folder of files is sealed by `manifest.json`, which holds the size and sha256 of every other file and of
itself. Tensors are safetensors, all else JSON; nothing is ever unpickled. (Of the safetensors library only
the reading side serves: its writer neither syncs nor hashes, and its reader finds no flipped bit.)
No communication.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resist_ds.errors import DamagedError
from resist_ds.files import patiently, status

T = TypeVar("T")

MANIFEST = "manifest.json"
_READ = 1 << 20  # bytes hashed at a time
_MAX_JSON = 1 << 28  # bytes; no file of ours comes near

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bfloat16: "BF16"}
DTYPES |= {torch.float16: "F16"}
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


class Spec(NamedTuple):
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """Size in bytes and sha256 of a file."""

    size: int
    sha256: str


def write(path: Path, parts: Iterable[bytes | memoryview]) -> Entry:
    """Create a file, which must not exist, and have it on the disk; returns its size and hash."""
    size, digest = 0, hashlib.sha256()
    try:
        with path.open("xb", buffering=0) as file:
            for part in parts:
                digest.update(part)
                rest = memoryview(part).cast("B")
                size += len(rest)
                while rest:  # an unbuffered file may take less at a time than it is given
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:  # that of a write names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Entry(size, digest.hexdigest())


def write_json(path: Path, value: Any) -> Entry:
    """Create a JSON file; NaN and Inf are refused."""
    return write(path, [_dump(value)])


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    specs: Mapping[str, Spec],
    metadata: Mapping[str, str],
) -> Entry:
    """Create a safetensors file from tensors on any device; one copy in host memory at a time.

    Args:
        tensors: in the order of `specs`, perhaps made one by one on the way.
        specs: of each.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        shape = list(spec.shape)
        header[name] = {"dtype": DTYPES[spec.dtype], "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # so that the data are aligned

    def parts() -> Iterable[bytes | memoryview]:
        yield len(head).to_bytes(8, "little") + head
        for (name, spec), (given, tensor) in zip(specs.items(), tensors, strict=True):
            assert name == given and spec == Spec(tensor.dtype, tuple(tensor.shape)), (name, given, spec)
            host = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield host.numpy().data

    return write(path, parts())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(folder: Path, files: Mapping[str, Entry]) -> Entry:
    """Write the manifest of a folder's files; returns its own entry."""
    content: dict[str, Any] = {"files": {name: asdict(files[name]) for name in sorted(files)}}
    content["sha256"] = hashlib.sha256(_dump(content)).hexdigest()
    return write_json(folder / MANIFEST, content)


def check_sealed(folder: Path) -> dict[str, Entry]:
    """Compare every byte of a sealed folder with its manifest; returns {name: entry}.

    Raises:
        DamagedError: a file is missing, changed, too much, or no plain file.
        UnreadableError: a file cannot be read; so with all that reads here.
    """
    files = check_listing(folder)
    for name, entry in files.items():
        if _digest(folder / name) != entry.sha256:
            raise DamagedError(f"{folder / name} is damaged: its bytes are not those that were written")
    return files


def check_listing(folder: Path) -> dict[str, Entry]:
    """The quick part of `check_sealed`: the manifest, and names and sizes. Raises `DamagedError`."""
    found = status(folder)
    if found is None or not stat.S_ISDIR(found.st_mode):
        raise DamagedError(f"{folder}: no such folder")
    files = read_manifest(folder)

    def scan() -> dict[str, os.stat_result]:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}

    there = _present(folder, scan)
    for name in sorted(there.keys() - files.keys() - {MANIFEST}):
        raise DamagedError(f"{folder / name} does not belong to this checkpoint: its manifest lacks it")
    for name, entry in files.items():
        if name not in there:
            raise DamagedError(f"{folder / name} is missing")
        if not stat.S_ISREG(there[name].st_mode):
            raise DamagedError(f"{folder / name} is no plain file")
        if there[name].st_size != entry.size:
            raise DamagedError(
                f"{folder / name} is damaged: it has {there[name].st_size} bytes, not {entry.size}"
            )
    return files


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What a sealed folder's manifest names. Raises `DamagedError` where it does not vouch for itself."""
    path = folder / MANIFEST
    content = read_json(path)
    try:
        said = content.pop("sha256")
        files = {name: Entry(**entry) for name, entry in content["files"].items()}
        sound = set(content) == {"files"} and said == hashlib.sha256(_dump(content)).hexdigest()
        sound = sound and _present(path, path.read_bytes) == _dump({**content, "sha256": said})
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise DamagedError(f"{path} is damaged: its bytes are not those that were written")
    for name in files:
        if name in ("", ".", "..", MANIFEST) or Path(name).name != name:
            raise DamagedError(f"{path} names {name!r}, which is no file of this folder")
    return files


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises `DamagedError`."""
    found = _present(path, lambda: os.lstat(path))
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_JSON:
        raise DamagedError(f"{path} is no plain JSON file")
    try:
        return json.loads(_present(path, path.read_bytes))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def open_safetensors(path: Path) -> Any:
    """A safetensors file to read tensors from, as numpy arrays in host memory. Raises `DamagedError`."""

    def opened() -> Any:
        with path.open("rb"):  # the library calls every error of the disk "no such file"
            pass
        return safe_open(path, "numpy")

    try:
        return _present(path, opened)
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def read_specs(path: Path) -> dict[str, Spec]:
    """What a safetensors file holds. Raises `DamagedError`."""
    try:
        with open_safetensors(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {n: Spec(_BY_NAME[s.get_dtype()], tuple(s.get_shape())) for n, s in slices.items()}
    except KeyError as error:
        raise DamagedError(f"{path} holds tensors of type {error}, which are never written") from None
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {' '.join(str(error).split())}") from None


def _present(path: Path, read: Callable[[], T]) -> T:
    """`patiently`, where a file that is not there, or no file, is damage."""
    try:
        return patiently(path, read)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path} is no plain file ({error.strerror})") from None


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _digest(path: Path) -> str:
    def read() -> str:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while part := file.read(_READ):
                digest.update(part)
        return digest.hexdigest()

    return _present(path, read)

"""A foreign file of weights, read tensor by tensor: safetensors, or plain tensors that `torch.save` wrote.

Nothing in a file is executed. A wrapping around the tensors and a prefix before their names are taken off,
and that is said; a file that holds no weights is refused in words that say what it is.
"""

import argparse
import errno
import pickle
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resist_ds.errors import RunError, UserError
from resist_ds.files import names, patiently, status

# Under which of several keys the weights are, and in which order: as timm's load_state_dict has it.
_WRAPPINGS = ("state_dict_ema", "model_ema", "state_dict", "model")
_DEPTH = 3  # wrappings in wrappings
_HEAD = 512  # bytes that tell what a file is
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"7z\xbc\xaf": "7-Zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_FOREIGN = {b"\x89HDF": "an HDF5 file (Keras?)", b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy array"}


class Weights:
    """The tensors of a file, by name.

    Attributes:
        shapes: {name: shape}, without wrapping and prefixes.
        metadata: that of a safetensors file.

    Raises:
        UserError: it is no file of weights.
        UnreadableError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, str] = {}
        self._files = ExitStack()
        self._said: list[str] = []
        self._read: Callable[[str], Tensor]
        kind = _kind(path)
        shapes = self._open_safetensors() if kind == "safetensors" else self._load(whole=kind == "pickle")
        from timm.models import clean_state_dict  # which imports all of timm's nets

        self._stored: dict[str, str] = clean_state_dict({name: name for name in shapes})
        self.shapes = {name: shapes[stored] for name, stored in self._stored.items()}
        self._say_prefixes({stored.removesuffix(name) for name, stored in self._stored.items()} - {""})

    @property
    def remark(self) -> str | None:
        """What was taken off, if anything."""
        return f"{self.path}: {', '.join(self._said)}" if self._said else None

    def take_off(self, prefix: str) -> None:
        """Go on with those names alone that begin with `prefix`, without it."""
        inside = {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}
        aside = len(self.shapes) - len(inside)
        self._stored = {name: self._stored[before] for name, before in inside.items()}
        self.shapes = {name: self.shapes[before] for name, before in inside.items()}
        self._say_prefixes({prefix})
        if aside:
            self._said.append(f"{aside} other tensor{'s are' if aside > 1 else ' is'} left out")

    def tensor(self, name: str) -> Tensor:
        """One tensor of floats, in host memory; halves are widened.

        Raises:
            UserError: it holds something else, or NaN or Inf.
        """
        stored = self._stored[name]
        tensor = self._read(stored)
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(
                f"--from_pretrained {self.path}: {stored} is of {tensor.dtype}, and "
                "weights are plain floating point numbers"
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        if not tensor.isfinite().all():
            raise UserError(
                f"--from_pretrained {self.path}: {stored} holds NaN or Inf: training from it cannot succeed, "
                "so type another file"
            )
        return tensor

    def close(self) -> None:
        """Close the file."""
        self._files.close()

    def _say_prefixes(self, prefixes: set[str]) -> None:
        if prefixes:
            self._said.append(f"{' and '.join(sorted(prefixes))} is taken off the names")

    def _open_safetensors(self) -> dict[str, tuple[int, ...]]:
        path = self.path

        def opened() -> Any:
            with path.open("rb"):  # the library calls every error of the disk "no such file"
                pass
            return safe_open(path, "pt")

        try:
            file = self._files.enter_context(patiently(path, opened))
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise _damaged(path, error) from None
        self.metadata = file.metadata() or {}
        self._read = file.get_tensor
        return shapes

    def _load(self, whole: bool) -> dict[str, tuple[int, ...]]:
        content = _unpickled(self.path, mapped=not whole)
        where, tensors = _tensors_of(content, self.path)
        if where:
            self._said.append(f"{where} is what is read")
        if whole:
            self._said.append(
                "its old format cannot be read in parts, so at the start every rank holds all of it in memory"
            )
        self._read = lambda name: tensors[name].detach()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _kind(path: Path) -> str:
    """What a file is, by its first bytes: "safetensors", "zip" or "pickle". Raises `UserError` for others."""

    def head() -> bytes:
        with path.open("rb") as file:
            return file.read(_HEAD)

    found = status(path)
    if found is None:
        raise UserError(f"--from_pretrained {path}: no such file")
    if stat.S_ISDIR(found.st_mode):
        raise UserError(f"--from_pretrained {path} is a folder: {_inside(path)}")
    start = patiently(path, head)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    packed = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    foreign = next((name for magic, name in _FOREIGN.items() if start.startswith(magic)), None)
    if not start:
        said = "is empty: download or copy it again"
    elif text.startswith(b"version https://git-lfs"):
        said = "is a Git LFS pointer, not the weights: type git lfs pull in its repository"
    elif text.startswith(b"<"):
        said = "is a web page, not the weights: download it again, from the link to the file itself"
    elif start[8:9] == b"{":
        return "safetensors"
    elif text.startswith((b"{", b"[")):
        said = "is JSON, not the weights: type the file of the tensors"
    elif start.startswith(b"PK\x03\x04") and start[30 : 30 + sum(start[26:27])].endswith(b".npy"):
        said = "is an archive of NumPy arrays, and PyTorch's weights are asked for"
    elif start.startswith(b"PK\x03\x04"):
        return "zip"
    elif start.startswith(b"\x80"):
        return "pickle"
    elif packed or start[257:262] == b"ustar":
        said = f"is packed ({packed or 'tar'}): unpack it, and type the file that was in it"
    elif foreign:
        said = f"is {foreign}, and PyTorch's weights are asked for"
    else:
        said = "is neither a safetensors file nor one that torch.save has written"
    raise UserError(f"--from_pretrained {path} {said}")


def _inside(folder: Path) -> str:
    """What to type instead of a folder."""
    there = sorted(names(folder))
    if "manifest.json" in there:
        return f"if it is a checkpoint of ours, type --resume {folder}, or export it (tools/export.py)"
    if "checkpoints" in there:
        return "if it is that of a run of ours, export one of its checkpoints first (tools/export.py)"
    files = [name for name in there if name.endswith(_SUFFIXES)]
    return f"type the file in it, {folder / files[0]}" if files else "type a file of weights"


def _unpickled(path: Path, mapped: bool) -> Any:
    """What `torch.save` wrote, plain data and tensors alone; mapped, so that only what is used is read."""

    def load() -> Any:
        with path.open("rb"):  # so that an error of the disk is one
            pass
        # timm's and torchvision's training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a file is that will be refused
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except OSError as error:
                if error.errno in (None, errno.EINVAL):  # a place that a file which is cut off does not have
                    raise ValueError(error.strerror or "it ends too early") from None
                raise

    try:
        return patiently(path, load)
    except RunError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise _damaged(path, "a pickle, but none of tensors") from None
        raise UserError(
            f"--from_pretrained {path} holds a pickled {found.group(1)} beside or instead of plain tensors: "
            "nothing of the kind is unpickled here, since it may run code; save net.state_dict() alone"
        ) from None
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"--from_pretrained {path} is a TorchScript program: save its state_dict() alone"
            ) from None
        raise _damaged(path, error) from None


def _damaged(path: Path, error: object) -> UserError:
    words = " ".join(str(error).split()) or type(error).__name__
    first = re.split(r"(?<=\w)\. |: This is", words)[0]
    return UserError(f"--from_pretrained {path} is damaged or cut off ({first}): download or copy it again")


def _tensors_of(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """(the keys that lead there, {name: tensor}) of what `torch.save` wrote."""
    where: list[str] = []
    while isinstance(content, Mapping) and len(where) <= _DEPTH:
        own = _tensors(content)
        counts = {key: n for key, value in content.items() if isinstance(key, str) and (n := _count(value))}
        known = next((key for key in _WRAPPINGS if key in counts), None)
        most = max(counts.values(), default=0)
        largest = [key for key, count in counts.items() if count == most > len(own)]
        if known is None and len(largest) > 1:
            raise UserError(
                f"--from_pretrained {path} holds several nets ({', '.join(largest)}): write one of them into "
                "a file of its own"
            )
        key = known or next(iter(largest), None)
        if key is None and own:
            return ".".join(where), own
        if key is None:
            break
        where.append(key)
        content = content[key]
    holds = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise UserError(
        f"--from_pretrained {path} holds no tensors by name ({holds or 'nothing'}): save net.state_dict()"
    )


def _count(content: Any, depth: int = _DEPTH) -> int:
    """Tensors by name in dictionaries of dictionaries; none in a tensor."""
    if not isinstance(content, Mapping) or depth < 0:
        return 0
    inside = (value for key, value in content.items() if isinstance(key, str))
    return len(_tensors(content)) + sum(_count(value, depth - 1) for value in inside)


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}

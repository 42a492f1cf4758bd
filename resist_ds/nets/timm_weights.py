"""timm's own pretrained weights of a model (`--from_pretrained timm`): where its cache has them.

timm's register of models says where they are; huggingface_hub, which timm uses, keeps and fetches them. None
of the nets that ResIST can partition needs the renaming that timm does for some others. No communication.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import logging

from resist_ds.errors import RunError, UserError
from resist_ds.nets.blueprint import TESTED

if TYPE_CHECKING:  # an import would run timm's package, and that imports all nets
    from timm.models import PretrainedCfg

_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's order


def find(model: str) -> Path:
    """The file of a model's weights on this machine; the network is not asked.

    Raises:
        UserError: timm has none, or they were never fetched.
    """
    source = _source(model)
    path = _here(source)
    if path is None:
        raise UserError(
            f"--from_pretrained timm: the weights {source.hf_hub_id} are not in {constants.HF_HUB_CACHE}: "
            "type --download to fetch them"
        )
    return path


def fetch(model: str) -> None:
    """Fetch a model's weights unless they are here. It writes: call it on one rank per machine.

    Raises:
        UserError: timm has none.
        RunError: the network or the disk does not give them.
    """
    source = _source(model)
    if _here(source) is not None:
        return
    repository, revision = _repository(source)
    lacking = ""
    logging.set_verbosity_error()  # it would tell every attempt
    for name in _names(source):
        try:
            hf_hub_download(repository, name, revision=revision)
            return
        except LocalEntryNotFoundError as error:  # it is an EntryNotFoundError too
            raise _failed(source, error.__cause__ or error) from None
        except EntryNotFoundError:  # as safetensors, say
            lacking = f"it has no {name}"
        except Exception as error:  # httpx's, requests', the hub's own: whichever it uses for the network
            raise _failed(source, error) from None
    raise _failed(source, lacking)


def _source(model: str) -> "PretrainedCfg":
    source = timm.get_pretrained_cfg(model)
    if source is None or not (source.file or source.hf_hub_id):
        those = ", ".join(name for name in TESTED if _has_weights(name))
        raise UserError(
            f"--from_pretrained timm: timm has no pretrained weights of --model {model}; it has some of "
            f"{those}"
        )
    return source


def _has_weights(model: str) -> bool:
    source = timm.get_pretrained_cfg(model)
    return source is not None and bool(source.hf_hub_id)


def _here(source: "PretrainedCfg") -> Path | None:
    if source.file:  # of a model that the user has registered
        return Path(source.file)
    repository, revision = _repository(source)
    for name in _names(source):
        # hf_hub_download would ask the network for something else, even with local_files_only.
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def _repository(source: "PretrainedCfg") -> tuple[str, str | None]:
    """(repository, revision) of `owner/name@revision`."""
    repository, _, revision = str(source.hf_hub_id).partition("@")
    return repository, revision or None


def _names(source: "PretrainedCfg") -> tuple[str, ...]:
    return (source.hf_hub_filename,) if source.hf_hub_filename else _FILES


def _failed(source: "PretrainedCfg", error: object) -> RunError:
    words = str(error).strip().partition("\n")[0] or type(error).__name__
    return RunError(f"could not download the weights {source.hf_hub_id}: {words}")

"""From a checkpoint to one plain timm state dict: no code of ours is needed to load it.

In training K of P pool blocks are active, and at test time each residual is scaled by K/P (paper, section
3.2). The scale is folded into the last layer of each pool block's branch. Tensors go through memory one by
one. No communication.
"""

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from resist_ds.errors import RunError, UserError
from resist_ds.nets.pretrained import FOLDED
from resist_ds.state import storage
from resist_ds.state.checkpoint import Checkpoint


def export(checkpoint: Checkpoint, out: Path, *, fold: bool = True) -> tuple[str, ...]:
    """Write a checkpoint's global model as one safetensors file; returns warnings.

    Args:
        out: the file, which must not exist.
        fold: without it the file holds the weights as trained, which need the scale at test time.

    Raises:
        UserError: `out` exists.
        RunError: it cannot be written, or the checkpoint cannot be read.
    """
    state, blueprint = checkpoint.state, checkpoint.blueprint
    specs = checkpoint.specs["model"]
    prefixes = tuple(blueprint.block_prefix(block) for block in range(blueprint.pool))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in specs:
            tensor = checkpoint.tensor("model", name)
            prefix = next((p for p in prefixes if name.startswith(p)), None)
            if fold and prefix is not None and tensor.is_floating_point() and not _is_statistic(name):
                blueprint.fold({name.removeprefix(prefix): tensor}, state.test_scale)
            yield name, tensor

    metadata = {
        "format": "pt",
        FOLDED: str(fold).lower(),
        "residual_scale": repr(state.test_scale),
        "model": state.model,
        "num_classes": str(state.num_classes),
        "round": str(state.round),
    }
    if out.exists():
        raise UserError(f"{out} exists: type another name")
    partial = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    try:
        storage.write_safetensors(partial, tensors(), specs, metadata)
        os.replace(partial, out)
        storage.sync_folder(out.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise RunError(f"{out} cannot be written ({error.strerror})") from None
        raise  # of reading, say
    if state.statistics_round == state.round:
        return ()
    since = (
        "were never estimated" if state.statistics_round is None else f"are of round {state.statistics_round}"
    )
    return (
        f"BatchNorm's statistics {since}, and the weights of round {state.round}: the model will test badly. "
        "Checkpoints after an evaluation have fresh ones (--eval_every)",
    )


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2].startswith("running_")

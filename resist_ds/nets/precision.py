"""In which numbers a net is computed, on which kernels, and whether they are finite. No communication."""

import os
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resist_ds.options.config import Config


def choose_kernels(config: Config) -> None:
    """Let a GPU's libraries choose their kernels by speed, or so that a run gives the same bits again.

    Call it before anything is computed. On a CPU kernels are deterministic anyway; only what has no
    deterministic kernel at all is refused there too, with torch's RuntimeError.
    """
    torch.backends.cudnn.benchmark = not config.deterministic  # by speed: shapes never change
    if config.deterministic or torch.are_deterministic_algorithms_enabled():  # it imports torch's compiler
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS insists
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tf32 = not config.deterministic if config.tf32 is None else config.tf32
    # The older names: torch's compiler reads these, and mixing them with the newer ones is an error.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def low_precision(config: Config) -> torch.dtype | None:
    """Of convolutions and products under `--mixed_precision`; None: that of the weights."""
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass under `--mixed_precision`.

    Without its cache: that finds the cast of a weight by the tensor's identity, and evaluation puts one
    block after the other into the same tensors.
    """
    dtype = low_precision(config)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def is_finite(vector: Tensor) -> bool:
    """Whether no element is NaN or Inf; without a copy of it."""
    low, high = torch.aminmax(vector)  # NaNs are propagated
    return bool(torch.isfinite(low) & torch.isfinite(high))

"""The precision of a forward pass, and whether numbers are finite. No communication."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resist_ds.options.config import Config


def autocast(config: Config, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass under `--mixed_precision`.

    Without its cache: that finds the cast of a weight by the tensor's identity, and evaluation puts one
    block after the other into the same tensors.
    """
    dtypes = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes[config.mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def is_finite(vector: Tensor) -> bool:
    """Whether no element is NaN or Inf; without a copy of it."""
    low, high = torch.aminmax(vector)  # NaNs are propagated
    return bool(torch.isfinite(low) & torch.isfinite(high))

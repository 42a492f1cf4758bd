"""Torch's SGD and AdamW without the decorators that import torch's compiler: a second of a start, 150 MB.

The same methods, from inside their decorators, so the same bits. The decorators keep the compiler out of an
optimizer: here it never looks in, since `--compile` is for the sub-ResNet alone.
"""

from inspect import unwrap
from typing import Any

import torch
from torch import nn

from resist_ds.options.config import Config


class _Undecorated(torch.optim.Optimizer):
    """To stand first among the bases of an optimizer."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class SGD(_Undecorated, torch.optim.SGD):
    """torch.optim.SGD."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class AdamW(_Undecorated, torch.optim.AdamW):
    """torch.optim.AdamW."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def optimizer_of(
    config: Config, parameters: list[nn.Parameter], *, decorated: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that a run's options ask for, in the form that is fastest where its parameters are.

    Args:
        decorated: torch's own class, for those who look at the class (DeepSpeed, FSDP2).
    """
    on_gpu = parameters[0].device.type == "cuda"
    kind: Any
    if config.optimizer == "adamw":
        kind = torch.optim.AdamW if decorated else AdamW
        # Both forms keep the step counters on the device, where they travel with their piece. CUDA's fused
        # kernel takes a counter's bytes for float32, whatever it is; here it is of the weights' own type.
        wide = on_gpu and config.dtype == "float64"
        form = {"foreach": True, "capturable": True} if wide else {"fused": True}
        optimizer = kind(parameters, config.lr, config.two_betas, config.eps, config.weight_decay, **form)
        optimizer._warned_capturable_if_run_uncaptured = True  # that it is not captured is meant
        return optimizer
    kind = torch.optim.SGD if decorated else SGD
    return kind(
        parameters,
        config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        # One kernel for all tensors; and a loss scaler then asks it to leave a step out, not the host.
        fused=(on_gpu and not decorated) or None,
    )

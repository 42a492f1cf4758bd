"""The weights in low precision: what convolutions and products are computed with under mixed precision.

Autocast would cast every weight in every forward pass, and every weight's gradient back: on a GPU two kernels
for each of them, most too small to fill it. Here all weights are cast at once, and so are all gradients. The
numbers are autocast's, to the bit.
"""

import torch
from torch import Tensor, nn


class Shadow:
    """The low-precision copies of a net's weights that stand in their places in it, as its parameters.

    Args:
        pairs: (part of the flat state, the same in low precision) whose first are cast into the second.
        weights: name → the weight, a parameter of the optimizer.
        copies: name → the same tensor as a view of the low-precision parts.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: list[tuple[Tensor, Tensor]],
        weights: dict[str, nn.Parameter],
        copies: dict[str, Tensor],
    ):
        self._pairs = pairs
        self._weights: list[nn.Parameter] = []
        self._copies: list[nn.Parameter] = []
        for name in cast_by_autocast(module):
            owner, _, leaf = name.rpartition(".")
            copy = nn.Parameter(copies[name])
            setattr(module.get_submodule(owner), leaf, copy)
            self._weights.append(weights[name])
            self._copies.append(copy)

    @torch.no_grad()
    def cast(self) -> None:
        """Make the copies what the weights are now."""
        for part, low in self._pairs:
            low.copy_(part)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to those of the weights, in the weights' precision; drop the former."""
        first: tuple[list[Tensor], list[Tensor]] = [], []
        more: tuple[list[Tensor], list[Tensor]] = [], []
        for weight, copy in zip(self._weights, self._copies, strict=True):
            if copy.grad is None:  # of a block that was skipped
                continue
            sums, found = more if weight.grad is not None else first
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
            sums.append(weight.grad)
            found.append(copy.grad)
            copy.grad = None
        if first[0]:
            torch._foreach_copy_(*first)
        if more[0]:
            torch._foreach_add_(*more)


def cast_by_autocast(module: nn.Module) -> list[str]:
    """Names of the parameters that autocast would cast: those of convolutions and products."""
    return [
        f"{path}.{leaf}"
        for path, part in module.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear)
        for leaf, _ in part.named_parameters(recurse=False)
    ]

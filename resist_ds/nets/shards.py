"""A tensor's rows, spread over the lanes of a team as FSDP2 spreads them: along its first dimension.

Every lane has ⌈rows / lanes⌉ of them; where these do not divide, the last ones have fewer, and what is left
of their place stays zero.
"""

from collections.abc import Sequence

from torch import Tensor

from resist_ds.nets.subnet import PartLayout


def rows(value: Tensor, lane: int, lanes: int) -> Tensor:
    """Those of a whole tensor [n, …] that lie with a lane: a view."""
    each = -(-len(value) // lanes)
    return value[min(lane * each, len(value)) : min((lane + 1) * each, len(value))]


def used(part: Tensor, rows_of_all: int, lane: int) -> Tensor:
    """The view of a lane's place [⌈n / lanes⌉, …] that holds rows of a tensor with so many."""
    return part[: max(0, min(len(part), rows_of_all - lane * len(part)))]


def place(value: Tensor, part: Tensor, lane: int, lanes: int) -> None:
    """Copy a lane's rows of a whole tensor into their place."""
    if lanes == 1 or part.dim() == 0:  # a step counter, which every lane has
        part.copy_(value)
    else:
        used(part, len(value), lane).copy_(rows(value, lane, lanes))


def join(parts: Sequence[Tensor], out: Tensor) -> None:
    """Put a tensor together in `out` from all lanes' places, in the order of the lanes."""
    for lane, part in enumerate(parts):
        rows(out, lane, len(parts)).copy_(used(part, len(out), lane))


def join_part(layout: PartLayout, whole: PartLayout, parts: Sequence[Tensor], out: Tensor) -> None:
    """The same for all parameters of a part (shared, or a slot): the lanes' vectors into that of a whole."""
    views = [layout.views(part) for part in parts]
    for name, tensor in whole.views(out).items():
        join([view[name] for view in views], tensor)

"""What a field of `Config` says of itself: its help, its limits, whether it shapes what is trained."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import TypeVar

T = TypeVar("T")

TIMM = "timm"  # of --from_pretrained: timm's own weights


def option(
    default: T | Callable[[], T],
    doc: str,
    *,
    low: float = 0,
    below: float = math.inf,
    group: str = "",
    free: bool = False,
    null: str | None = None,
    many: bool = False,
) -> T:
    """A field and its help. A number must lie in [low, below); `group` opens a section of `--help`.

    `free`: it does not shape what is trained, so a resumed run may have another value.
    `null`: what a null means to an option that has none in its type, as the None of a sweep: nothing of it.
    `many`: a text of values that are joined by commas, which may be a list in a YAML file.
    """
    metadata = dict(doc=doc, low=low, below=below, group=group, free=free, null=null, many=many)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)

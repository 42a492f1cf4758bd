"""A checkpoint's copy in host memory, so that it can be written while training goes on.

On a CPU each tensor is copied. From a GPU all tensors go into one buffer of pinned memory, which is kept for
the next checkpoint, and the copies are only queued: what is queued behind them on the same stream, the next
local steps among it, cannot overtake them, and the thread that writes waits for the event at their end.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from resist_ds.memory import pinned_bytes
from resist_ds.nets.subnet import ALIGNMENT

Tensors = dict[str, dict[str, Tensor]]  # {group: {name: tensor}}


class Snapshot:
    """Room for copies of a checkpoint's tensors.

    Attributes:
        nbytes: of host memory that the largest copy took so far.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._room = torch.empty(0, dtype=torch.uint8)
        self.nbytes = 0

    def take(self, tensors: Tensors) -> tuple[Tensors, Callable[[], None]]:
        """Begin to copy tensors of this rank; the copy, and the wait until it is there (for any thread).

        A copy is valid until the next one is taken. Errors: MemoryError or RuntimeError without host memory.
        """
        if self._device.type == "cpu":
            copied = {
                group: {n: t.to("cpu", copy=True) for n, t in g.items()} for group, g in tensors.items()
            }
            self.nbytes = max(self.nbytes, sum(t.nbytes for g in copied.values() for t in g.values()))
            return copied, lambda: None
        runs = _runs(t for group in tensors.values() for t in group.values())
        self._reserve(sum(_aligned(run.nbytes) for run, _ in runs))
        copies: dict[int, Tensor] = {}
        start = 0
        for run, members in runs:
            room = self._room[start : start + run.nbytes].view(run.dtype)
            room.copy_(run, non_blocking=True)
            start += _aligned(run.nbytes)
            for tensor in members:
                offset = room.storage_offset() + tensor.storage_offset() - run.storage_offset()
                copies[id(tensor)] = room.as_strided(tensor.shape, tensor.stride(), offset)
        there = torch.cuda.Event(blocking=True)
        there.record()
        copied = {group: {n: copies[id(t)] for n, t in g.items()} for group, g in tensors.items()}
        return copied, there.synchronize

    def _reserve(self, size: int) -> None:
        """Have room for so many bytes; what was there is too small, and given back first."""
        if self._room.numel() < size:
            self._room = torch.empty(0, dtype=torch.uint8)
            self._room = torch.empty(pinned_bytes(size), dtype=torch.uint8, pin_memory=True)
            self.nbytes = self._room.nbytes


def _runs(tensors: Iterable[Tensor]) -> list[tuple[Tensor, list[Tensor]]]:
    """Dense tensors put together to flat runs of the vectors of which they are views: (run, its tensors).

    The padding between neighbours does not part them: a block that is wholly owned is one run, with its
    momentum.
    """

    def place(tensor: Tensor) -> tuple[int, int]:
        """Where its memory begins, and where in that, in elements, it begins."""
        offset = int(tensor.storage_offset())
        return tensor.data_ptr() - offset * tensor.element_size(), offset

    groups: list[list[Tensor]] = []
    memory, end = 0, 0
    for tensor in sorted(tensors, key=place):
        (its, start), last = place(tensor), groups[-1][-1] if groups else None
        near = its == memory and 0 <= start - end < ALIGNMENT
        if last is not None and near and last.dtype == tensor.dtype:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
        memory, end = its, start + tensor.numel()
    runs = []
    for group in groups:
        first, last = group[0], group[-1]
        length = int(last.storage_offset()) + last.numel() - int(first.storage_offset())
        runs.append((first.as_strided((length,), (1,)), group))
    return runs


def _aligned(size: int) -> int:
    return -(-size // 64) * 64

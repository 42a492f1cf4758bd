"""Peak memory over an interval, measured: allocated and reserved on a GPU, resident on a CPU.

And what pinned host memory really takes.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from resist_ds.errors import RunError

GIB = 1 << 30


class PeakMemory:
    """The highest memory use since the last reset, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        """Start a new interval."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux: the peak becomes what is resident now. Elsewhere peaks are since the process started.
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def now(self) -> int:
        """Bytes in use: allocated on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        try:
            return psutil.Process().memory_info().rss
        except (psutil.Error, OSError):  # without /proc: what is certainly enough
            return _resident_peak()

    def read(self) -> tuple[int, int]:
        """(peak, reserved): allocated and reserved by torch on a GPU; resident, twice, on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
        peak = _resident_peak()
        return peak, peak


def pinned_bytes(size: int) -> int:
    """What torch's allocator of pinned memory takes for `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def host_bytes(tensor: Tensor) -> int:
    """What a tensor that has its memory for itself takes of the host's."""
    return pinned_bytes(tensor.nbytes) if tensor.is_pinned() else tensor.nbytes


@contextlib.contextmanager
def one_line_when_out(device: torch.device, rank: int) -> Iterator[None]:
    """A `RunError` when memory runs out. (A CPU's is a RuntimeError without a class of its own.)"""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        out = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not out and "can't allocate memory" not in str(error):
            raise
        raise RunError(
            f"out of memory on {device} of rank {rank}: more --workers hold fewer "
            "blocks each; or lower --batch_size, raise --accumulation_steps, or add "
            "--activation_checkpointing"
        ) from error


def _resident_peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10

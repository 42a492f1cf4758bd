"""Peak memory over an interval, measured: allocated and reserved on a GPU, resident on a CPU."""

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

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

"""A CUDA device that is not there, to try what touches a device where no GPU is at hand.

`device.install` makes torch believe in GPUs. Their tensors say `cuda:N`, hold real numbers and compute them
on the CPU; they refuse to be mixed with the host's, and every copy, wait and launch is recorded with the line
of the package that asked for it. `record` keeps what was seen, `tensor` is the device's tensor, `device` what
stands around it in torch, `runtime.c` what torch asks of CUDA's libraries. `start` starts ranks, each a
process: `__main__`, which lets `trial` run the trainer.

What is asynchronous on a GPU arrives late here too: what is copied into pinned memory without blocking is NaN
until an event or a stream was waited for, and pinned memory that is written to before the copy out of it was
waited for is an error. What all this does not show: NCCL, side streams, CUDA graphs, cuDNN, memory, speed,
torch.compile.
"""

import shutil
import sys
from importlib import metadata

FITS = "2.15"
"""The version of torch that it was tried with: it stands on what torch keeps to itself."""


def misfit() -> str | None:
    """Why there can be no such device here, or None."""
    if sys.platform != "linux":
        return "the pretended GPU was tried on Linux only"
    version = metadata.version("torch")
    if not version.startswith(FITS + "."):
        return f"the pretended GPU fits torch {FITS}, and this is {version}"
    if shutil.which("gcc") is None:
        return "the pretended GPU needs gcc"
    return None

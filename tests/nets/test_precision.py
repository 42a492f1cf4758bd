"""Which kernels a GPU's libraries may choose."""

import subprocess
import sys

import pytest

from tests import ROOT

SAYS = """
import os, torch
from resist_ds.nets.precision import choose_kernels
from resist_ds.options.command_line import parse
choose_kernels(parse({argv}))
found = (torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled())
found += (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
print(*found, os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.get_float32_matmul_precision())
"""


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ([], "True False True True None high"),
        (["--tf32", "false"], "True False False False None highest"),
        (["--deterministic"], "False True False False :4096:8 highest"),
        (["--deterministic", "--tf32"], "False True True True :4096:8 high"),
    ],
)
def test_kernels_are_chosen_by_speed_or_for_the_same_bits(argv: list[str], found: str) -> None:
    """In a process of its own, since these are the process's; torch's compiler asks for the last of them."""
    words = [sys.executable, "-W", "error", "-c", SAYS.format(argv=argv)]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (said.stdout.strip(), said.stderr) == (found, "")

"""The numerical tests as other processors would run them, on one thread a rank or two; then a table.

    python tools/portable.py                    # or: make portable
    python tools/portable.py -k adamw           # what pytest understands goes to pytest

Which kernels compute is decided by variables that torch, oneDNN, MKL, OpenBLAS and numpy read as they start.
A processor can so be taken for an older one, never for a newer: what this one lacks is skipped, and said so.
The tests are those marked `numerical`; one of them checks that the setting has reached the ranks.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-n",
    "2",
    "--dist",
    "loadfile",
    "-m",
    "numerical and not soak",
)
COLUMNS = "{:<10}{:>8}{:>8}{:>8}{:>9}{:>9}"
X86 = platform.machine().lower() in ("x86_64", "amd64")


@dataclass(frozen=True)
class Processor:
    """One to be taken for.

    Attributes:
        capability: what torch then says of itself.
        environment: what makes torch and oneDNN, MKL and OpenBLAS believe it.
        newer: how the names of numpy's features begin that it does not have.
        here: whether this one can do so much.
        threads: of a rank, each a run of its own; two where kernels differ most, so that it stays bearable.
    """

    name: str
    capability: str
    environment: dict[str, str]
    newer: tuple[str, ...]
    here: bool
    threads: tuple[int, ...] = (1,)

    def variables(self) -> dict[str, str]:
        found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())
        hidden = [feature for feature in found if feature.startswith(self.newer)] if self.newer else []
        return {
            **self.environment,
            **({"NPY_DISABLE_CPU_FEATURES": " ".join(hidden)} if hidden else {}),
            **({"RESIST_TEST_CAPABILITY": self.capability} if self.capability else {}),
        }


def believed(aten: str, onednn: str, mkl: str, openblas: str) -> dict[str, str]:
    return {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_CBWR": mkl,  # its other switches work on Intel's processors alone
        "OPENBLAS_CORETYPE": openblas,
    }


PROCESSORS = (
    Processor("this one", "", {}, (), True, threads=(1, 2)),
    Processor(
        "AVX-512",
        "AVX512",
        believed("avx512", "AVX512_CORE", "AVX512", "SkylakeX"),  # without its later parts, and without AMX
        ("AVX512_ICL", "AVX512_SPR"),
        torch.cpu._is_avx512_supported(),
    ),
    Processor(
        "AVX2",
        "AVX2",
        believed("avx2", "AVX2", "AVX2", "Haswell"),
        ("AVX512", "X86_V4"),
        torch.cpu._is_avx2_supported(),
        threads=(1, 2),
    ),
    Processor(
        "SSE4.1",
        "DEFAULT",
        believed("default", "SSE41", "COMPATIBLE", "Nehalem"),
        ("AVX", "FMA3", "F16C", "X86_V3", "X86_V4"),
        X86,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """How the tests ended; `code` is pytest's."""

    code: int
    passed: int
    failed: int
    skipped: int
    seconds: float


def tested(processor: Processor, threads: int, arguments: Sequence[str]) -> Outcome:
    """One run of the tests; what they print goes to the terminal."""
    variables = {
        "RESIST_TEST_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # ranks that share two cores should not spin for each other
    }
    clean = {k: v for k, v in os.environ.items() if k not in PROCESSORS[-1].environment}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = time.perf_counter()
        code = subprocess.run(
            [*PYTEST, f"--junitxml={report}", *arguments],
            cwd=ROOT,
            env=clean | variables | processor.variables(),
            check=False,
        ).returncode
        seconds = time.perf_counter() - start
        if not report.exists():  # pytest has not come so far
            return Outcome(code, 0, 0, 0, seconds)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    total, failures, errors, skipped = (
        int(suite.get(count, 0)) for count in ("tests", "failures", "errors", "skipped")
    )
    return Outcome(code, total - failures - errors - skipped, failures + errors, skipped, seconds)


def main(arguments: Sequence[str] = ()) -> int:
    """All processors and threads in turn; 1 if any test failed, or none was run."""
    lines, good = [], True
    for processor in PROCESSORS:
        for threads in processor.threads if processor.here else ():
            print(f"\n=== {processor.name}, {threads} thread{'s' * (threads > 1)} a rank", flush=True)
            found = tested(processor, threads, arguments)
            good = good and found.code == 0 and found.passed > 0
            counts = (found.passed, found.failed, found.skipped, f"{found.seconds:.0f}")
            lines.append(COLUMNS.format(processor.name, threads, *counts))
            if found.code > 1:
                lines[-1] += f"   pytest ended with exit code {found.code}"
        if not processor.here:
            lines.append(f"{processor.name:<10}   skipped: this processor has no {processor.name}")
    print("\n" + COLUMNS.format("as if on", "threads", "passed", "failed", "skipped", "seconds"))
    print("\n".join(lines), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

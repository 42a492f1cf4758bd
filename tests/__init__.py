"""A folder per wing of the package; `run`: whole runs; `project`: what is around the package."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Of the checkout."""

THREADS = int(os.environ.get("RESIST_TEST_THREADS", "1"))
"""Of each rank, and of the tests that compute in this process; `make portable` tries two."""

HIDDEN_GPUS = "RESIST_TEST_HIDDEN_GPUS"
"""The variable that says how many GPUs are there and hidden from the tests."""

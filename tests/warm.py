"""Imported once by the process that the tests' ranks are forked from: they need not import it again."""

import gc
import importlib

import accelerate.tracking  # noqa: F401
import wandb  # noqa: F401

import resist_ds.telemetry.figures
import resist_ds.trainer  # noqa: F401
from resist_ds import comm
from resist_ds.telemetry import report
from tests import conftest  # noqa: F401  # where the lives of ranks begin: pytest and hypothesis come with it

comm.deepspeed_comm()
for name in (  # after DeepSpeed's environment is set
    "resist_ds.engines.zero",
    "resist_ds.engines.fsdp",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which its engines import, and with it torch's inductor
):
    importlib.import_module(name)

# Runs of the tests are short, and yet say what is predicted: nothing, in no time; tests of that put it back.
report.SHORT = 0
report.expected = lambda *args: (0, 0.0)

gc.collect()
gc.freeze()  # no rank's collections need look through what was imported, which takes them 0.3 s each

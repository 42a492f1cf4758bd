"""Imported once by the process that the tests' ranks are forked from: they need not import it again."""

import gc
import importlib

import accelerate.tracking  # noqa: F401
import torch
import wandb  # noqa: F401

import resist_ds.telemetry.figures
import resist_ds.trainer  # noqa: F401
from resist_ds import comm
from resist_ds.forecast.plan import Expected
from resist_ds.nets.blueprint import Blueprint
from resist_ds.telemetry import report
from tests import saved  # which brings what the lives of ranks begin with: tests.conftest, pytest, hypothesis

comm.deepspeed_comm()
for name in (  # after DeepSpeed's environment is set
    "resist_ds.engines.zero",
    "resist_ds.engines.fsdp",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which its engines import, and with it torch's inductor
):
    importlib.import_module(name)

# Runs of the tests are short, and yet say what is predicted: nothing, in no time; tests of that put it back.
report.SHORT = 0
report.expected = lambda *args: Expected(0, 0.0, 0)

# Most ranks train one of two nets from the same initial values and copy them: to draw them takes half of a
# short run. tests/nets/test_blueprint.py draws in its own process, and ranks draw those of other nets.
# On one thread: forked from a process that has computed with several, ranks would wait for the others.
threads = torch.get_num_threads()
torch.set_num_threads(1)
draw_shared, draw_block = Blueprint.initial_shared, Blueprint.initial_block
drawn: dict[tuple[str, int, int, int | None], dict[str, torch.Tensor]] = {}
for net in (Blueprint("preact_resnet_small", 10), Blueprint(saved.OPTIONS["model"], 10)):
    drawn[net.name, net.num_classes, 0, None] = net.initial_shared(0)
    for number in range(net.pool):
        drawn[net.name, net.num_classes, 0, number] = net.initial_block(0, number)
torch.set_num_threads(threads)


def initial_shared(self: Blueprint, seed: int) -> dict[str, torch.Tensor]:
    known = drawn.get((self.name, self.num_classes, seed, None))
    return draw_shared(self, seed) if known is None else {name: v.clone() for name, v in known.items()}


def initial_block(self: Blueprint, seed: int, block: int) -> dict[str, torch.Tensor]:
    known = drawn.get((self.name, self.num_classes, seed, block))
    return draw_block(self, seed, block) if known is None else {name: v.clone() for name, v in known.items()}


Blueprint.initial_shared = initial_shared  # type: ignore[method-assign]
Blueprint.initial_block = initial_block  # type: ignore[method-assign]

gc.collect()
gc.freeze()  # no rank's collections need look through what was imported, which takes them 0.3 s each

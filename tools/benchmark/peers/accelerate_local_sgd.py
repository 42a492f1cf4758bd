"""accelerate's LocalSGD, as its guide shows it: huggingface.co/docs/accelerate/usage_guides/local_sgd."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.errors import RunError
from resist_ds.options.config import Config
from tools.benchmark.peers.common import begin, check_same, timed


def train(comm: Comm, config: Config) -> dict[str, Any]:
    """Collective: all ranks."""
    net, inner = begin(comm, config)
    accelerator = Accelerator(cpu=comm.device.type == "cpu")
    if accelerator.num_processes != comm.size:
        raise RunError(f"accelerate sees {accelerator.num_processes} of {comm.size} processes")
    torch.set_num_threads(config.cpu_threads)  # which it has changed
    model, optimizer = accelerator.prepare(net, inner)

    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=config.local_steps) as local_sgd:

        def step(x: Tensor, y: Tensor) -> Tensor:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
            return loss.detach()

        figures = timed(comm, config, step)
        check_same(comm, net)
    return figures

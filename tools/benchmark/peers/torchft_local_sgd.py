"""torchft's LocalSGD, as its examples/localsgd shows it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchft.local_sgd import LocalSGD

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from tools.benchmark.peers.common import begin, check_same, timed
from tools.benchmark.peers.torchft_manager import check_commits, manager


def train(comm: Comm, config: Config) -> dict[str, Any]:
    """Collective: all ranks."""
    assert config.rounds is not None
    net, optimizer = begin(comm, config)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()  # and, when its time has come, what LocalSGD has hooked to it
        return loss.detach()

    with (
        manager(comm, net, optimizer, use_async_quorum=True) as ours,
        LocalSGD(ours, net, optimizer, sync_every=config.local_steps),
    ):
        figures = timed(comm, config, step)
        check_commits(ours, config.rounds)
        check_same(comm, net)
    return figures

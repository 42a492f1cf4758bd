"""torchft's DiLoCo and Streaming DiLoCo, as its examples/diloco and its documentation show them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchft.local_sgd import DiLoCo

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from tools.benchmark.peers.common import begin, check_same, timed
from tools.benchmark.peers.torchft_manager import check_commits, manager


def train(
    comm: Comm,
    config: Config,
    *,
    outer_lr: float,
    outer_momentum: float,
    fragments: int,
    fragment_sync_delay: int,
    fragment_update_alpha: float,
    use_bucketization: bool,
) -> dict[str, Any]:
    """Collective: all ranks."""
    assert config.rounds is not None
    net, inner = begin(comm, config)
    parts = cut(net, fragments)
    outer = [
        torch.optim.SGD(part.parameters(), lr=outer_lr, momentum=outer_momentum, nesterov=outer_momentum > 0)
        for part in parts
    ]

    def step(x: Tensor, y: Tensor) -> Tensor:
        inner.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        inner.step()  # and, when its time has come, what DiLoCo has hooked to it
        return loss.detach()

    with (
        manager(comm, net, inner, use_async_quorum=False) as ours,
        DiLoCo(
            ours,
            parts,
            inner,
            outer,
            sync_every=config.local_steps,
            backup_device=comm.device,
            use_bucketization=use_bucketization,
            fragment_sync_delay=fragment_sync_delay,
            fragment_update_alpha=fragment_update_alpha,
        ),
    ):
        figures = timed(comm, config, step, exchanges=fragments * (2 if fragment_sync_delay else 1))
        check_commits(ours, config.rounds * fragments)
        if len(parts) == 1 and not fragment_update_alpha:
            check_same(comm, net)
    return figures


def cut(net: nn.Module, number: int) -> list[nn.Module]:
    """The net in `number` fragments of consecutive layers, of about as many parameters each."""
    if number == 1:
        return [net]
    leaves = [leaf for leaf in net.modules() if any(True for _ in leaf.parameters(recurse=False))]
    total, done = sum(p.numel() for p in net.parameters()), 0
    parts: list[list[nn.Module]] = [[] for _ in range(number)]
    for leaf in leaves:
        size = sum(p.numel() for p in leaf.parameters(recurse=False))
        parts[min(number - 1, number * (done + size // 2) // total)].append(leaf)
        done += size
    return [nn.ModuleList(part) for part in parts]

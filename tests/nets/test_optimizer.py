"""The optimizers are torch's, to the bit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from resist_ds.nets.optimizer import optimizer_of
from resist_ds.options.config import Config


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"momentum": 0.0}, {"optimizer": "adamw", "lr": 1e-3}],
    ids=["sgd", "nesterov", "plain", "adamw"],
)
def test_undecorated_optimizers_make_the_same_bits(options: dict[str, object]) -> None:
    config = replace(Config(), weight_decay=0.1, **options)  # type: ignore[arg-type]
    results = []
    for decorated in (False, True):
        generator = torch.Generator().manual_seed(0)
        parameters = [
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(7, 3), (5,), (4, 2, 3, 3)]
        ]
        optimizer = optimizer_of(config, parameters, decorated=decorated)
        assert isinstance(optimizer, getattr(torch.optim, "AdamW" if config.optimizer == "adamw" else "SGD"))
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(parameter.grad is None for parameter in parameters)
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))

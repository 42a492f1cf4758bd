"""What happens inside a run: its workers before and after a synchronisation, on one rank, which plays all.

Nothing that is looked at changes a trained bit: whatever is computed here is computed with copies, or without
gradients in nets whose BatchNorm touches no buffer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.engines.engine import TorchEngine
from resist_ds.engines.workers import Workers
from resist_ds.nets.precision import autocast
from resist_ds.protocol.evaluate import Evaluation
from resist_ds.trainer import Trainer

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # multiples of K/P


@dataclass(frozen=True)
class Images:
    """Some images and their labels, which an evaluation takes for a test set."""

    images: Tensor
    labels: Tensor
    trainer: Trainer

    @property
    def test_size(self) -> int:
        return len(self.labels)

    @property
    def train_size(self) -> int:
        return self.trainer.data.train_size

    def train_images(self, *of: Any, **how: Any) -> Tensor:
        return self.trainer.data.train_images(*of, **how)

    def test_batches(self, batches: Iterable[np.ndarray], **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            yield self.images[batch], self.labels[batch]


class Inside:
    """Writes down what is inside a run after every so many rounds, and after the last one.

    Args:
        every: rounds.
        note: takes what was seen, one dictionary a time.
        images: of the training set, evenly spread and not augmented, and as many of the test set.
    """

    def __init__(
        self, trainer: Trainer, every: int, note: Callable[[dict[str, Any]], None], images: int = 2000
    ):
        assert trainer.comm.size == 1 and isinstance(trainer.workers, Workers)
        assert isinstance(trainer.workers.engine, TorchEngine)
        self._trainer, self._workers, self._engine = trainer, trainer.workers, trainer.workers.engine
        self._every, self._note = every, note
        how = dict(
            device=trainer.comm.device,
            dtype=getattr(torch, trainer.config.dtype),
            channels_last=trainer.config.channels_last,
        )
        data = trainer.data
        chosen, test = (
            np.linspace(0, size - 1, min(images, size)).round().astype(np.int64)
            for size in (data.train_size, data.test_size)
        )
        labels = data.plain_train.labels[torch.from_numpy(chosen)].to(trainer.comm.device)
        ((shown, right),) = list(data.test_batches([test], **how))
        self._sets = {
            "train": Images(data.train_images(chosen, **how), labels, trainer),
            "test": Images(shown, right, trainer),
        }
        self._gradients: dict[str, dict[str, list[Tensor]]] = {}  # {part: {tensor in it: Σ² of every step}}
        self._names: dict[str, tuple[str, str]] = {}
        self._passes = dict.fromkeys(self._engine.subnet.weights, 0)
        for name, weight in self._engine.subnet.weights.items():
            weight.register_post_accumulate_grad_hook(lambda p, name=name: self._gradient(name, p))
        load = self._engine.load

        def loaded(worker: Any) -> None:
            load(worker)
            self._names = self._named(worker.index)

        self._engine.load = loaded  # type: ignore[method-assign]
        self._synchronise = trainer.net.synchronise
        trainer.net.synchronise = self._around  # type: ignore[method-assign]
        self._begin(0)

    def _begin(self, round: int) -> None:
        """Before a round: where shared stands, and whether gradients are to be looked at."""
        self._start = self._shared(next(iter(self._workers.vectors.values())), 0).clone()
        self._gradients.clear()
        self._due = (round + 1) % self._every == 0 or round + 1 == self._trainer.rounds

    def _around(self, round: int, dropped: frozenset[int] = frozenset()) -> None:
        """In place of `GlobalModel.synchronise`."""
        seen: dict[str, Any] = {}
        if self._due:
            vectors = self._workers.vectors.values()
            values, momentum = ([self._shared(v, row).double() for v in vectors] for row in (0, 1))
            seen = {
                "round": round + 1,
                "images": self._trainer._after(round).samples,
                "lr": self._trainer.rates.of(round)[-1],
                "moved": float((_mean(values) - self._start).norm()),
                "apart": _apart(values),
                "momentum": float(_mean(momentum).norm()),
                "momentum_apart": _apart(momentum),
                "gradients": {
                    part: float(sum(torch.stack(squares).mean() for squares in tensors.values()) ** 0.5)
                    for part, tensors in sorted(self._gradients.items())
                },
                "alone": self._of_workers(),
            }
        self._due, due = False, self._due  # looking is no gradient
        self._synchronise(round, dropped)
        if due:
            scale = self._trainer.net.test_scale
            seen |= {"averaged": self._of_workers(), "global": self._of_global(scale)}
            if round + 1 == self._trainer.rounds:
                seen["scales"] = {str(by): self._of_global(by * scale) for by in SCALES}
            self._note(seen)
        if round + 1 < self._trainer.rounds:
            self._begin(round + 1)

    def _shared(self, vector: Tensor, row: int) -> Tensor:
        """Shared parameters in a worker's vector, or (row 1) their momentum."""
        layout = self._workers.layout
        length = layout.shared.parameters
        return layout.shared_part(vector)[row * length : (row + 1) * length]

    def _named(self, worker: int) -> dict[str, tuple[str, str]]:
        """{tensor of a worker's net: a pool block by its number, or a part of shared; its name therein}."""
        prefix, blocks = self._trainer.net.blueprint.block_prefix, self._trainer.net.deal.blocks[worker]
        slots = {prefix(slot): f"block {block:02d}" for slot, block in enumerate(blocks)}
        found = {}
        for name in self._engine.subnet.weights:
            start = next((start for start in slots if name.startswith(start)), None)
            found[name] = (slots[start], name.removeprefix(start)) if start else (_section(name), name)
        return found

    def _gradient(self, name: str, weight: Tensor) -> None:
        """After a backward pass; the gradient is complete after the last micro-batch."""
        self._passes[name] += 1
        if self._due and self._passes[name] % self._trainer.config.accumulation_steps == 0:
            assert weight.grad is not None
            part, leaf = self._names[name]
            squares = self._gradients.setdefault(part, {}).setdefault(leaf, [])
            squares.append(weight.grad.detach().double().square().sum())

    @torch.no_grad()
    def _of_workers(self) -> dict[str, float]:
        """Mean over the workers of what their sub-ResNets make of the images, by batch statistics."""
        found: list[dict[str, float]] = []
        module, config = self._engine.subnet.module, self._trainer.config
        for _ in self._workers.turns():
            self._engine.subnet.refresh()
            row = {}
            for name, some in self._sets.items():
                with autocast(config, self._trainer.comm.device):
                    logits = torch.cat([module(x) for x in some.images.split(config.batch_size)]).float()
                row |= _scores(name, logits, some.labels)
            found.append(row)
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}

    def _of_global(self, scale: float) -> dict[str, float]:
        """What the global model makes of the images, with a test scale."""
        trainer, row = self._trainer, {}
        subnet, vectors = self._workers.for_evaluation(trainer.net.deal)
        for name, some in self._sets.items():
            evaluation = Evaluation(
                trainer.comm, trainer.net.layout, trainer.net.blueprint, some, trainer.config
            )
            cast = autocast(trainer.config, trainer.comm.device)
            result = evaluation.run(subnet, vectors, trainer.net.deal, scale, cast, 1 << 28)
            row |= {f"{name} loss": result.loss, f"{name} accuracy": result.accuracy}
        return row


def _section(name: str) -> str:
    """The part of a net that a shared tensor is in, by its timm name."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "stages" else first


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _apart(values: list[Tensor]) -> float:
    """Root of the mean square distance of vectors from their mean."""
    mean = _mean(values)
    return float(torch.stack([(value - mean).square().sum() for value in values]).mean().sqrt())


def _scores(name: str, logits: Tensor, labels: Tensor) -> Mapping[str, float]:
    return {
        f"{name} loss": float(F.cross_entropy(logits, labels)),
        f"{name} accuracy": float((logits.argmax(1) == labels).double().mean()),
    }

"""Looks into a run: its workers before and after a synchronisation, and the global model.

Looking changes no trained bit: what is computed here is computed of copies, or without gradients in nets
whose BatchNorm touches no buffer.
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
from resist_ds.errors import UserError
from resist_ds.nets.precision import autocast
from resist_ds.options.config import Config
from resist_ds.protocol.evaluate import Evaluation
from resist_ds.trainer import Trainer

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # multiples of K/P

Look = dict[str, Any]


def check(config: Config) -> None:
    """Raises `UserError` where a run cannot be looked into."""
    if config.strategy not in ("resist", "local_sgd", "ddp"):
        raise UserError(f"a run of {config.strategy} cannot be looked into: type resist, local_sgd or ddp")
    for name in ("overlap_steps", "warmup_rounds", "deepspeed_config"):
        if getattr(config, name):
            raise UserError(f"a run with --{name} cannot be looked into: leave it out")
    if config.mixed_precision == "fp16":
        raise UserError("a run in fp16 cannot be looked into: its gradients are scaled; type bf16 or no")


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
            part = slice(int(batch[0]), int(batch[-1]) + 1)
            yield self.images[part], self.labels[part]


class Looks:
    """Looks into a run on one rank after every so many rounds, and after the last one.

    Args:
        every: rounds.
        note: takes what was seen, one look at a time.
        images: of the training set, drawn at random and not augmented, and as many of the test set.
    """

    def __init__(self, trainer: Trainer, every: int, note: Callable[[Look], None], images: int = 2000):
        check(trainer.config)
        assert trainer.comm.size == 1 and isinstance(trainer.workers, Workers)
        assert isinstance(trainer.workers.engine, TorchEngine)
        self._trainer, self._workers, self._engine = trainer, trainer.workers, trainer.workers.engine
        self._every, self._note = every, note
        self._sets = self._chosen(images)
        self._evaluations = {
            name: Evaluation(trainer.comm, trainer.net.layout, trainer.net.blueprint, some, trainer.config)
            for name, some in self._sets.items()
        }
        self._squares: dict[str, list[Tensor]] = {}  # {part: |gradient|² of every step of a worker}
        self._parts: dict[str, str] = {}
        self._load, self._engine.load = self._engine.load, self._loaded  # type: ignore[method-assign]
        optimizer = self._engine.subnet.optimizer
        self._step, optimizer.step = optimizer.step, self._stepped  # type: ignore[method-assign]
        self._synchronise = trainer.net.synchronise
        trainer.net.synchronise = self._around  # type: ignore[method-assign]
        self._begin(0)

    def _chosen(self, count: int) -> dict[str, Images]:
        """Images of every class in every batch, as in training: a folder has them class by class."""
        trainer, data = self._trainer, self._trainer.data
        config = trainer.config
        how: dict[str, Any] = dict(
            device=trainer.comm.device,
            dtype=getattr(torch, config.dtype),
            channels_last=config.channels_last,
        )
        train, test = (
            np.random.default_rng(0).permutation(size)[:count] for size in (data.train_size, data.test_size)
        )
        labels = data.plain_train.labels[torch.from_numpy(train)].to(trainer.comm.device)
        ((shown, right),) = list(data.test_batches([test], **how))
        return {
            "train": Images(data.train_images(train, **how), labels, trainer),
            "test": Images(shown, right, trainer),
        }

    def _begin(self, round: int) -> None:
        """Before a round: where shared stands, and whether it is to be looked at."""
        self._start = self._shared(next(iter(self._workers.vectors.values())), 0).clone()
        self._squares.clear()
        self._due = (round + 1) % self._every == 0 or round + 1 == self._trainer.rounds

    def _around(self, round: int, dropped: frozenset[int] = frozenset()) -> None:
        """In place of `GlobalModel.synchronise`."""
        trainer, due, seen = self._trainer, self._due, {}
        if due:
            vectors = self._workers.vectors.values()
            values, momentum = ([self._shared(v, row).double() for v in vectors] for row in (0, 1))
            seen = {
                "round": round + 1,
                "images": trainer._after(round).samples,
                "lr": trainer.rates.of(round)[-1],
                "moved": float((_mean(values) - self._start).norm()),
                "apart": _apart(values),
                "momentum": float(_mean(momentum).norm()),
                "momentum_apart": _apart(momentum),
                "gradients": {
                    part: float(torch.stack(self._squares[part]).mean().sqrt())
                    for part in sorted(self._squares, key=_place)
                },
                "alone": self._of_workers(),
            }
        self._synchronise(round, dropped)
        if due:
            scale = trainer.net.test_scale
            seen |= {"next": self._of_workers(), "global": self._of_global(scale)}
            if round + 1 == trainer.rounds:
                seen["scales"] = {str(by): self._of_global(by * scale) for by in SCALES}
            self._note(seen)
        if round + 1 < trainer.rounds:
            self._begin(round + 1)

    def _shared(self, vector: Tensor, row: int) -> Tensor:
        """Shared parameters in a worker's vector, or (row 1) their momentum."""
        layout = self._workers.layout
        length = layout.shared.parameters
        return layout.shared_part(vector)[row * length : (row + 1) * length]

    def _loaded(self, worker: Any) -> None:
        """In place of the engine's `load`: the parts that this worker's tensors are of."""
        self._load(worker)
        prefix, blocks = self._trainer.net.blueprint.block_prefix, self._trainer.net.deal.blocks[worker.index]
        slots = {prefix(slot): f"block {block:02d}" for slot, block in enumerate(blocks)}
        self._parts = {
            name: next((part for start, part in slots.items() if name.startswith(start)), _section(name))
            for name in self._engine.subnet.weights
        }

    def _stepped(self, *of: Any, **how: Any) -> Any:
        """In place of the optimizer's `step`: all micro-batches are in, and clipping was before."""
        if self._due:
            found: dict[str, list[Tensor]] = {}
            for name, weight in self._engine.subnet.weights.items():
                assert weight.grad is not None, name
                found.setdefault(self._parts[name], []).append(weight.grad.detach().double().square().sum())
            for part, squares in found.items():
                self._squares.setdefault(part, []).append(torch.stack(squares).sum())
        return self._step(*of, **how)

    @torch.no_grad()
    def _of_workers(self) -> dict[str, float]:
        """Mean over the workers of what their nets make of the images, in batches as in training."""
        found: list[Mapping[str, float]] = []
        module, config = self._engine.subnet.module, self._trainer.config
        size = config.batch_size // config.accumulation_steps
        for _ in self._workers.turns():
            self._engine.subnet.refresh()
            row: dict[str, float] = {}
            for name, some in self._sets.items():
                parts = some.images.split(size)
                whole = [x for x in parts if len(x) == size] or parts[:1]
                with autocast(config, self._trainer.comm.device):
                    logits = torch.cat([module(x) for x in whole]).float()
                row |= _scores(name, logits, some.labels[: len(logits)])
            found.append(row)
        return {name: sum(row[name] for row in found) / len(found) for name in found[0]}

    def _of_global(self, scale: float) -> dict[str, float]:
        """What the global model makes of the images, with a test scale."""
        trainer, row = self._trainer, {}
        shown = self._workers.for_evaluation(trainer.net.deal)
        for name, evaluation in self._evaluations.items():
            cast = autocast(trainer.config, trainer.comm.device)
            result = evaluation.run(shown, trainer.net.deal, scale, cast, 1 << 28)
            row |= {f"{name} loss": result.loss, f"{name} accuracy": result.accuracy}
        return row


def _section(name: str) -> str:
    """The part of a net that a shared tensor is in, by its timm name."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "stages" else first


def _place(part: str) -> tuple[int, str]:
    """Parts in the order of the net."""
    order = ("stem", "stages.0", "stages.1", "stages.2", "block", "stages.3")
    return order.index(part.split()[0]) if part.split()[0] in order else len(order), part


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean(0)


def _apart(values: list[Tensor]) -> float:
    """Root of the mean square distance of vectors from their mean."""
    mean = _mean(values)
    return float(torch.stack([(value - mean).square().sum() for value in values]).mean().sqrt())


def _scores(name: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        f"{name} loss": float(F.cross_entropy(logits, labels)),
        f"{name} accuracy": float((logits.argmax(1) == labels).double().mean()),
    }

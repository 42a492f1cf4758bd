"""ResIST for a training loop of one's own: the workers of this rank, `synchronise`, `evaluate`, `save`.

    resist = ResIST("resnetv2_50", num_classes=10, workers=8, lr=0.1, output_dir="runs/mine")
    for round in range(resist.round, 100):
        for worker in resist.workers():                      # those that this rank plays, one after the other
            for x, y in batches_of(worker.index, round):     # ℓ local steps of yours
                x, y = x.to(resist.device), y.to(resist.device)
                F.cross_entropy(worker.module(x), y).backward()
                worker.optimizer.step()
                worker.optimizer.zero_grad()
        resist.synchronise()

Start it like train.py, with any launcher and any number of ranks. Options have train.py's names and meaning.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from resist_ds.comm import Comm
from resist_ds.engines.engine import TorchStep
from resist_ds.engines.place import layout_of, place_workers
from resist_ds.engines.workers import Workers
from resist_ds.errors import RunError, UserError
from resist_ds.nets.blueprint import Blueprint
from resist_ds.options.config import Config
from resist_ds.protocol.evaluate import Evaluation
from resist_ds.protocol.global_model import GlobalModel
from resist_ds.state.checkpoint import folder_name
from resist_ds.state.folder import RunFolder
from resist_ds.state.run_state import config_to_keep
from resist_ds.state.start import Start

OPTIONS = (  # those of train.py that mean something without its loop
    *(
        "workers",
        "team_size",
        "team_strategy",
        "min_blocks",
        "warmup_rounds",
        "strategy",
        "wire",
        "optimizer_state",
        "transit_mib",
    ),
    *("optimizer", "lr", "momentum", "nesterov", "weight_decay", "dtype", "channels_last", "cpu_threads"),
    *("from_pretrained", "download", "activation_checkpointing"),
    *("eval_batch_size", "eval_memory", "calibration_samples"),
    *("seed", "output_dir", "keep", "resume", "override"),
)

Samples = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class Turn:
    """A worker whose turn it is: its state is in the module until the next worker's turn.

    Attributes:
        index: which of the W workers.
        module: the sub-ResNet, in training mode, on `ResIST.device`.
        optimizer: over its parameters, with the worker's own momentum; set its `lr` as you like.
    """

    index: int
    module: nn.Module
    optimizer: torch.optim.Optimizer


class ResIST:
    """The global model of a timm ResNet, of which this rank holds its workers' sub-ResNets. Use as a context.

    Attributes:
        round: rounds that are done.
        rank, ranks: r and R; workers_total: W.
        device: where this rank computes.
    """

    def __init__(self, model: str, *, num_classes: int, **options: Any):
        """Join the launcher's job and place the workers. Collective: all ranks.

        Args:
            model: a name as for `--model`.
            options: `OPTIONS`, as train.py has them; `output_dir` is locked until `close`.

        Raises:
            UserError: an option that is unknown, or that cannot be meant.
        """
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise UserError(f"ResIST has no option {unknown[0]}: its options are {', '.join(OPTIONS)}")
        given: dict[str, Any] = {"eval_memory": 256, **options, "model": model, "num_classes": num_classes}
        config = Config(**given, log_with="none")
        if config.strategy not in ("resist", "local_sgd"):
            raise UserError(f"ResIST trains by strategy resist or local_sgd, not by {config.strategy}")
        if config.inside and config.inside.stage:
            raise UserError("ResIST's teams share a step by ddp or fsdp: DeepSpeed's is no plain module")
        self._comm = comm = Comm()
        self._folder = RunFolder(config.output_dir)
        comm.agree(lambda: self._folder.take() if comm.rank == 0 else None)
        try:
            self._place(config)
        except BaseException:
            self._folder.release()
            raise

    def _place(self, config: Config) -> None:
        """Place the workers. Collective: all ranks."""
        comm = self._comm
        start = Start(comm, config, self._folder)
        self._config = config = replace(config, cpu_threads=start.threads(comm.local_size))
        torch.set_num_threads(config.cpu_threads)
        # What train.py counts and a loop of one's own need not: kept as it was.
        self._position, self._train_size = start.position, start.state.train_size if start.state else 0
        comm.agree(lambda: start.check(config_to_keep(config) | {"scheduler": None}, self._train_size))
        layout = layout_of(comm, config, start)
        self._config = config = replace(config, team_size=layout.team_size)
        assert config.num_classes is not None
        classes = config.num_classes
        blueprint = comm.agree(lambda: Blueprint(config.model, classes))
        self._team = comm.team(layout.team_size)
        self._workers = place_workers(comm, config, layout, blueprint, start)
        self._net = GlobalModel(comm, config, layout, blueprint, start, self._workers)
        self._saver = self._net.saver(self._folder.checkpoints, background=False)
        comm.agree(lambda: start.make_way() if comm.rank == 0 else None)
        if comm.rank == 0:
            for remark in start.remarks:
                print(f"warning: {remark}", file=sys.stderr)
        self._waiting = set(layout.workers_of(comm.rank))  # for their turn in this round
        self._spoilt: list[int] = []
        self.round = start.position.round
        self.rank, self.ranks, self.workers_total = comm.rank, comm.size, layout.workers
        self.device = comm.device

    def workers(self) -> Iterator[Turn]:
        """The workers that this rank plays, each in its turn. Go through all of them.

        No communication, but in a team (`team_size`), whose ranks train a worker together, each on its own
        part of the batch. Collective then: the team.
        """
        engine = self._workers.engine
        assert isinstance(engine, TorchStep)
        if self._config.optimizer_state == "reset" and isinstance(self._workers, Workers):
            self._workers.reset_optimizer()
        self._spoilt = []
        for worker in self._workers.turns():
            self._waiting.add(worker.index)
            yield Turn(worker.index, engine.forward, engine.optimizer)
            engine.optimizer.zero_grad(set_to_none=True)  # they are no part of a worker's state
            if not all(self._team.gather(engine.is_finite())):
                self._spoilt.append(worker.index)
            self._waiting.discard(worker.index)

    def synchronise(self) -> None:
        """Average what the workers have trained and deal the blocks anew. Collective: all ranks.

        Raises:
            RunError: a worker has not had its turn, or holds NaN or Inf; nothing was averaged.
        """
        missing, spoilt = zip(*self._comm.gather((sorted(self._waiting), self._spoilt)), strict=True)
        left = [worker for rank in missing for worker in rank]
        bad = [worker for rank in spoilt for worker in rank]
        if left:
            raise RunError(
                f"synchronise() before worker {left[0]} had its turn: go through all of workers() first"
            )
        if bad:
            raise RunError(
                f"worker {bad[0]} met NaN or Inf in round {self.round + 1}: nothing of it was averaged or "
                "saved; try a lower lr"
            )
        self._net.synchronise(self.round)
        self._waiting = set(self._net.layout.workers_of(self._comm.rank))
        self.round += 1

    def evaluate(self, test: Samples, calibration: Samples) -> tuple[float, float]:
        """Test the global model, after a `synchronise`; (loss in nats, accuracy). Collective: all ranks.

        Args:
            test: (image [3, S, S], label) of each sample, the same on all ranks, which share the work.
            calibration: training samples without augmentation; `calibration_samples` of them, evenly spread,
                set BatchNorm's statistics.
        """
        data = _Given(test, calibration)
        evaluation = Evaluation(self._comm, self._net.layout, self._net.blueprint, data, self._config)
        result = self._net.evaluate(evaluation, self.round - 1, free=0)
        return result.loss, result.accuracy

    def save(self) -> Path:
        """Write a checkpoint, which `resume` and tools/export.py read; its folder. Collective: all ranks.

        Raises:
            RunError: it could not be written; older ones are as before.
        """
        position = replace(self._position, round=self.round)
        options = config_to_keep(self._config) | {"scheduler": None}
        self._net.save(self._saver, position, options, train_size=self._train_size, totals={})
        saved = self._saver.settle()
        if saved.error is not None:
            raise RunError(f"the checkpoint of round {saved.round} was not written ({saved.error})")
        return self._folder.checkpoints / folder_name(self.round)

    def close(self) -> None:
        """Leave the job and its process group, and let others use `output_dir`. Collective: all ranks."""
        self._folder.release()
        self._comm.close()

    def __enter__(self) -> "ResIST":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # the others may be gone: leaving the job would wait for them
            self.close()
        else:
            self._folder.release()


class _Given:
    """The user's samples, as `Evaluation` asks for them."""

    def __init__(self, test: Samples, calibration: Samples):
        self._test, self._calibration = test, calibration
        self.test_size = len(test)  # type: ignore[arg-type]
        self.train_size = len(calibration)  # type: ignore[arg-type]

    def train_images(
        self, indices: np.ndarray, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Tensor:
        if not len(indices):  # of a rank that has none: the shape of an image, and no image
            images = self._calibration[0][0][None][:0]
        else:
            images = torch.stack([self._calibration[int(i)][0] for i in indices])
        return _placed(images, device, dtype, channels_last)

    def test_batches(
        self, batches: Iterable[np.ndarray], device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            samples = [self._test[int(i)] for i in batch]
            images = torch.stack([image for image, _ in samples])
            labels = torch.tensor([int(label) for _, label in samples], device=device)
            yield _placed(images, device, dtype, channels_last), labels


def _placed(images: Tensor, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(device, dtype).contiguous(memory_format=layout)

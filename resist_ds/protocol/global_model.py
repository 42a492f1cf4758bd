"""The global model: the whole ResNet, which exists only as the union of what the workers of all ranks hold.

What a round does to it, whoever makes the local steps: `trainer` with its own loop, or `api` with the user's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.data.order import Position
from resist_ds.errors import RunError, UserError
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import autocast, is_finite
from resist_ds.nets.subnet import OptimizerState, StateDict, Worker
from resist_ds.options.config import Config
from resist_ds.protocol.alone import Alone
from resist_ds.protocol.evaluate import Evaluation, Result
from resist_ds.protocol.overlap import Overlap
from resist_ds.protocol.partition import Layout, Partition, sample_partition
from resist_ds.protocol.sync import Synchroniser
from resist_ds.protocol.workers import RankWorkers
from resist_ds.state.run_state import State, config_hash, versions
from resist_ds.state.saver import Saver
from resist_ds.state.start import Start


class GlobalModel:
    """The global model at the start of a round.

    Attributes:
        workers: those that this rank plays.
        deal, trained: who holds what in the round that comes, and in the one before it.
        ahead: {worker: its shared part, as far as that takes part}, where it has gone on being trained while
            the last exchange ran; empty where all workers hold the same.
        statistics, statistics_round: BatchNorm's, and the round after which they were estimated, or None.
    """

    def __init__(
        self,
        comm: Comm,
        config: Config,
        layout: Layout,
        blueprint: Blueprint,
        start: Start,
        workers: RankWorkers,
    ):
        """Collective: all ranks.

        Args:
            start: what the run begins from; its files are closed.
            workers: of this rank, placed by `deal_of` the start's round.
        """
        self._comm = comm
        self._config = config
        self.layout = layout
        self.blueprint = blueprint
        self.workers = workers
        self.deal = self.trained = self.partition(start.position.round)
        dtype = getattr(torch, config.dtype)
        self.statistics = comm.agree(lambda: start.statistics(blueprint, dtype))
        self.statistics_round = start.state.statistics_round if start.state else None
        travel = config.optimizer_state == "travel"
        self.sync = Synchroniser(
            comm,
            layout,
            self.workers.layout,
            blueprint.pool,
            budget=config.transit_mib << 20,
            travel=travel,
            compact=config.wire == "compact",
            vectors=self.workers.vectors,
            replicas=not (config.inside and config.inside.spread),
        )

        self.overlap = Overlap(comm, self.sync, self.workers.layout, travel=travel)
        self.ahead: dict[int, Tensor] = {}
        lanes = self.sync.differences.group.lanes if self.sync.differences else ()
        carried = OptimizerState.carried(config)
        self._alone = Alone(comm, layout, workers.layout, carried, workers.shards, lanes)
        comm.agree(lambda: self._take_up(start))
        start.close()

    def partition(self, round: int) -> Partition:
        """Who holds what in a round."""
        return deal_of(self._config, self.blueprint, self.layout.workers, round)

    @property
    def test_scale(self) -> float:
        """K/P of the round that was trained."""
        return self._config.test_scale(self.trained.slots, self.trained.pool)

    @property
    def parameters_held(self) -> int:
        """Of a rank, in the round that was trained; copies of replicas count."""
        blueprint = self.blueprint
        held = blueprint.parameters_held(self.trained.slots)
        return self._config.parameters_held(blueprint.parameters, held, self._comm.size)

    def finish(self, round: int, lost: frozenset[int] = frozenset()) -> None:
        """Complete what has begun behind local steps, in place of `synchronise`. Collective: all ranks.

        Args:
            round: that was trained.
            lost: workers whose round does not count, or no longer.
        """
        self.trained, self.deal = self.deal, self.partition(round + 1)
        self.overlap.finish(self.workers.vectors, self.trained, self.deal, lost)
        self.ahead = self.overlap.shared_parts(self.workers.vectors)

    def synchronise(self, round: int, dropped: frozenset[int] = frozenset()) -> None:
        """Average every piece and bring it to its next holders. Collective: all ranks.

        Args:
            round: that was trained.
            dropped: workers whose round does not count.
        """
        self.trained, self.deal = self.deal, self.partition(round + 1)
        self.ahead, self.overlap.seconds, self.overlap.waited = {}, 0.0, 0.0
        if self._config.way.lockstep:  # all hold the same at any time
            return
        self.sync.aggregate(self.workers.vectors, self.trained, dropped)
        self.sync.hand_off(self.workers.vectors, self.trained, self.deal)
        if self.deal.slots != self.trained.slots:  # warm-up is over
            self.workers.resize(self.deal.slots)

    @contextmanager
    def behind(self, round: int, steps: int) -> Iterator[None]:
        """Local steps of all of this rank's workers, the last of which the exchange runs behind. Collective.

        Args:
            steps: so many of each worker; with 0 nothing communicates.
        """
        try:
            yield
        except Exception as error:
            if (
                self._config.inside is not None
            ):  # its team waits in a step, and learns of it by this rank's end
                raise
            if steps and not self.overlap.running:  # the others wait for this rank
                self._begin(round, error)
            try:
                self.overlap.wait()
            except Exception as other:
                if isinstance(other, RunError) and other.alone:
                    raise
            raise
        self.overlap.wait()

    def take(self, round: int, worker: Worker, vector: Tensor) -> None:
        """Copy a worker; after the last one of this rank the exchange begins. Collective: all ranks.

        Args:
            vector: what takes part; of a spoilt worker the round's start.
        """
        self.overlap.take(worker.index, vector, bool(worker.spoilt))
        if worker.index == self.layout.workers_of(self._comm.rank)[-1]:
            self._begin(round)

    def _begin(self, round: int, error: Exception | None = None) -> None:
        skip = self._config.on_nan == "skip"
        self.overlap.begin(self.deal, self.partition(round + 1), skip=skip, error=error)

    def evaluate(self, evaluation: Evaluation, round: int, free: int) -> Result:
        """Test the global model with the test scale of the round just trained. Collective: all ranks.

        Args:
            free: bytes for test activations, see `Evaluation.run`.
        """
        shown = self.workers.for_evaluation(self.deal)
        cast = autocast(self._config, self._comm.device)
        result = evaluation.run(shown, self.deal, self.test_scale, cast, free)
        dtype = getattr(torch, self._config.dtype)  # as they are saved: float64's may be too large for it
        if all(is_finite(values.to(dtype)) for pair in result.statistics.values() for values in pair):
            self.statistics, self.statistics_round = result.statistics, round + 1
        return result

    def save(
        self,
        saver: Saver,
        position: Position,
        options: Mapping[str, Any],
        *,
        train_size: int,
        totals: Mapping[str, Any],
    ) -> None:
        """Begin a checkpoint of the state at the start of the next round. Collective: all ranks.

        Args:
            options: as `checkpoint.config_to_keep` has them, with the data set's values in place of nulls.
            train_size: images of the training set.
            totals: what the run's records carry on.
        """
        scales = {w: s for rank in self._comm.gather(self.workers.loss_scales) for w, s in rank.items()}
        state = State(
            **asdict(position),
            train_size=train_size,
            model=self.blueprint.name,
            num_classes=self.blueprint.num_classes,
            workers=self.layout.workers,
            slots=self.deal.slots,
            pool=self.deal.pool,
            test_scale=self.test_scale,
            statistics_round=self.statistics_round,
            dtype=self._config.dtype,
            optimizer=asdict(saver.optimizer),
            loss_scales=[scales[w] for w in range(self.layout.workers)] if scales else None,
            totals=dict(totals),
            cpu_threads=self._config.cpu_threads,
            config=dict(options),
            config_hash=config_hash(options),
            versions=versions(),
        )
        saver.start(state, self._owned(), self.statistics, self._kept())

    def _owned(self) -> StateDict:
        """The partitioned state dict: of shared, what all workers have agreed on. Collective: all ranks."""
        return self.workers.owned(self.deal, self.overlap.shared if self.ahead else None)

    def _kept(self) -> dict[str, dict[int, Tensor]]:
        """{kind: {worker: what it holds alone}}, of the workers for which this rank writes it.

        Collective: all ranks.
        """
        kept = {"shared": self._alone.whole("shared", self.ahead)} if self.ahead else {}
        if self.sync.differences is not None:
            if self._comm.device.type == "cuda":  # the errors may still be on their way to the host
                torch.cuda.synchronize(self._comm.device)
            kept["error"] = self._alone.whole("error", self.sync.differences.error)
        return kept

    def _take_up(self, start: Start) -> None:
        """Give this rank's workers back what they held alone; the reference is that of the checkpoint."""
        parts = self.overlap.shared_parts(self.workers.vectors)
        for worker, kind, values in start.kept(tuple(parts), self.layout.workers):
            if kind == "shared":
                self._alone.take("shared", parts[worker], values)
            else:
                assert self.sync.differences is not None
                self._alone.take("error", self.sync.differences.error[worker], values)

    def saver(self, folder: Path, *, background: bool) -> Saver:
        """What writes its checkpoints into a folder."""
        config = self._config
        return Saver(
            self._comm,
            self.blueprint,
            folder,
            dtype=getattr(torch, config.dtype),
            optimizer=OptimizerState.carried(config),
            keep=config.keep,
            background=background,
        )


def deal_of(config: Config, blueprint: Blueprint, workers: int, round: int) -> Partition:
    """Who holds what in a round. Warm-up rounds are local SGD: they deal the whole pool to everyone.

    Raises:
        UserError: `--min_blocks` asks for more than the model has.
    """
    pool = blueprint.pool
    if config.min_blocks > pool:
        raise UserError(
            f"--min_blocks {config.min_blocks} is more than {config.model} has: "
            f"type at most {pool}, its pool blocks"
        )
    least = pool if round < config.warmup_rounds else config.least_blocks(pool)
    return sample_partition(config.seed, round, workers=workers, pool=pool, min_blocks=least)

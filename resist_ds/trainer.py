"""The round loop: local steps, aggregate, hand off, evaluate (paper, section 3)."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from resist_ds import report
from resist_ds.comm import Comm
from resist_ds.config import Config
from resist_ds.data import Data, download, load_data
from resist_ds.errors import RunError, UserError
from resist_ds.evaluate import Evaluation, Result
from resist_ds.local import autocast, learning_rate, local_steps
from resist_ds.models import Blueprint
from resist_ds.order import Order
from resist_ds.partition import Layout, Partition, sample_partition
from resist_ds.sync import Synchroniser
from resist_ds.telemetry import Meter, Telemetry
from resist_ds.workers import Workers

Batches = Iterator[tuple[Tensor, Tensor]]


def main(config: Config) -> int:
    """Train as `config` says; returns the exit code. Collective: all ranks."""
    comm = Comm()
    try:
        Trainer(comm, config).run()
    except RunError as error:
        if comm.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code  # without leaving the job: that waits for collectives which may never end
    comm.close()
    return 0


class Trainer:
    """One run: what is to be done, and the state of the workers that this rank plays."""

    def __init__(self, comm: Comm, config: Config):
        """Load the data and place the workers. Collective: all ranks."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Launchers differ in the thread counts that they set, and on a CPU results differ with these.
        config = replace(config, cpu_threads=config.cpu_threads or max(1, cores // comm.local_size))
        torch.set_num_threads(config.cpu_threads)
        os.environ["OMP_NUM_THREADS"] = str(config.cpu_threads)  # where it is unset, accelerate sets another
        torch.backends.cudnn.benchmark = True  # shapes never change
        self.comm = comm
        self.config = config
        self.meter = Meter(comm)

        workers = config.workers or (comm.size if comm.size > 1 else 4)
        if workers < comm.size:
            raise UserError(
                f"--workers {workers} is less than the {comm.size} ranks: "
                f"type --workers {comm.size} or more, or start fewer ranks"
            )
        self.layout = Layout(workers, comm.size)
        self.data = self._load_data()
        self.blueprint = comm.agree(lambda: Blueprint(config.model, self.data.num_classes))
        if config.min_blocks > self.blueprint.pool:
            raise UserError(
                f"--min_blocks {config.min_blocks} is more than {config.model} has: "
                f"type at most {self.blueprint.pool}, its pool blocks"
            )
        self.order = Order(config.seed, self.data.train_size, workers, config.batch_size)
        steps = config.epochs * self.data.train_size / (workers * config.batch_size)
        self.rounds = config.rounds or math.ceil(steps / config.local_steps)

        self.deal = self.partition(0)
        self.workers = comm.agree(self._place_workers)
        self.sync = Synchroniser(
            comm,
            self.layout,
            self.workers.layout,
            self.blueprint.pool,
            budget=config.transit_mib << 20,
            travel=config.optimizer_state == "travel",
        )
        self.evaluation = Evaluation(comm, self.layout, self.blueprint, self.data, config)

    def run(self) -> Result:
        """Train to the end; returns the last evaluation. Collective: all ranks."""
        job = report.Job(self.config, self.comm, self.layout, self.blueprint, self.data, self.rounds)
        with Telemetry(self.comm, self.config, self.rounds) as telemetry:
            self.comm.agree(lambda: telemetry.open(job.settings()))
            telemetry.say(report.opening(job, self.deal))
            batches = self._batches()
            for round in range(self.rounds):
                trained, self.deal = self.deal, self.partition(round + 1)
                with self.meter.phase("local"):
                    self.comm.agree(partial(self._local_steps, round, batches))
                with self.meter.phase("sync"):
                    self._synchronise(trained, self.deal)
                telemetry.round(self._position(round, trained), self.comm.gather(self.meter.take()))
                if self._evaluation_is_due(round):
                    with self.meter.phase("eval"):
                        result = self._evaluate(trained)
                    telemetry.evaluation(
                        self._position(round, trained),
                        self.comm.gather(self.meter.take()),
                        result.loss,
                        result.accuracy,
                    )
            telemetry.summary(job.settings())
            telemetry.say(report.closing(job, self.deal, telemetry.totals, self.meter.baseline))
        return result

    def partition(self, round: int) -> Partition:
        """Who holds what in a round. Warm-up rounds are local SGD: they deal the whole pool to everyone."""
        config, pool = self.config, self.blueprint.pool
        least = pool if round < config.warmup_rounds else config.min_blocks
        return sample_partition(config.seed, round, workers=self.layout.workers, pool=pool, min_blocks=least)

    def _place_workers(self) -> Workers:
        with self._within_memory():
            return Workers(self.comm, self.layout, self.blueprint, self.config, self.deal)

    @contextmanager
    def _within_memory(self) -> Iterator[None]:
        """One line when memory runs out. (A CPU's is a RuntimeError without a class of its own.)"""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            out = isinstance(error, MemoryError | torch.OutOfMemoryError)
            if not out and "can't allocate memory" not in str(error):
                raise
            raise RunError(
                f"out of memory on {self.comm.device} of rank {self.comm.rank}: more --workers hold fewer "
                "blocks each; or lower --batch_size, raise --accumulation_steps, or add "
                "--activation_checkpointing"
            ) from error

    def _load_data(self) -> Data:
        """The data set, fetched first where that is allowed. Collective: all ranks."""
        comm, config = self.comm, self.config
        if config.download:
            comm.agree(lambda: download(config) if comm.local_rank == 0 else None)
        return comm.agree(lambda: load_data(config))

    def _batches(self) -> Batches:
        """All batches that this rank's workers will see, in the order in which they are played."""

        def schedule() -> Iterator[tuple[int, np.ndarray]]:
            steps = self.config.local_steps
            for round in range(self.rounds):
                for worker in self.layout.workers_of(self.comm.rank):
                    for step in range(round * steps, (round + 1) * steps):
                        yield self.order.batch(step, worker)

        dtype = getattr(torch, self.config.dtype)
        return self.data.train_batches(schedule(), self.comm.device, dtype, self.config.channels_last)

    def _local_steps(self, round: int, batches: Batches) -> None:
        """ℓ local steps of every worker that this rank plays. No communication."""
        config = self.config
        if config.optimizer_state == "reset":
            self.workers.reset_optimizer()
        try:
            with self._within_memory():
                for worker in self.workers.turns():
                    tally = local_steps(
                        self.workers.subnet,
                        worker,
                        batches,
                        first=round * config.local_steps,
                        count=config.local_steps,
                        steps=self.rounds * config.local_steps,
                        config=config,
                    )
                    self.meter.tally(worker.index, tally)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "BatchNorm cannot train on a single image whose maps shrink to 1×1: type a larger "
                f"--img_size, or a --batch_size of at least {2 * config.accumulation_steps} "
                "(2 for each accumulation step)"
            ) from error

    def _synchronise(self, trained: Partition, deal: Partition) -> None:
        """Average every piece and bring it to its next holders. Collective: all ranks."""
        self.sync.aggregate(self.workers.vectors, trained)
        self.sync.hand_off(self.workers.vectors, trained, deal)
        if deal.slots != trained.slots:  # warm-up is over
            self.workers.resize(deal.slots)

    def _evaluation_is_due(self, round: int) -> bool:
        every = self.config.eval_every
        return round + 1 == self.rounds or (every > 0 and (round + 1) % every == 0)

    def _evaluate(self, trained: Partition) -> Result:
        """Test the global model with the test scale of the round just trained. Collective: all ranks."""
        self.workers.prepare_evaluation()
        return self.evaluation.run(
            self.workers.subnet,
            self.workers.vectors,
            self.deal,
            trained.scale,
            autocast(self.config, self.comm.device),
        )

    def _position(self, round: int, trained: Partition) -> dict[str, float]:
        """Where in the run the end of a round is, and what a worker held in it."""
        steps = (round + 1) * self.config.local_steps
        return {
            "round": round + 1,
            "global_step": steps,
            "samples_seen": steps * self.layout.workers * self.config.batch_size,
            "lr": learning_rate(self.config, steps - 1, self.rounds * self.config.local_steps),
            "mem/params_held": self.blueprint.parameters_held(trained.slots),
            "mem/params_full": self.blueprint.parameters,
        }

"""The round loop: local steps, aggregate, hand off, evaluate, save (paper, section 3)."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resist_ds.comm import Comm
from resist_ds.data.datasets import Data, download, load_data
from resist_ds.data.order import Order, Position
from resist_ds.data.trouble import Hearing, News
from resist_ds.engines.deepspeed_options import scheduler_of
from resist_ds.engines.local import Tally, local_steps
from resist_ds.engines.place import layout_of, place_workers
from resist_ds.engines.rates import Rates
from resist_ds.engines.timetable import Timetable
from resist_ds.engines.workers import Workers
from resist_ds.errors import DataError, NotFiniteError, RunError, Stopped, UserError
from resist_ds.launcher import Launch
from resist_ds.memory import one_line_when_out
from resist_ds.nets.blueprint import Blueprint
from resist_ds.nets.precision import choose_kernels
from resist_ds.nets.subnet import Worker
from resist_ds.options.config import Config
from resist_ds.protocol.evaluate import Evaluation, Result
from resist_ds.protocol.global_model import GlobalModel
from resist_ds.signals import Signals
from resist_ds.state.checkpoint import folder_name
from resist_ds.state.folder import RunFolder
from resist_ds.state.policy import SavingPolicy
from resist_ds.state.run_state import config_to_keep
from resist_ds.state.saver import Saved
from resist_ds.state.start import Start
from resist_ds.telemetry import report
from resist_ds.telemetry.meter import Meter
from resist_ds.telemetry.records import Telemetry

Batches = Iterator[tuple[Tensor, Tensor]]


def main(config: Config, parent: int | None = None) -> int:
    """Train as `config` says; returns the exit code. Collective: all ranks.

    Args:
        parent: pid of the process that has started this one, which may have ended since.
    """
    with Signals(config.grace, Launch.read(os.environ), parent) as signals:
        comm = Comm()  # it may wait long for the others
        try:
            trainer = Trainer(comm, config)
            try:
                trainer.run(signals)
            finally:
                trainer.folder.release()
        except RunError as error:
            if comm.rank == 0 or error.alone:
                prefix = "" if isinstance(error, Stopped) else "error: "
                with suppress(OSError):  # a terminal that is gone changes no exit code
                    print(f"{prefix}{error}", file=sys.stderr, flush=True)
            return error.exit_code  # without leaving the job: that waits for collectives which may never end
    comm.close()
    return 0


@dataclass(frozen=True)
class Report:
    """What a rank tells the others when its local steps are done.

    Attributes:
        spoilt: {worker: where it first met NaN or Inf} of those workers that did.
        signal: the number of a signal that asked it to stop, or None.
        due: whether, by its clock, it is time for a checkpoint.
        written: whether its part of a checkpoint in flight is on the disk.
        trouble: with images, that it met on the way.
    """

    spoilt: dict[int, str]
    signal: int | None
    due: bool
    written: bool
    trouble: News


class Trainer:
    """One run: what is to be done, and the state of the workers that this rank plays."""

    def __init__(self, comm: Comm, config: Config):
        """Take the folder, load the data, place the workers. Collective: all ranks."""
        self.meter = Meter(comm)
        self.comm = comm
        self.folder = RunFolder(config.output_dir)
        comm.agree(lambda: self.folder.take() if comm.rank == 0 else None)
        self.start = start = Start(comm, config, self.folder)
        # Launchers differ in the thread counts that they set, and on a CPU results differ with these.
        self.config = config = replace(config, cpu_threads=start.threads(comm.local_size))
        torch.set_num_threads(config.cpu_threads)
        choose_kernels(config)

        layout = layout_of(comm, config, start)
        self.config = config = replace(config, team_size=layout.team_size)
        self.data = self._load_data()
        blueprint = comm.agree(lambda: Blueprint(config.model, self.data.num_classes))
        self._scheduler = comm.agree(lambda: scheduler_of(config))  # once: the file may change during the run
        comm.agree(lambda: start.check(self.options, self.data.train_size))
        self.order = Order(
            config.seed, self.data.train_size, layout.workers, config.batch_size, start.position
        )
        self.timetable = Timetable(config, self.order)
        self.rounds = self.timetable.rounds

        self.rates = comm.agree(lambda: Rates(config, self.timetable, self._scheduler))
        self.workers = place_workers(comm, config, layout, blueprint, start)
        self.net = GlobalModel(comm, config, layout, blueprint, start, self.workers)
        self.evaluation = Evaluation(comm, layout, blueprint, self.data, config)
        on_gpu = comm.device.type == "cuda"
        self.saver = self.net.saver(
            self.folder.checkpoints,
            background=on_gpu if config.checkpoint_async is None else config.checkpoint_async,
        )
        newest = start.position.round if start.here else 0
        self.saving = SavingPolicy(config, self.rounds, newest)
        self._hearing = Hearing(config.on_bad_image)

    def run(self, signals: Signals | None = None) -> Result | None:
        """Train to the end; returns the last evaluation, or None if all was done before.

        Collective: all ranks.

        Args:
            signals: requests to stop, which are met between rounds.

        Raises:
            Stopped: a signal asked for it; a checkpoint was written.
            DataError: images could not be had; if another could stand in, the round was completed and saved.
            NotFiniteError: a worker met NaN or Inf under `--on_nan stop`.
        """
        net = self.net
        left = range(self.start.position.round, self.rounds) if self.comm.rank == 0 else ()
        behind = sum(self._steps_behind(round) > 0 for round in left)
        job = report.Job(self.config, self.comm, net.layout, net.blueprint, self.data, self.timetable, behind)
        if self.start.position.round >= self.rounds:
            if self.comm.rank == 0:
                done = self.start.position.round
                with suppress(OSError):  # nobody may be reading
                    print(f"nothing to do: the run is complete (round {done} of {self.rounds})", flush=True)
            return None
        self.comm.agree(lambda: self.start.make_way() if self.comm.rank == 0 else None)
        telemetry = Telemetry(self.comm, self.config, self.rounds, self.folder.metrics, self.start)
        with telemetry:
            self.comm.agree(lambda: telemetry.open(job.settings()))
            telemetry.say(report.opening(job, net.deal, self.start))
            for remark in self.start.remarks:
                telemetry.warn(remark)
            batches = self._batches()
            if signals:
                signals.defer()
            for round in range(self.start.position.round, self.rounds):
                with self.meter.phase("local"):
                    reports = self._train(partial(self._local_steps, round, batches, signals))
                dropped = self._dropped(round, reports, telemetry)
                with self.meter.phase("sync"):
                    complete = net.finish if self._steps_behind(round) else net.synchronise
                    complete(round, dropped)
                self.meter.exposed(net.overlap.waited, net.overlap.seconds)
                axes = self._axes(round)
                lacking = self._lacking([r.trouble for r in reports], telemetry)
                telemetry.round(axes, self.comm.gather(self.meter.take()), len(dropped))
                if self._evaluation_is_due(round):
                    with self.meter.phase("eval"):
                        result = net.evaluate(self.evaluation, round, self.meter.free)
                    figures = self.comm.gather(self.meter.take())
                    telemetry.evaluation(axes, figures, result.loss, result.accuracy)
                    lacking = self._lacking(self.comm.gather(self.data.trouble.take()), telemetry) or lacking
                stop = next((r.signal for r in reports if r.signal is not None), None)
                if self.saver.in_flight and all(r.written for r in reports):
                    self._settle(telemetry)
                leave = stop is not None or lacking is not None
                if leave or self._checkpoint_is_due(round, reports[0].due):
                    self._save(round, telemetry, wait=leave)
                if lacking is not None:
                    raise DataError(f"{lacking}; {self._goes_on_from(round)}")
                if stop is not None and round + 1 < self.rounds:
                    raise self._stopped(round, stop, signals)
            self._settle(telemetry)
            if signals:
                signals.saved()
            telemetry.summary(job.settings())
            facts = (telemetry.totals, self.meter.baseline, self._copies())
            last = self.folder.checkpoints / folder_name(self.rounds)
            telemetry.say(report.closing(job, net.deal, *facts, last))
        return result

    @property
    def options(self) -> dict[str, Any]:
        """The options as a checkpoint keeps them, with the data set's values in place of nulls."""
        classes, size = self.data.num_classes, self.data.img_size
        # The scheduler is that of a file that stays behind. (A new Config would read that file again.)
        derived = {"num_classes": classes, "img_size": size, "scheduler": self._scheduler}
        return config_to_keep(self.config) | derived

    def _load_data(self) -> Data:
        """The data set, fetched first where that is allowed. Collective: all ranks."""
        comm, config = self.comm, self.config
        if config.download:
            comm.agree(lambda: download(config) if comm.local_rank == 0 else None)
        data = comm.agree(lambda: load_data(config))
        comm.agree(lambda: data.check_shared_memory(config, comm.local_size))
        sizes = comm.gather((data.train_size, data.test_size, data.num_classes))
        for rank, size in enumerate(sizes):
            if size != sizes[0]:  # a machine with another copy
                words = "{} training and {} test images of {} classes"
                raise RunError(
                    f"rank {rank} sees {words.format(*size)}, rank 0 {words.format(*sizes[0])}: "
                    "--data_dir must hold the same on all machines"
                )

        def placed() -> Data:
            with one_line_when_out(comm.device, comm.rank):
                return data.placed(comm.device, config.gpu_cache_mib)

        return comm.agree(placed)

    def _batches(self) -> Batches:
        """What this rank takes of its workers' batches, in the order in which they are played."""
        layout = self.net.layout

        def schedule() -> Iterator[tuple[int, np.ndarray]]:
            for round in range(self.start.position.round, self.rounds):
                steps = range(self._after(round - 1).step, self._after(round).step)
                for worker in layout.workers_of(self.comm.rank):
                    for step in steps:
                        yield self.order.batch(step, worker, layout.lane_of(self.comm.rank), layout.team_size)

        dtype = getattr(torch, self.config.dtype)
        return self.data.train_batches(schedule(), self.comm.device, dtype, self.config.channels_last)

    def _train(self, work: Callable[[], Report]) -> list[Report]:
        """Every rank's local steps, and what each has to say of them. Collective: all ranks."""
        if self.config.inside is None:
            return self.comm.collect(work)
        # Ranks that average gradients at every step cannot agree on a failure in between: the one that
        # fails says so itself and leaves, and the others notice.
        try:
            with self.comm.others():
                report = work()
        except UserError:
            raise
        except RunError as error:
            error.alone = True
            raise
        return self.comm.gather(report)

    def _local_steps(self, round: int, batches: Batches, signals: Signals | None) -> Report:
        """ℓ local steps of every worker that this rank plays; nothing communicates in them but lockstep's.

        Behind the last ones the exchange may run. Collective then: all ranks.
        """
        config = self.config
        if config.optimizer_state == "reset" and isinstance(self.workers, Workers):
            self.workers.reset_optimizer()
        spoilt: dict[int, str] = {}
        behind = self._steps_behind(round)
        try:
            in_a_line = partial(one_line_when_out, self.comm.device, self.comm.rank)
            with in_a_line(), self.net.behind(round, behind), in_a_line():
                for worker in self.workers.turns():
                    tally = self._turn(round, worker, batches, behind)
                    if worker.spoilt:
                        spoilt[worker.index] = worker.spoilt
                        tally = replace(tally, loss=0.0, right=0, images=0)
                    self.meter.tally(worker.index, tally)
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            what = str(error).split(" does not have ")[0]
            raise UserError(
                f"torch has no deterministic form of {what}, which {config.model} uses: "
                "leave --deterministic out"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "BatchNorm cannot train on a single image whose maps shrink to 1×1: type a larger "
                f"--img_size, or a --batch_size of at least {2 * config.accumulation_steps} "
                "(2 for each accumulation step)"
            ) from error
        asked = signals.received if signals else None
        due, written = self.saving.due_by_clock, self.saver.written
        return Report(spoilt, asked, due, written, self.data.trouble.take())

    def _turn(self, round: int, worker: Worker, batches: Batches, behind: int) -> Tally:
        """A worker's local steps of a round, of which so many run while the exchange does."""
        engine, rates = self.workers.engine, self.rates.of(round)
        before = len(rates) - behind
        tally = local_steps(engine, batches, rates=rates[:before])
        worker.spoilt = self._spoilt(round, tally, 0, before)
        if behind:
            assert isinstance(self.workers, Workers)
            self.net.take(round, worker, self.workers.standing(worker))
            rest = local_steps(engine, batches, rates=rates[before:])
            worker.spoilt = worker.spoilt or self._spoilt(round, rest, before, len(rates))
            tally += rest
        return tally

    def _steps_behind(self, round: int) -> int:
        """τ: none where all workers must hold the same when the round ends."""
        if not self.config.overlap_steps:
            return 0
        alike = self._evaluation_is_due(round) or self._checkpoint_is_due(round, by_clock=False)
        changes = round + 1 == self.config.warmup_rounds  # K
        return 0 if alike or changes or self.net.layout.workers == 1 else self.config.overlap_steps

    def _spoilt(self, round: int, tally: Tally, before: int, done: int) -> str | None:
        """Where in a round a worker first met NaN or Inf, if it did: in a loss, or in what it now holds.

        Collective: the team, which agrees on it. A gradient's reaches the weights and momentum in the same
        step, and the next step's loss.

        Args:
            tally: of the round's local steps from `before` to `done`.
        """
        first = self._after(round - 1).step
        found: list[tuple[int, str]] = []
        if tally.spoilt_at is not None:
            step = first + before + tally.spoilt_at + 1
            found = [(step, f"first in the loss of local step {step}")]
        elif not self.workers.engine.is_finite():
            found = [(first + done, f"in the weights or momentum after local step {first + done}")]
        team = self.comm.team(self.net.layout.team_size)
        _, where = min((each for lane in team.gather(found) for each in lane), default=(0, None))
        return where

    def _dropped(self, round: int, reports: Sequence[Report], telemetry: Telemetry) -> frozenset[int]:
        """The workers whose round must not reach the others. Collective: all ranks."""
        spoilt = {worker: where for report in reports for worker, where in report.spoilt.items()}
        said = [f"worker {w} met NaN or Inf in round {round + 1}, {spoilt[w]}" for w in sorted(spoilt)]
        if spoilt and self.config.on_nan == "stop":
            try:
                self._settle(telemetry)
            except RunError as error:
                telemetry.warn(str(error))
            remedy = "try a lower --lr or --clip_grad 1"
            if not self.config.way.lockstep:
                remedy += ", or --on_nan skip"
            raise NotFiniteError(f"{'; '.join(said)}. Nothing of this round is kept: {remedy}")
        for worker, line in zip(sorted(spoilt), said, strict=True):
            late = self._steps_behind(round) and worker not in self.net.overlap.dropped
            but = ", but for what it had sent of shared" if late else ""
            telemetry.warn(f"{line}: its round is dropped{but}")
        return frozenset(spoilt)

    def _lacking(self, trouble: Sequence[News], telemetry: Telemetry) -> str | None:
        """Why the run ends with this round for want of images, or None; the rest is told."""
        told, ends = self._hearing.hear(trouble)
        for line in told:
            telemetry.warn(line)
        telemetry.totals.unreadable = self._hearing.images
        return ends

    def _evaluation_is_due(self, round: int) -> bool:
        every = self.config.eval_every
        return round + 1 == self.rounds or (every > 0 and (round + 1) % every == 0)

    def _checkpoint_is_due(self, round: int, by_clock: bool) -> bool:
        passes = [self._after(r).samples // self.data.train_size for r in (round - 1, round)]
        return self.saving.due(round + 1, new_pass=passes[0] < passes[1], by_clock=by_clock)

    def _save(self, round: int, telemetry: Telemetry, *, wait: bool) -> None:
        """Write the state at the start of the next round. Collective: all ranks."""
        self._settle(telemetry)
        telemetry.sync()
        self.saving.begun()
        with self.meter.phase("save"):
            self.net.save(
                self.saver,
                self._after(round),
                self.options,
                train_size=self.data.train_size,
                totals=telemetry.totals.to_keep(),
            )
            saved = self.saver.settle() if wait or not self.saver.background else None
        self._in_flight = self._axes(round), self.comm.gather(self.meter.take())
        if saved is not None:
            self._tell(saved, telemetry)

    def _settle(self, telemetry: Telemetry) -> None:
        """Complete a checkpoint in flight, if there is one. Collective: all ranks."""
        if self.saver.in_flight:
            self._tell(self.saver.settle(), telemetry)

    def _tell(self, saved: Saved, telemetry: Telemetry) -> None:
        """Record how a save ended; raise `RunError` where the run must not go on without it."""
        warning = self.saving.ended(saved)
        if warning is None:
            telemetry.checkpoint(*self._in_flight, saved)
        else:
            telemetry.warn(warning)

    def _stopped(self, round: int, signum: int, signals: Signals | None) -> Stopped:
        if self.saving.newest > round and signals:
            signals.saved()
        name = signal.Signals(signum).name
        return Stopped(
            f"stopped by {name} after round {round + 1} of {self.rounds}; {self._goes_on_from(round)}", signum
        )

    def _goes_on_from(self, round: int) -> str:
        """Where a run that ends after `round` may be taken up again."""
        newest, there = self.saving.newest, "there"
        if newest <= round:  # the warning before has said why
            there = f"round {newest}" if newest else "nothing: no checkpoint was written"
        return f"--resume auto goes on from {there}"

    def _copies(self) -> dict[str, int]:
        """Bytes of host memory beside what is measured, on the rank that has most. Collective: all ranks."""
        net = self.net
        kept = net.sync.differences.nbytes if net.sync.differences else 0
        beside = (self.workers.idle, self.workers.copies, self.saver.copies, kept, net.overlap.nbytes)
        of_ranks = self.comm.gather(beside)
        names = ("workers", "on_nan skip", "checkpoint_async", "wire compact", "overlap_steps")
        return dict(zip(names, map(max, zip(*of_ranks, strict=True)), strict=True))

    def _after(self, round: int) -> Position:
        """Where the run is when `round` is done."""
        return self.timetable.after(round)

    def _axes(self, round: int) -> dict[str, float]:
        """Where in the run the end of a round is, how long that was, and what a worker held in it."""
        position = self._after(round)
        axes = {
            "round": position.round,
            "global_step": position.step,
            "samples_seen": position.samples,
            "lr": self.rates.of(round)[-1],
            "mem/params_held": self.net.parameters_held,
            "mem/params_full": self.net.blueprint.parameters,
        }
        if self.config.local_steps_max is not None:
            axes["train/local_steps"] = self.timetable.local_steps(round)
        return axes

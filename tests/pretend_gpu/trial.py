"""Runs of the trainer on the pretended device, and what was seen in their local steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resist_ds import trainer
from resist_ds.comm import Comm
from resist_ds.options.config import Config
from tests.pretend_gpu.record import RECORD


@dataclass(frozen=True)
class Seen:
    """What a run came to, on one rank.

    Attributes:
        faults: {what a local step must not do, and where: how often}.
        launches: operations that the device executes in a local step.
        steps: local steps that were seen.
        loss, accuracy: of the last evaluation.
        carrier: what carried the exchanges.
        devices: where the rank computed, and where its exchange buffers were.
    """

    faults: dict[str, int]
    launches: float
    steps: int
    loss: float
    accuracy: float
    carrier: str
    devices: tuple[str, str]


class _Watched(list[float]):
    """The rates of local steps: to take one begins a step, which ends when the next one is asked for."""

    def __iter__(self) -> Iterator[float]:
        for rate in super().__iter__():
            with RECORD.step():
                yield rate


def train(comm: Comm, options: dict[str, Any]) -> Seen:
    """A whole run, its local steps watched: what stands before and behind their loop is not. Collective."""
    local_steps = trainer.local_steps

    def watched(engine: Any, batches: Any, *, rates: Any) -> Any:
        return local_steps(engine, batches, rates=_Watched(rates))

    RECORD.clear()
    trainer.local_steps = watched
    try:
        run = trainer.Trainer(comm, Config(**options))
        try:
            result = run.run()
        finally:
            run.folder.release()
    finally:
        trainer.local_steps = local_steps
    assert result is not None
    return Seen(
        RECORD.faults(),
        RECORD.launches_per_step,
        RECORD.steps,
        result.loss,
        result.accuracy,
        comm.backend,
        (str(comm.device), str(comm.buffer_device)),
    )


def train_all(comm: Comm, runs: dict[str, dict[str, Any]]) -> dict[str, Seen]:
    """Runs one after the other, {name: options}. Collective: all ranks."""
    return {name: train(comm, options) for name, options in runs.items()}

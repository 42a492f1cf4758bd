"""Runs of the trainer on the pretended device, and what was seen in their local steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.pretend_gpu.record import RECORD


@dataclass(frozen=True)
class Seen:
    """What a run on the pretended device came to, on one rank.

    Attributes:
        faults: {what a local step must not do, and where: how often}.
        launches: operations that the device executes in a local step.
        steps: local steps that were seen.
        loss, accuracy: of the last evaluation.
        where: backend and devices.
    """

    faults: dict[str, int]
    launches: float
    steps: int
    loss: float
    accuracy: float
    where: str


class _Watched(list[float]):
    """The rates of local steps: to take one begins a step, which ends when the next one is asked for."""

    def __iter__(self) -> Iterator[float]:
        for rate in super().__iter__():
            with RECORD.step():
                yield rate


def watch_local_steps() -> None:
    """Let the trainer's local steps be recorded; what stands before and behind their loop is not."""
    from resist_ds import trainer

    local_steps = trainer.local_steps

    def watched(engine: Any, batches: Any, *, rates: Any) -> Any:
        return local_steps(engine, batches, rates=_Watched(rates))

    trainer.local_steps = watched


def train(comm: Any, options: dict[str, Any]) -> Seen:
    """A whole run. Collective: all ranks."""
    from resist_ds.options.config import Config
    from resist_ds.trainer import Trainer

    RECORD.clear()
    trainer = Trainer(comm, Config(**options))
    try:
        result = trainer.run()
    finally:
        trainer.folder.release()
    assert result is not None
    where = f"{comm.backend}, computes on {comm.device}, exchanges on {comm.buffer_device}"
    return Seen(RECORD.faults(), RECORD.launches_per_step, RECORD.steps, result.loss, result.accuracy, where)

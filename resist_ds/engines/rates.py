"""The learning rate of every local step of a run. No communication."""

from resist_ds.engines.deepspeed_options import resolved
from resist_ds.engines.timetable import Timetable, decay
from resist_ds.options.config import Config
from resist_ds.options.deepspeed_file import Json


class Rates:
    """Learning rates by round.

    How far a run is, is counted in what ends it: in images, or in rounds under `--rounds`. So another number
    of workers does not move it. (Both quotients are the same while W and ℓ stay.)

    Args:
        scheduler: of a DeepSpeed file, where that decides.

    Raises:
        UserError: DeepSpeed refuses the scheduler's parameters.
    """

    def __init__(self, config: Config, timetable: Timetable, scheduler: Json | None = None):
        self._config = config
        self._timetable = timetable
        self._scheduled = None
        if scheduler is not None:
            from resist_ds.engines.parallel import deepspeed_schedule  # which imports much

            chosen = resolved(scheduler, config, timetable.end.step)
            self._scheduled = deepspeed_schedule(chosen["type"], chosen["params"], config.lr)

    def of(self, round: int) -> list[float]:
        """Of each local step of a round."""
        config, order = self._config, self._timetable.order
        first, steps = self._timetable.after(round - 1), self._timetable.local_steps(round)
        if self._scheduled is not None:
            return [self._scheduled(first.step + i) for i in range(steps)]
        if config.rounds:
            done = [(round * steps + i) / (config.rounds * steps) for i in range(steps)]
        else:
            each, whole = order.workers * order.batch_size, self._timetable.end.samples
            done = [(first.samples + i * each) / whole for i in range(steps)]
        return [learning_rate(config, first.step + i, share) for i, share in enumerate(done)]


def learning_rate(config: Config, step: int, done: float) -> float:
    """Learning rate of local step `step` of a run, when the share `done` of it is done: see `decay`.

    A linear warm-up from 1/lr_warmup_steps multiplies any.
    """
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    return config.lr * decay(config.schedule, done) * warm

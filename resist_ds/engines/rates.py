"""The learning rate of every local step of a run. No communication."""

import math

from resist_ds.data.order import Order, Position
from resist_ds.engines.deepspeed_options import resolved
from resist_ds.options.config import Config
from resist_ds.options.deepspeed_file import Json


class Rates:
    """Learning rates by round.

    How far a run is, is counted in what ends it: in images, or in local steps under `--rounds`. So another
    number of workers does not move it. (Both quotients are the same while W stays.)

    Args:
        rounds: after which the run is complete.
        scheduler: of a DeepSpeed file, where that decides.

    Raises:
        UserError: DeepSpeed refuses the scheduler's parameters.
    """

    def __init__(self, config: Config, order: Order, rounds: int, scheduler: Json | None = None):
        self._config = config
        self._order = order
        self._last = self._after(rounds - 1)
        self._scheduled = None
        if scheduler is not None:
            from resist_ds.engines.parallel import deepspeed_schedule  # which imports much

            chosen = resolved(scheduler, config, self._last.step)
            self._scheduled = deepspeed_schedule(chosen["type"], chosen["params"], config.lr)

    def of(self, round: int) -> list[float]:
        """Of each local step of a round."""
        config, first = self._config, self._after(round - 1)
        if self._scheduled is not None:
            return [self._scheduled(first.step + i) for i in range(config.local_steps)]
        each = self._order.workers * config.batch_size
        rates = []
        for i in range(config.local_steps):
            step, samples = first.step + i, first.samples + i * each
            done = step / self._last.step if config.rounds else samples / self._last.samples
            rates.append(learning_rate(config, step, done))
        return rates

    def _after(self, round: int) -> Position:
        return self._order.after(round + 1 - self._order.start.round, self._config.local_steps)


def learning_rate(config: Config, step: int, done: float) -> float:
    """Learning rate of local step `step` of a run, when the share `done` of its images has been seen.

    step: ÷10 at 50 % and 75 % of training, as in the authors' release; cosine: half a period down to 0.
    A linear warm-up from 1/lr_warmup_steps multiplies either.
    """
    factor = {
        "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant": 1.0,
    }[config.schedule]
    warm = min(1.0, (step + 1) / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
    return config.lr * factor * warm

"""When a run saves, and what a save that failed means for it. No communication; the writing is `saver`'s."""

import time

from resist_ds.errors import RunError
from resist_ds.options.config import Config
from resist_ds.state.saver import Saved


class SavingPolicy:
    """The options about checkpoints, applied to one run.

    Args:
        rounds: after which the run is complete.
        newest: round of the newest checkpoint that is in the run's own folder; 0: none.

    Attributes:
        newest: the same, as the run goes on.
    """

    def __init__(self, config: Config, rounds: int, newest: int):
        self._config = config
        self._rounds = rounds
        self.newest = newest
        self._last = time.monotonic()

    @property
    def due_by_clock(self) -> bool:
        """Whether this rank's clock says so; ranks must agree on one of theirs."""
        every = self._config.checkpoint_minutes
        return every is not None and (time.monotonic() - self._last) / 60 >= every

    def due(self, rounds_done: int, *, new_pass: bool, by_clock: bool) -> bool:
        """Whether to save at the end of a round.

        Args:
            new_pass: whether a pass over the data ended in this round.
            by_clock: `due_by_clock` of one rank for all.
        """
        every = self._config.checkpoint_every
        if rounds_done == self._rounds or by_clock:
            return True
        if every is not None:
            return every > 0 and rounds_done % every == 0
        return self._config.checkpoint_minutes is None and new_pass

    def begun(self) -> None:
        """A save begins: the minutes to the next count from here."""
        self._last = time.monotonic()

    def ended(self, saved: Saved) -> str | None:
        """A save has ended; returns what to warn of where it failed.

        Raises:
            RunError: the run must not go on without it.
        """
        if saved.error is None:
            self.newest = saved.round
            return None
        said = (
            f"the checkpoint of round {saved.round} was not written ({saved.error}); older ones are as before"
        )
        if self._config.checkpoint_errors == "stop" or saved.round == self._rounds:
            raise RunError(said)
        return said

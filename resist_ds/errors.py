"""The errors that end a run with one clear line instead of a traceback."""


class RunError(Exception):
    """Something outside the program went wrong (an unreadable image, a full disk). Exit code 1.

    Attributes:
        alone: the other ranks do not know of it, so that this one must say it.
    """

    exit_code = 1
    alone = False


class UserError(RunError):
    """What the user typed cannot be done; the message says what to type instead. Exit code 2."""

    exit_code = 2


class DamagedError(RunError):
    """A checkpoint is not what was written; the message names the file and what is wrong with it."""


class DataError(RunError):
    """Images cannot be had: a file that cannot be read, a loader process that has ended."""


class NotFiniteError(RunError):
    """A worker met NaN or Inf (`--on_nan stop`). Exit code 3."""

    exit_code = 3


class Stopped(RunError):
    """A signal asked the run to end, and it has ended in good order. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message, signum)
        self.exit_code = 128 + signum

    def __str__(self) -> str:
        return str(self.args[0])

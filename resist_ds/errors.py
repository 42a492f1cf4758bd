"""The errors that end a run with one clear line instead of a traceback."""


class RunError(Exception):
    """Something outside the program went wrong (an unreadable image, a full disk). Exit code 1.

    Attributes:
        alone: the other ranks do not know of it, so that this one must say it.
    """

    exit_code = 1
    alone = False

    def __str__(self) -> str:
        return _printable(super().__str__())


class UserError(RunError):
    """What the user typed cannot be done; the message says what to type instead. Exit code 2."""

    exit_code = 2


class DamagedError(RunError):
    """A checkpoint is not what was written; the message names the file and what is wrong with it."""


class UnreadableError(RunError):
    """A file could not be read, which says nothing about what is in it; the message names file and error."""


class OtherVersionError(UserError):
    """A checkpoint is as it was written, by another version of this package; the message names both."""


class DataError(RunError):
    """Images cannot be had: a file that cannot be read, a loader process that has ended."""


class LostRankError(RunError):
    """Another rank is gone: all that were waiting for it find out by themselves."""


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


def _printable(text: str) -> str:
    """One line that any terminal takes, whatever names of files and fields are quoted in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

"""The two errors that end a run with one clear line instead of a traceback."""


class RunError(Exception):
    """Something outside the program went wrong (an unreadable image, a full disk). Exit code 1."""

    exit_code = 1


class UserError(RunError):
    """What the user typed cannot be done; the message says what to type instead. Exit code 2."""

    exit_code = 2

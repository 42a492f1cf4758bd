"""What a device was asked to do, and by which line of the project."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGE = str(_ROOT / "resist_ds")


@dataclass(frozen=True, order=True)
class Place:
    """A line of the package."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"

    @classmethod
    def now(cls) -> "Place":
        """The innermost line of the package that is being executed."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(_PACKAGE):
                return cls(code.co_filename[len(_PACKAGE) + 1 :], code.co_name, frame.f_lineno)
            frame = frame.f_back  # type: ignore[assignment]
        return cls("?", "?", 0)


@dataclass(frozen=True, order=True)
class Copy:
    """A copy between the host's memory and a device's.

    Attributes:
        to_device: which way.
        pinned: whether the host's side is pinned memory.
        blocking: whether the host waits for it.
    """

    to_device: bool
    pinned: bool
    blocking: bool

    def __str__(self) -> str:
        way = "host to device" if self.to_device else "device to host"
        return f"copy from {way}, {'pinned' if self.pinned else 'pageable'}{', blocking' * self.blocking}"


class Record:
    """Counts of what was seen, everywhere and in local steps alone.

    Attributes:
        copies: {(copy, place): how many}.
        waits: {(operation, place): how many}: the host needed an answer of the device.
        launches: {(operation, place): how many}: operations that the device executed.
        steps: local steps.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.copies: Counter[tuple[Copy, Place]] = Counter()
        self.waits: Counter[tuple[str, Place]] = Counter()
        self.launches: Counter[tuple[str, Place]] = Counter()
        self.steps = 0
        self._in_step = self._begun = False

    def copy(self, copy: Copy) -> None:
        if self._in_step:
            self.copies[copy, Place.now()] += 1

    def wait(self, operation: str) -> None:
        if self._in_step:
            self.waits[operation, Place.now()] += 1

    def launch(self, operation: str) -> None:
        if self._in_step:
            self.launches[operation, Place.now()] += 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """A local step: to its end everything is recorded; but for the first, in which things are set up."""
        self._in_step = self._begun
        self.steps += self._begun
        self._begun = True
        try:
            yield
        finally:
            self._in_step = False

    @property
    def launches_per_step(self) -> float:
        """Operations that the device executes in a local step: what an eager step's time hangs on."""
        return self.launches.total() / max(1, self.steps)

    def faults(self) -> dict[str, int]:
        """What a local step must not do: {what and where: how often}."""
        found: Counter[str] = Counter()
        for (copy, place), count in self.copies.items():
            if not copy.to_device or copy.blocking or not copy.pinned:
                found[f"{place.file} {place.function}: {copy}"] += count
        for (operation, place), count in self.waits.items():
            found[f"{place.file} {place.function}: waits for {operation}"] += count
        return dict(found)


RECORD = Record()
"""Of this process."""

"""What was wrong with images on the way, told between rounds instead of ending one in the middle.

Where an image cannot be read, another stands in for it, and where a loader process ends, the rank decodes for
itself: so the round is completed as on every other rank. What comes of it, all ranks then decide alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

TOLD = 10  # images that are named one by one


@dataclass(frozen=True)
class News:
    """What a rank met since it was last asked.

    Attributes:
        unreadable: {path: the line that says why it cannot be read}.
        loader: why it does without loader processes, or None.
    """

    unreadable: dict[str, str] = field(default_factory=dict)
    loader: str | None = None


class Trouble:
    """What this rank's sources of images meet."""

    def __init__(self) -> None:
        self._news = News()

    def unreadable(self, path: str, why: str) -> None:
        """An image for which another had to stand in."""
        self._news.unreadable[path] = why

    def loader_ended(self, why: str) -> None:
        """From now on the rank decodes for itself."""
        self._news = News(self._news.unreadable, why)

    def take(self) -> News:
        """What was met since the last call."""
        news, self._news = self._news, News()
        return news


class Hearing:
    """What all ranks have told of their troubles; the same on every rank, where all hear the same.

    Args:
        on_bad_image: whether an image that cannot be read ends the run.
    """

    def __init__(self, on_bad_image: Literal["stop", "skip"]):
        self._on_bad_image = on_bad_image
        self._unreadable: dict[str, str] = {}

    @property
    def images(self) -> int:
        """Images for which another stood in, so far."""
        return len(self._unreadable)

    def hear(self, of_ranks: Sequence[News]) -> tuple[list[str], str | None]:
        """What is to be said now, and what ends the run after this round, if anything does."""
        new: dict[str, str] = {}
        for news in of_ranks:
            new |= {path: why for path, why in news.unreadable.items() if path not in self._unreadable}
        known, lines = self.images, [new[path] for path in sorted(new)]
        self._unreadable |= new
        broken = next((news.loader for news in of_ranks if news.loader), None)
        if self._on_bad_image == "stop" and lines:
            more = f" (and {len(lines) - 1} more)" if lines[1:] else ""
            return [], (
                f"{lines[0]}{more}. Replace it, or type --on_bad_image skip; tools/check_data.py finds all. "
                "Until the end of the round another image stood in for it"
            )
        told = [f"{line}; its neighbour stands in for it" for line in lines[: max(0, TOLD - known)]]
        if known < TOLD < self.images:
            told.append(f"more than {TOLD} images cannot be read: tools/check_data.py names all")
        return told, broken

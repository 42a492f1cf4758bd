"""Image folders: which files below train/ and val/ are images of which class, and what is left out.

The order of the files is torchvision's, so that runs train the same bits as they always did. Other than
there, hidden files and folders and what systems leave behind are no data, no folder is read twice through a
link, and nothing is left out without being counted. Imports no torch.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resist_ds.data.pixels import in_one_line, reason
from resist_ds.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TEST_FOLDERS = ("val", "valid", "validation", "test")
# What systems put into folders of ours: previews and the like, some of which are images.
_SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "#recycle", "lost+found"}
_SHOWN = 6  # kinds of what was left out


@dataclass(frozen=True)
class Split:
    """The images below one folder of class folders.

    Attributes:
        files: (path, index of the class), sorted.
        left_out: how many files or folders are no data, by what they are.
    """

    folder: Path
    classes: Sequence[str]
    files: Sequence[tuple[str, int]]
    left_out: Counter[str]

    @property
    def remark(self) -> str | None:
        """What was left out, in one line, or None."""
        kinds = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        if not kinds:
            return None
        words = [f"{number:,} {kind}" for kind, number in kinds[:_SHOWN]]
        if kinds[_SHOWN:]:
            words.append(f"{sum(number for _, number in kinds[_SHOWN:]):,} others")
        return f"left out of {self.folder.name}/: {', '.join(words)}"


def find(root: Path) -> tuple[Split, Split]:
    """The training and the test images below a data set's folder.

    Errors: UserError for a folder that is missing or half present, or whose classes do not fit.
    """
    if not root.is_dir():
        raise UserError(f"--data_dir {root}: no such folder")
    there = (root / name for name in TEST_FOLDERS if (root / name).is_dir())
    folders = (root / "train", next(there, root / TEST_FOLDERS[0]))
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"--data_dir {root} has no {folder.name} folder: it must hold train/ and val/ (or test/), "
                "each with one folder of images per class"
            )
    train, test = (_Search(folder).split() for folder in folders)
    for here, other in ((train, test), (test, train)):
        missing = sorted(set(other.classes) - set(here.classes))
        if missing:
            raise UserError(f"{here.folder} lacks class folders that {other.folder} has: {_some(missing)}")
    if len(train.classes) == 1:
        raise UserError(
            f"{train.folder} has images of one class alone, {_some(train.classes)}: a classifier needs two "
            "or more class folders (perhaps they are one level deeper)"
        )
    return train, test


@dataclass
class _Class:
    """What is below one class folder.

    Attributes:
        images: {folder: names of its images}.
        links: to folders; they are followed last, so that what can be reached without them is.
    """

    images: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)


class _Search:
    """One walk below a folder of class folders."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._left_out: Counter[str] = Counter()

    def split(self) -> Split:
        try:
            # A link upwards leads to the images of all classes, and of the test set.
            above = (self._folder, *self._folder.resolve().parents)
            self._seen = {_identity(str(place)) for place in above}
            names = self._class_folders()
            found = [_Class() for _ in names]
            for name, each in zip(names, found, strict=True):
                self._walk(os.path.join(self._folder, name), each)
            for each in found:
                for link in each.links:  # a list that grows while its links are followed
                    if self._is_new(link):
                        self._walk(link, each)
        except OSError as error:
            raise UserError(f"{in_one_line(str(self._folder))} cannot be used: {reason(error)}") from None
        empty = [name for name, each in zip(names, found, strict=True) if not any(each.images.values())]
        if empty:
            raise UserError(f"{self._folder} has class folders without images: {_some(empty)}")
        files = [
            (os.path.join(folder, name), label)
            for label, each in enumerate(found)
            for folder in sorted(each.images)
            for name in each.images[folder]
        ]
        return Split(self._folder, names, files, self._left_out)

    def _class_folders(self) -> list[str]:
        classes: dict[tuple[int, int], str] = {}
        for entry in self._entries(str(self._folder)):
            if not _is_folder(entry):
                self._judge(entry, at_top=True)
            elif _identity(entry.path) in classes:
                raise UserError(
                    f"{self._folder} has the same class folder twice, by a link: "
                    f"{_some([classes[_identity(entry.path)], entry.name])}"
                )
            elif self._is_new(entry.path):
                classes[_identity(entry.path)] = entry.name
        if not classes:
            raise UserError(f"{self._folder} cannot be used: it has no class folder")
        return sorted(classes.values())

    def _walk(self, folder: str, found: _Class) -> None:
        """Collect the images below a folder; of the links in it, only those to files."""
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            found.images[here] = []
            for entry in self._entries(here):
                if not _is_folder(entry):
                    if self._judge(entry):
                        found.images[here].append(entry.name)
                elif entry.is_symlink():
                    found.links.append(entry.path)
                elif self._is_new(entry.path):
                    waiting.append(entry.path)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What is in a folder and may be data."""
        entries = []
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith("."):
                    self._left_out["hidden"] += 1
                elif entry.name.lower() in _SYSTEM:
                    self._left_out["of the system"] += 1
                else:
                    entries.append(entry)
        return sorted(entries, key=lambda entry: entry.name)

    def _judge(self, entry: os.DirEntry[str], at_top: bool = False) -> bool:
        """Whether a file is an image of a class; if not, it is counted."""
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix not in SUFFIXES:
            self._left_out[in_one_line(suffix[:12]) or "without a suffix"] += 1
        elif at_top:
            self._left_out["beside the class folders"] += 1
        # A link that leads nowhere is an image that is missing: reading it says so.
        elif entry.is_symlink() or entry.is_file():
            return True
        else:  # a pipe, say, which would be waited for
            self._left_out["no plain file"] += 1
        return False

    def _is_new(self, folder: str) -> bool:
        """Whether nobody has been in a folder yet; from now on, somebody has."""
        identity = _identity(folder)
        if identity in self._seen:
            self._left_out["reached twice by a link"] += 1
            return False
        self._seen.add(identity)
        return True


def _identity(folder: str) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(in_one_line, names[:3]))
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Which files below a data set's folder are data, and that all others are counted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from resist_ds.data import image_folder
from resist_ds.data.image_folder import SUFFIXES, Split
from resist_ds.errors import UserError

FILES = [
    "a/1.png",
    "a/0.JPG",
    "a/deep/2.png",
    "a/deep/er/3.Tiff",
    "a/deep-er/3.png",
    "b/1.webp",
    "b/sub/0.png",
    "b/other/0.png",
    "b/10.png",
    "b/9.png",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound data set of two classes; nobody reads its images here."""
    for split in ("train", "val"):
        for name in FILES:
            put(tmp_path / split / name)
    return tmp_path


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def inside(split: Split) -> list[str]:
    return [os.path.relpath(path, split.folder) for path, _ in split.files]


def test_files_come_in_torchvisions_order(root: Path) -> None:
    train, test = image_folder.find(root)
    for split in (train, test):
        assert list(split.files) == ImageFolder(str(split.folder)).samples
        assert list(split.classes) == ["a", "b"] and not split.left_out and split.remark is None
    assert len(train.files) == len(FILES)
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert SUFFIXES == IMG_EXTENSIONS


RUBBISH: dict[str, tuple[Callable[[Path], object], str]] = {
    "jupyter": (lambda p: put(p / ".ipynb_checkpoints" / "0-checkpoint.png"), "1 hidden"),
    "jupyter in a class": (lambda p: put(p / "a" / ".ipynb_checkpoints" / "0-checkpoint.png"), "1 hidden"),
    "macOS": (lambda p: (put(p / "a" / "._0.png"), put(p / ".DS_Store"), put(p / "b/.DS_Store")), "3 hidden"),
    "macOS's archives": (lambda p: put(p / "__MACOSX" / "a" / "0.png"), "1 of the system"),
    "Synology's previews": (lambda p: put(p / "a" / "@eaDir" / "0.jpg" / "M.jpg"), "1 of the system"),
    "Windows": (lambda p: (put(p / "a" / "Thumbs.db"), put(p / "b" / "desktop.ini")), "1 .db, 1 .ini"),
    "GIFs": (lambda p: [put(p / "a" / f"{i}.GIF") for i in range(1200)], "1,200 .gif"),
    "no suffix": (lambda p: (put(p / "a" / "README"), put(p / "a" / "b~")), "2 without a suffix"),
    "beside the classes": (lambda p: put(p / "0.png"), "1 beside the class folders"),
    "lists": (lambda p: (put(p / "labels.csv"), put(p / "a" / "labels.csv")), "2 .csv"),
    "a pipe": (lambda p: os.mkfifo(p / "a" / "pipe.png"), "1 no plain file"),
    "an odd suffix": (lambda p: put(p / "a" / "x.\n\udc80"), "1 .\\n\\udc80"),
    "a loop": (lambda p: (p / "a" / "loop").symlink_to("."), "1 reached twice by a link"),
    "a loop to the top": (lambda p: (p / "a" / "up").symlink_to(".."), "1 reached twice by a link"),
    "a loop to the data set": (lambda p: (p / "a" / "up").symlink_to("../.."), "1 reached twice by a link"),
    "a loop as a class": (lambda p: (p / "all").symlink_to("."), "1 reached twice by a link"),
    "another class": (lambda p: (p / "a" / "b").symlink_to("../b"), "1 reached twice by a link"),
    "a link that sorts first": (lambda p: (p / "a" / "0").symlink_to("deep/er"), "1 reached twice by a link"),
    "a circle of links": (lambda p: (p / "a" / "x").symlink_to("x"), "1 without a suffix"),
    "much": (
        lambda p: [put(p / "a" / f"x.{c}") for c in "abcdefgh"],
        "1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 2 others",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_is_no_data_and_is_counted(kind: str, root: Path) -> None:
    before, _ = image_folder.find(root)
    litter, said = RUBBISH[kind]
    litter(root / "train")
    train, test = image_folder.find(root)
    assert (train.files, train.classes) == (before.files, before.classes)
    assert train.remark == f"left out of train/: {said}" and test.remark is None
    assert train.remark.isprintable() and train.remark.encode()


def test_links_to_what_is_elsewhere_are_followed_once(root: Path) -> None:
    put(root / "more" / "7.png")
    (root / "more" / "back").symlink_to(".")
    (root / "train" / "a" / "more").symlink_to("../../more")
    (root / "train" / "b" / "more").symlink_to("../../more")
    (root / "train" / "b" / "link.png").symlink_to("1.webp")
    (root / "train" / "b" / "lost.png").symlink_to(
        "nowhere.png"
    )  # an image that is missing: reading it says so
    train, _ = image_folder.find(root)
    added = ["a/more/7.png", "b/link.png", "b/lost.png"]
    assert sorted(inside(train)) == sorted([*FILES, *added])
    assert train.left_out == {"reached twice by a link": 2}


def test_a_whole_split_or_class_may_be_a_link(root: Path) -> None:
    (root / "val" / "a").rename(root / "elsewhere")
    (root / "val" / "a").symlink_to("../elsewhere")
    assert len(image_folder.find(root)[1].files) == len(FILES)
    (root / "val").rename(root / "old")
    (root / "val").symlink_to("train")
    train, test = image_folder.find(root)
    assert inside(train) == inside(test) and not test.left_out


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_test_folder_may_be_called(name: str, root: Path) -> None:
    (root / "val").rename(root / name)
    assert image_folder.find(root)[1].folder.name == name


def one_class(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "b").rename(root / f"b of {split}")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one class": (one_class, "{}/train has images of one class alone, a: a classifier needs two or more "),
    "the same class twice": (
        lambda p: (p / "train" / "b2").symlink_to("b"),
        "{}/train has the same class folder twice, by a link: b, b2",
    ),
    "only hidden classes": (
        lambda p: [f.rename(f.with_name(f".{f.name}")) for f in (p / "val").iterdir()],
        "{}/val cannot be used: it has no class folder",
    ),
    "only rubbish in a class": (
        lambda p: (put(p / "train/c/._0.png"), put(p / "train/c/0.gif"), put(p / "val/c/0.png")),
        "{}/train has class folders without images: c",
    ),
    "a class of the test set alone": (
        lambda p: put(p / "val" / "c" / "0.png"),
        "{}/train lacks class folders that {}/val has: c",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_meant_is_refused(kind: str, root: Path) -> None:
    damage, said = REFUSED[kind]
    damage(root)
    with pytest.raises(UserError) as caught:
        image_folder.find(root)
    assert str(caught.value).startswith(said.format(root, root)) and "\n" not in str(caught.value)


def test_a_closed_folder_is_not_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk would leave it out in silence."""
    scan = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"train cannot be used: .*Permission denied.*sub"):
        image_folder.find(root)

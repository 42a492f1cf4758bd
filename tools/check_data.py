"""Read every image of a data set once: what cannot be read, what is left out, how many of each class.

    python tools/check_data.py ~/photos      # with train/ and val/ in it, as for --data_dir

Images are read as training reads them, and each that cannot be is named with the reason. Exit code 0 if all
can be read, 1 if not, 2 if the folder is no data set.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import ExifTags, Image
from tqdm import tqdm

from resist_ds.data import image_folder, pixels
from resist_ds.data.image_folder import Split
from resist_ds.errors import DataError, UserError

AT_ONCE = 1000  # images that wait for a thread
DARK = 16  # of 255


@dataclass(frozen=True)
class Found:
    """What is to be said of one image.

    Attributes:
        bad: why it cannot be read, or None.
        remark: what looks odd about it, or None.
    """

    bad: str | None = None
    remark: str | None = None


def look(path: str) -> Found:
    """Read one image."""
    try:
        image = pixels.read(path)
        with Image.open(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except DataError as error:
        return Found(bad=str(error))
    values = image.getextrema()
    if all(low == high for low, high in values):
        return Found(remark="of a single colour")
    if all(high < DARK for _, high in values):  # 12 bits in a file of 16, say
        return Found(remark=f"almost black (no value above {DARK - 1} of 255)")
    return Found(remark="with an orientation in EXIF, which training does not apply" if turned else None)


def looks(split: Split, threads: int) -> Iterator[tuple[str, int, Found]]:
    """(path, label, what was found) of all images of a split, in order."""
    with (
        ThreadPoolExecutor(threads) as pool,  # Pillow decodes outside of the interpreter lock
        tqdm(total=len(split.files), desc=split.folder.name, unit="image", disable=None) as bar,
    ):
        for start in range(0, len(split.files), AT_ONCE):
            files = split.files[start : start + AT_ONCE]
            for (path, label), found in zip(files, pool.map(look, (path for path, _ in files)), strict=True):
                bar.update()
                yield path, label, found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the --data_dir of a run")
    parser.add_argument("--threads", type=int, default=0, help="that read at the same time [one per core]")
    given = parser.parse_args()
    if given.threads < 0:
        parser.error(f"--threads is {given.threads}: type a whole number above 0")
    try:
        splits = image_folder.find(given.folder.expanduser())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    bad = 0
    good = [Counter[int](), Counter[int]()]
    remarks: dict[str, list[str]] = {}
    for split, counts in zip(splits, good, strict=True):
        for path, label, found in looks(split, given.threads or os.cpu_count() or 1):
            if found.bad is None:
                counts[label] += 1
            else:
                bad += 1
                tqdm.write(found.bad)
            if found.remark is not None:
                remarks.setdefault(found.remark, []).append(path)

    names = [pixels.in_one_line(name) for name in splits[0].classes]
    width = max(map(len, ("class", *names)))
    print("class".ljust(width), *(split.folder.name.rjust(10) for split in splits))
    for label, name in enumerate(names):
        print(name.ljust(width), *(f"{counts[label]:10,}" for counts in good))
    for split in splits:
        if split.remark:
            print(split.remark)
    for remark, paths in remarks.items():
        print(f"{len(paths):,} {remark}: {pixels.in_one_line(paths[0])}{' and others' if paths[1:] else ''}")
    total = sum(len(split.files) for split in splits)
    print(f"{total - bad:,} of {total:,} images can be read" if bad else f"all {total:,} images can be read")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""What was measured: a line of JSON for every run that has ended, from which all tables and pictures follow.

The file may be kept where run folders are not, and taken elsewhere: a run whose line is there is done.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resist_ds.errors import UserError

# Options that say where and beside what a run takes place, and nothing of what it learns; what they are.
BESIDE = {
    "data_workers": "0",
    "cpu_threads": "1",
    "checkpoint_every": "0",
    "keep": "1",
    "eval_every": "0",
    "log_with": "none",
    "progress": "false",
}
INCIDENTAL = ("data_dir", "output_dir", "resume", *BESIDE)
VARIED = ("lr", "epochs", "seed")


@dataclass(frozen=True)
class Record:
    """A run that has ended.

    Attributes:
        arm: its name; options: all that were typed for it, but `INCIDENTAL`; data: what `data_of` says.
        study: those of them that all runs of the study have alike.
        lr, passes, seed: peak rate, passes over the images by all workers together, seed.
        accuracy: of the last, global model on the test images, in [0, 1]; None: the run met NaN or Inf.
        loss: of training, in the last round.
        facts: W, K, P, rounds, steps of a worker, images seen, what the run stood on.
    """

    arm: str
    options: dict[str, str]
    study: dict[str, str]
    data: str
    lr: float
    passes: float
    seed: int
    accuracy: float | None
    loss: float | None
    facts: dict[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        return key(self.data, self.options, self.lr, self.passes, self.seed)


def data_of(folder: Path) -> str:
    """What an image folder holds, so that another one is another study."""
    counts = [len([*(folder / part).glob("*/*")]) for part in ("train", "test")]
    classes = len([*(folder / "train").glob("*/")])
    return f"{counts[0]:,} and {counts[1]:,} images of {classes} classes"


def telling(options: Mapping[str, str]) -> dict[str, str]:
    """Options without those that are incidental."""
    return {name: value for name, value in sorted(options.items()) if name not in INCIDENTAL}


def key(data: str, options: Mapping[str, str], lr: float, passes: float, seed: int) -> tuple[object, ...]:
    """What makes two runs the same one."""
    return (data, *way(options), lr, passes, seed)


def way(options: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Options without those that make several runs of one way."""
    return tuple((name, value) for name, value in telling(options).items() if name not in VARIED)


def load(path: Path) -> list[Record]:
    """The records of a file, each run once; raises `UserError` for a line that is no record."""
    if not path.exists():
        return []
    found: dict[tuple[object, ...], Record] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = Record(**json.loads(line))
            found.setdefault(record.key, record)
        except (ValueError, TypeError):
            raise UserError(
                f"{path}, line {number}, is no record of the study: mend it or take it out"
            ) from None
    return list(found.values())


def fingerprint(found: Iterable[Record]) -> str:
    """What a picture or table carries of the records that it was made from."""
    lines = sorted(json.dumps(asdict(record), sort_keys=True) for record in found)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def append(path: Path, record: Record) -> None:
    """Add a record, whole or not at all where the process ends in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(record), sort_keys=True) + "\n")


def by_study(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by what all of a study's runs have alike, in words."""
    found: dict[str, list[Record]] = {}
    for record in records:
        alike = ", ".join(f"{name} {value}" for name, value in sorted(record.study.items()))
        found.setdefault(f"{alike}; {record.data}", []).append(record)
    return found

"""Where images wait for their batch: decoded, on the host or on the device, or in files.

A *schedule* of (epoch, sample indices) goes in, and batches of bytes on the device come out in that order.
From the host they come through page-locked memory, so that nobody waits for a copy: torch gives a block of
that out again only when the copies that were begun from it are done. An
image that cannot be read is replaced by its neighbour in the data set, the next one that can: a choice that
depends on the files alone, so it is the same in whatever batch, worker, rank or loader process it is met.
What becomes of the run, others decide (trouble.py).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from resist_ds.data import pixels
from resist_ds.data.cut import Cut
from resist_ds.data.loader import Loaded, load
from resist_ds.data.order import resized_crop
from resist_ds.data.trouble import Trouble
from resist_ds.errors import DataError

Schedule = Iterable[tuple[int, np.ndarray]]
"""(epoch, sample indices int64 [B]) of one batch after the other."""


class Task(NamedTuple):
    """What a loader process reads in one go: a part of a batch, so that all of them work on the next one.

    Attributes:
        samples: int64 [n].
        paths: of these samples, so that a loader process holds no list of a million files.
        last: of its batch.
    """

    epoch: int
    samples: np.ndarray
    paths: Sequence[str]
    last: bool


TASK = 32  # images of a task at most

# Up to this side, images are augmented by pad-crop-flip on the device (as for CIFAR), and image folders may
# be kept decoded; above, training images are random resized crops of the files (as for ImageNet).
SMALL = 64

NEIGHBOURS = 100  # that are tried; if none can be read, it is not the images that are broken


@dataclass(frozen=True)
class Batch:
    """Samples int64 [B] of an epoch, their images uint8 [B, 3, S, S] and labels int64 [B], on the device."""

    epoch: int
    samples: Tensor
    images: Tensor
    labels: Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on the device: on a GPU a copy for which nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class InMemory:
    """Decoded images uint8 [N, 3, S, S] with their labels int64 [N], on the host or on the device."""

    images: Tensor
    labels: Tensor

    @property
    def nbytes(self) -> int:
        """Of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    def to(self, device: torch.device) -> "InMemory":
        """The same there: of a batch only the numbers of its samples then travel."""
        return InMemory(self.images.to(device), self.labels.to(device))

    def stream(self, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
        """The scheduled batches, in order."""
        for epoch, samples in schedule:
            there = sent(_rows(samples), device)
            here = there if self.images.device == there.device else _rows(samples)
            images, labels = (_gathered(values, here, device) for values in (self.images, self.labels))
            yield Batch(epoch, there, images, labels)


def _gathered(values: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """`values[rows]` on the device, gathered where the values are."""
    pin = values.device.type != device.type
    shape = (len(rows), *values.shape[1:])
    out = torch.empty(shape, dtype=values.dtype, device=values.device, pin_memory=pin)
    return torch.index_select(values, 0, rows, out=out).to(device, non_blocking=True)


@dataclass(frozen=True)
class Decode(Dataset[object]):
    """Reads image files as uint8 [3, S, S].

    Up to S = SMALL the image is scaled to the square. Above, its centre is taken after scaling the shorter
    side to S / 0.875, or, where `seed` is given, a random resized crop, flipped or not. Large JPEGs are
    decoded smaller (cut.py); without a seed only where twice the pixels remain, so that what is evaluated
    differs from torchvision's and timm's by rounding at the most.
    """

    img_size: int
    seed: int | None = None

    def __getitem__(self, task: Task | DataError) -> Loaded | DataError:
        """The images of a task uint8 [B, 3, S, S], and why which of them could not be read."""
        if isinstance(task, DataError):  # which was lost on its way here
            return task
        images = np.zeros((len(task.paths), 3, self.img_size, self.img_size), np.uint8)
        unreadable: dict[int, str] = {}
        for row, (sample, path) in enumerate(zip(task.samples, task.paths, strict=True)):
            try:
                images[row] = self.read(path, task.epoch, int(sample))
            except pixels.UnreadableError as error:
                unreadable[row] = str(error)
            except DataError as error:
                return error
        return torch.from_numpy(images), unreadable

    def read(self, path: str, epoch: int = 0, sample: int = 0) -> np.ndarray:
        """One image; DataError with its path if it cannot be read."""
        image = pixels.read(path, lambda width, height: self.cut(width, height, epoch, sample))
        return np.asarray(image).transpose(2, 0, 1)

    def cut(self, width: int, height: int, epoch: int, sample: int) -> Cut:
        """What is seen of an image of width × height pixels."""
        size, whole = self.img_size, (0, 0, width, height)
        if size <= SMALL:
            return Cut(whole, (size, size), size, spare=2)
        if self.seed is not None:
            box, flip = resized_crop(self.seed, epoch, sample, width, height)
            return Cut(box, (size, size), size, flip)
        shorter, side = min(width, height), round(size / 0.875)
        return Cut(whole, (side * width // shorter, side * height // shorter), size, spare=2)


@dataclass(frozen=True)
class Files:
    """Image files with their labels int64 [N]."""

    paths: Sequence[str]
    labels: Tensor

    def neighbour(self, decode: Decode, epoch: int, sample: int, why: str) -> tuple[np.ndarray, int]:
        """What stands in for a sample that cannot be read: the image and label of the next that can.

        Errors: DataError if none can.
        """
        for distance in range(1, min(NEIGHBOURS, len(self.paths) - 1) + 1):
            other = (sample + distance) % len(self.paths)
            try:
                return decode.read(self.paths[other], epoch, sample), int(self.labels[other])
            except pixels.UnreadableError:  # and is met as itself some day
                continue
        raise DataError(f"{why}, and nor can the images after it")


@dataclass(frozen=True)
class OnDisk:
    """Image files, decoded by `processes` loader processes (0: by the caller)."""

    files: Files
    decode: Decode
    processes: int
    trouble: Trouble

    @property
    def labels(self) -> Tensor:
        """Of the files."""
        return self.files.labels

    def stream(self, schedule: Schedule, device: torch.device) -> Iterator[Batch]:
        """The scheduled batches, in order."""
        coming = iter(schedule)
        first = next(coming, None)
        if first is None:
            return
        tasks = (task for batch in chain([first], coming) for task in self._tasks(*batch))
        parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of the batch that is being read
        for task, images, unreadable in self._read(tasks, device.type != "cpu", _parts(len(first[1]))):
            samples = _rows(task.samples)
            labels = self.labels[samples]
            self._stand_in(task, unreadable, images, labels)
            parts.append((samples, images.to(device, non_blocking=True), labels))
            if task.last:
                samples, images, labels = map(_joined, zip(*parts, strict=True))
                parts.clear()
                yield Batch(task.epoch, sent(samples, device), images, sent(labels, device))

    def _tasks(self, epoch: int, samples: np.ndarray) -> Iterator[Task]:
        """What a batch is cut into."""
        parts = np.array_split(samples, _parts(len(samples)))
        for i, part in enumerate(parts, start=1):
            yield Task(epoch, part, [self.files.paths[sample] for sample in part], i == len(parts))

    def _read(
        self, tasks: Iterator[Task], pin: bool, per_batch: int
    ) -> Iterator[tuple[Task, Tensor, dict[int, str]]]:
        """Every task with its images, and why which of them could not be read."""
        due: deque[Task] = deque()

        def noted() -> Iterator[Task]:
            for task in tasks:
                due.append(task)
                yield task

        to_come = noted()
        loaded = load(self.decode, to_come, self.processes, pin, per_batch)
        while True:
            try:
                images, unreadable = next(loaded)
            except StopIteration:
                return
            except DataError as error:
                if not self.processes:
                    raise
                self.trouble.loader_ended(str(error))
                break
            yield due.popleft(), images, unreadable
        while due or next(to_come, None) is not None:  # what was under way, once more, and the rest
            (here,) = load(self.decode, [due[0]], 0, pin)
            yield due.popleft(), *here

    def _stand_in(self, task: Task, unreadable: dict[int, str], images: Tensor, labels: Tensor) -> None:
        """Put neighbours in the place of what could not be read."""
        for row, why in unreadable.items():
            sample = int(task.samples[row])
            image, labels[row] = self.files.neighbour(self.decode, task.epoch, sample, why)
            images[row] = torch.from_numpy(image.copy())
            self.trouble.unreadable(task.paths[row], why)


Source = InMemory | OnDisk


def _rows(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(samples.astype(np.int64, order="C"))  # a copy: torch takes no reversed view


def _parts(samples: int) -> int:
    """Tasks that a batch of so many samples is cut into."""
    return -(-samples // TASK) or 1


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def decoded(files: Files, decode: Decode, threads: int, trouble: Trouble | None) -> InMemory:
    """Read all files into memory.

    Args:
        trouble: where an image that cannot be read is noted; None: it is an error.

    Errors: DataError also where nothing of a class can be read.
    """
    count = len(files.paths)
    images = np.empty((count, 3, decode.img_size, decode.img_size), np.uint8)
    labels = files.labels.clone()

    def read(sample: int) -> None:
        try:
            images[sample] = decode.read(files.paths[sample], 0, sample)
        except pixels.UnreadableError as error:
            if trouble is None:
                raise
            images[sample], labels[sample] = files.neighbour(decode, 0, sample, str(error))
            trouble.unreadable(files.paths[sample], str(error))

    with ThreadPoolExecutor(max(1, threads)) as pool:  # Pillow decodes outside of the interpreter lock
        try:
            for _ in pool.map(read, range(count)):
                pass
        except DataError:
            pool.shutdown(cancel_futures=True)
            raise
    lost = set(files.labels.tolist()) - set(labels.tolist())
    if lost:  # to train without a class would be silent
        path = files.paths[files.labels.tolist().index(min(lost))]
        raise DataError(f"not one image can be read of the class of {path}: mend them, or remove that class")
    return InMemory(torch.from_numpy(images), labels)

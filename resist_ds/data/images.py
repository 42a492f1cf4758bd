"""Where images wait for their batch: decoded in memory, or in files that are decoded on the way.

A *schedule* of (epoch, sample indices) goes in, and batches of bytes on the host come out in that order. An
image that cannot be read is replaced by its neighbour in the data set, the next one that can: a choice that
depends on the files alone, so it is the same in whatever batch, worker, rank or loader process it is met.
What becomes of the run, others decide (trouble.py).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from resist_ds.data import pixels
from resist_ds.data.loader import Loaded, load
from resist_ds.data.order import resized_crop
from resist_ds.data.trouble import Trouble
from resist_ds.errors import DataError

Schedule = Iterable[tuple[int, np.ndarray]]
"""(epoch, sample indices int64 [B]) of one batch after the other."""

Task = tuple[int, np.ndarray, Sequence[str]]
"""(epoch, sample indices, their paths), so that a loader process holds no list of a million files."""

# Up to this side, images are augmented by pad-crop-flip on the device (as for CIFAR), and image folders may
# be kept decoded; above, training images are random resized crops of the files (as for ImageNet).
SMALL = 64

NEIGHBOURS = 100  # that are tried; if none can be read, it is not the images that are broken


@dataclass(frozen=True)
class HostBatch:
    """Images uint8 [B, 3, S, S] and labels int64 [B] on the host, of the given samples in the given epoch."""

    epoch: int
    samples: np.ndarray
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class InMemory:
    """Decoded images uint8 [N, 3, S, S] with their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def stream(self, schedule: Schedule, pin: bool) -> Iterator[HostBatch]:
        """The scheduled batches, in order; `pin` puts their images into page-locked memory."""
        for epoch, samples in schedule:
            rows = _rows(samples)
            images = torch.empty((len(rows), *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
            torch.index_select(self.images, 0, rows, out=images)
            yield HostBatch(epoch, samples, images, self.labels[rows])


@dataclass(frozen=True)
class Decode(Dataset[object]):
    """Reads image files as uint8 [3, S, S].

    Up to S = SMALL the image is scaled to the square. Above, its centre is taken after scaling the shorter
    side to S / 0.875, or, where `seed` is given, a random resized crop, flipped or not.
    """

    img_size: int
    seed: int | None = None

    def __getitem__(self, task: Task | DataError) -> Loaded | DataError:
        """The images of a task uint8 [B, 3, S, S], and why which of them could not be read."""
        if isinstance(task, DataError):  # which was lost on its way here
            return task
        epoch, samples, paths = task
        images = np.zeros((len(paths), 3, self.img_size, self.img_size), np.uint8)
        unreadable: dict[int, str] = {}
        for row, (sample, path) in enumerate(zip(samples, paths, strict=True)):
            try:
                images[row] = self.read(path, epoch, int(sample))
            except pixels.UnreadableError as error:
                unreadable[row] = str(error)
            except DataError as error:
                return error
        return torch.from_numpy(images), unreadable

    def read(self, path: str, epoch: int = 0, sample: int = 0) -> np.ndarray:
        """One image; DataError with its path if it cannot be read."""
        return np.asarray(self._fit(pixels.read(path), epoch, sample)).transpose(2, 0, 1)

    def _fit(self, image: Image.Image, epoch: int, sample: int) -> Image.Image:
        size = self.img_size
        if size > SMALL and self.seed is not None:
            box, flip = resized_crop(self.seed, epoch, sample, image.width, image.height)
            image = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
        if size > SMALL:
            shorter, side = min(image.size), round(size / 0.875)
            width, height = (side * length // shorter for length in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - size) / 2), round((height - size) / 2)
            return image.crop((left, top, left + size, top + size))
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)


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

    def stream(self, schedule: Schedule, pin: bool) -> Iterator[HostBatch]:
        """The scheduled batches, in order; `pin` puts their images into page-locked memory."""
        paths = self.files.paths
        due: deque[Task] = deque()

        def tasks() -> Iterator[Task]:
            for epoch, samples in schedule:
                due.append((epoch, samples, [paths[i] for i in samples]))
                yield due[-1]

        to_come = tasks()
        loaded = load(self.decode, to_come, self.processes, pin)
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
            yield self._complete(due.popleft(), images, unreadable)
        while due or next(to_come, None) is not None:  # what was under way, once more, and the rest
            yield self._complete(due[0], *self._here(due[0], pin))
            due.popleft()

    def _here(self, task: Task, pin: bool) -> Loaded:
        """Decode a task without loader processes."""
        (loaded,) = load(self.decode, [task], 0, pin)
        return loaded

    def _complete(self, task: Task, images: Tensor, unreadable: dict[int, str]) -> HostBatch:
        epoch, samples, paths = task
        labels = self.labels[_rows(samples)]
        for row, why in unreadable.items():
            image, labels[row] = self.files.neighbour(self.decode, epoch, int(samples[row]), why)
            images[row] = torch.from_numpy(image.copy())
            self.trouble.unreadable(paths[row], why)
        return HostBatch(epoch, samples, images, labels)


Source = InMemory | OnDisk


def _rows(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(samples.astype(np.int64, order="C"))  # a copy: torch takes no reversed view


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

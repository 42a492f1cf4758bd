"""Where images wait for their batch: decoded in memory, or in files that loader processes decode on the way.

A *schedule* of (epoch, sample indices) goes in, and batches of bytes on the host come out in that order.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resist_ds.data.order import resized_crop
from resist_ds.errors import RunError

Schedule = Iterable[tuple[int, np.ndarray]]
"""(epoch, sample indices int64 [B]) of one batch after the other."""

# Up to this side, images are augmented by pad-crop-flip on the device (as for CIFAR), and image folders may
# be kept decoded; above, training images are random resized crops of the files (as for ImageNet).
SMALL = 64


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

    def __getitem__(self, task: tuple[int, np.ndarray, list[str]]) -> object:
        """(epoch, samples, paths) → (epoch, samples, images uint8 [B, 3, S, S]).

        An unreadable file's RunError is returned, not raised: raising in a loader process would bury its line
        in that process's traceback.
        """
        epoch, samples, paths = task
        images = np.empty((len(paths), 3, self.img_size, self.img_size), np.uint8)
        try:
            for image, sample, path in zip(images, samples, paths, strict=True):
                image[:] = self.read(path, epoch, int(sample))
        except RunError as error:
            return error
        return epoch, samples, torch.from_numpy(images)

    def read(self, path: str, epoch: int = 0, sample: int = 0) -> np.ndarray:
        """One image; RunError with its path if it cannot be read."""
        try:
            with Image.open(path) as file:
                image = self._fit(file.convert("RGB"), epoch, sample)
        except Exception as error:  # decoders raise nearly anything when they meet broken bytes
            raise RunError(f"cannot read the image {path}: {reason(error)}") from None
        return np.asarray(image).transpose(2, 0, 1)

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
class OnDisk:
    """Image files with their labels int64 [N], decoded by `processes` loader processes (0: by the caller)."""

    paths: Sequence[str]
    labels: Tensor
    decode: Decode
    processes: int

    def stream(self, schedule: Schedule, pin: bool) -> Iterator[HostBatch]:
        """The scheduled batches, in order; `pin` puts their images into page-locked memory."""
        # The paths travel with each batch, so that a loader process holds no list of a million files.
        tasks = ((epoch, samples, [self.paths[i] for i in samples]) for epoch, samples in schedule)
        loader = DataLoader(
            self.decode,
            sampler=tasks,
            batch_size=None,  # a task is a batch already
            collate_fn=_unchanged,
            num_workers=self.processes,
            pin_memory=pin,
            multiprocessing_context=_loader_context() if self.processes else None,
            worker_init_fn=_belong_to_the_rank,
            generator=torch.Generator(),  # else it would draw a seed, which nobody uses, from the global one
        )
        try:
            for batch in loader:
                if isinstance(batch, RunError):
                    raise batch
                epoch, samples, images = batch
                yield HostBatch(epoch, samples, images, self.labels[_rows(samples)])
        except (RuntimeError, OSError, EOFError) as error:  # a process was killed, mostly for its memory
            raise RunError(f"a loader process ended ({reason(error)}): try fewer --data_workers") from None


Source = InMemory | OnDisk


def _rows(samples: np.ndarray) -> Tensor:
    return torch.from_numpy(samples.astype(np.int64, order="C"))  # a copy: torch takes no reversed view


def _unchanged(batch: object) -> object:
    return batch


def _belong_to_the_rank(process: int) -> None:
    """Ctrl-C, and deepspeed's launcher, reach all processes; the rank needs these to end its round.

    torch would look at the server that forked this process, which lives as long as its children do.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os._exit(1)


def _loader_context() -> multiprocessing.context.BaseContext:
    """How loader processes start: forked, but from a server that holds this module and nothing else.

    A fork of the rank itself would inherit the locks of the threads of gloo, NCCL and CUDA without the
    threads, and may wait on one for ever. Spawning each process is as safe, but imports torch once for each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resist_ds.data.loader_server", "__main__", __name__])
    return context


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def decoded(files: Sequence[tuple[str, int]], decode: Decode, threads: int) -> InMemory:
    """Read all of the (path, label) files into memory."""
    images = np.empty((len(files), 3, decode.img_size, decode.img_size), np.uint8)
    with ThreadPoolExecutor(max(1, threads)) as pool:  # Pillow decodes outside of the interpreter lock
        for image, pixels in zip(images, pool.map(decode.read, (path for path, _ in files)), strict=True):
            image[:] = pixels
    return InMemory(torch.from_numpy(images), torch.tensor([label for _, label in files]))

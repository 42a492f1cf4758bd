"""Data sets: `load_data` reads one, and `Data` delivers its images as normalised batches on the device.

Which samples make a batch is decided elsewhere (order.py): here a *schedule* of (epoch, sample indices) goes
in, and batches come out in that order. Images wait as bytes, decoded in memory where they fit, that of a GPU
if it has one, and otherwise decoded on the way by loader processes. Augmentation depends on (seed, epoch,
sample) alone, so a sample looks the same in whatever batch, worker, rank or loader process it comes.

Nothing here communicates or writes files, except `download`; several ranks may load at once.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.data import image_folder
from resist_ds.data.images import SMALL, Decode, Files, InMemory, OnDisk, Schedule, Source, decoded
from resist_ds.data.loader import Stream, check_shared_memory
from resist_ds.data.on_device import Normalise, PadCropFlip
from resist_ds.data.order import Purpose, keyed_hash
from resist_ds.data.pixels import reason
from resist_ds.data.trouble import Trouble
from resist_ds.errors import RunError, UserError
from resist_ds.options.config import Config

# ------------------------------------------------------------------------------------------------------------
# Delivery: from bytes to normalised batches on the device.

_AT_ONCE = 32  # images of a batch that goes through no net


DIGITS = "sklearn/datasets/data/digits.csv.gz"


@dataclass(frozen=True)
class Data:
    """A training and a test set, delivered as float [B, 3, S, S] images and int64 [B] labels on a device.

    Images are normalised, of dtype float32 or float64, contiguous or channels_last. The float32 values are
    exactly the float64 ones, rounded. An image that cannot be read is noted in `trouble`, and another stands
    in for it; DataError where none can.
    """

    name: str
    num_classes: int  # of the classifier: at least as many as the data set has
    img_size: int  # S
    train: Source
    plain_train: Source  # the training images without what `train` does at random
    test: Source
    augment: PadCropFlip | None  # None: not on the device
    trouble: Trouble = field(default_factory=Trouble)  # of all three sources
    remarks: Sequence[str] = ()  # what of its folders is no data, in a line each

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train.labels)

    @property
    def test_size(self) -> int:
        """Number of test images."""
        return len(self.test.labels)

    @property
    def on_gpu(self) -> int:
        """Bytes of images and labels that wait on a GPU."""
        kept = (source for source in (self.train, self.test) if isinstance(source, InMemory))
        return sum(source.nbytes for source in kept if source.images.device.type != "cpu")

    def placed(self, device: torch.device, mib: int) -> "Data":
        """The same, with decoded images on the device if it is a GPU and they take at most so many MiB."""
        train, test = self.train, self.test
        if device.type == "cpu" or not (isinstance(train, InMemory) and isinstance(test, InMemory)):
            return self
        if train.nbytes + test.nbytes > mib << 20:
            return self
        train, test = train.to(device), test.to(device)
        return replace(self, train=train, plain_train=train, test=test)

    def check_shared_memory(self, config: Config, ranks: int) -> None:
        """Whether the batches of loader processes fit where they wait for their rank.

        Errors: UserError, with what to type.

        Args:
            ranks: of this machine.
        """
        if not isinstance(self.train, OnDisk):
            return
        processes, image = self.train.processes, 3 * self.img_size**2

        def stream(images: int, batch: int) -> Stream:
            return Stream(min(batch, images) * image, -(-images // batch))

        evaluation = (
            stream(min(config.calibration_samples, self.train_size), _AT_ONCE),
            stream(self.test_size, config.eval_batch_size or config.batch_size),
        )
        # The stream of training stays open meanwhile; those of an evaluation follow each other.
        largest = max(evaluation, key=lambda stream: stream.waiting(processes))
        check_shared_memory(processes, (Stream(config.batch_size * image), largest), ranks)

    def train_batches(
        self, schedule: Schedule, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of the scheduled training samples, augmented unless --augment false.

        Call it once for a whole run: an iterator over image files owns its loader processes, which read the
        schedule a few batches ahead.
        """
        normalise = Normalise(self.name, device, dtype, channels_last)
        for batch in self.train.stream(schedule, device):
            images = batch.images
            if self.augment is not None:
                images = self.augment(images, batch.epoch, batch.samples)
            yield normalise(images), batch.labels

    def test_batches(
        self, batches: Iterable[np.ndarray], device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of the test samples with the given indices, batch by batch."""
        return self._plain_batches(self.test, batches, device, dtype, channels_last)

    def train_images(
        self, indices: np.ndarray, device: torch.device, dtype: torch.dtype, channels_last: bool
    ) -> Tensor:
        """The training images [len(indices), 3, S, S] without augmentation: what calibrates BatchNorm."""
        parts = np.array_split(indices, -(-len(indices) // _AT_ONCE) or 1)  # so that all processes have work
        images = [x for x, _ in self._plain_batches(self.plain_train, parts, device, dtype, channels_last)]
        return torch.cat(images)

    def _plain_batches(
        self,
        source: Source,
        batches: Iterable[np.ndarray],
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        normalise = Normalise(self.name, device, dtype, channels_last)
        for batch in source.stream(((0, indices) for indices in batches), device):
            yield normalise(batch.images), batch.labels


# ------------------------------------------------------------------------------------------------------------
# Data sets.


def load_data(config: Config) -> Data:
    """Reads the data set that the options name. Touches no network: see `download`.

    Errors: UserError for a missing or half-present folder, or classes that do not fit; DataError with the
    path of an image that cannot be read, where images are kept in memory (where they are not, see Data).
    """
    name = config.dataset
    size = config.img_size or (224 if name in ("imagenet", "imagefolder") else 32)
    train: Source
    test: Source
    trouble = Trouble()
    remarks: list[str] = []
    if name in ("imagenet", "imagefolder"):
        train, test, num_classes, remarks = _image_folders(config, size, trouble)
    elif name == "digits":
        num_classes = _num_classes(config, 10)
        train, test = _digits(size)
    elif name == "synthetic":
        num_classes = config.num_classes or 10
        train, test = _synthetic(0, 2048, num_classes, size), _synthetic(2048, 512, num_classes, size)
    else:
        train, test, num_classes = _cifar(config, size)

    plain_train = train
    augment: PadCropFlip | None = None
    if config.augment and isinstance(train, OnDisk) and size > SMALL:
        train = replace(train, decode=Decode(size, config.seed))
    elif config.augment:
        # No flip for digits: a mirrored digit is another sign, or none.
        augment = PadCropFlip(config.seed, len(train.labels), flip=name != "digits")
    return Data(name, num_classes, size, train, plain_train, test, augment, trouble, remarks)


def _num_classes(config: Config, classes: int) -> int:
    """Outputs of the classifier for a data set of so many classes."""
    if config.num_classes is not None and config.num_classes < classes:
        raise UserError(
            f"--num_classes {config.num_classes} is too few: {config.dataset} has {classes} classes; type "
            f"--num_classes {classes}, or leave it out"
        )
    return config.num_classes or classes


def _digits(size: int) -> tuple[InMemory, InMemory]:
    """1,437 training and 360 test images of scikit-learn's 1,797 digits, scaled up from 8×8 grey."""
    # scikit-learn's own file, without a second of its imports; `load_digits` reads it likewise.
    table = np.loadtxt(str(distribution("scikit-learn").locate_file(DIGITS)), delimiter=",")
    raw, labels = table[:, :-1], table[:, -1].astype(int)
    grey = torch.from_numpy(raw).view(-1, 1, 8, 8) * (255 / 16)
    images = _resize(grey, size).expand(-1, 3, -1, -1)
    # The same split whatever the seed: 36 test images of each class, so results of all runs compare.
    shuffled = np.argsort(keyed_hash((Purpose.DIGITS_SPLIT,), np.arange(len(labels))))
    test = np.sort(np.concatenate([shuffled[labels[shuffled] == digit][:36] for digit in range(10)]))
    train = np.setdiff1d(np.arange(len(labels)), test)
    targets = torch.from_numpy(labels).long()
    return InMemory(images[train], targets[train]), InMemory(images[test], targets[test])


def _synthetic(first: int, count: int, classes: int, size: int) -> InMemory:
    """Samples `first` … `first + count - 1` of an endless set: a coarse pattern per class under noise."""
    pattern = _keyed_bytes(Purpose.SYNTHETIC_PATTERN, np.arange(classes), 3 * 4 * 4).reshape(-1, 3, 4, 4)
    cell = np.arange(size) * 4 // size
    pattern = pattern[:, :, cell[:, None], cell]
    images = np.empty((count, 3, size, size), np.uint8)
    labels = np.arange(first, first + count) % classes
    for start in range(0, count, 64):  # in pieces, since the hashes behind a byte take many times its memory
        part = slice(start, min(start + 64, count))
        samples = np.arange(first + part.start, first + part.stop)
        noise = _keyed_bytes(Purpose.SYNTHETIC_NOISE, samples, images[0].size).reshape(images[part].shape)
        images[part] = (pattern[labels[part]].astype(np.uint16) + 3 * noise.astype(np.uint16)) // 4
    return InMemory(torch.from_numpy(images), torch.from_numpy(labels))


def _keyed_bytes(purpose: Purpose, items: np.ndarray, count: int) -> np.ndarray:
    """Uniform uint8 [len(items), count], each row decided by its item."""
    words = -(-count // 8)
    hashes = keyed_hash((purpose,), items[:, None] * words + np.arange(words))
    return hashes.astype("<u8").view(np.uint8)[:, :count]


def _resize(images: Tensor, size: int) -> Tensor:
    """Images [N, C, H, W] of pixel values 0 … 255, of any type → uint8 [N, C, size, size], bilinear."""
    if images.shape[-2:] == (size, size):
        return images.to(torch.uint8)
    scaled = [
        F.interpolate(part.double(), (size, size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in images.split(1024)  # float64 copies take much memory
    ]
    return torch.cat(scaled)


def _cifar(config: Config, size: int) -> tuple[InMemory, InMemory, int]:
    dataset, root, folder = _cifar_place(config)
    if not folder.is_dir():
        raise UserError(
            f"{config.dataset} is not in {root} (no folder {folder.name}): type --download to fetch it, or "
            "another --data_dir"
        )
    try:
        parts = [dataset(root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError):
        raise UserError(f"{folder} is incomplete or damaged: type --download to fetch it again") from None
    train, test = (
        InMemory(
            _resize(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), size),
            torch.tensor(part.targets),
        )
        for part in parts
    )
    return train, test, _num_classes(config, len(parts[0].classes))


def _cifar_place(config: Config) -> tuple[Any, Path, Path]:
    """torchvision's class, the root folder for it, and the folder of files that it expects there."""
    from torchvision.datasets import CIFAR10, CIFAR100  # slow to import

    dataset = CIFAR10 if config.dataset == "cifar10" else CIFAR100
    root = _data_dir(config)
    return dataset, root, root / dataset.base_folder


def download(config: Config) -> None:
    """With --download, fetches cifar10 or cifar100 into --data_dir unless it is there already.

    It does not communicate, but it writes: call it on one rank per machine, and let the others wait for that
    before they call `load_data`.
    Errors: RunError if the network or the disk does not give it.
    """
    if not config.download or not config.dataset.startswith("cifar"):  # it may be for timm's weights
        return
    dataset, root, _ = _cifar_place(config)
    try:
        dataset(root, train=True, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise RunError(f"could not download {config.dataset} into {root}: {reason(error)}") from None


def _data_dir(config: Config) -> Path:
    assert config.data_dir is not None  # Config sees to it
    return Path(config.data_dir).expanduser()


def _image_folders(config: Config, size: int, trouble: Trouble) -> tuple[Source, Source, int, list[str]]:
    """Training and test images, classes, and what of the folders is no data."""
    splits = image_folder.find(_data_dir(config))
    num_classes = _num_classes(config, len(splits[0].classes))
    decode = Decode(size)
    train, test = (
        Files([path for path, _ in split.files], torch.tensor([label for _, label in split.files]))
        for split in splits
    )
    remarks = [split.remark for split in splits if split.remark]
    decoded_bytes = (len(train.paths) + len(test.paths)) * 3 * size * size
    if size <= SMALL and decoded_bytes <= config.cache_mib * 2**20:
        noted = trouble if config.on_bad_image == "skip" else None
        kept = [decoded(files, decode, config.data_workers, noted) for files in (train, test)]
        return kept[0], kept[1], num_classes, remarks
    # More processes than cores get in each other's way, and torch warns of them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(config.data_workers, cores)
    on_disk = [OnDisk(files, decode, processes, trouble) for files in (train, test)]
    return on_disk[0], on_disk[1], num_classes, remarks

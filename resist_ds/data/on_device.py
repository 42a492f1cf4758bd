"""What becomes of a batch of bytes on its device: augmentation of small images, and normalisation."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resist_ds.data.images import sent
from resist_ds.data.order import crop_and_flip

# Mean and standard deviation of the red, green and blue pixels, scaled to 0 … 1.
_MEAN_STD = {
    "digits": ((0.3046,) * 3, (0.3233,) * 3),  # computed over the training images at 32×32
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's, for want of better ones
    "synthetic": ((0.507, 0.501, 0.505), (0.229, 0.230, 0.228)),  # computed likewise
}


class Normalise:
    """uint8 images [B, 3, S, S] on the device → normalised ones, through a table of the 3 × 256 values.

    A table, because its entries are rounded once, from float64: arithmetic on the device may or may not fuse
    the product and the sum, and then results differ between devices and dtypes by more than their rounding.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None] for values in _MEAN_STD[name])
        table = ((torch.arange(256, dtype=torch.float64) / 255 - mean) / std).flatten().to(dtype)
        self.table = sent(table, device)
        self.rows = (torch.arange(3, dtype=torch.int32, device=device) * 256).view(3, 1, 1)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        values = self.table.index_select(0, (images.int() + self.rows).flatten()).view(images.shape)
        return values.contiguous(memory_format=self.memory_format)


@dataclass(frozen=True)
class PadCropFlip:
    """Pads images uint8 [B, 3, S, S] by S // 8 black pixels, cuts S×S out again and mirrors half of them.

    order.crop_and_flip decides, for all samples of an epoch at once; what it has decided waits on the device.

    Attributes:
        count: samples of the data set.
        flip: False leaves out the mirroring.
    """

    seed: int
    count: int
    flip: bool

    def __call__(self, images: Tensor, epoch: int, samples: Tensor) -> Tensor:
        size = images.shape[-1]
        pad = size // 8
        choices = _choices(self.seed, epoch, self.count, pad, images.device)
        tops, lefts, flips = choices.index_select(1, samples)[:, :, None]
        inside = torch.arange(size, device=images.device)
        columns = lefts + torch.where((flips == 1) & self.flip, size - 1 - inside, inside)
        padded = F.pad(images, (pad, pad, pad, pad)).flatten(2)
        pixels = (tops + inside)[:, :, None] * (size + 2 * pad) + columns[:, None, :]  # [B, S, S]: in it
        return padded.gather(2, pixels.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)


# Two entries: a rank that plays its workers in turn goes back over an epoch's end within a round.
@lru_cache(maxsize=2)
def _choices(seed: int, epoch: int, count: int, pad: int, device: torch.device) -> Tensor:
    """Top, left and flip of every sample, int16 [3, count]."""
    choices = np.stack(crop_and_flip(seed, epoch, np.arange(count), pad))
    return sent(torch.from_numpy(choices.astype(np.int16)), device)

"""JPEGs to be decoded, and a way to decode them whole. Light, since loader processes import it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from resist_ds.data.cut import Cut
from resist_ds.data.images import Decode

SIZE = (500, 375)  # pixels of most of ImageNet's


@dataclass(frozen=True)
class Whole(Decode):
    """Decodes every pixel of a JPEG, as torchvision and timm do."""

    def cut(self, width: int, height: int, epoch: int, sample: int) -> Cut:
        return replace(super().cut(width, height, epoch, sample), spare=max(width, height) + 1)


def make_photos(folder: Path, number: int, size: tuple[int, int] = SIZE) -> None:
    """JPEGs of quality 90, smooth with grain as photographs are: `number` to train, two to test."""
    for k in range(number + 2):
        noise = np.random.default_rng(k)
        coarse = noise.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = noise.normal(0, 6, (size[1], size[0], 1)).astype(np.int16)
        path = folder / ("train" if k < number else "val") / "ab"[k % 2] / f"{k:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)

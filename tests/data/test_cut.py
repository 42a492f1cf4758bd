"""What is seen of an image does not hang on how much smaller it was decoded, beyond rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from resist_ds.data import pixels
from resist_ds.data.cut import Cut
from resist_ds.data.images import Decode
from resist_ds.data.pixels import UnreadableError

LENGTH = st.integers(1, 4000)


@given(LENGTH, LENGTH, LENGTH, LENGTH, st.integers(1, 3))
def test_no_more_is_decoded_than_it_takes_and_no_less(
    across: int, down: int, width: int, height: int, spare: int
) -> None:
    cut = Cut((7, 9, 7 + across, 9 + down), (width, height), width, spare=spare)
    enough = [n for n in (1, 2, 4, 8) if across >= n * spare * width and down >= n * spare * height]
    assert cut.reduction == max(enough, default=1)


def smooth(width: int, height: int) -> Image.Image:
    """Every place has a colour of its own, so that a box that is off by a pixel or two shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(9 * x), np.cos(7 * y), np.sin(5 * (x + y))], axis=2)
    return Image.fromarray((127.5 + 120 * waves).astype(np.uint8))


KINDS = {
    "RGB": "JPEG",
    "L": "JPEG",
    "CMYK": "JPEG",
    "progressive": "JPEG",
    "frames": "MPO",
    "png": "PNG",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1601, 1203), (640, 999)])
def test_a_large_image_is_what_it_is_when_decoded_whole(
    tmp_path: Path, kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "image")
    image, other = smooth(*size), Image.new("RGB", size)
    options = {"progressive": {"progressive": True}, "frames": {"save_all": True, "append_images": [other]}}
    turned = Image.Exif()
    turned[0x0112] = 6  # an orientation, which is not applied
    image = image.convert(kind) if kind in ("L", "CMYK") else image
    image.save(path, KINDS[kind], quality=95, exif=turned, **options.get(kind, {}))
    for decode in (Decode(32), Decode(96), Decode(96, seed=1)):
        cuts = [decode.cut(*size, 2, sample) for sample in range(4)]
        found = [decode.read(path, 2, sample).astype(int) for sample in range(4)]
        assert max(cut.reduction for cut in cuts) > 1
        with monkeypatch.context() as whole:
            whole.setattr(Cut, "reduction", 1)
            expected = [decode.read(path, 2, sample).astype(int) for sample in range(4)]
        for got, plain in zip(found, expected, strict=True):
            difference = abs(got - plain)
            assert difference.mean() < 0.5 and difference.max() <= (2 if decode.seed is None else 5)
            assert kind != "png" or not difference.any()
    drafted = pixels.read(path, lambda *_: Cut((0, 0, *size), (80, 60), 80))
    assert drafted.mode == "RGB" and drafted.size == (80, 80)


def test_what_is_evaluated_is_torchvisions_to_rounding(tmp_path: Path) -> None:
    path = str(tmp_path / "image.jpg")
    smooth(1500, 1000).save(path, quality=90)
    usual = v2.Compose([v2.PILToTensor(), v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    with Image.open(path) as file:
        expected = usual(file.convert("RGB")).int()
    difference = abs(torch.from_numpy(Decode(224).read(path).copy()).int() - expected)
    assert difference.max() <= 2
    assert Decode(224).cut(1500, 1000, 0, 0).reduction == 1  # 2 would leave 500, less than twice 256
    assert Decode(224).cut(1536, 1024, 0, 0).reduction == 2


def test_a_truncated_image_is_found_out_however_small_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    smooth(1600, 1200).save(path)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UnreadableError, match="truncated"):
        Decode(32).read(str(path))

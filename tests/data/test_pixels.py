"""What an image file's pixels become: the usual, or scaled where there are more bits, or one line."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader

from resist_ds.data import pixels
from resist_ds.data.pixels import UnreadableError, in_one_line
from resist_ds.errors import DataError

VALUES = np.array([[0, 1, 128, 129, 257, 4095, 30000, 32768, 65407, 65535]], np.uint16)


def scaled(values: np.ndarray, white: int) -> np.ndarray:
    """Computed in another way than there."""
    return np.floor(values.astype(np.float64) / white * 255 + 0.5).astype(np.uint8)


def tiff(tags: dict[int, tuple[str, list[int]]], data: bytes) -> bytes:
    """A TIFF file by hand, for what Pillow reads and does not write."""
    sizes = {"H": 2, "L": 4}
    tags = {**tags, 273: ("L", [0]), 279: ("L", [len(data)])}
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = ("L", [start])
    out = io.BytesIO()
    out.write(b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little"))
    for tag, (kind, (value,)) in sorted(tags.items()):
        out.write(tag.to_bytes(2, "little") + (3 if kind == "H" else 4).to_bytes(2, "little"))
        out.write((1).to_bytes(4, "little") + value.to_bytes(sizes[kind], "little").ljust(4, b"\0"))
    out.write(bytes(4) + data)
    return out.getvalue()


def grey_tiff(values: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    tags[339] = sample_format
    return tiff({tag: ("H", [value]) for tag, value in tags.items()}, values.astype(values.dtype).tobytes())


def pgm(values: np.ndarray, white: int) -> bytes:
    height, width = values.shape
    return f"P5\n{width} {height}\n{white}\n".encode() + values.astype(">u2").tobytes()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def twelve_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.int64)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    return packed.astype(np.uint8).tobytes()


SMALL = VALUES.clip(0, 4095)
DEEP = {
    "png": (saved(Image.fromarray(VALUES), "PNG"), scaled(VALUES, 65535)),
    "tiff": (saved(Image.fromarray(VALUES), "TIFF"), scaled(VALUES, 65535)),
    "tiff by hand": (grey_tiff(VALUES, 16), scaled(VALUES, 65535)),
    "tiff, white is zero": (grey_tiff(VALUES, 16, photometric=0), scaled(65535 - VALUES, 65535)),
    "tiff of 12 bits": (
        tiff(
            {t: ("H", [v]) for t, v in {256: 10, 257: 1, 258: 12, 259: 1, 262: 1, 277: 1, 278: 1}.items()},
            twelve_bits(SMALL),
        ),
        scaled(SMALL, 4095),
    ),
    "pgm": (pgm(VALUES, 65535), scaled(VALUES, 65535)),
    "pgm of 12 bits": (pgm(SMALL, 4095), scaled(SMALL, 4095)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_more_than_8_bits_is_scaled_by_its_depth(kind: str, tmp_path: Path) -> None:
    content, expected = DEEP[kind]
    (tmp_path / "image").write_bytes(content)
    got = np.asarray(pixels.read(str(tmp_path / "image")))
    assert got.shape == (1, 10, 3) and (got == got[:, :, :1]).all()
    np.testing.assert_array_equal(got[:, :, 0], expected)


def test_pillow_before_11_calls_a_16_bit_png_i(tmp_path: Path) -> None:
    image = Image.fromarray(VALUES.astype(np.int32))
    image.format = "PNG"
    np.testing.assert_array_equal(np.asarray(pixels.to_rgb(image))[:, :, 0], scaled(VALUES, 65535))


def test_colour_of_16_bits_keeps_its_high_byte(tmp_path: Path) -> None:
    colours = np.stack([VALUES, VALUES[:, ::-1], VALUES // 2], -1)
    path = tmp_path / "image.ppm"
    path.write_bytes(b"P6\n10 1\n65535\n" + colours.astype(">u2").tobytes())
    assert abs(np.asarray(pixels.read(str(path))) - colours / 257).max() <= 1
    head = struct.pack(">2I5B", 10, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + colours.astype(">u2").tobytes())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert abs(np.asarray(pixels.read(str(path))) - colours / 257).max() <= 1


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


UNKNOWN = {
    "floats": (grey_tiff(VALUES.astype(np.float32) / 65535, 32, sample_format=3), "F"),
    "signed": (grey_tiff(VALUES.astype(np.int16), 16, sample_format=2), "I"),
    "signed, 8 bits": (grey_tiff(VALUES.astype(np.int8), 8, sample_format=2), "L"),
    "32 bits": (grey_tiff(VALUES.astype(np.uint32), 32), "I"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_does_not_say_which_value_is_white_is_one_line_with_its_mode(kind: str, tmp_path: Path) -> None:
    content, mode = UNKNOWN[kind]
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    with pytest.raises(UnreadableError) as caught:
        pixels.read(str(path))
    said = str(caught.value)
    assert said.startswith(f"cannot read the image {path}: its pixels are ") and "\n" not in said
    assert f"(mode {mode})" in said and said.endswith("convert it to 8 or 16 bits")
    assert caught.value.__cause__ is None


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # of Pillow's plain conversion
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P clear", "RGB", "RGBA", "CMYK", "turned"])
def test_the_usual_modes_are_read_as_torchvision_reads_them(mode: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    image, options = Image.fromarray(noise), {}
    if mode == "P clear":
        image = image.quantize(16)
        options["transparency"] = bytes(range(0, 256, 16))
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise[:, :, 0]))
    path = tmp_path / "image"
    path.write_bytes(saved(image, "JPEG" if mode in ("CMYK", "turned") else "PNG", **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in a loader process it would come once for each
        got = np.asarray(pixels.read(str(path)))
    np.testing.assert_array_equal(got, np.asarray(pil_loader(str(path))))
    assert got.shape == (9, 7, 3)


def test_an_error_of_the_machine_is_none_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a full memory would replace one image after the other."""
    for error in (MemoryError(), OSError(24, "Too many open files")):
        monkeypatch.setattr(Image, "open", lambda path, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=r"^cannot read the image x: (MemoryError|.*Too many)") as caught:
            pixels.read("x")
        assert not isinstance(caught.value, UnreadableError)


def test_a_name_with_odd_characters_stays_in_one_line(tmp_path: Path) -> None:
    path = f"{tmp_path}/\udc80a\nb é.png"
    with pytest.raises(UnreadableError) as caught:
        pixels.read(path)
    said = str(caught.value)
    assert said.startswith(f"cannot read the image {tmp_path}/\\udc80a\\nb é.png: ")
    assert "\n" not in said and said.encode()
    assert in_one_line("photos/ä 1.jpg") == "photos/ä 1.jpg"

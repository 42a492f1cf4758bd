"""What the pixels of an image file mean: every file as 8-bit RGB, or one line that says why not.

The ordinary modes become what torchvision and timm make of them, so that results compare: transparency is
dropped, grey is repeated, CMYK converted plainly, of several frames the first is taken, and an orientation in
EXIF is not applied. More than 8 bits are scaled by the depth of the file; Pillow's own conversion would cut
every value above 255 off. (Of 16-bit colour Pillow keeps the high byte, which is as good.) Where a file does
not say which value is white, nobody can scale it: that is an error, not a guess. Of a JPEG that is to be
scaled down no more is decoded than that takes. Imports no torch.
"""

import errno
from collections.abc import Callable

import numpy as np
from PIL import Image

from resist_ds.data.cut import Cut
from resist_ds.errors import DataError

_HAS_NO_PART = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # of which errors the image is innocent
_WHITE_IS_ZERO, _PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SIGNED = 0, 262, 258, 339, 2  # of TIFF
_UNKNOWN = {
    "F": "floating-point numbers",
    "I": "signed or 32-bit whole numbers",
}


class UnreadableError(DataError):
    """One image that cannot be read; the line names it."""


def read(path: str, cut: Callable[[int, int], Cut] | None = None) -> Image.Image:
    """An image file as RGB; UnreadableError with its path if it is none, or cannot be read faithfully.

    Args:
        cut: of its width and height; what is to be seen of it (default: the whole).
    """
    try:
        with Image.open(path) as file:
            if cut is None:
                return to_rgb(file)
            seen, whole = cut(*file.size), file.width
            if seen.reduction > 1:  # only JPEGs heed it
                file.draft(None, (file.width // seen.reduction, file.height // seen.reduction))
            reduction = seen.reduction if file.width < whole else 1
            image = to_rgb(file)
    except Exception as error:  # decoders raise nearly anything when they meet broken bytes
        said = f"cannot read the image {in_one_line(path)}: {reason(error)}"
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _HAS_NO_PART:
            raise DataError(said) from None
        raise UnreadableError(said) from None
    return seen.of(image, reduction)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as RGB. Raises ValueError where it does not say what its values mean."""
    depth = _depth(image)
    if depth is not None:
        white = 2**depth - 1
        values = np.asarray(image).astype(np.uint32).clip(0, white)
        if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow looks after up to 8 bits only
            values = white - values
        return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)).convert("RGB")
    unknown = _UNKNOWN.get(image.mode)
    if unknown is None and _tag(image, _SAMPLE_FORMAT) in (_SIGNED, (_SIGNED,)):
        unknown = "signed whole numbers"  # of 8 bits, which Pillow takes for unsigned ones
    if unknown is not None:
        raise ValueError(
            f"its pixels are {unknown} (mode {image.mode}), and it does not say which value is white: "
            "convert it to 8 or 16 bits"
        )
    if image.mode == "P":
        image.info.pop("transparency", None)  # it would be dropped anyway, with a warning
    return image.convert("RGB")


def _depth(image: Image.Image) -> int | None:
    """Bits of a grey value where they are more than 8 and known."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, _BITS)
        return bits[0] if isinstance(bits, tuple) else 16
    # Pillow scales PGM up to 16 bits itself; and before version 11 it had no other mode for PNG's.
    return 16 if image.mode == "I" and image.format in ("PPM", "PNG") else None


def _tag(image: Image.Image, number: int) -> object:
    """A tag of a TIFF file; None of others."""
    return getattr(image, "tag_v2", {}).get(number)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return in_one_line((str(error) or type(error).__name__).splitlines()[0])


def in_one_line(text: str) -> str:
    """Text that any terminal can show: a file's name may hold line ends, and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""What a net sees of an image: a box of it, scaled; and how much smaller a JPEG may be decoded for that.

A JPEG can be decoded at 1/2, 1/4 or 1/8 of its side, by leaving out the higher frequencies of each 8×8 block,
in a fraction of the time. What is cut must still have as many pixels as it is scaled to. Imports no torch.
"""

from dataclasses import dataclass

from PIL import Image

_REDUCTIONS = (8, 4, 2)  # that libjpeg knows of


@dataclass(frozen=True)
class Cut:
    """A box of an image, scaled, of which the centre is taken.

    Attributes:
        box: (left, top, right, bottom) in pixels of the whole image.
        size: (width, height) that the box is scaled to.
        centre: side of the square in the middle of it that remains.
        flip: whether it is mirrored.
        spare: pixels that a smaller decoded box must have, per side, for each of `size`.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    centre: int
    flip: bool = False
    spare: int = 1

    @property
    def reduction(self) -> int:
        """By how much the whole image may be decoded smaller: 1, 2, 4 or 8."""
        left, top, right, bottom = self.box
        width, height = self.size
        across = min((right - left) // (width * self.spare), (bottom - top) // (height * self.spare))
        return next((each for each in _REDUCTIONS if each <= across), 1)

    def of(self, image: Image.Image, reduction: int) -> Image.Image:
        """This cut of an image that is `reduction` times smaller than the whole."""
        if reduction > 1:  # a box between pixels
            box = tuple(edge / reduction for edge in self.box)
            image = image.resize(self.size, Image.Resampling.BILINEAR, box)  # type: ignore[arg-type]
        else:
            image = image if self.box == (0, 0, *image.size) else image.crop(self.box)
            image = image if image.size == self.size else image.resize(self.size, Image.Resampling.BILINEAR)
        if self.size != (self.centre, self.centre):
            left, top = (round((length - self.centre) / 2) for length in self.size)
            image = image.crop((left, top, left + self.centre, top + self.centre))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image

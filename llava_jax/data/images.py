"""Images as pixels, the way CLIP's and SigLIP's processors make them."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llava_jax.config import Aspect, Decode
from llava_jax.data.errors import SampleError
from llava_jax.data.files import open_file
from llava_jax.data.image_file import open_checked, to_rgb
from llava_jax.data.image_limits import MAX_FILE_BYTES

# OpenAI's CLIP: means and standard deviations of its training pixels, RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's pixels go from -1 to 1.
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

BICUBIC = Image.Resampling.BICUBIC

MOST_PIXELS = 2**28
"""Of what an image becomes on its way: a narrow one in its square may be huge."""

_STRIP_PIXELS = 2**24
"""What is resized at a time; most images are smaller, even in their square."""


LEAST_REDUCED = 0.95
"""How large a reduced JPEG must be at least, of what is needed. Its error grows slowly here, and so
the many photographs of 640 pixels can be halved for 336 (docs/performance.md)."""

Triple = tuple[float, float, float]
Box = tuple[float | int, float | int, float | int, float | int]
"""Left, top, right, bottom."""


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Resizes, crops and normalises an image.

    Attributes:
        shortest_edge: The image is resized until its shorter side has so many pixels; "squash"
            does not use it.
        height: Of the result: the centre is kept, and a smaller image is filled with black.
        width: Of the result.
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel.
        rescale: Factor that takes a pixel's 0..255 to 0..1.
        aspect: "pad" first centres the image on a square of the mean colour, so that the crop
            loses nothing. "crop" keeps the centre. "squash" resizes to height x width at once,
            whatever becomes of the image's proportions.
        decode: How `read` decodes a JPEG: "exact" as Hugging Face's processors do. "draft" at a
            half, a quarter or an eighth of its size, if that leaves about as many pixels as are
            needed; they differ by 0.5 to 2.5 steps of 1/255 on average.
    """

    shortest_edge: int = 336
    height: int = 336
    width: int = 336
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    rescale: float = 1 / 255
    aspect: Aspect = "pad"
    decode: Decode = "exact"

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "3 H W"]:
        """Returns the normalised pixels, channels first.

        Raises:
            SampleError: The image is too narrow to be made square in memory.
        """
        # Each level once, in double precision and back as Hugging Face's processor does.
        levels = (np.arange(256) * self.rescale).astype(np.float32)
        mean, std = np.array([self.mean, self.std], np.float32)
        table = (levels - mean[:, None]) / std[:, None]
        pixels = np.asarray(self._fit(to_rgb(image), image.size, 1))
        return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])

    @property
    def scale(self) -> tuple[Triple, Triple]:
        """What levels are multiplied by, and what is then added, to normalise each channel."""
        red, green, blue = self.std
        factors = self.rescale / red, self.rescale / green, self.rescale / blue
        return factors, (-self.mean[0] / red, -self.mean[1] / green, -self.mean[2] / blue)

    def read(self, image: str | bytes, levels: UInt8[np.ndarray, "3 H W"]) -> None:
        """Writes the pixels of an image file, not yet normalised, to where they are needed.

        Args:
            image: The file's path, or what is in it.
            levels: Becomes the pixels.

        Raises:
            SampleError: As `open_image` does, or the transform.
        """
        with _opened(image) as file:
            size = file.size
            scale = self._reduce(file) if self.decode == "draft" else 1
            rgb = to_rgb(file)
        fitted = self._fit(rgb, size, scale)
        # A channel at a time is faster than moving an array's axis.
        for channel, name in zip(levels, "RGB", strict=True):
            flat = np.frombuffer(fitted.tobytes("raw", name), np.uint8)
            channel[...] = flat.reshape(channel.shape)

    def _reduce(self, file: Image.Image) -> int:
        """Has a JPEG decoded at 1 / scale of its size; returns the scale."""
        width, height = file.size
        (left, top, right, bottom), size = self._place(width, height)
        drafted = file.draft(
            None,
            (
                max(1, int(LEAST_REDUCED * size[0] * width / (right - left))),
                max(1, int(LEAST_REDUCED * size[1] * height / (bottom - top))),
            ),
        )
        return 1 if drafted is None else round(width / drafted[1][2])

    def _place(self, width: int, height: int) -> tuple[Box, tuple[int, int]]:
        """The part of an image that is resized, perhaps larger than the image, and its new size."""
        if self.aspect == "squash":
            return (0, 0, width, height), (self.width, self.height)
        left = top = 0
        if self.aspect == "pad":
            side = max(width, height)
            _check_pixels((width, height), side**2, MOST_PIXELS)
            left, top = -((side - width) // 2), -((side - height) // 2)
            width = height = side
        # The longer side is rounded down, as Hugging Face's processor does.
        new = [int(self.shortest_edge * side / min(width, height)) for side in (width, height)]
        _check_pixels((width, height), math.prod(new), MOST_PIXELS)
        return (left, top, left + width, top + height), (new[0], new[1])

    def _fit(self, image: Image.Image, size: tuple[int, int], scale: int) -> Image.Image:
        """Resizes and crops an image that was decoded at 1 / scale of its size.

        As Pillow does in one call: across first, then down, with rounding between. But what is
        added around the image is never there as a whole, which may be large.
        """
        box, (width, height) = self._place(*size)
        left, top, right, bottom = (side / scale for side in box)
        across = Image.new("RGB", (width, image.height))
        rows = max(1, _STRIP_PIXELS // max(image.width, width, math.ceil(right - left)))
        for row in range(0, image.height, rows):
            strip = image.crop((0, row, image.width, min(image.height, row + rows)))
            strip, (start, stop) = self._enlarge(strip, (left, right), 0)
            resized = strip.resize((width, strip.height), BICUBIC, (start, 0, stop, strip.height))
            across.paste(resized, (0, row))
        across, (start, stop) = self._enlarge(across, (top, bottom), 1)
        image = across.resize((width, height), BICUBIC, (0, start, width, stop))
        return _center_crop(image, self.height, self.width)

    def _enlarge(
        self, image: Image.Image, span: tuple[float, float], axis: int
    ) -> tuple[Image.Image, tuple[float, float]]:
        """Adds the mean colour where a span reaches beyond an image; the span in the result."""
        before = max(0, math.ceil(-span[0]))
        size, place = [*image.size], [0, 0]
        size[axis] = before + max(size[axis], math.ceil(span[1]))
        span = span[0] + before, span[1] + before
        if size == [*image.size]:
            return image, span
        red, green, blue = (int(channel * 255) for channel in self.mean)
        enlarged = Image.new("RGB", (size[0], size[1]), (red, green, blue))
        place[axis] = before
        enlarged.paste(image, (place[0], place[1]))
        return enlarged, span


def open_image(image: str | bytes) -> Image.Image:
    """Reads an image file whole, as RGB.

    Args:
        image: The file's path, or what is in it.

    Raises:
        SampleError: There is no such file, it is no image in one of `image_file.FORMATS`, or it
            costs too much to decode.
    """
    with _opened(image) as file:
        return to_rgb(file)


@contextlib.contextmanager
def _opened(image: str | bytes) -> Iterator[Image.Image]:
    """An image file of which but the head is read. What goes wrong while it is open names it."""
    embedded = isinstance(image, bytes)
    name = f"an embedded image of {len(image)} bytes" if embedded else f"image {image}"
    try:
        with open_checked(image if embedded else _read_file(image)) as opened:
            yield opened
    except FileNotFoundError:
        raise SampleError(f"image not found: {image}", "image missing") from None
    except SampleError as error:
        raise SampleError(f"cannot read {name}: {error}", error.kind) from None
    # What reads remote files raises errors of many kinds, as do paths that no system takes.
    except Exception as error:
        raise SampleError(f"cannot read {name}: {error}", "image") from error


def _read_file(path: str) -> bytes:
    with open_file(path) as file:
        return file.read(MAX_FILE_BYTES + 1)


def _check_pixels(size: tuple[int, int], made: int, most: int) -> None:
    if not 0 < made <= most:
        raise SampleError(
            f"its {size[0]} x {size[1]} pixels take {made:,}, of at most {most:,}", "image size"
        )


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

"""Images as pixels, the way CLIP's and SigLIP's processors make them."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llava_jax.config import Aspect, Decode
from llava_jax.data.files import open_file
from llava_jax.data.image_file import open_checked, to_rgb
from llava_jax.data.image_limits import MAX_FILE_BYTES
from llava_jax.errors import SampleError

# OpenAI's CLIP: means and standard deviations of its training pixels, RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's pixels go from -1 to 1.
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

BICUBIC = Image.Resampling.BICUBIC

MAX_PIXELS = 2**28
"""Of what an image becomes on its way: a narrow one in its square may be huge."""

MAX_WHOLE_PIXELS = 2**26
"""Of an image, with what is added around it, that is resized in one call."""
_STRIP_PIXELS = 2**24
"""What is resized at a time; most images are smaller, even in their square."""


MIN_REDUCED = 0.95
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
        height: Height of the result: the centre is kept, a smaller image is filled with black.
        width: Width of the result.
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
            SampleError: `open_image` or the transform fails.
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
        (left, top, right, bottom), size = self._box_and_size(width, height)
        drafted = file.draft(
            None,
            (
                max(1, int(MIN_REDUCED * size[0] * width / (right - left))),
                max(1, int(MIN_REDUCED * size[1] * height / (bottom - top))),
            ),
        )
        return 1 if drafted is None else round(width / drafted[1][2])

    def _box_and_size(self, width: int, height: int) -> tuple[Box, tuple[int, int]]:
        """The part of an image that is resized, perhaps larger than the image, and its new size."""
        if self.aspect == "squash":
            return (0, 0, width, height), (self.width, self.height)
        left = top = 0
        if self.aspect == "pad":
            side = max(width, height)
            _check_pixels((width, height), side**2, MAX_PIXELS)
            left, top = -((side - width) // 2), -((side - height) // 2)
            width = height = side
        # The longer side is rounded down, as Hugging Face's processor does.
        new = [int(self.shortest_edge * side / min(width, height)) for side in (width, height)]
        _check_pixels((width, height), math.prod(new), MAX_PIXELS)
        return (left, top, left + width, top + height), (new[0], new[1])

    def _fit(self, image: Image.Image, size: tuple[int, int], scale: int) -> Image.Image:
        """Resizes and crops an image that was decoded at 1 / scale of its size.

        In one call: it rounds between across and down, and which comes first is up to Pillow. Only
        what would take too much memory, with what is added around it, goes by strips.
        """
        box, new = self._box_and_size(*size)
        left, top, right, bottom = (side / scale for side in box)
        if max(image.width, right - left) * max(image.height, bottom - top) <= MAX_WHOLE_PIXELS:
            image = self._resized(image, (left, top, right, bottom), new)
        else:
            image = self._resized(
                self._across(image, left, right, new[0]), (0, top, new[0], bottom), new
            )
        return _center_crop(image, self.height, self.width)

    def _across(self, image: Image.Image, left: float, right: float, width: int) -> Image.Image:
        """Resizes an image between two columns to a width, and leaves its height."""
        across = Image.new("RGB", (width, image.height))
        rows = max(1, _STRIP_PIXELS // max(image.width, width, math.ceil(right - left)))
        for row in range(0, image.height, rows):
            strip = image.crop((0, row, image.width, min(image.height, row + rows)))
            box = (left, 0, right, strip.height)
            across.paste(self._resized(strip, box, (width, strip.height)), (0, row))
        return across

    def _resized(self, image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
        image, box = self._enlarge(image, box)
        return image.resize(size, BICUBIC, box)

    def _enlarge(self, image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
        """Adds the mean colour where a box reaches beyond an image; the box in the result."""
        left, top = (max(0, math.ceil(-side)) for side in box[:2])
        right, bottom = (math.ceil(side) for side in box[2:])
        box = (box[0] + left, box[1] + top, box[2] + left, box[3] + top)
        size = left + max(image.width, right), top + max(image.height, bottom)
        if size == image.size:
            return image, box
        red, green, blue = (int(channel * 255) for channel in self.mean)
        enlarged = Image.new("RGB", size, (red, green, blue))
        enlarged.paste(image, (left, top))
        return enlarged, box


def read_pixels(
    data: bytes, transform: ImageTransform, max_side: int
) -> Float32[np.ndarray, "3 H W"]:
    """The normalised pixels of an image file, as `ImageTransform` makes them of a picture.

    Args:
        data: What is in the file.
        transform: What happens to the image.
        max_side: Most pixels of its longer side.

    Raises:
        SampleError: It cannot be read, or costs too much.
    """
    with open_checked(data, max_side) as image:
        return transform(image)


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

"""Converts images to pixel arrays in the same way as the image processors of CLIP and SigLIP."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llava_jax.config import Aspect, Decode, TilingConfig
from llava_jax.data.files import open_file
from llava_jax.data.image_file import open_checked
from llava_jax.data.image_limits import MAX_FILE_BYTES
from llava_jax.data.image_pixels import find_orientation, is_deep, is_sideways, to_rgb
from llava_jax.data.tiles import best_resolution, resized_size
from llava_jax.errors import SampleError

# Means and standard deviations of the RGB channels in the training data of OpenAI's CLIP.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP takes values from -1 to 1.
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

BICUBIC = Image.Resampling.BICUBIC

MAX_PIXELS = 2**28
"""Maximum number of pixels of an image after it is padded to a square, and after it is resized.
A narrow image may become huge when it is padded."""

MAX_WHOLE_PIXELS = 2**26
"""Maximum number of pixels, including padding, of an image that is resized in a single call."""
_STRIP_PIXELS = 2**24
"""Number of pixels in one strip of a larger image, which is resized strip by strip."""

MIN_REDUCED = 0.95
"""Minimum side length of a JPEG that is decoded at a reduced size, relative to the side length
that is needed. Slightly below 1, the error of the pixels is still small. With 0.95, photographs of
640 pixels, which are common, can be decoded at half size for an image size of 336
(docs/performance.md)."""

MAX_DARK = 32
"""An image is nearly black if all of its pixels are below this level, of 255."""

Triple = tuple[float, float, float]
Box = tuple[float | int, float | int, float | int, float | int]
"""Rectangle in pixels: left, top, right, bottom."""


class ImageKind(NamedTuple):
    """What was changed in an image file before its pixels were resized.

    Attributes:
        is_deep: Whether the file has more than 8 bits per channel, which were reduced to 8 bits.
        is_turned: Whether the image was turned upright because of its Exif orientation.
        is_dark: Whether an image with more than 8 bits per channel is nearly black in 8 bits. Most
            often, its pixels use only a part of the bits, as in 12-bit colors in a 16-bit file.
    """

    is_deep: bool
    is_turned: bool
    is_dark: bool = False


class Prepared(NamedTuple):
    """An image that is ready for the model.

    Attributes:
        pixels: float32 [slots, 3, height, width]. Normalized pixels of the whole image and of its
            tiles, if it is cut into tiles.
        size: Height and width in pixels of the upright image before it was resized; None if the
            image is not cut into tiles.
    """

    pixels: Float32[np.ndarray, "M 3 H W"]
    size: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Converts an image to RGB, turns it upright, and resizes, crops and normalizes it.

    Attributes:
        shortest_edge: Length in pixels of the shorter side after resizing; not used by "squash".
        height: Height of the result in pixels. The center of a larger image is kept, and a smaller
            image is padded with black.
        width: Width of the result in pixels.
        mean: Mean of each color channel, for values from 0 to 1.
        std: Standard deviation of each color channel.
        rescale: Factor that converts pixel levels from 0 to 255 to values from 0 to 1.
        aspect: How an image becomes square. "pad" first puts the image in the center of a square of
            the mean color, so that nothing is cropped. "crop" crops the image to its center.
            "squash" scales height and width separately, which changes the aspect ratio.
        decode: How `read` decodes a JPEG. "exact" decodes at full size, like Hugging Face's
            processors. "draft" decodes at 1/2, 1/4 or 1/8 of the size if the decoded image is still
            about as large as needed; its pixels differ by 0.5 to 2.5 levels (of 255) on average.
        exif_orientation: Whether to turn an image upright as its Exif orientation says.
        tiling: How images are cut into tiles; None takes each image as a whole.
    """

    shortest_edge: int = 336
    height: int = 336
    width: int = 336
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD
    rescale: float = 1 / 255
    aspect: Aspect = "pad"
    decode: Decode = "exact"
    exif_orientation: bool = True
    tiling: TilingConfig | None = None

    def __call__(self, image: Image.Image | str | bytes) -> Float32[np.ndarray, "3 H W"]:
        """Returns the normalized pixels of an image, float32 [3, height, width].

        Args:
            image: Opened image, or path or content of an image file.

        Raises:
            SampleError: The file cannot be read, or the image has too many pixels after padding or
                resizing, because it is too narrow, or it has no finite pixels.
        """
        if isinstance(image, str | bytes):
            with _opened(image) as file:
                return self(file)
        rgb = to_rgb(image, exif_orientation=self.exif_orientation)
        return self._normalize(self._fit(rgb, rgb.size, 1))

    def prepare(self, image: Image.Image | str | bytes, *, tiled: bool) -> Prepared:
        """Returns the normalized pixels of an image, and of its tiles.

        Args:
            image: Opened image, or path or content of an image file.
            tiled: Whether to cut the image into tiles.

        Raises:
            SampleError: See `__call__`.
        """
        if isinstance(image, str | bytes):
            with _opened(image) as file:
                return self.prepare(file, tiled=tiled)
        if not tiled:
            return Prepared(self(image)[None], None)
        rgb = to_rgb(image, exif_orientation=self.exif_orientation)
        slots = self._cut(rgb, rgb.size, 1)
        return Prepared(
            np.stack([self._normalize(slot) for slot in slots]), (rgb.height, rgb.width)
        )

    def _normalize(self, image: Image.Image) -> Float32[np.ndarray, "3 H W"]:
        """Returns the normalized pixels of a resized image."""
        # Each of the 256 pixel levels is normalized once. As in Hugging Face's processor, the
        # product is computed in float64 and then rounded to float32.
        levels = (np.arange(256) * self.rescale).astype(np.float32)
        mean, std = np.array([self.mean, self.std], np.float32)
        table = (levels - mean[:, None]) / std[:, None]
        pixels = np.asarray(image)
        return np.stack([table[channel][pixels[..., channel]] for channel in range(3)])

    @property
    def scale(self) -> tuple[Triple, Triple]:
        """Returns a factor and an offset per channel that normalize pixel levels from 0 to 255."""
        red, green, blue = self.std
        factors = self.rescale / red, self.rescale / green, self.rescale / blue
        return factors, (-self.mean[0] / red, -self.mean[1] / green, -self.mean[2] / blue)

    def find_size(self, image: str | bytes) -> tuple[int, int]:
        """Returns the height and width in pixels of an upright image; reads only its header.

        Raises:
            SampleError: The file cannot be read.
        """
        if isinstance(image, bytes):
            return _read_size(image, self.exif_orientation)
        return _size_of_file(image, self.exif_orientation)

    def upright_size(self, image: Image.Image) -> tuple[int, int]:
        """Returns the height and width in pixels of an opened image when it is upright."""
        image.load()  # the orientation may be at the end of a PNG file
        is_turned = self.exif_orientation and is_sideways(image)
        return image.size if is_turned else (image.height, image.width)

    def count_slots(self, size: tuple[int, int] | None) -> int:
        """Returns the number of image slots of an image of a size (height, width) in pixels.

        The size is None if the image is not cut into tiles.
        """
        if self.tiling is None or size is None:
            return 1
        height, width = best_resolution(size, self.tiling)
        return 1 + height // self.height * (width // self.width)

    def read(self, image: str | bytes, levels: UInt8[np.ndarray, "M 3 H W"]) -> ImageKind:
        """Decodes and resizes an image file, and writes the pixels, not normalized, to an array.

        Args:
            image: Path or content of the file.
            levels: uint8 [slots, 3, height, width]. Array that the pixels are written to. If it has
                several slots, these are for the whole image and its tiles.

        Returns:
            What was changed in the image before it was resized.

        Raises:
            SampleError: The file cannot be read, or the image has too many pixels after padding or
                resizing, because it is too narrow.
        """
        with _opened(image) as file:
            was_deep = is_deep(file)
            tiled = len(levels) > 1
            scale, size = self._reduce(file, tiled) if self.decode == "draft" else (1, file.size)
            rgb = to_rgb(file, exif_orientation=self.exif_orientation)
            is_turned = self.exif_orientation and find_orientation(file) != 1
        kind = ImageKind(was_deep, is_turned, was_deep and _highest_level(rgb) < MAX_DARK)
        size = rgb.size if scale == 1 else size
        if tiled and self.count_slots((size[1], size[0])) != len(levels):
            raise SampleError("the size of the image changed while it was read", "image size")
        fitted = self._cut(rgb, size, scale) if tiled else [self._fit(rgb, size, scale)]
        for slot, one in zip(levels, fitted, strict=True):
            _copy_levels(one, slot)
        return kind

    def write(self, image: Image.Image, levels: UInt8[np.ndarray, "3 H W"]) -> None:
        """Resizes an RGB image as a whole, and writes the pixels, not normalized, to an array.

        Args:
            image: Image that is upright.
            levels: uint8 [3, height, width]. Array that the pixels are written to.

        Raises:
            SampleError: The image has too many pixels after padding or resizing.
        """
        _copy_levels(self._fit(image, image.size, 1), levels)

    def _cut(self, image: Image.Image, size: tuple[int, int], scale: int) -> Iterator[Image.Image]:
        """Yields the whole image, resized to a square, and its tiles.

        Args:
            image: Image that was decoded at 1 / scale of its size.
            size: Full width and height of the image.
            scale: Number by which the size was divided.
        """
        box = (0, 0, size[0] / scale, size[1] / scale)
        yield self._resized_box(image, box, (self.width, self.height))
        (width, height), new = self._canvas_and_size(size)
        # The padding is black before the pixels are normalized.
        canvas = Image.new("RGB", (width, height))
        resized = self._resized_box(image, box, new)
        canvas.paste(resized, ((width - new[0]) // 2, (height - new[1]) // 2))
        for top in range(0, height, self.height):
            for left in range(0, width, self.width):
                yield canvas.crop((left, top, left + self.width, top + self.height))

    def _canvas_and_size(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns (width, height) of the canvas that is cut into tiles, and of the image in it."""
        assert self.tiling is not None
        upright = size[1], size[0]
        height, width = best_resolution(upright, self.tiling)
        new_height, new_width = resized_size(upright, (height, width))
        return (width, height), (new_width, new_height)

    def _reduce(self, file: Image.Image, tiled: bool) -> tuple[int, tuple[int, int]]:
        """Lets Pillow decode a JPEG at 1 / scale of its size, if possible.

        Returns:
            The scale, and the full width and height of the upright image.
        """
        stored = size = file.size
        if is_turned := self.exif_orientation and is_sideways(file):
            size = (stored[1], stored[0])
        if tiled:
            (left, top, right, bottom), new = (0, 0, *size), self._canvas_and_size(size)[1]
        else:
            (left, top, right, bottom), new = self._box_and_size(*size)
        needed = (
            max(1, int(MIN_REDUCED * new[0] * size[0] / (right - left))),
            max(1, int(MIN_REDUCED * new[1] * size[1] / (bottom - top))),
        )
        drafted = file.draft(None, (needed[1], needed[0]) if is_turned else needed)
        return 1 if drafted is None else round(stored[0] / drafted[1][2]), size

    def _box_and_size(self, width: int, height: int) -> tuple[Box, tuple[int, int]]:
        """Returns the rectangle to resize, which may be larger than the image, and its new size."""
        if self.aspect == "squash":
            return (0, 0, width, height), (self.width, self.height)
        left = top = 0
        if self.aspect == "pad":
            side = max(width, height)
            _check_pixels((width, height), side**2, MAX_PIXELS)
            left, top = -((side - width) // 2), -((side - height) // 2)
            width = height = side
        # The longer side is rounded down, as in Hugging Face's processor.
        new = [int(self.shortest_edge * side / min(width, height)) for side in (width, height)]
        _check_pixels((width, height), math.prod(new), MAX_PIXELS)
        return (left, top, left + width, top + height), (new[0], new[1])

    def _fit(self, image: Image.Image, size: tuple[int, int], scale: int) -> Image.Image:
        """Resizes and crops an image that was decoded at 1 / scale of its size."""
        box, new = self._box_and_size(*size)
        left, top, right, bottom = (side / scale for side in box)
        resized = self._resized_box(image, (left, top, right, bottom), new)
        return _center_crop(resized, self.height, self.width)

    def _resized_box(self, image: Image.Image, box: Box, new: tuple[int, int]) -> Image.Image:
        """Resizes a rectangle, strip by strip if it is very large."""
        left, top, right, bottom = box
        # Pillow resizes in two passes, whose order it chooses, and rounds between the passes.
        # Resizing in strips may therefore give slightly different pixels, so it is used only if a
        # single call would take too much memory.
        if max(image.width, right - left) * max(image.height, bottom - top) <= MAX_WHOLE_PIXELS:
            return self._resized(image, box, new)
        across = self._across(image, left, right, new[0])
        return self._resized(across, (0, top, new[0], bottom), new)

    def _across(self, image: Image.Image, left: float, right: float, width: int) -> Image.Image:
        """Resizes the columns between `left` and `right` to `width` columns; keeps the height."""
        across = Image.new("RGB", (width, image.height))
        rows = max(1, _STRIP_PIXELS // max(image.width, width, math.ceil(right - left)))
        for row in range(0, image.height, rows):
            strip = image.crop((0, row, image.width, min(image.height, row + rows)))
            box = (left, 0, right, strip.height)
            across.paste(self._resized(strip, box, (width, strip.height)), (0, row))
        return across

    def _resized(self, image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
        """Resizes a rectangle; its parts outside of the image get the mean color."""
        image, box = self._enlarge(image, box)
        return image.resize(size, BICUBIC, box)

    def _enlarge(self, image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
        """Pads an image to contain a rectangle; returns the image and the shifted rectangle."""
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
    data: bytes, transform: ImageTransform, max_side: int, *, tiled: bool = False
) -> Prepared:
    """Returns the normalized pixels of an image file, and of its tiles.

    Args:
        data: Content of the file.
        transform: Transform of the image. Its `decode` is ignored: JPEGs are decoded at full size.
        max_side: Maximum length of the longer side in pixels.
        tiled: Whether to cut the image into tiles.

    Raises:
        SampleError: The file is not an image, costs too much to decode, or is too narrow.
    """
    with open_checked(data, max_side) as image:
        return transform.prepare(image, tiled=tiled)


def open_image(image: str | bytes, *, exif_orientation: bool = True) -> Image.Image:
    """Decodes an image file and returns the image as RGB.

    Args:
        image: Path or content of the file.
        exif_orientation: Whether to turn the image upright as its Exif orientation says.

    Raises:
        SampleError: The file does not exist, is not an image in one of `image_file.FORMATS`, or
            costs too much to decode.
    """
    with _opened(image) as file:
        return to_rgb(file, exif_orientation=exif_orientation)


@contextlib.contextmanager
def _opened(image: str | bytes) -> Iterator[Image.Image]:
    """Opens an image file and decodes only its header. Errors inside the context name the file."""
    embedded = isinstance(image, bytes)
    name = f"an embedded image of {len(image)} bytes" if embedded else f"image {image}"
    try:
        with open_checked(image if embedded else _read_file(image)) as opened:
            yield opened
    except FileNotFoundError:
        raise SampleError(f"image not found: {image}", "image missing") from None
    except SampleError as error:
        raise SampleError(f"cannot read {name}: {error}", error.kind) from None
    # fsspec's file systems raise errors of many types; invalid paths raise other errors.
    except Exception as error:
        raise SampleError(f"cannot read {name}: {error}", "image") from error


def _copy_levels(image: Image.Image, levels: UInt8[np.ndarray, "3 H W"]) -> None:
    # Copying one channel at a time is faster than transposing an array.
    for channel, name in zip(levels, "RGB", strict=True):
        flat = np.frombuffer(image.tobytes("raw", name), np.uint8)
        channel[...] = flat.reshape(channel.shape)


_LATE_MARKS = b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif"
"""Marks of chunks with an orientation, which may be at the end of a PNG file."""


def _read_size(image: str | bytes, exif_orientation: bool) -> tuple[int, int]:
    """Returns the height and width of an upright image."""
    with _opened(image) as file:
        if exif_orientation and file.format == "PNG":
            content = cast("Any", file).fp.getvalue()  # `open_checked` opens bytes in memory
            if any(mark in content for mark in _LATE_MARKS):
                file.load()
        is_turned = exif_orientation and is_sideways(file)
        return file.size if is_turned else (file.height, file.width)


_size_of_file = functools.lru_cache(maxsize=2**16)(_read_size)
"""Like `_read_size`, for paths; the same image is often in several samples."""


def _highest_level(rgb: Image.Image) -> int:
    return max(high for _, high in cast("tuple[tuple[int, int], ...]", rgb.getextrema()))


def _read_file(path: str) -> bytes:
    with open_file(path) as file:
        return file.read(MAX_FILE_BYTES + 1)


def _check_pixels(size: tuple[int, int], made: int, most: int) -> None:
    if not 0 < made <= most:
        raise SampleError(
            f"the image has {size[0]} x {size[1]} pixels, and {made:,} pixels after padding or "
            f"resizing; 1 to {most:,} are allowed",
            "image size",
        )


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

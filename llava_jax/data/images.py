"""Images as pixels, the way CLIP's and SigLIP's processors make them."""

import dataclasses
import io
import os

import numpy as np
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError

from llava_jax.config import Aspect
from llava_jax.data.conversation import SampleError
from llava_jax.data.files import open_file

# OpenAI's CLIP: means and standard deviations of its training pixels, RGB.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# SigLIP's pixels go from -1 to 1.
SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)

MOST_FILE_PIXELS = 2**30 // 4 // 3
"""Of an image file: Pillow's own limit, which is checked before anything is decoded."""
MOST_PIXELS = 2**28
"""Of what an image becomes on its way, 4 bytes each: a narrow one in its square may be huge."""


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
    """

    shortest_edge: int = 336
    height: int = 336
    width: int = 336
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    rescale: float = 1 / 255
    aspect: Aspect = "pad"

    def __call__(self, image: Image.Image) -> Float32[np.ndarray, "3 H W"]:
        """Returns the normalised pixels, channels first.

        Raises:
            SampleError: The image is too narrow to be made square in memory.
        """
        image = _to_rgb(image)
        if self.aspect == "pad":
            image = _pad_to_square(image, self.mean)
        if self.aspect == "squash":
            image = image.resize((self.width, self.height), Image.Resampling.BICUBIC)
        else:
            image = _resize_shortest_edge(image, self.shortest_edge)
            image = _center_crop(image, self.height, self.width)
        # Each level once, in double precision and back as Hugging Face's processor does.
        levels = (np.arange(256) * self.rescale).astype(np.float32)
        mean, std = np.array([self.mean, self.std], np.float32)
        table = (levels - mean[:, None]) / std[:, None]
        pixels = np.asarray(image)
        values = np.empty((3, image.height, image.width), np.float32)
        for channel in range(3):  # three times as fast as indexing, and no copy
            np.take(table[channel], pixels[..., channel], out=values[channel], mode="clip")
        return values


def open_image(image: str | bytes) -> Image.Image:
    """Reads an image file whole, as RGB.

    Args:
        image: The file's path, or what is in it.

    Raises:
        SampleError: There is no such file, it is not an image that Pillow reads, or a huge one.
    """
    embedded = isinstance(image, bytes)
    name = f"an embedded image of {len(image)} bytes" if embedded else f"image {image}"
    if not embedded and os.path.exists(image) and not os.path.isfile(image):
        raise SampleError(f"cannot read {name}: not a file", "image")  # a pipe would wait for ever
    try:
        with (
            io.BytesIO(image) if embedded else open_file(image) as file,
            Image.open(file) as opened,
        ):
            if opened.format == "EPS":
                raise SampleError("EPS is a program, which Pillow would have run", "image")
            _check_pixels(opened, opened.width * opened.height, MOST_FILE_PIXELS)
            opened.load()
            return _to_rgb(opened)
    except FileNotFoundError:
        raise SampleError(f"image not found: {image}", "image missing") from None
    except UnidentifiedImageError:
        raise SampleError(f"cannot read {name}: no image that Pillow knows", "image") from None
    except SampleError as error:
        raise SampleError(f"cannot read {name}: {error}", error.kind) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(f"cannot read {name}: {error}", "image size") from None
    # Pillow's decoders raise errors of many kinds for broken files.
    except Exception as error:
        raise SampleError(f"cannot read {name}: {error}", "image") from error


def _check_pixels(image: Image.Image, made: int, most: int) -> None:
    if not 0 < made <= most:
        raise SampleError(
            f"its {image.width} x {image.height} pixels take {made:,}, of at most {most:,}",
            "image size",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    """Lays what is transparent on white, as Hugging Face's processor does (LLaVA dropped it)."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _pad_to_square(image: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    _check_pixels(image, side**2, MOST_PIXELS)
    red, green, blue = (int(channel * 255) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _resize_shortest_edge(image: Image.Image, edge: int) -> Image.Image:
    short, long = sorted(image.size)
    long = int(edge * long / short)  # rounded down, as Hugging Face's processor does
    _check_pixels(image, edge * long, MOST_PIXELS)
    size = (edge, long) if image.width <= image.height else (long, edge)
    return image.resize(size, Image.Resampling.BICUBIC)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))

"""Image files of strangers as RGB: checked first, by the bytes, then decoded by Pillow.

Nothing here needs JAX, so that a process can be started for it alone.
"""

import contextlib
import io
import math
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from llava_jax.data.image_limits import MAX_PIXELS, check_cost
from llava_jax.errors import SampleError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that people use, and whose cost of decoding can be known before it starts."""

_STRIP_PIXELS = 2**22


@contextlib.contextmanager
def open_checked(data: bytes, max_side: int | None = None) -> Iterator[Image.Image]:
    """An image of which no more than the head is decoded, and that may be decoded whole.

    Args:
        data: An image file.
        max_side: Most pixels of its longer side.

    Raises:
        SampleError: It is not an image or costs too much, or reading it fails while it is open.
    """
    try:
        check_cost(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            if not 0 < math.prod(size) <= MAX_PIXELS:
                raise SampleError(
                    f"its {size[0]} x {size[1]} pixels take {math.prod(size):,}, of at most "
                    f"{MAX_PIXELS:,}",
                    "image size",
                )
            if max_side is not None and max(size) > max_side:
                raise SampleError(
                    f"it has {size[0]} x {size[1]} pixels; its longer side may have {max_side:,}",
                    "image size",
                )
            yield image
    except SampleError:
        raise
    except UnidentifiedImageError:
        raise SampleError(f"it is damaged, or none of {', '.join(FORMATS)}", "image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(str(error), "image size") from None
    # Pillow's decoders raise errors of many kinds for broken files.
    except Exception as error:
        raise SampleError(str(error) or type(error).__name__, "image") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Lays what is transparent on white, as Hugging Face's processor does (LLaVA dropped it)."""
    image.load()  # of some files, this tells what is transparent
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):  # the whole at once would be in memory five times
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb

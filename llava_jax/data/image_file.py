"""Opens untrusted image files with Pillow, after checking the cost of decoding them.

This module does not import JAX, so that a process that only decodes images
starts quickly.
"""

import contextlib
import io
import math
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from llava_jax.data.image_limits import MAX_PIXELS, check_cost
from llava_jax.errors import SampleError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Supported formats. For each of them, the cost of decoding can be computed in advance."""


@contextlib.contextmanager
def open_checked(data: bytes, max_side: int | None = None) -> Iterator[Image.Image]:
    """Opens an image file after checking it against the limits; decodes only the header.

    Args:
        data: Content of an image file.
        max_side: Maximum length of the longer side in pixels; None sets no limit.

    Raises:
        SampleError: The data is not an image or costs too much to decode, or reading the image
            fails inside the context.
    """
    try:
        check_cost(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
            if not 0 < math.prod(size) <= MAX_PIXELS:
                raise SampleError(
                    f"the image has {size[0]} x {size[1]} = {math.prod(size):,} pixels; 1 to "
                    f"{MAX_PIXELS:,} are allowed",
                    "image size",
                )
            if max_side is not None and max(size) > max_side:
                raise SampleError(
                    f"the image has {size[0]} x {size[1]} pixels; its longer side may have at most "
                    f"{max_side:,}",
                    "image size",
                )
            yield image
    except SampleError:
        raise
    except UnidentifiedImageError:
        raise SampleError(
            f"the file is damaged, or its format is none of {', '.join(FORMATS)}", "image"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SampleError(str(error), "image size") from None
    # Pillow's decoders raise errors of many types for broken files.
    except Exception as error:
        raise SampleError(str(error) or type(error).__name__, "image") from error

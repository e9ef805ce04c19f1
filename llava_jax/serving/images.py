"""Images that requests bring: checked before anything of them is decoded."""

import base64
import binascii
import io
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image, UnidentifiedImageError

from llava_jax.serving.fetch import FetchError, fetch
from llava_jax.serving.limits import Limits, RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of Pillow's many: what people send, by decoders that many eyes have seen."""

FETCH_SECONDS = 20.0


def read_url(url: str, limits: Limits) -> bytes:
    """The image file that a URL holds or names.

    Raises:
        RequestError: It cannot be had, or is not an image that may be read.
    """
    scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
    if scheme == "data":
        data = _data_url(url)
    elif scheme in ("http", "https"):
        data = _remote(url, limits)
    else:
        takes = "data: and http(s): URLs" if limits.remote_images else "data: URLs"
        raise _refusal(f"{url[:40]!r} is not a URL of an image; this server takes {takes}")
    check_image(data, limits)
    return data


def check_image(data: bytes, limits: Limits) -> str:
    """Refuses what is not an image, or too large a one, by its first bytes; returns its format.

    Raises:
        RequestError: Why.
    """
    if len(data) > limits.image_bytes:
        raise _refusal(
            f"an image has {len(data):,} bytes, of at most {limits.image_bytes:,}",
            "image_too_large",
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            (width, height), form = image.size, str(image.format)
    except UnidentifiedImageError:
        raise _refusal(f"an image is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _refusal(f"an image has too many pixels: {error}", "image_too_large") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise _refusal(f"an image cannot be read: {error}") from error
    if max(width, height) ** 2 > limits.image_pixels:
        raise _refusal(
            f"an image has {width} x {height} pixels; its longer side may have "
            f"{int(limits.image_pixels**0.5):,}",
            "image_too_large",
        )
    return form


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise _refusal("a data: URL has no comma before its data")
    try:
        if head.lower().endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refusal(f"a data: URL is not base64: {error}") from error
    return unquote_to_bytes(data)


def _remote(url: str, limits: Limits) -> bytes:
    if not limits.remote_images:
        raise _refusal(
            "images from the network are switched off on this server (--remote-images); send the "
            "image as a data: URL"
        )
    try:
        seconds = min(FETCH_SECONDS, limits.seconds)
        return fetch(url, most_bytes=limits.image_bytes, seconds=seconds)
    except FetchError as error:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        raise _refusal(f"the image from {host[:80]!r} cannot be had: {error}") from error


def _refusal(text: str, code: str = "invalid_image") -> RequestError:
    return RequestError(text, code=code, param="messages")

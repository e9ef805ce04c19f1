"""Images that requests bring: checked before anything of them is decoded."""

import base64
import binascii
import math
from urllib.parse import unquote_to_bytes, urlsplit

from llava_jax.data.errors import SampleError
from llava_jax.data.image_file import open_checked
from llava_jax.serving.fetch import FetchError, fetch
from llava_jax.serving.limits import Limits, RequestError

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


def check_image(data: bytes, limits: Limits) -> None:
    """Refuses what is not an image, or costs too much to decode, by counting.

    Raises:
        RequestError: Why.
    """
    if len(data) > limits.image_bytes:
        raise _refusal(
            f"an image has {len(data):,} bytes, of at most {limits.image_bytes:,}",
            "image_too_large",
        )
    try:
        with open_checked(data, math.isqrt(limits.image_pixels)):
            pass
    except SampleError as error:
        code = "invalid_image" if error.kind == "image" else "image_too_large"
        raise _refusal(f"an image cannot be read: {error}", code) from None


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

"""Images that requests bring: fetched, checked, and decoded in processes that can be ended.

A decoder is C code, which nothing in its own process can interrupt. So pictures are decoded in
others: a request whose time is up takes its decoding with it, and however many pictures there are,
text is read and answered beside them.
"""

import asyncio
import base64
import binascii
import contextlib
import math
import multiprocessing
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
from jaxtyping import Float32
from pebble import ProcessExpired, ProcessPool

from llava_jax.data.errors import SampleError
from llava_jax.data.image_file import open_checked
from llava_jax.data.images import ImageTransform, read_pixels
from llava_jax.serving.fetch import FetchError, fetch
from llava_jax.serving.limits import MIB, Limits, RequestError

FETCH_SECONDS = 20.0
MAX_FETCHES = 4
"""Files that are fetched at a time."""
DECODERS = max(2, min(4, os.cpu_count() or 1))
"""Pictures that are decoded at a time."""
DECODE_SECONDS = 20.0
"""For a picture; what the limits let pass takes a few seconds of a core."""
DECODE_BYTES = 3072 * MIB
"""Memory that a process which decodes may ask for; all of Python and NumPy is in it."""


class Images:
    """Reads the images of requests.

    Args:
        limits: Limits of the server.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._fetchers = ThreadPoolExecutor(MAX_FETCHES, thread_name_prefix="fetcher")
        context: Any = multiprocessing.get_context("spawn")  # a fork copies locks of JAX's threads
        self._decoders = ProcessPool(DECODERS, initializer=_become_decoder, context=context)

    def start(self) -> None:
        """Starts the processes, so that the first picture does not wait for them."""
        for _ in range(DECODERS):
            self._decoders.schedule(int)

    def stop(self) -> None:
        """Ends all that is under way."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.stop()
        self._decoders.join()

    async def fetch(self, url: str) -> bytes:
        """The file that a URL holds or names.

        Raises:
            RequestError: It cannot be had.
        """
        scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
        if scheme == "data":
            return _data_url(url)
        if scheme in ("http", "https"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._fetchers, _remote, url, self._limits)
        takes = "data: and http(s): URLs" if self._limits.remote_images else "data: URLs"
        raise _refusal(f"{url[:40]!r} is not a URL of an image; this server takes {takes}")

    async def decode(self, data: bytes, transform: ImageTransform) -> Float32[np.ndarray, "3 H W"]:
        """The normalised pixels of an image file.

        Raises:
            RequestError: It is not an image that may be read.
        """
        _check_bytes(data, self._limits)
        side = math.isqrt(self._limits.image_pixels)
        # Cancelled with the request, this ends the process.
        decoding = self._decoders.schedule(
            read_pixels, args=(data, transform, side), timeout=DECODE_SECONDS
        )
        try:
            return await asyncio.wrap_future(decoding)
        except SampleError as error:
            raise _unreadable(error) from None
        except TimeoutError:
            raise _refusal(f"an image took more than {DECODE_SECONDS:g} s to decode") from None
        except ProcessExpired:
            raise _refusal("an image could not be decoded: its decoder ended") from None


def _become_decoder() -> None:
    os.nice(10)  # answers come first
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (DECODE_BYTES, DECODE_BYTES))


def check_image(data: bytes, limits: Limits) -> str:
    """Refuses what is not an image, or costs too much to decode, by counting; returns its format.

    Raises:
        RequestError: Why.
    """
    _check_bytes(data, limits)
    try:
        with open_checked(data, math.isqrt(limits.image_pixels)) as image:
            return "JPEG" if image.format == "MPO" else str(image.format)
    except SampleError as error:
        raise _unreadable(error) from None


def _check_bytes(data: bytes, limits: Limits) -> None:
    if len(data) > limits.image_bytes:
        raise _refusal(
            f"an image has {len(data):,} bytes, of at most {limits.image_bytes:,}",
            "image_too_large",
        )


def _unreadable(error: SampleError) -> RequestError:
    code = "invalid_image" if error.kind == "image" else "image_too_large"
    return _refusal(f"an image cannot be read: {error}", code)


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

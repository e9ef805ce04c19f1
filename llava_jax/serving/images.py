"""Fetches, checks and decodes the images of requests."""

import asyncio
import contextlib
import math
import os
import threading
from collections.abc import Callable
from urllib.parse import unquote_to_bytes, urlsplit

from llava_jax.data.image_file import open_checked
from llava_jax.data.image_paths import decode_base64
from llava_jax.data.images import ImageTransform, Prepared
from llava_jax.errors import SampleError
from llava_jax.serving.decoder import Decoders
from llava_jax.serving.fetch import FetchError, fetch
from llava_jax.serving.limits import Limits, RequestError

FETCH_SECONDS = 20.0
MAX_FETCHES = 4
"""Largest number of files that are fetched at the same time."""
DECODERS = max(2, min(4, os.cpu_count() or 1))
"""Number of images that are decoded at the same time."""


class Images:
    """Fetches and decodes the images of requests.

    Args:
        limits: Limits of the server.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._fetches = asyncio.Semaphore(MAX_FETCHES)
        self._decoders = Decoders(DECODERS)

    async def start(self) -> None:
        """Starts the decoder processes, so that the first image does not wait for them."""
        await self._decoders.start()

    async def stop(self) -> None:
        """Stops the decoder processes."""
        await self._decoders.stop()

    async def fetch(self, url: str) -> bytes:
        """Returns the contents of the file in a data: URL, or at an http or https URL.

        Raises:
            RequestError: The URL is not supported or not valid, or the file at the URL cannot be
                fetched or is too large.
        """
        scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
        if scheme == "data":
            return _data_url(url)
        if scheme in ("http", "https"):
            async with self._fetches:
                return await _in_thread(lambda: _remote(url, self._limits))
        takes = "data:, http: and https: URLs" if self._limits.remote_images else "data: URLs"
        raise _refusal(f"the image URL {url[:40]!r} is not supported; this server accepts {takes}")

    async def decode(self, data: bytes, transform: ImageTransform, *, tiled: bool) -> Prepared:
        """Decodes an image file and returns its normalized pixels.

        Args:
            data: Contents of the image file.
            transform: Image preprocessing of the model.
            tiled: Whether to cut the image into tiles.

        Raises:
            RequestError: The file is not an image, or exceeds a limit of size, time or memory.
        """
        _check_bytes(data, self._limits)
        side = math.isqrt(self._limits.image_pixels)
        try:
            return await self._decoders.decode(data, transform, side, tiled=tiled)
        except SampleError as error:
            raise _unreadable(error) from None


async def _in_thread(work: Callable[[], bytes]) -> bytes:
    """Runs `work` in a thread that does not delay the end of the process; returns the result."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[bytes] = loop.create_future()

    def tell(result: bytes | Exception) -> None:
        if done.done():  # the request was cancelled
            return
        if isinstance(result, Exception):
            done.set_exception(result)
        else:
            done.set_result(result)

    def run() -> None:
        try:
            result: bytes | Exception = work()
        except Exception as error:
            result = error
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(tell, result)

    threading.Thread(target=run, daemon=True).start()
    return await done


def check_image(data: bytes, limits: Limits) -> str:
    """Checks that a file is an image within the limits, and returns its format, such as "PNG".

    The cost of decoding is computed from the bytes of the file, without decoding the image.

    Args:
        data: Contents of the file.
        limits: Limits of the server.

    Raises:
        RequestError: The file is not an image, or exceeds a limit.
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
            f"an image file has {len(data):,} bytes; at most {limits.image_bytes:,} are allowed",
            "image_too_large",
        )


def _unreadable(error: SampleError) -> RequestError:
    code = "invalid_image" if error.kind == "image" else "image_too_large"
    return _refusal(f"an image cannot be read: {error}", code)


def _data_url(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma:
        raise _refusal(
            "a data: URL has no comma before its data; send it as data:image/png;base64,DATA"
        )
    try:
        if head.lower().endswith(";base64"):
            return decode_base64(data)
    except ValueError as error:
        raise _refusal(f"the data of a data: URL is not valid base64: {error}") from error
    return unquote_to_bytes(data)


def _remote(url: str, limits: Limits) -> bytes:
    if not limits.remote_images:
        raise _refusal(
            "this server was started without --remote-images, so it does not fetch images; send "
            "the image as a data: URL"
        )
    try:
        seconds = min(FETCH_SECONDS, limits.seconds)
        return fetch(url, most_bytes=limits.image_bytes, seconds=seconds)
    except FetchError as error:
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        raise _refusal(f"the image from {host[:80]!r} cannot be fetched: {error}") from error


def _refusal(text: str, code: str = "invalid_image") -> RequestError:
    return RequestError(text, code=code, param="messages")

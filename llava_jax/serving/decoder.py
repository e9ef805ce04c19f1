"""Decodes images in separate processes, which can be killed at any time.

Image decoders are C code, and a Python thread that runs C code cannot be interrupted. A separate
process can be killed when its request ends, and it does not delay requests that have only text. A
process returns pixels or the text of an error; nothing that a process returns is executed.

For each image, the server writes a line of JSON and the bytes of the image file to the stdin of a
process. The process writes a line of JSON to its stdout. It contains either the size of the image,
and is followed by the pixels as float32 numbers, or the text and the kind of an error.
"""

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import resource
import sys

import numpy as np

from llava_jax.config import TilingConfig
from llava_jax.data.images import ImageTransform, Prepared, read_pixels
from llava_jax.disk import Json
from llava_jax.errors import SampleError

MAX_SECONDS = 20.0
"""Longest decoding time of an image in seconds. Images of an allowed size take a few seconds."""
MAX_BYTES = 3 * 2**30
"""Largest address space of a process in bytes, including Python, NumPy and Pillow."""
MAX_ERROR = 1000
"""Largest number of characters of an error's text."""


class Decoders:
    """Pool of processes, each of which decodes one image at a time.

    Args:
        count: Number of processes.
    """

    def __init__(self, count: int):
        self._processes: list[asyncio.subprocess.Process | None] = [None] * count
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for number in range(count):
            self._free.put_nowait(number)

    async def start(self) -> None:
        """Starts the processes, so that the first image does not wait for them."""
        for number in range(len(self._processes)):
            await self._process(number)

    async def stop(self) -> None:
        """Kills the processes, even while they decode images."""
        for number in range(len(self._processes)):
            await self._end(number)

    async def decode(
        self, data: bytes, transform: ImageTransform, max_side: int, *, tiled: bool
    ) -> Prepared:
        """Decodes an image file and returns its normalized pixels.

        Cancelling this coroutine kills the process that decodes the image.

        Args:
            data: Contents of the image file.
            transform: Image preprocessing of the model.
            max_side: Largest number of pixels of the image's longer side.
            tiled: Whether to cut the image into tiles.

        Raises:
            SampleError: The file is not an image, or exceeds a limit of size, time or memory.
        """
        number = await self._free.get()
        try:
            async with asyncio.timeout(MAX_SECONDS):
                return await self._ask(number, data, transform, max_side, tiled=tiled)
        except TimeoutError:
            await self._end(number)
            raise SampleError(
                f"decoding the image took more than {MAX_SECONDS:g} s", "image cost"
            ) from None
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            await self._end(number)
            raise SampleError(
                "the process that decodes the image ended; the image may need too much memory",
                "image cost",
            ) from None
        except BaseException:  # cancelled: the next request must not read this answer
            await self._end(number)
            raise
        finally:
            self._free.put_nowait(number)

    async def _ask(
        self, number: int, data: bytes, transform: ImageTransform, max_side: int, *, tiled: bool
    ) -> Prepared:
        """Sends an image to a process, and returns the pixels that the process answers.

        Raises:
            SampleError: The process answers an error.
        """
        process = await self._process(number)
        assert process.stdin is not None
        assert process.stdout is not None
        head = {
            "bytes": len(data),
            "transform": dataclasses.asdict(transform),
            "max_side": max_side,
            "tiled": tiled,
        }
        process.stdin.write(json.dumps(head).encode() + b"\n")
        process.stdin.write(data)
        await process.stdin.drain()
        answer = json.loads(await process.stdout.readline())
        if "error" in answer:
            text, kind = answer["error"]
            raise SampleError(str(text), str(kind))
        size = None
        if tiled:
            height, width = answer["size"]
            size = min(max(int(height), 1), max_side), min(max(int(width), 1), max_side)
        shape = transform.count_slots(size), 3, transform.height, transform.width
        pixels = await process.stdout.readexactly(math.prod(shape) * np.float32().itemsize)
        return Prepared(np.frombuffer(pixels, np.float32).reshape(shape), size)

    async def _process(self, number: int) -> asyncio.subprocess.Process:
        """Returns the process with this number; starts the process if it does not run."""
        process = self._processes[number]
        if process is None:
            self._processes[number] = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "llava_jax.serving.decoder"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                # In its own process group, the process does not receive the SIGINT that Ctrl-C
                # sends to the server. A new session would also prevent this, but Linux would give
                # the session its own share of the CPU, and `os.nice` would have no effect.
                process_group=0,
            )
        return process

    async def _end(self, number: int) -> None:
        process, self._processes[number] = self._processes[number], None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _environment() -> dict[str, str]:
    """Returns the environment of a decoder process, with the server's import paths.

    Variables with KEY in their names are left out, because the process reads untrusted files.
    """
    kept = {name: value for name, value in os.environ.items() if "KEY" not in name}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def main() -> None:
    """Decodes the images that arrive on stdin and writes the pixels to stdout, until stdin ends."""
    os.nice(10)  # generating answers has priority
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while line := stdin.readline():
        head = json.loads(line)
        data = stdin.read(head["bytes"])
        answer, pixels = {}, b""
        try:
            transform = _transform_of(head["transform"])
            made = read_pixels(data, transform, head["max_side"], tiled=head["tiled"])
            answer["size"] = made.size
            pixels = np.ascontiguousarray(made.pixels, np.float32).tobytes()
        except SampleError as error:
            answer["error"] = str(error)[:MAX_ERROR], error.kind
        except MemoryError:
            answer["error"] = "decoding the image needs too much memory", "image cost"
        stdout.write(json.dumps(answer).encode() + b"\n" + pixels)
        stdout.flush()


def _transform_of(fields: Json) -> ImageTransform:
    """Returns the transform of which `dataclasses.asdict` returned the fields."""
    tiling = fields.pop("tiling")
    return ImageTransform(**fields, tiling=None if tiling is None else TilingConfig(**tiling))


if __name__ == "__main__":
    main()

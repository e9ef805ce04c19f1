"""Pictures are decoded in processes of their own, which can be ended.

A decoder is C code, which nothing in its own process can interrupt. Here a request whose time is up
takes its decoding with it, and however many pictures there are, text is read and answered beside
them. What comes back from such a process is numbers and text: nothing in it is run.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import sys

import numpy as np
from jaxtyping import Float32

from llava_jax.data.images import ImageTransform, read_pixels
from llava_jax.errors import SampleError

MAX_SECONDS = 20.0
"""For a picture; what the limits let pass takes a few seconds of a core."""
MAX_BYTES = 3 * 2**30
"""Memory that such a process may ask for; Python, NumPy and Pillow are in it."""
MAX_ERROR = 1000
"""Characters of an error's text."""


class Decoders:
    """Processes that decode pictures, one at a time each.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int):
        self._processes: list[asyncio.subprocess.Process | None] = [None] * count
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for number in range(count):
            self._free.put_nowait(number)

    async def start(self) -> None:
        """Starts the processes, so that the first picture does not wait for them."""
        for number in range(len(self._processes)):
            await self._process(number)

    async def stop(self) -> None:
        """Ends the processes, whatever they do."""
        for number in range(len(self._processes)):
            await self._end(number)

    async def decode(
        self, data: bytes, transform: ImageTransform, max_side: int
    ) -> Float32[np.ndarray, "3 H W"]:
        """The normalised pixels of an image file. Cancelled, it ends the decoding.

        Args:
            data: What is in the file.
            transform: What happens to the image.
            max_side: Most pixels of its longer side.

        Raises:
            SampleError: It cannot be read, or not within the limits.
        """
        number = await self._free.get()
        try:
            async with asyncio.timeout(MAX_SECONDS):
                answer, pixels = await self._ask(number, data, transform, max_side)
        except TimeoutError:
            await self._end(number)
            raise SampleError(
                f"it took more than {MAX_SECONDS:g} s to decode", "image cost"
            ) from None
        except (OSError, EOFError, ValueError):
            await self._end(number)
            raise SampleError(
                "its decoder ended: it may want too much memory", "image cost"
            ) from None
        except BaseException:  # cancelled: what it would still answer is nobody's
            await self._end(number)
            raise
        finally:
            self._free.put_nowait(number)
        if answer is not None:
            raise SampleError(*answer)
        return np.frombuffer(pixels, np.float32).reshape(3, transform.height, transform.width)

    async def _ask(
        self, number: int, data: bytes, transform: ImageTransform, max_side: int
    ) -> tuple[tuple[str, str] | None, bytes]:
        """Text and kind of an error, or None and the pixels."""
        process = await self._process(number)
        assert process.stdin is not None
        assert process.stdout is not None
        head = {
            "bytes": len(data),
            "transform": dataclasses.asdict(transform),
            "max_side": max_side,
        }
        process.stdin.write(json.dumps(head).encode() + b"\n")
        process.stdin.write(data)
        await process.stdin.drain()
        answer = json.loads(await process.stdout.readline())
        if answer is not None:
            text, kind = answer
            return (str(text), str(kind)), b""
        size = 3 * transform.height * transform.width * np.float32().itemsize
        return None, await process.stdout.readexactly(size)

    async def _process(self, number: int) -> asyncio.subprocess.Process:
        process = self._processes[number]
        if process is None:
            self._processes[number] = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "llava_jax.serving.decoder"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=_environment(),
                # A terminal's Ctrl-C is for the server alone. A session of its own would give it
                # its own share of the CPU too, whatever its priority.
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
    """Paths to import from, and none of the server's secrets: hostile bytes are read there."""
    kept = {name: value for name, value in os.environ.items() if "KEY" not in name}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def main() -> None:
    """Answers what comes on stdin, until it ends."""
    os.nice(10)  # answers come first
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    while line := stdin.readline():
        head = json.loads(line)
        data = stdin.read(head["bytes"])
        answer, pixels = None, b""
        try:
            made = read_pixels(data, ImageTransform(**head["transform"]), head["max_side"])
            pixels = np.ascontiguousarray(made, np.float32).tobytes()
        except SampleError as error:
            answer = str(error)[:MAX_ERROR], error.kind
        except MemoryError:
            answer = "it takes too much memory", "image cost"
        stdout.write(json.dumps(answer).encode() + b"\n" + pixels)
        stdout.flush()


if __name__ == "__main__":
    main()

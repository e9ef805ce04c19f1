"""Reads request bodies, and limits their size, their duration and the memory of all bodies.

A body is read completely before its request enters the queue. Therefore an incomplete request
occupies a connection, but no place in the queue.
"""

import asyncio
from collections import Counter

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from llava_jax.serving.limits import MIB, Limits, RequestError

BODY_SECONDS = 60.0
"""Longest time in seconds between the headers of a request and the last byte of its body."""
SMALL = 2**14
"""Largest size in bytes of a body that does not count towards `MAX_TOGETHER`. Most requests without
images are smaller."""
MAX_TOGETHER = 64 * MIB
"""Largest total size in bytes of all bodies that are larger than `SMALL`. The bodies from one IP
address may take half of this size. Both limits are raised to `Limits.body_bytes` if necessary."""
_SLICE = 2**16  # bytes

CLIENT_IS_GONE = 499
"""Status of a request whose client disconnected. HTTP defines no such status; nginx uses 499."""


def client_of(scope: Scope) -> str:
    """Returns the IP address of the client; an empty string if the address is not known."""
    return scope["client"][0] if scope["client"] else ""


def media_type(headers: Headers) -> str:
    """Returns the media type from the Content-Type header, in lower case and without parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class Bodies:
    """Limits the memory that the bodies of all requests take together.

    Args:
        limits: Limits of the server.
        ending: Event that is set when the server begins to shut down.

    Attributes:
        limits: Limits of the server.
        ending: Event that is set when the server begins to shut down.
    """

    def __init__(self, limits: Limits, ending: asyncio.Event):
        self.limits, self.ending = limits, ending
        self._sizes: Counter[str] = Counter()

    def hold(self, client: str) -> "Body":
        """Returns an unread `Body` for a `with` statement, whose end frees the memory of the body.

        Args:
            client: IP address of the client.
        """
        return Body(self, client)

    def count(self, client: str, size: int) -> None:
        """Adds a number of bytes to the total size of large bodies.

        Args:
            client: IP address of the client.
            size: Number of bytes; negative when memory is freed.

        Raises:
            RequestError: The large bodies of all clients, or of this client, exceed the limit.
        """
        most, own = max(MAX_TOGETHER, self.limits.body_bytes), self._sizes[client] + size
        fair = max(MAX_TOGETHER // 2, self.limits.body_bytes)
        if size > 0 and (self._sizes.total() + size > most or own > fair):
            raise RequestError(
                "the server is already reading too many large requests; try again in a few seconds",
                status=429,
                code="too_many_large_requests",
                retry_after=5,
            )
        self._sizes[client] += size
        self._sizes += Counter()  # removes clients whose count is 0

    def leaving_at_end(self, receive: Receive) -> Receive:
        """Returns an ASGI receive function that reports a disconnect when the server shuts down."""

        async def receive_on() -> Message:
            received = asyncio.ensure_future(receive())
            ending = asyncio.ensure_future(self.ending.wait())
            try:
                await asyncio.wait((received, ending), return_when=asyncio.FIRST_COMPLETED)
                return received.result() if received.done() else {"type": "http.disconnect"}
            finally:
                received.cancel()
                ending.cancel()

        return receive_on


class Body:
    """Body of one request. Its size counts towards the memory limit until it is released.

    Args:
        bodies: Object that counts the memory of all bodies.
        client: IP address of the client.

    Attributes:
        data: Bytes that have been read.
    """

    def __init__(self, bodies: Bodies, client: str):
        self._bodies, self._client, self._counted = bodies, client, 0
        self.data = bytearray()

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def read(self, headers: Headers, receive: Receive) -> bytearray:
        """Reads the whole body and returns it.

        Args:
            headers: Headers of the request.
            receive: ASGI receive function of the request.

        Raises:
            RequestError: The body is too large or arrives too slowly, other large bodies take too
                much memory, the client disconnected, or the server shuts down.
        """
        length, limits = headers.get("content-length", "0"), self._bodies.limits
        if len(length) > 18 or int(length) > limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(min(BODY_SECONDS, limits.seconds)):
                while await self._read_some(self._bodies.leaving_at_end(receive)):
                    pass
        except TimeoutError:
            text = "the request body did not arrive within the time limit"
            raise RequestError(text, status=408, code="timeout") from None
        return self.data

    async def _read_some(self, receive: Receive) -> bool:
        """Reads the next part of the body; returns True if another part follows."""
        message = await receive()
        if message["type"] == "http.disconnect":
            status = 503 if self._bodies.ending.is_set() else CLIENT_IS_GONE
            text = "the connection ended before the request body was complete"
            raise RequestError(text, status=status)
        self.data += message.get("body", b"")
        if len(self.data) > self._bodies.limits.body_bytes:
            raise self._too_large()
        if len(self.data) > SMALL:
            self._bodies.count(self._client, len(self.data) - self._counted)
            self._counted = len(self.data)
        return bool(message.get("more_body"))

    def _too_large(self) -> RequestError:
        limit = self._bodies.limits.body_bytes
        text = f"the request body has more than {limit:,} bytes, which is the limit of this server"
        return RequestError(text, status=413)

    def release(self) -> None:
        """Frees the memory of the body."""
        self._bodies.count(self._client, -self._counted)
        self._counted = 0
        self.data = bytearray()


def with_body(body: bytes | bytearray, receive: Receive) -> Receive:
    """Returns an ASGI receive function for a body that was already read.

    The function returns the body in slices, and lets other tasks run between two slices, because
    Starlette's form parser is written in Python and is slow.

    Args:
        body: The complete body.
        receive: ASGI receive function for the messages after the body.
    """
    starts = iter(range(0, max(1, len(body)), _SLICE))

    async def receive_on() -> Message:
        await asyncio.sleep(0)
        start = next(starts, None)
        if start is None:
            return await receive()
        more = start + _SLICE < len(body)
        return {
            "type": "http.request",
            "body": bytes(body[start : start + _SLICE]),
            "more_body": more,
        }

    return receive_on

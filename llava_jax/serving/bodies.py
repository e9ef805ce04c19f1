"""Bodies of requests: read whole before anything else is done, within limits of size and time.

A request whose body is not there yet holds a connection, and nothing else: no place in the queue.
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive

from llava_jax.serving.limits import MIB, Limits, RequestError

MAX_SECONDS = 60.0
"""From a request's headers to the last byte of its body."""
SMALL = 2**16
"""Bytes of a body that is always taken: requests without images are below it."""
MAX_TOGETHER = 64 * MIB
"""Bytes of all larger bodies together, or one body if that may be larger."""

CLIENT_IS_GONE = 499
"""Status of a request whose client went away; HTTP has none, this is nginx's."""


class Bodies:
    """Reads bodies, and knows how much memory they take together.

    Args:
        limits: Limits of the server.
        ending: Set when the server is to end.
    """

    def __init__(self, limits: Limits, ending: asyncio.Event):
        self._limits, self._ending = limits, ending
        self._together = 0

    def hold(self) -> "Body":
        """A body to be read, in a `with` for as long as it is needed."""
        return Body(self)

    def count(self, size: int) -> None:
        """Adds to the bytes of larger bodies.

        Raises:
            RequestError: They are too many.
        """
        if size > 0 and self._together + size > max(MAX_TOGETHER, self._limits.body_bytes):
            raise RequestError(
                "the server is reading as many large requests as it may",
                status=429,
                code="too_many_large_requests",
                retry_after=5,
            )
        self._together += size

    async def read(self, headers: Headers, receive: Receive, body: "Body") -> None:
        """See `Body.read`."""
        limit = self._limits.body_bytes
        large = RequestError(f"the body has more than {limit:,} bytes", status=413)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > limit:
            raise large
        receive = self.until_end(receive)
        try:
            async with asyncio.timeout(min(MAX_SECONDS, self._limits.seconds)):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        status = 503 if self._ending.is_set() else CLIENT_IS_GONE
                        raise RequestError("the request ended before its body", status=status)
                    body.data += message.get("body", b"")
                    if len(body.data) > limit:
                        raise large
                    body.count()
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            text = "the body took too long to come"
            raise RequestError(text, status=408, code="timeout") from None

    def until_end(self, receive: Receive) -> Receive:
        """A receiver to which all clients have left when the server is to end."""

        async def receive_on() -> Message:
            received = asyncio.ensure_future(receive())
            ending = asyncio.ensure_future(self._ending.wait())
            try:
                await asyncio.wait((received, ending), return_when=asyncio.FIRST_COMPLETED)
                return received.result() if received.done() else {"type": "http.disconnect"}
            finally:
                received.cancel()
                ending.cancel()

        return receive_on


class Body:
    """One request's body: its memory counts until it is released.

    Args:
        bodies: Counts it.

    Attributes:
        data: What has been read.
    """

    def __init__(self, bodies: Bodies):
        self._bodies, self._counted = bodies, 0
        self.data = bytearray()

    def __enter__(self) -> "Body":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def read(self, headers: Headers, receive: Receive) -> bytearray:
        """All of it.

        Raises:
            RequestError: It is too large or too slow, the client went away, or the server ends.
        """
        await self._bodies.read(headers, receive, self)
        return self.data

    def count(self) -> None:
        """Counts what has been read. As `Bodies.count`."""
        if len(self.data) > SMALL:
            self._bodies.count(len(self.data) - self._counted)
            self._counted = len(self.data)

    def release(self) -> None:
        """Frees its memory."""
        self._bodies.count(-self._counted)
        self._counted = 0
        self.data = bytearray()


def with_body(body: bytes | bytearray, receive: Receive) -> Receive:
    """A receiver that gives a body that was read before, and then what another one has."""
    messages: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def receive_on() -> Message:
        return messages.pop() if messages else await receive()

    return receive_on

"""Bodies of requests: read whole before anything else is done, within limits of size and time.

A request whose body is not there yet holds a connection, and nothing else: no place in the queue.
"""

import asyncio
from collections import Counter

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from llava_jax.serving.limits import MIB, Limits, RequestError

BODY_SECONDS = 60.0
"""From a request's headers to the last byte of its body."""
SMALL = 2**14
"""Bytes of a body that is always taken: most requests without images are below it."""
MAX_TOGETHER = 64 * MIB
"""Bytes of all larger bodies together, or of one, if that may be larger; an address has half."""
_SLICE = 2**16

CLIENT_IS_GONE = 499
"""Status of a request whose client went away; HTTP has none, this is nginx's."""


def client_of(scope: Scope) -> str:
    """The address of a request's client."""
    return scope["client"][0] if scope["client"] else ""


def media_type(headers: Headers) -> str:
    """The type of a body, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


class Bodies:
    """Knows how much memory bodies take together.

    Args:
        limits: Limits of the server.
        ending: Set when the server is to end.
    """

    def __init__(self, limits: Limits, ending: asyncio.Event):
        self.limits, self.ending = limits, ending
        self._sizes: Counter[str] = Counter()

    def hold(self, client: str) -> "Body":
        """A body to be read, in a `with` for as long as it is needed.

        Args:
            client: The client's address.
        """
        return Body(self, client)

    def count(self, client: str, size: int) -> None:
        """Adds to the bytes of larger bodies.

        Raises:
            RequestError: They are too many.
        """
        most, own = max(MAX_TOGETHER, self.limits.body_bytes), self._sizes[client] + size
        fair = max(MAX_TOGETHER // 2, self.limits.body_bytes)
        if size > 0 and (self._sizes.total() + size > most or own > fair):
            raise RequestError(
                "the server is reading as many large requests as it may",
                status=429,
                code="too_many_large_requests",
                retry_after=5,
            )
        self._sizes[client] += size
        self._sizes += Counter()  # drops those without any

    def leaving_at_end(self, receive: Receive) -> Receive:
        """A receiver to which all clients have left when the server is to end."""

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
    """One request's body: its memory counts until it is released.

    Args:
        bodies: Counts it.
        client: The client's address.

    Attributes:
        data: What has been read.
    """

    def __init__(self, bodies: Bodies, client: str):
        self._bodies, self._client, self._counted = bodies, client, 0
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
        length, limits = headers.get("content-length", "0"), self._bodies.limits
        if len(length) > 18 or int(length) > limits.body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(min(BODY_SECONDS, limits.seconds)):
                while await self._read_some(self._bodies.leaving_at_end(receive)):
                    pass
        except TimeoutError:
            text = "the body took too long to come"
            raise RequestError(text, status=408, code="timeout") from None
        return self.data

    async def _read_some(self, receive: Receive) -> bool:
        """Reads on; returns whether there is more."""
        message = await receive()
        if message["type"] == "http.disconnect":
            status = 503 if self._bodies.ending.is_set() else CLIENT_IS_GONE
            raise RequestError("the request ended before its body", status=status)
        self.data += message.get("body", b"")
        if len(self.data) > self._bodies.limits.body_bytes:
            raise self._too_large()
        if len(self.data) > SMALL:
            self._bodies.count(self._client, len(self.data) - self._counted)
            self._counted = len(self.data)
        return bool(message.get("more_body"))

    def _too_large(self) -> RequestError:
        limit = self._bodies.limits.body_bytes
        return RequestError(f"the body has more than {limit:,} bytes", status=413)

    def release(self) -> None:
        """Frees its memory."""
        self._bodies.count(self._client, -self._counted)
        self._counted = 0
        self.data = bytearray()


def with_body(body: bytes | bytearray, receive: Receive) -> Receive:
    """A receiver that gives a body that was read before, and then what another one has.

    It gives slices, and lets others run between them: forms are parsed in Python.
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

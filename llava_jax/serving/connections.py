"""Connections: few enough for the system, and none kept by a client that sends nothing.

The HTTP parser is llhttp, by httptools, which refuses what two parsers may read in two ways: lines
that end in a bare LF, headers folded over lines, a length beside chunks.
"""

import asyncio
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0
"""From a connection, or the first byte of a later request, to the end of the headers."""
MAX_HEADER_BYTES = 2**16
MAX_IGNORED_BYTES = 2**26
"""Bytes that are read after a request was refused, so that the client comes to read why."""
IGNORE_SECONDS = 10.0
MAX_CONNECTIONS = 4096
SPARE_FILES = 32
"""Files that the server itself may still open when all connections are in use."""
LOG_SECONDS = 10.0
"""Between two lines that say the same."""

_log = logging.getLogger("uvicorn.error")


class Connections:
    """All connections of the server. When there are too many, the oldest that waits makes room.

    A connection waits until its first request is there with its body; a client whose request is
    whole is not thrown out for one that sends nothing.
    """

    def __init__(self) -> None:
        self.maximum = max_connections()
        self._waiting: dict[Connection, None] = {}  # in the order in which they came
        self._open: set[Connection] = set()
        self._clients: Counter[str] = Counter()
        self._next_line = 0.0

    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """What uvicorn makes for each connection."""
        return lambda *args, **options: Connection(self, *args, **options)

    def add(self, connection: "Connection") -> bool:
        """Adds one, and closes another if need be; False if this one finds no place."""
        crowded = len(self._open) >= self.maximum
        # Half is left to others, but only when there is a need.
        greedy = crowded and self._clients[connection.address] > self.maximum // 2
        if crowded:
            self._say_that_they_ran_out()
            mine = (one for one in self._waiting if one.address == connection.address)
            oldest = next(mine if greedy else iter(self._waiting), None)
            if oldest is None:
                return False
            oldest.refuse(408, "another client needed the connection")
            self.remove(oldest)
        self._open.add(connection)
        self._waiting[connection] = None
        self._clients[connection.address] += 1
        return True

    def ask(self, connection: "Connection") -> None:
        """Notes that a connection has sent a whole request."""
        self._waiting.pop(connection, None)

    def remove(self, connection: "Connection") -> None:
        """Notes that a connection is over."""
        if connection in self._open:
            self._open.remove(connection)
            self._waiting.pop(connection, None)
            self._clients[connection.address] -= 1
            self._clients += Counter()  # drops those without any

    def _say_that_they_ran_out(self) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LOG_SECONDS
            address, count = self._clients.most_common(1)[0]
            _log.warning(
                f"all {self.maximum} connections are in use, {count} of them by {address}; those "
                "that send nothing are closed (`ulimit -n` sets how many there may be)"
            )


def max_connections() -> int:
    """How many connections the process may have; raises its limit of open files for them."""
    wanted = MAX_CONNECTIONS + len(os.listdir("/dev/fd")) + SPARE_FILES
    soft, hard = (
        wanted if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    return max(8, MAX_CONNECTIONS - max(0, wanted - soft))


class Connection(HttpToolsProtocol):
    """One connection, whose headers have limits of size and time.

    Args:
        connections: All of them.
        args: Those of uvicorn.
        options: Those of uvicorn.
    """

    def __init__(self, connections: Connections, *args: object, **options: object):
        super().__init__(*args, **options)  # pyright: ignore[reportArgumentType]
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._in_headers = self._in_body = False
        self._counted = 0
        self.address = ""

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for a request."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else "?"
        if self._all.add(self):
            self._expect_headers()
        else:
            self.refuse(429, "the server has as many connections as it may")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        self._stop_timer()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on; headers without end are refused, and so is a body that nobody reads."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_headers:
            self._count(len(data), MAX_HEADER_BYTES, "the headers are too long")
        elif self._in_body and self.cycle.response_complete:
            self._count(len(data), MAX_IGNORED_BYTES, "the body is too long")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if not self._in_headers:
            self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind a chunked body, of which nobody here has a use."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request has its headers."""
        self._stop_timer()
        self._in_headers, self._in_body, self._counted = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._in_body = False
        self._all.ask(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A request is answered, perhaps before its body was there."""
        super().on_response_complete()
        if self._in_body:  # a client that still sends would not see an answer before a reset
            self._stop_timer()
            self._timer = self.loop.call_later(IGNORE_SECONDS, self.transport.close)

    def refuse(self, status: int, text: str) -> None:
        """Answers, outside of any application, and closes."""
        self._stop_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.close()  # an answer is under way; this would be read as a part of it
        elif not self.transport.is_closing():
            head = f"HTTP/1.1 {status} {text}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

    def _expect_headers(self) -> None:
        self._stop_timer()
        self._in_headers, self._counted = True, 0
        self._timer = self.loop.call_later(
            HEADER_SECONDS, self.refuse, 408, "the headers took too long"
        )

    def _count(self, size: int, most: int, text: str) -> None:
        self._counted += size
        if self._counted > most:
            self.refuse(431 if self._in_headers else 413, text)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

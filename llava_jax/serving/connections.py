"""Limits the number of connections, and the time and the bytes of each connection.

The HTTP parser is llhttp, which the package httptools wraps. llhttp refuses requests that the
parser of a proxy may interpret differently: lines that end with LF instead of CRLF, headers that
are folded over several lines, and a Content-Length header together with chunked encoding.

A connection either waits for a request or waits for the answer to a request. A connection that
waits for a request is closed after a short time, or earlier if there are too many connections.
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
"""Longest time in seconds for the headers of a request to arrive, measured from the start of the
connection or from the end of the previous answer."""
MAX_HEADER_BYTES = 2**16
MAX_IGNORED_BYTES = 2**26
"""Largest number of body bytes that the server reads and drops if it has answered a request before
the end of the body. If the server closed the connection instead, the client could lose the answer.
"""
IGNORE_SECONDS = 10.0
"""Longest time in seconds for which the server reads and drops the rest of such a body."""
READ_SECONDS = 30.0
"""Longest time in seconds that the server waits for a client that does not read its answer."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 32
"""Number of open files that are reserved for the server itself, in addition to connections."""
LOG_SECONDS = 10.0
"""Shortest time in seconds between two log lines that begin with the same 40 characters."""

_log = logging.getLogger("uvicorn.error")


class Connections:
    """Keeps track of all open connections of the server.

    If there are too many connections, the connection that has waited longest for a request is
    closed. One IP address can have at most three quarters of all connections.

    Attributes:
        maximum: Largest number of open connections.
    """

    def __init__(self) -> None:
        self.maximum = max_connections()
        self._waiting: dict[Connection, None] = {}  # longest waiting connection first
        self._open: set[Connection] = set()
        self._clients: Counter[str] = Counter()
        for name in ("uvicorn.error", "asyncio"):  # these loggers write a line for each bad request
            logging.getLogger(name).addFilter(_not_said_before())

    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """Returns the function that uvicorn calls to create a protocol for each connection."""
        return lambda *args, **options: Connection(self, *args, **options)

    def add(self, connection: "Connection") -> bool:
        """Adds a connection and returns True; closes a waiting connection if there are too many.

        If no waiting connection can be closed, adds nothing and returns False.
        """
        address = connection.address
        greedy = self._clients[address] >= self.maximum * 3 // 4
        if greedy or len(self._open) >= self.maximum:
            most, count = self._clients.most_common(1)[0]
            _log.warning(
                f"too many connections: {count} of {self.maximum} are from {most}; connections "
                "without a request are closed (a higher `ulimit -n` may allow more connections)"
            )
            waiting = (one for one in self._waiting if one.address == address or not greedy)
            oldest = next(waiting, None)
            if oldest is None:
                return False
            oldest.refuse(408, "another client needed the connection")
            self.remove(oldest)
        self._open.add(connection)
        self._clients[address] += 1
        return True

    def note_waiting(self, connection: "Connection", is_waiting: bool) -> None:
        """Records whether a connection waits for a request."""
        self._waiting.pop(connection, None)
        if is_waiting and connection in self._open:
            self._waiting[connection] = None

    def remove(self, connection: "Connection") -> None:
        """Removes a closed connection."""
        if connection in self._open:
            self._open.remove(connection)
            self._waiting.pop(connection, None)
            self._clients[connection.address] -= 1
            self._clients += Counter()  # removes addresses whose count is 0

    def end_in(self, seconds: float) -> None:
        """Aborts all open connections after `seconds`; may be called from a signal handler."""
        for connection in list(self._open):
            loop = connection.loop
            loop.call_soon_threadsafe(loop.call_later, seconds, connection.transport.abort)


def _not_said_before() -> Callable[[logging.LogRecord], bool]:
    """Returns a log filter that drops a line if a similar line was logged within LOG_SECONDS."""
    said: dict[str, float] = {}

    def passes(record: logging.LogRecord) -> bool:
        text, now = record.getMessage()[:40], time.monotonic()
        if now - said.get(text, -LOG_SECONDS) < LOG_SECONDS:
            return False
        if len(said) > 100:
            said.clear()
        said[text] = now
        return True

    return passes


def max_connections() -> int:
    """Raises the limit of open files if needed, and returns the largest number of connections."""
    wanted = MAX_CONNECTIONS + len(os.listdir("/dev/fd")) + SPARE_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return max(8, MAX_CONNECTIONS - max(0, wanted - soft))


class Connection(HttpToolsProtocol):
    """HTTP protocol of one connection, with limits of size and time.

    Args:
        connections: All connections of the server.
        args: Positional arguments that uvicorn passes to a protocol.
        options: Keyword arguments that uvicorn passes to a protocol.

    Attributes:
        address: IP address of the client; "?" if it is not known.
    """

    def __init__(self, connections: Connections, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        self._in_headers = self._in_body = False
        self._counted = 0
        self.address = ""

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Waits for a request, or refuses the connection if there are too many connections."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else "?"
        if self._all.add(self):
            self._expect_headers()
        else:
            self.refuse(429, "the server has too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancels the timers, and removes the connection from the list of connections."""
        for timer in (self._timer, self._reading):
            if timer is not None:
                timer.cancel()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parses data; refuses headers that are too long, and a long body that is being dropped."""
        if self.transport.is_closing():
            return
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:  # not counted if `data` ended a body
            self._count(len(data), MAX_HEADER_BYTES, 431, "the headers are too long")
        elif self._in_body and not self._is_answering:
            self._count(len(data), MAX_IGNORED_BYTES, 413, "the body is too long")

    def on_message_begin(self) -> None:
        """Starts a request; refuses it if the previous request is not answered yet."""
        if self._is_answering:
            raise ValueError("a request began before the previous request was answered")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header; ignores trailers, which are header lines that follow a chunked body."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Ends the headers of a request; refuses upgrades to another protocol."""
        if self.parser is None or self.parser.should_upgrade():
            raise ValueError("this server does not upgrade connections")
        super().on_headers_complete()
        self._wait(None)
        self._in_headers, self._in_body, self._counted = False, True, 0

    def on_message_complete(self) -> None:
        """Ends the body of a request."""
        self._in_body = False
        super().on_message_complete()
        if self._is_answering:
            self._all.note_waiting(self, False)
        else:  # the request was refused before its body was complete
            self._expect_headers()

    def on_response_complete(self) -> None:
        """Waits for the next request, or for the rest of the body of the answered request."""
        super().on_response_complete()
        # Our timer replaces uvicorn's keep-alive timer, because any incoming data would stop that
        # timer.
        self._unset_keepalive_if_required()
        if self._in_body:
            # If the connection were closed now, the operating system would reset it, and a client
            # that still sends its body could lose the answer.
            self._wait(IGNORE_SECONDS)
        else:
            self._expect_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuses data that is not valid HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, text: str) -> None:
        """Sends an error response without calling the application, and closes the connection.

        Args:
            status: HTTP status code.
            text: Reason phrase of the status line.
        """
        self._wait(None)
        if self._is_answering and self.cycle.response_started:
            self.transport.abort()  # the client would take an error for a part of the answer
        elif not self.transport.is_closing():
            head = f"HTTP/1.1 {status} {text}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

    def pause_writing(self) -> None:
        """Starts a timer that aborts the connection if the client does not read its answer."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer of `pause_writing`, because the client has begun to read."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _expect_headers(self) -> None:
        self._in_headers, self._counted = True, 0
        self._wait(HEADER_SECONDS)
        self._all.note_waiting(self, True)

    def _wait(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        text = "the request took too long"
        if seconds is not None:
            self._timer = self.loop.call_later(seconds, self.refuse, 408, text)

    def _count(self, size: int, most: int, status: int, text: str) -> None:
        self._counted += size
        if self._counted > most:
            self.refuse(status, text)

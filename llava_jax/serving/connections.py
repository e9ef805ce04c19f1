"""Connections: few enough for the system, and none kept by a client that does not do its part.

The HTTP parser is llhttp, by httptools, which refuses what two parsers may read in two ways: lines
that end in a bare LF, headers folded over lines, a length beside chunks. A connection is either
answered, or it waits for a request: then it has little time, and makes room if there are too many.
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
"""From a connection, or from an answer, to the end of the next request's headers."""
MAX_HEADER_BYTES = 2**16
MAX_IGNORED_BYTES = 2**26
"""Bytes that are read after a request was refused, so that the client comes to read why."""
IGNORE_SECONDS = 10.0
READ_SECONDS = 30.0
"""How long a client may leave unread what was sent to it."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 32
"""Files that the server itself may still open when all connections are in use."""
LOG_SECONDS = 10.0
"""Between two lines of the log that say the same."""

_log = logging.getLogger("uvicorn.error")


class Connections:
    """All connections of the server. When there are too many, the oldest that waits makes room.

    One address has three quarters of them at most.
    """

    def __init__(self) -> None:
        self.maximum = max_connections()
        self._waiting: dict[Connection, None] = {}  # the one that has waited longest is first
        self._open: set[Connection] = set()
        self._clients: Counter[str] = Counter()
        for name in ("uvicorn.error", "asyncio"):  # which write a line for each bad request
            logging.getLogger(name).addFilter(_not_said_before())

    def protocol(self) -> Callable[..., asyncio.Protocol]:
        """What uvicorn makes for each connection."""
        return lambda *args, **options: Connection(self, *args, **options)

    def add(self, connection: "Connection") -> bool:
        """Adds one, and closes another if need be; False if there are too many."""
        address = connection.address
        greedy = self._clients[address] >= self.maximum * 3 // 4
        if greedy or len(self._open) >= self.maximum:
            most, count = self._clients.most_common(1)[0]
            _log.warning(
                f"connections run out: {count} of {self.maximum} are used by {most}; those that "
                "send nothing are closed (`ulimit -n` sets how many there may be)"
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
        """Notes that a connection waits for a request, or that it has one."""
        self._waiting.pop(connection, None)
        if is_waiting and connection in self._open:
            self._waiting[connection] = None

    def remove(self, connection: "Connection") -> None:
        """Notes that a connection is over."""
        if connection in self._open:
            self._open.remove(connection)
            self._waiting.pop(connection, None)
            self._clients[connection.address] -= 1
            self._clients += Counter()  # drops those without any

    def end_in(self, seconds: float) -> None:
        """Ends all that are open after some time; may be called by a signal's handler."""
        for connection in list(self._open):
            loop = connection.loop
            loop.call_soon_threadsafe(loop.call_later, seconds, connection.transport.abort)


def _not_said_before() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets a line pass once in a while."""
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
    """How many connections the process may have; raises its limit of open files for them."""
    wanted = MAX_CONNECTIONS + len(os.listdir("/dev/fd")) + SPARE_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else limit for limit in limits)
    if soft < wanted:
        soft = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    return max(8, MAX_CONNECTIONS - max(0, wanted - soft))


class Connection(HttpToolsProtocol):
    """One connection, with limits of size and time for what its client does.

    Args:
        connections: All of them.
        args: Arguments of uvicorn.
        options: Options of uvicorn.
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
        """Begins to wait for a request."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else "?"
        if self._all.add(self):
            self._expect_headers()
        else:
            self.refuse(429, "the server has as many connections as it may")

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        for timer in (self._timer, self._reading):
            if timer is not None:
                timer.cancel()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on; headers without end are refused, and so is a body that nobody reads."""
        if self.transport.is_closing():
            return
        was_in_headers = self._in_headers
        super().data_received(data)
        if was_in_headers and self._in_headers:  # else it was the end of a body
            self._count(len(data), MAX_HEADER_BYTES, 431, "the headers are too long")
        elif self._in_body and not self._is_answering:
            self._count(len(data), MAX_IGNORED_BYTES, 413, "the body is too long")

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._is_answering:
            raise ValueError("a request before the last one is answered")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind a chunked body, of which nobody here has a use."""
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request has its headers."""
        if self.parser is None or self.parser.should_upgrade():
            raise ValueError("nothing here is upgraded")
        super().on_headers_complete()
        self._wait(None)
        self._in_headers, self._in_body, self._counted = False, True, 0

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._in_body = False
        super().on_message_complete()
        if self._is_answering:
            self._all.note_waiting(self, False)
        else:  # it was refused before its body was there
            self._expect_headers()

    def on_response_complete(self) -> None:
        """A request is answered, perhaps before its body was there."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # in its place is our timer, which no data stops
        if self._in_body:  # a client that still sends would not see an answer before a reset
            self._wait(IGNORE_SECONDS)
        else:
            self._expect_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self.refuse(400, msg)

    def refuse(self, status: int, text: str) -> None:
        """Answers, outside of any application, and closes."""
        self._wait(None)
        if self._is_answering and self.cycle.response_started:
            self.transport.abort()  # more would be read as a part of the answer
        elif not self.transport.is_closing():
            head = f"HTTP/1.1 {status} {text}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
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

"""HTTP as clients send it who mean no good: slow, without end, ambiguous, too many."""

import asyncio
import contextlib
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
pytest.importorskip("httptools")

OPEN = "GET / HTTP/1.1\r\nHost: x\r\n"
POST = "POST / HTTP/1.1\r\nHost: x\r\n"


class Running:
    """A server whose application answers with the size of the body.

    Args:
        maximum: Most connections.
        answer: What is answered; None is the size of the body.
        wait: Seconds before that.
        limits: Options of `Limits`.
    """

    def __init__(self, maximum: int, answer: bytes | None, wait: float, **limits: Any):
        import uvicorn

        from llava_jax.serving.bodies import Bodies
        from llava_jax.serving.connections import Connections
        from llava_jax.serving.limits import Limits, RequestError, refusal

        self.ending = asyncio.Event()
        bodies = Bodies(Limits(**limits), self.ending)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            from starlette.requests import Request
            from starlette.responses import PlainTextResponse

            request = Request(scope, receive)
            try:
                with bodies.hold("client") as body:
                    size = str(len(await body.read(request.headers, receive)))
                await asyncio.sleep(wait)
                await PlainTextResponse(answer or size)(scope, receive, send)
            except RequestError as error:
                await refusal(error)(scope, receive, send)

        self.connections = Connections()
        self.connections.maximum = maximum
        self.listener = socket.create_server(("127.0.0.1", 0))
        protocol: Any = self.connections.protocol()
        config = uvicorn.Config(app, http=protocol, loop="asyncio", lifespan="off", log_config=None)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), timeout=10)

    def ask(self, text: str) -> str:
        """The status line and body of what is answered before the connection ends."""
        with self.connect() as connection:
            connection.sendall(text.encode("latin-1"))
            return read(connection)


def receive(connection: socket.socket) -> str:
    """The status line of the next answer, which is read whole."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    found = re.search(r"content-length: (\d+)", head.decode(), re.IGNORECASE)
    assert found is not None
    connection.recv(int(found[1]), socket.MSG_WAITALL)
    return head.decode().splitlines()[0]


def read(connection: socket.socket) -> str:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            found += piece
    head, _, body = found.decode().partition("\r\n\r\n")
    return f"{head.splitlines()[0] if head else ''} {body}".strip()


@contextlib.contextmanager
def running(
    maximum: int = 64, answer: bytes | None = None, wait: float = 0.0, **limits: Any
) -> Iterator[Running]:
    server = Running(maximum, answer, wait, **limits)
    server.thread.start()
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join()
        server.listener.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(body_bytes=100_000) as server:
        yield server


CLOSE = "Connection: close\r\n"
REFUSED = {
    "obs-fold": OPEN + CLOSE + "A: b\r\n c\r\n\r\n",
    "obs-fold by tab": OPEN + CLOSE + "A: b\r\n\tc\r\n\r\n",
    "bare LF": "GET / HTTP/1.1\nHost: x\nConnection: close\n\n",
    "one bare LF": OPEN + CLOSE + "A: b\n\r\n",
    "bare CR": OPEN + CLOSE + "A: b\rc\r\n\r\n",
    "space before the colon": OPEN + CLOSE + "A : b\r\n\r\n",
    "NUL": OPEN + CLOSE + "A: b\0\r\n\r\n",
    "a length beside chunks": POST + CLOSE + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n"
    "\r\n0\r\n\r\n",
    "two lengths": POST + CLOSE + "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a length with a sign": POST + CLOSE + "Content-Length: +3\r\n\r\nabc",
    "a huge length": POST + CLOSE + f"Content-Length: {10**30}\r\n\r\n",
    "bare LF in chunks": POST + CLOSE + "Transfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    "no chunk": POST + CLOSE + "Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "another version": "GET / HTTP/3.7\r\nHost: x\r\nConnection: close\r\n\r\n",
    "CONNECT": "CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "another's address": "GET http://evil HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path of bytes": "GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "an upgrade": POST + "Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
    "no HTTP": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_two_parsers_may_read_in_two_ways(server, case):
    assert server.ask(REFUSED[case])[:12] == "HTTP/1.1 400"


def test_usual_requests(server):
    assert server.ask(OPEN + CLOSE + "\r\n") == "HTTP/1.1 200 OK 0"
    assert server.ask(POST + CLOSE + "Content-Length: 3\r\n\r\nabc") == "HTTP/1.1 200 OK 3"
    chunks = (
        POST + CLOSE + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nX: y\r\n\r\n"
    )
    assert server.ask(chunks) == "HTTP/1.1 200 OK 5"


def test_long_headers_and_bodies(server, monkeypatch):
    from llava_jax.serving import connections

    assert "431" in server.ask(OPEN + "A: " + "b" * 10**6)
    assert "431" in server.ask(OPEN + "A: b\r\n" * 10**5)
    monkeypatch.setattr(connections, "IGNORE_SECONDS", 0.5)
    assert "413" in server.ask(POST + "Content-Length: 100001\r\n\r\n")
    chunk = "2710\r\n" + "x" * 10**4 + "\r\n"
    assert "413" in server.ask(POST + "Transfer-Encoding: chunked\r\n\r\n" + chunk * 12)
    # A client that sends all of it, and reads only then, still reads why it was refused.
    with server.connect() as connection:
        connection.sendall(f"{POST}Content-Length: 10000000\r\n\r\n".encode() + b"x" * 10**7)
        assert "413" in receive(connection)
        connection.sendall(f"{POST}Content-Length: 3\r\n\r\nabc".encode())  # and may go on
        assert "200" in receive(connection)
    # The end of such a body is none of the next headers.
    with server.connect() as connection, monkeypatch.context() as patched:
        patched.setattr(connections, "MAX_HEADER_BYTES", 200)
        connection.sendall(f"{POST}Content-Length: 200000\r\n\r\n".encode())
        assert "413" in receive(connection)
        connection.sendall(b"x" * 200_000)
        time.sleep(0.2)
        connection.sendall(f"{POST}Content-Length: 3\r\n\r\nabc".encode())
        assert "200" in receive(connection)
    monkeypatch.setattr(connections, "MAX_IGNORED_BYTES", 10**6)
    monkeypatch.setattr(connections, "IGNORE_SECONDS", 60)
    began = time.monotonic()
    with contextlib.suppress(OSError):
        server.ask(POST + "Transfer-Encoding: chunked\r\n\r\n" + chunk * 1000)
    assert time.monotonic() - began < 5


def test_headers_and_bodies_that_do_not_come(server, monkeypatch):
    from llava_jax.serving import bodies, connections

    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    began = time.monotonic()
    for text in ("", "GET", OPEN, POST + "Content-Length: 5\r\n\r\nab"):
        assert "408" in server.ask(text), text
    with server.connect() as connection:  # one byte now and then
        for sign in OPEN:
            try:
                connection.sendall(sign.encode())
            except OSError:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the server waited for all of it")
    assert time.monotonic() - began < 5


def test_the_oldest_that_sends_nothing_makes_room(caplog):
    with running(maximum=8) as server, contextlib.ExitStack() as idle:
        caplog.set_level(logging.WARNING, "uvicorn.error")
        held = [idle.enter_context(server.connect()) for _ in range(6)]
        for connection in held[1:3]:
            connection.sendall(OPEN.encode())
        for connection in held[3:]:  # which have been answered, and do not go
            connection.sendall(f"{OPEN}\r\n".encode())
            assert b"200" in connection.recv(1000)
        for _ in range(5):
            assert server.ask(OPEN + CLOSE + "\r\n") == "HTTP/1.1 200 OK 0"
        assert "408" in read(held[0])
        assert "6 of 8 are from 127.0.0.1" in caplog.text
        assert len(caplog.records) == 1  # not one for each


def test_nothing_keeps_a_connection_that_asks_for_nothing(server, monkeypatch):
    from llava_jax.serving import connections

    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    for more in ("", "\r\n", "\r\n\r\n", "GET /"):
        with server.connect() as connection:
            connection.sendall(f"{OPEN}\r\n".encode())
            began = time.monotonic()
            assert b"200" in connection.recv(1000)
            connection.sendall(more.encode())
            assert "408" in read(connection)
            assert time.monotonic() - began < 3


def test_a_client_that_does_not_read_is_thrown_out(monkeypatch):
    from llava_jax.serving import connections

    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    with running(body_bytes=2**25, answer=b"x" * 2**25) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.listener.getsockname())
        connection.sendall(f"{OPEN}\r\n".encode())
        until = time.monotonic() + 5
        time.sleep(0.2)
        while server.connections._open:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_no_request_before_the_last_is_answered(caplog):
    with running(wait=1.0) as server, server.connect() as connection:
        began = time.monotonic()
        connection.sendall(f"{OPEN}\r\n".encode() * 5000)
        with contextlib.suppress(ConnectionError):
            assert b"200" not in connection.recv(1000)
        assert time.monotonic() - began < 0.9
    assert "Traceback" not in caplog.text


def test_larger_bodies_are_bounded_together(monkeypatch):
    from llava_jax.serving import bodies
    from llava_jax.serving.limits import Limits, RequestError

    monkeypatch.setattr(bodies, "MAX_TOGETHER", 200_000)
    with running(body_bytes=150_000) as server, server.connect() as half:
        half.sendall(f"{POST}Content-Length: 150000\r\n\r\n".encode() + b"x" * 140_000)
        time.sleep(0.3)
        large = f"{POST}{CLOSE}Content-Length: 100000\r\n\r\n" + "x" * 100_000
        assert "429" in server.ask(large)
        assert server.ask(f"{POST}{CLOSE}Content-Length: 3\r\n\r\nabc") == "HTTP/1.1 200 OK 3"
        half.sendall(b"x" * 10_000)
        assert b"200" in half.recv(100)
        assert "200" in server.ask(large)
    counted = bodies.Bodies(Limits(body_bytes=50_000), asyncio.Event())
    counted.count("a", 100_000)
    with pytest.raises(RequestError):
        counted.count("a", 1)  # half is left to others
    counted.count("b", 100_000)


def test_a_server_that_ends_does_not_wait_for_a_body(caplog):
    with running() as server, server.connect() as waits:
        waits.sendall(f"{POST}Content-Length: 5\r\n\r\nab".encode())
        time.sleep(0.2)
        began = time.monotonic()
        server.server.should_exit = True
        loop = server.server.servers[0].get_loop()
        loop.call_soon_threadsafe(server.ending.set)
        assert "503" in read(waits)
        server.thread.join()
        assert time.monotonic() - began < 3
    assert "Traceback" not in caplog.text
    assert [record for record in caplog.records if record.exc_info] == []


def test_the_limit_of_open_files_is_raised_and_kept_to(monkeypatch):
    from llava_jax.serving import connections

    limits = [1024, 2**20]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    assert connections.max_connections() == connections.MAX_CONNECTIONS
    assert connections.MAX_CONNECTIONS < limits[0] < 2**20
    limits[:] = [200, 200]
    assert 8 <= connections.max_connections() < 200 - connections.SPARE_FILES
    assert limits == [200, 200]

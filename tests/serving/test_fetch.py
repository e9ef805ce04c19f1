"""Files from URLs that strangers name; nothing here leaves this machine."""

import http.server
import threading
import time
from collections.abc import Iterator

import pytest

from llava_jax.serving import fetch as fetching
from llava_jax.serving.fetch import FetchError, fetch, is_public


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x",
        "http://localhost:1/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/x",
        "http://192.168.1.1/x",
        "http://0.0.0.0:1/x",
        "http://2130706433:1/x",
        "http://0x7f.1:1/x",
        "https://[::1]:1/x",
        "http://[::ffff:127.0.0.1]:1/x",
        "http://[fd00::1]/x",
        "http://user@127.0.0.1:1/x",
    ],
)
def test_addresses_that_are_not_public_are_refused(url: str):
    with pytest.raises(FetchError, match="an IP address that is not public"):
        fetch(url, most_bytes=10, seconds=5.0)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("fe80::1%eth0", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(address: str, expected: bool):
    assert is_public(address) is expected


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://x/", "http://", "http://[::1"])
def test_only_urls_of_the_web_are_fetched(url: str):
    with pytest.raises(FetchError):
        fetch(url, most_bytes=10, seconds=5.0)


class Pages(http.server.BaseHTTPRequestHandler):
    """A server that is not always kind."""

    def do_GET(self) -> None:
        path, _, what = self.path.partition("?")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", what)
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        if path == "/short":
            self.send_header("Content-Length", "99")
        self.end_headers()
        try:
            if path == "/drip":
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            self.wfile.write(self.headers["Host"].encode() if path == "/host" else b"0123456789")
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server whose address, of all that are not public, is taken for public."""
    monkeypatch.setattr(fetching, "is_public", lambda ip: ip == "127.0.0.1" or is_public(ip))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_file_is_fetched(address: str):
    assert fetch(f"{address}/x", most_bytes=10, seconds=5.0) == b"0123456789"
    assert fetch(f"{address}/to?/x", most_bytes=10, seconds=5.0) == b"0123456789"
    host = address.removeprefix("http://").encode()
    assert fetch(f"{address}/host", most_bytes=99, seconds=5.0) == host


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/x", "more than 9 bytes"),
        ("/missing", "HTTP status 404"),
        ("/short", "ended before the file was complete"),
        ("/to?/to?/to?/to?/to?/x", "redirected more than 3 times"),
        ("/to?http://169.254.169.254/latest/", "an IP address that is not public"),
        ("/to?http://[::1]/", "an IP address that is not public"),
        ("/to?file:///etc/passwd", "must start with http:// or https://"),
        ("/a b", "control characters"),
    ],
)
def test_what_cannot_be_fetched(address: str, path: str, reason: str):
    with pytest.raises(FetchError, match=reason):
        fetch(f"{address}{path}", most_bytes=99 if path == "/short" else 9, seconds=5.0)


def test_a_server_that_drips_is_cut_off(address: str):
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"more than 0\.3 s"):
        fetch(f"{address}/drip", most_bytes=1000, seconds=0.3)
    assert time.monotonic() - began < 2

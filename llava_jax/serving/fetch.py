"""A file from an http or https URL that a stranger named: from public addresses alone.

A server that fetches any URL reaches what its clients cannot: its own machine, its
network, a cloud's metadata. So a host's addresses are looked up once, all must be public, and the
connection goes to one of those that were checked; each redirect is a new URL.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)


class FetchError(Exception):
    """A file that cannot be had; its text says why."""


def fetch(url: str, *, most_bytes: int, seconds: float) -> bytes:
    """What is at a URL.

    Args:
        url: http or https.
        most_bytes: Largest size of the file.
        seconds: For all of it, redirects included.

    Raises:
        FetchError: It is not public, too large or too slow, or the file does not exist.
    """
    until = time.monotonic() + seconds
    for _ in range(1 + MAX_REDIRECTS):
        try:
            with _opened(url, until) as response:
                if response.status not in _REDIRECTS:
                    return _read(response, most_bytes)
                url = urljoin(url, response.headers.get("Location", ""))
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= until:
                raise FetchError(f"it took more than {seconds:g} s") from error
            raise FetchError(str(error) or type(error).__name__) from error
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    if response.status != 200:
        raise FetchError(f"the server answered {response.status}")
    data = response.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise FetchError(f"it has more than {most_bytes:,} bytes")
    if response.length:
        raise OSError("it ended early")
    return data


@contextlib.contextmanager
def _opened(url: str, until: float) -> Iterator[http.client.HTTPResponse]:
    """The response, whose socket is shut when time is up, however slowly bytes come."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("only http and https URLs are fetched")
    usual = 443 if parts.scheme == "https" else 80
    port = parts.port or usual
    sock = _connected(parts.hostname, port, until, safely=parts.scheme == "https")
    late = threading.Timer(until - time.monotonic(), _shut, (sock,))
    late.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.default_port = usual  # the header Host has others only
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        yield connection.getresponse()
    finally:
        late.cancel()
        sock.close()
    if time.monotonic() >= until:  # a file without a length may have been cut short
        raise TimeoutError


def _connected(host: str, port: int, until: float, *, safely: bool) -> socket.socket:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.create_connection((public_address(host, port), port), timeout=left)
    if not safely:
        return sock
    context = ssl.create_default_context()
    return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


def public_address(host: str, port: int) -> str:
    """An address of a host of which all are public.

    Raises:
        FetchError: One is not.
        OSError: The host does not exist.
    """
    found = [str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(address):
            raise FetchError("its host is not on the public internet")
    return found[0]


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address is inside


def is_public(address: str) -> bool:
    """Whether an address is one of the internet, and of one machine."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _TRANSLATED:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS's own would take the reader's state

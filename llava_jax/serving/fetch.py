"""Fetches a file from an http or https URL of a client; allows only public IP addresses.

If the server fetched any URL, clients could read data from the server's machine, from its private
network and from the metadata service of its cloud. Therefore the addresses of a host are looked up
once, all addresses must be public, and the connection uses an address that was checked. The URLs of
redirects are checked in the same way.
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
    """Raised if a file cannot be fetched; the message says why."""


def fetch(url: str, *, most_bytes: int, seconds: float) -> bytes:
    """Returns the contents of the file at a URL.

    Args:
        url: URL with the scheme http or https.
        most_bytes: Largest size of the file in bytes.
        seconds: Longest time in seconds, including redirects.

    Raises:
        FetchError: The host is not public, the file does not exist, is too large or arrives too
            slowly, or the connection fails.
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
                raise FetchError(f"the download took more than {seconds:g} s") from error
            raise FetchError(str(error) or type(error).__name__) from error
    raise FetchError(f"the URL was redirected more than {MAX_REDIRECTS} times")


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    """Reads a file; raises an error if the file is missing, too large or incomplete."""
    if response.status != 200:
        raise FetchError(f"the host answered with HTTP status {response.status}")
    data = response.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise FetchError(f"the file has more than {most_bytes:,} bytes, which is the limit")
    if response.length:
        raise OSError("the connection ended before the file was complete")
    return data


@contextlib.contextmanager
def _opened(url: str, until: float) -> Iterator[http.client.HTTPResponse]:
    """Yields the response for a URL; a timer ends the connection at the time `until`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("the URL must start with http:// or https:// and contain a host name")
    usual = 443 if parts.scheme == "https" else 80
    port = parts.port or usual
    sock = _connected(parts.hostname, port, until, safely=parts.scheme == "https")
    late = threading.Timer(until - time.monotonic(), _shut, (sock,))
    late.start()
    try:
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.default_port = usual  # http.client omits this port from the Host header
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*"})
        yield connection.getresponse()
    finally:
        late.cancel()
        sock.close()
    if time.monotonic() >= until:  # without a Content-Length, a truncated file looks complete
        raise TimeoutError


def _connected(host: str, port: int, until: float, *, safely: bool) -> socket.socket:
    """Connects to a public host, with TLS if `safely`; the caller must do the TLS handshake."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock = socket.create_connection((public_address(host, port), port), timeout=left)
    if not safely:
        return sock
    context = ssl.create_default_context()
    return context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)


def public_address(host: str, port: int) -> str:
    """Returns an IP address of a host, after checking that all its addresses are public.

    Raises:
        FetchError: An address of the host is not public.
        OSError: The host does not exist.
    """
    found = [str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not is_public(address):
            raise FetchError("the host has an IP address that is not public")
    return found[0]


# IPv6 addresses that contain an IPv4 address (RFC 6052).
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Returns True if `address` is a public unicast IP address."""
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
        # `SSLSocket.shutdown` would also remove the TLS state, which another thread still reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)

"""Refuses requests that other websites cause, and requests without the API key.

A web page of another site can make a user's browser send requests to this server. Such a request
has the origin of that page in its Origin header. In a DNS rebinding attack, the host name of the
page resolves to this machine, and the request has that host name in its Host header. Requests with
a foreign Origin header or a foreign Host header are refused before their bodies are read.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_jax.serving.limits import RequestError, refusal

OPEN_PATHS = ("/health", "/manifest.json", "/favicon.ico")
"""Paths that need no API key, because monitors and browsers request them without a key. The
responses contain only the name of the server and whether the server works."""


def guard_access(
    app: FastAPI, *, host: str, api_key: str | None = None, origins: Sequence[str] = ()
) -> None:
    """Adds the access checks to an application as middleware.

    Args:
        app: Application to protect.
        host: Host name or IP address on which the server listens. Host headers may contain it.
        api_key: Key that clients must send; None if no key is required.
        origins: Origins of other websites whose pages may use the server, for example
            "https://chat.example.org". Host headers may also contain the host names of these
            origins.
    """
    # Middleware that is added later runs earlier. CORS must run before the check of the key,
    # because browsers send CORS preflight requests without a key.
    if api_key is not None:
        app.add_middleware(KeyCheck, api_key=api_key)
    if origins:
        headers = ["Authorization", "Content-Type"]
        methods = ["GET", "POST"]
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers
        )
    names = {host.lower(), socket.gethostname().lower(), "localhost"}
    names |= {urlsplit(origin).hostname or "" for origin in origins}
    app.add_middleware(OriginCheck, names=frozenset(names), origins=frozenset(origins))


class OriginCheck:
    """Middleware that refuses requests with a foreign Host or Origin header.

    Args:
        app: Application that gets the accepted requests.
        names: Accepted host names. IP addresses are always accepted, because a DNS rebinding attack
            needs a host name.
        origins: Accepted origins of other websites.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], origins: frozenset[str]):
        self._app, self._names, self._origins = app, names, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the application, or responds with status 403."""
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope))
        except RequestError as error:
            await refusal(error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise RequestError(
                f"the Host header {', '.join(hosts)[:100]!r} is not a name of this server; to "
                "accept this host, start the server with --allow-origin and the host's origin, "
                "for example --allow-origin https://chat.example.org",
                status=403,
            )
        for origin in headers.getlist("origin"):
            if origin not in self._origins and _authority(origin) != hosts[0]:
                raise RequestError(
                    f"web pages of the origin {origin[:100]!r} may not use this server; to allow "
                    "them, start the server with --allow-origin and this origin",
                    status=403,
                )

    def _is_ours(self, host: str) -> bool:
        """Returns True if a Host header contains an accepted host name or an IP address."""
        try:
            name = urlsplit(f"//{host}").hostname
            if name is None or _authority(f"http://{host}") != host:
                return False
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _authority(origin: str) -> str | None:
    """Returns the host and port of an origin, as in a Host header; None for an invalid origin."""
    scheme, separator, authority = origin.lower().partition("://")
    if scheme not in ("http", "https") or not separator or set(authority) & set("/?#@\\"):
        return None
    return authority


class KeyCheck:
    """Middleware that requires the API key as a bearer token, or as a password (HTTP Basic).

    Args:
        app: Application that gets the accepted requests.
        api_key: Key that clients must send.
    """

    def __init__(self, app: ASGIApp, api_key: str):
        self._app, self._digest = app, _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to the application, or responds with status 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        text = "the API key is missing or wrong; send the header `Authorization: Bearer KEY`"
        response = refusal(RequestError(text, status=401, code="invalid_api_key"))
        scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="llava_jax"'
        response.headers["WWW-Authenticate"] = scheme
        await response(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        """Returns True if the request contains the correct API key."""
        given = Headers(scope=scope).getlist("authorization")
        if len(given) != 1:
            return False
        scheme, _, value = given[0].partition(" ")
        key = value.encode("latin-1").strip(b" \t")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        # Digests have equal lengths, so the time of the comparison reveals nothing about the key.
        return hmac.compare_digest(_digest(key), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""Refuses requests that foreign web pages cause, and requests without the API key.

Any web page that a user visits can make the browser send requests to this server. Such a request
has the origin of that page in its Origin header. If the host name of that page was made to resolve
to this machine (DNS rebinding), the request has a foreign Host header. Both kinds are refused
before anything else is read.
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
"""Paths that need no key, because monitors and browsers request them without a key. Their responses
tell only whether the server works, and its name."""


def guard_access(
    app: FastAPI, *, host: str, api_key: str | None = None, origins: Sequence[str] = ()
) -> None:
    """Adds the access checks to an application as middleware.

    Args:
        app: Application to protect.
        host: Host name or IP address that the server listens on; accepted in Host headers.
        api_key: Key that clients must send; None if no key is required.
        origins: Origins of other web pages that may use the server, for example
            "https://chat.example.org". Their host names are accepted in Host headers too.
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
        names: Accepted host names. IP addresses are always accepted, because DNS rebinding needs a
            host name.
        origins: Foreign origins that are accepted.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], origins: frozenset[str]):
        self._app, self._names, self._origins = app, names, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or responds with status 403."""
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
                f"Host {', '.join(hosts)[:100]!r} is not a name of this server; to accept it, "
                "start the server with --allow-origin and the origin of this host",
                status=403,
            )
        for origin in headers.getlist("origin"):
            if origin not in self._origins and _authority(origin) != hosts[0]:
                raise RequestError(
                    f"pages of {origin[:100]!r} may not use this server; to allow them, "
                    "start the server with --allow-origin",
                    status=403,
                )

    def _is_ours(self, host: str) -> bool:
        """Returns True if a Host header has an accepted name or an IP address."""
        try:
            name = urlsplit(f"//{host}").hostname
            if name is None or _authority(f"http://{host}") != host:
                return False
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _authority(origin: str) -> str | None:
    """Returns the host and port of an origin as in a Host header; None if it is not an origin."""
    scheme, separator, authority = origin.lower().partition("://")
    if scheme not in ("http", "https") or not separator or set(authority) & set("/?#@\\"):
        return None
    return authority


class KeyCheck:
    """Middleware that requires the API key, as a bearer token or as a Basic password.

    Args:
        app: Application that gets the accepted requests.
        api_key: Key that clients must send.
    """

    def __init__(self, app: ASGIApp, api_key: str):
        self._app, self._digest = app, _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or responds with status 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        text = "this server requires its API key; send it as `Authorization: Bearer KEY`"
        response = refusal(RequestError(text, status=401, code="invalid_api_key"))
        scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="llava_jax"'
        response.headers["WWW-Authenticate"] = scheme
        await response(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        """Returns True if the request has the right key."""
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

"""Who may ask: the server's own page, clients that are no browsers, and whom an option lets in.

A browser sends requests for any page that its user visits. Such a request carries that page's
origin, or, if the page's name was made to point at this machine (DNS rebinding), a foreign Host.
Both are refused before anything else is looked at.
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
"""Paths that need no key: monitors and browsers ask for them without one, and they tell whether the
server is well, and its name."""


def guard_access(
    app: FastAPI, *, host: str, api_key: str | None = None, origins: Sequence[str] = ()
) -> None:
    """Puts the checks in front of an application.

    Args:
        app: The application.
        host: Where it listens; a name among the names that it answers to.
        api_key: What clients must know; None lets all ask.
        origins: Origins of other pages that browsers may ask for, as "https://chat.example.org".
    """
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
    """Middleware that refuses a foreign Host or Origin.

    Args:
        app: The application behind it.
        names: Host names of this server. An address is one too: no page of another's has it.
        origins: Foreign origins that may ask.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str], origins: frozenset[str]):
        self._app, self._names, self._origins = app, names, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 403."""
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
                f"Host {', '.join(hosts)[:100]!r} is not a name of this server; if it should be, "
                "start it with --allow-origin and that address",
                status=403,
            )
        for origin in headers.getlist("origin"):
            if origin not in self._origins and _authority(origin) != hosts[0]:
                raise RequestError(
                    f"pages of {origin[:100]!r} may not ask this server; --allow-origin lets them",
                    status=403,
                )

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
            if name is None or _authority(f"http://{host}") != host:
                return False
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _authority(origin: str) -> str | None:
    """The host and port of an origin, as a Host header has them; None if it is no origin."""
    scheme, separator, authority = origin.lower().partition("://")
    if scheme not in ("http", "https") or not separator or set(authority) & set("/?#@\\"):
        return None
    return authority


class KeyCheck:
    """Middleware that asks for the key, as a bearer token or as the password of a browser's prompt.

    Args:
        app: The application behind it.
        api_key: The key.
    """

    def __init__(self, app: ASGIApp, api_key: str):
        self._app, self._digest = app, _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        text = "this server asks for its API key, as `Authorization: Bearer KEY`"
        response = refusal(RequestError(text, status=401, code="invalid_api_key"))
        scheme = "Bearer" if scope["path"].startswith("/v1/") else 'Basic realm="llava_jax"'
        response.headers["WWW-Authenticate"] = scheme
        await response(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
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
        # Digests have one length, so the time of the comparison tells nothing of the key.
        return hmac.compare_digest(_digest(key), self._digest)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

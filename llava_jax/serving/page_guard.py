"""Passes a request to Gradio only if the web page makes such requests.

Gradio has about seventy routes, and some routes read any file or URL that a client names. Therefore
only the few kinds of requests that the page makes are passed to Gradio. An event of the page is not
passed unchanged: a new event is built from the values of the event, after their types were checked.
An event is refused if it contains an image that is not in `Uploads`.
"""

import json
import mimetypes
import re
from typing import Annotated, Any
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_jax.disk import Json
from llava_jax.serving.bodies import Bodies, client_of, with_body
from llava_jax.serving.limits import RequestError
from llava_jax.serving.schema import parse_json
from llava_jax.serving.uploads import Uploads

_EVENTS = "/gradio_api/queue/join"
_CANCEL = "/gradio_api/cancel"
_SESSION = "[a-z0-9]{1,32}"

_STATIC = re.compile(r"/(|config|theme\.css|manifest\.json|favicon\.ico|(static|assets)/.+)")
_STREAMS = re.compile(rf"/gradio_api/(queue/data|heartbeat/{_SESSION})")

MAX_STREAMS = 512
"""Largest number of connections over which events are sent; an open page has one or two."""
MAX_SESSIONS = 128
"""Largest number of sessions (open pages) whose conversations are kept. If there are more sessions,
the oldest conversation is dropped."""
MAX_EVENTS = 4
"""Largest number of events of a session that are unfinished, or whose results were not read yet."""
MAX_TEXT = 16_000
"""Largest number of characters of a question."""


class _File(BaseModel):
    path: str


class _Question(BaseModel):
    text: str = Field(max_length=MAX_TEXT)
    files: list[_File] = Field(max_length=256)


_Value = Annotated[_Question | bool | float | None, Field(union_mode="left_to_right")]


class _Event(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    fn_index: int
    session_hash: str = Field(pattern=f"^{_SESSION}$")
    trigger_id: int | None = None
    data: list[_Value] = Field(max_length=16)


class _Cancel(BaseModel):
    fn_index: int
    session_hash: str = Field(pattern=f"^{_SESSION}$")
    event_id: str = Field(pattern="^[0-9a-f]{32}$")


class PageGuard:
    """ASGI application that passes only the requests of the page to Gradio.

    Args:
        app: Gradio's application.
        bodies: Reader of request bodies. When the server shuts down, the reader also reports to
            Gradio that all clients have disconnected. Otherwise an open page would keep its
            connection.
        uploads: Images that events may contain.
        blocks: The page, a `gradio.Blocks`.
    """

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
    """Content-Security-Policy of all responses."""

    def __init__(
        self,
        app: ASGIApp,
        bodies: Bodies,
        uploads: Uploads,
        blocks: Any,
    ):
        self._app, self._bodies, self._uploads = app, bodies, uploads
        self._inputs = {i: function.inputs for i, function in blocks.fns.items() if function.fn}
        # By session: messages that the page has not read yet, and events that are unfinished.
        self._messages = blocks._queue.pending_messages_per_session
        self._events = blocks._queue.pending_event_ids_session
        self._messages.max_size = MAX_SESSIONS
        blocks.state_session_capacity = MAX_SESSIONS
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request to Gradio.

        Raises:
            RequestError: The page does not make requests of this kind, or a limit is exceeded.
        """
        if scope["type"] != "http":
            raise RequestError("this server does not support WebSockets", status=404)
        path, method = scope["path"], scope["method"]
        send = self._with_policy(send)
        if method in ("GET", "HEAD") and _STATIC.fullmatch(path):
            # A query string would select a deep link or a theme, and the page has neither.
            await self._app({**scope, "query_string": b""}, receive, send)
        elif method == "GET" and _STREAMS.fullmatch(path):
            await self._stream(scope, receive, send)
        elif method == "POST" and path in (_EVENTS, _CANCEL):
            with self._bodies.hold(client_of(scope)) as held:
                sent = await held.read(Headers(scope=scope), receive)
                event = self._event(sent) if path == _EVENTS else _cancel(sent)
            body = json.dumps(event).encode()
            headers = [pair for pair in scope["headers"] if pair[0] not in _REPLACED]
            headers += [(b"content-type", b"application/json"), (b"content-length", _size(body))]
            scope = {**scope, "headers": headers, "query_string": b""}
            await self._app(scope, with_body(body, self._bodies.leaving_at_end(receive)), send)
        else:
            raise RequestError(f"{method} {path[:100]}: this server has no such route", status=404)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on a request to which Gradio responds with events while the page is open."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session_hash", [""])[-1]
        if scope["path"].endswith("/data") and session not in self._messages:
            text = "session_hash: the server has no events for this session; reload the page"
            raise RequestError(text, status=404)
        if self._streams >= MAX_STREAMS:
            text = "too many web pages of this server are open; try again in a minute"
            raise RequestError(text, status=429, retry_after=60)
        scope = {**scope, "query_string": f"session_hash={session}".encode()}
        self._streams += 1
        try:
            await self._app(scope, self._bodies.leaving_at_end(receive), send)
        finally:
            self._streams -= 1

    def _event(self, body: bytearray) -> Json:
        """Parses an event of the page; returns a new event that has only checked values."""
        event = parse_json(_Event, body)
        self._make_room(event.session_hash)
        inputs = self._inputs.get(event.fn_index)
        if inputs is None or len(inputs) != len(event.data):
            raise RequestError(
                f"fn_index: the page has no event {event.fn_index} with {len(event.data)} values; "
                "reload the page"
            )
        data = [
            self._value(component, value)
            for component, value in zip(inputs, event.data, strict=True)
        ]
        return event.model_dump() | {"data": data}

    def _make_room(self, session: str) -> None:
        """Drops the events of closed sessions; raises RequestError if this session has too many."""
        for name in self._events.keys() - self._messages.keys():
            del self._events[name]
        if len(self._events.get(session, ())) >= MAX_EVENTS:
            text = "your previous questions are still being answered; try again later"
            raise RequestError(text, status=429, retry_after=5)

    def _value(self, component: Any, value: _Question | bool | float | None) -> object:
        """Checks the value of a component, and returns the value in the form that browsers send."""
        kind = component.get_block_name()
        if kind == "state":
            return None  # Gradio keeps the value of a state on the server
        if kind == "checkbox" and isinstance(value, bool):
            return value
        if kind == "slider" and isinstance(value, float):
            return min(max(value, component.minimum), component.maximum)
        if kind == "multimodaltextbox" and isinstance(value, _Question):
            if len(value.files) > self._uploads.limits.images:
                raise RequestError(
                    f"the question has too many images; a conversation may have at most "
                    f"{self._uploads.limits.images}"
                )
            return {"text": value.text, "files": [self._file(file.path) for file in value.files]}
        raise RequestError(f"data: the value of a {kind} has the wrong type; reload the page")

    def _file(self, name: str) -> Json:
        path = self._uploads.path(name)
        kind = mimetypes.guess_type(path)[0]
        meta = {"_type": "gradio.FileData"}
        return {"path": str(path), "orig_name": path.name, "mime_type": kind, "meta": meta}

    def _with_policy(self, send: Send) -> Send:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", self.POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        return send_on


_REPLACED = (b"content-type", b"content-length", b"transfer-encoding")


def _size(body: bytes) -> bytes:
    return str(len(body)).encode()


def _cancel(body: bytearray) -> Json:
    return parse_json(_Cancel, body).model_dump()

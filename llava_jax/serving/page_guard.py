"""What a browser may ask of Gradio, which is far more than the page needs.

Gradio serves some seventy routes, and reads files and URLs that a client names. So a request comes
to it only if it is one of the few that the page makes, and an event is not passed on but built
anew, from values whose types are checked. An image in it is a name of `Uploads`, or the event is
refused.
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
"""Connections over which the server sends events to pages; a page has up to two."""
MAX_SESSIONS = 128
"""Browsers whose conversations are kept; of more, the oldest conversation is forgotten."""
MAX_EVENTS = 4
"""Of a session, that are not over or whose outcome it has not read."""
MAX_TEXT = 16_000
"""Characters of a question."""


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
    """The page's application, with Gradio behind it: only what the page needs is passed on.

    Args:
        app: Gradio's application.
        bodies: Reads the bodies of requests. When the server is to end, all clients have left, to
            Gradio: a page keeps a connection open for as long as it is shown.
        uploads: Images that events may name.
        blocks: Gradio's page.
    """

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

    def __init__(
        self,
        app: ASGIApp,
        bodies: Bodies,
        uploads: Uploads,
        blocks: Any,
    ):
        self._app, self._bodies, self._uploads = app, bodies, uploads
        self._inputs = {i: function.inputs for i, function in blocks.fns.items() if function.fn}
        # Messages that a session has not read yet, and its events that are not over.
        self._messages = blocks._queue.pending_messages_per_session
        self._events = blocks._queue.pending_event_ids_session
        self._messages.max_size = MAX_SESSIONS
        blocks.state_session_capacity = MAX_SESSIONS
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers.

        Raises:
            RequestError: The page makes no request like this.
        """
        if scope["type"] != "http":
            raise RequestError("this server has no websockets", status=404)
        path, method = scope["path"], scope["method"]
        send = self._with_policy(send)
        if method in ("GET", "HEAD") and _STATIC.fullmatch(path):
            # Deep links and themes are chosen in the query; the page has none of these.
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
            raise RequestError(f"{method} {path[:100]}: this server has no such thing", status=404)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A connection over which the server tells of events, for as long as a page is shown."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session_hash", [""])[-1]
        if scope["path"].endswith("/data") and session not in self._messages:
            raise RequestError("session_hash: this session has no events", status=404)
        if self._streams >= MAX_STREAMS:
            raise RequestError("as many pages are open as may be", status=429, retry_after=60)
        scope = {**scope, "query_string": f"session_hash={session}".encode()}
        self._streams += 1
        try:
            await self._app(scope, self._bodies.leaving_at_end(receive), send)
        finally:
            self._streams -= 1

    def _event(self, body: bytearray) -> Json:
        """An event of the page, made of nothing but checked values."""
        event = parse_json(_Event, body)
        self._make_room(event.session_hash)
        inputs = self._inputs.get(event.fn_index)
        if inputs is None or len(inputs) != len(event.data):
            raise RequestError(f"fn_index: the page has no event {event.fn_index} of this form")
        data = [
            self._value(component, value)
            for component, value in zip(inputs, event.data, strict=True)
        ]
        return event.model_dump() | {"data": data}

    def _make_room(self, session: str) -> None:
        """Forgets sessions that are gone; refuses one that does not read what it asked for."""
        for name in self._events.keys() - self._messages.keys():
            del self._events[name]
        if len(self._events.get(session, ())) >= MAX_EVENTS:
            raise RequestError("the last questions are not answered yet", status=429, retry_after=5)

    def _value(self, component: Any, value: _Question | bool | float | None) -> object:
        """A component's value, as Gradio takes it from a browser."""
        kind = component.get_block_name()
        if kind == "state":
            return None  # it is kept here
        if kind == "checkbox" and isinstance(value, bool):
            return value
        if kind == "slider" and isinstance(value, float):
            return min(max(value, component.minimum), component.maximum)
        if kind == "multimodaltextbox" and isinstance(value, _Question):
            if len(value.files) > self._uploads.limits.images:
                raise RequestError(
                    f"a conversation has at most {self._uploads.limits.images} images"
                )
            return {"text": value.text, "files": [self._file(file.path) for file in value.files]}
        raise RequestError(f"data: {kind} takes another type of value")

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

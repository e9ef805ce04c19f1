"""Builds the HTTP application: chat completions of OpenAI's API, models, health and metrics."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from llava_jax.disk import Json
from llava_jax.generation.answer import Answer
from llava_jax.serving.bodies import CLIENT_IS_GONE, Body, client_of, media_type
from llava_jax.serving.limits import RequestError, refusal
from llava_jax.serving.prometheus import CONTENT_TYPE
from llava_jax.serving.schema import ChatRequest, parse_request
from llava_jax.serving.service import Service, Ticket

_Result = TypeVar("_Result")


METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
READ_SECONDS = 30.0
"""Seconds that a client may take to read an answer, in addition to `Limits.seconds`."""


def make_app(service: Service) -> FastAPI:
    """Returns the HTTP application, which also starts and stops the service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        await service.images.start()
        yield
        await service.images.stop()
        await asyncio.to_thread(service.stop)

    # FastAPI's documentation pages would load scripts from other servers.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())

    def card(name: str) -> Json:
        return {"id": name, "object": "model", "created": started, "owned_by": "llava_jax"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return ChatResponse(service, request)

    @app.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.assistant(name)
        return JSONResponse(card(name))

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        if service.engine.failure:  # the log says why
            return JSONResponse({"status": "failed; the server must be restarted"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    @app.api_route("/v1/{path:path}", methods=METHODS)
    async def nothing(request: Request) -> Response:
        text = f"{request.method} {request.url.path[:100]}: this server has no such route"
        raise RequestError(text, status=404)

    @app.exception_handler(RequestError)
    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refusal(error)

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> Response:
        text = "an internal error occurred; the log of the server shows the error"
        return refusal(RequestError(text, status=500))

    return app


class ChatResponse(Response):
    """Response to a chat request; reads the request body, generates the answer and sends it.

    Args:
        service: Service that generates the answer.
        request: Request for a chat completion.
    """

    def __init__(self, service: Service, request: Request):
        super().__init__()
        self._service, self._request = service, request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads the request and sends the answer, or sends an error."""
        reply = Reply(send)
        client = client_of(scope)
        try:
            self._check_type()
            with self._service.bodies.hold(client) as body:
                await body.read(self._request.headers, receive)
                with self._service.enter(client) as ticket:
                    await unless_gone(receive, self._read_in_time(ticket, body, reply))
        except RequestError as error:
            if error.status == CLIENT_IS_GONE:
                return
            if reply.has_begun:
                await reply.event(error.body)
                await reply.end()
            else:
                await refusal(error)(scope, receive, send)

    async def _read_in_time(self, ticket: Ticket, body: Body, reply: "Reply") -> None:
        """Answers a request; raises RequestError if the client reads the answer too slowly."""
        try:
            async with asyncio.timeout(self._service.limits.seconds + READ_SECONDS):
                await self._answer(ticket, body, reply)
        except TimeoutError:
            text = "the client reads the answer too slowly"
            raise RequestError(text, status=CLIENT_IS_GONE) from None

    def _check_type(self) -> None:
        kind = media_type(self._request.headers)
        # A page of another site can make a browser send other media types without a CORS preflight
        # request.
        if kind != "application/json":
            text = f"the Content-Type header is {kind[:50]!r}; it must be application/json"
            raise RequestError(text, status=415)

    async def _answer(self, ticket: Ticket, body: Body, reply: "Reply") -> None:
        request = await ticket.read(partial(parse_request, body.data))
        answer = await ticket.begin(
            request.model,
            request.messages,
            self._service.images.fetch,
            new_tokens=request.new_tokens,
            sampling=request.sampling(),
            stop=request.stops,
            continues=bool(request.continue_final_message),
            wants_scores=bool(request.logprobs),
        )
        body.release()
        if request.stream:
            await self._stream(ticket, request, answer, reply)
            return
        async for _ in ticket.updates():
            pass
        whole = answer.reply
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        logprobs = await ticket.read(partial(self._logprobs, request, answer, 0, answer.shown))
        choice = {"index": 0, "message": message, "logprobs": logprobs}
        named = _naming(request, "chat.completion")
        choices = [choice | {"finish_reason": whole.ending}]
        await reply.whole(named | {"choices": choices, "usage": _usage(answer)})

    def _logprobs(self, request: ChatRequest, answer: Answer, begin: int, end: int) -> Json | None:
        """Returns the field `logprobs` for the tokens from `begin` to `end` of an answer."""
        scores = answer.request.scores
        if scores is None:
            return None
        writer = self._service.token_writer(request.model)
        tokens, count = answer.request.tokens[begin:end], request.top_logprobs or 0
        return {"content": writer.content(tokens, scores[begin:end], count), "refusal": None}

    async def _stream(
        self, ticket: Ticket, request: ChatRequest, answer: Answer, reply: "Reply"
    ) -> None:
        """Sends the answer as server-sent events, with one chunk for each update that adds text."""
        wants_usage = request.stream_options is not None and request.stream_options.include_usage
        named = _naming(request, "chat.completion.chunk")
        no_usage = {"usage": None} if wants_usage else {}

        async def chunk(
            delta: dict[str, str], ending: str | None = None, logprobs: Json | None = None
        ) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": ending}
            await reply.event(named | {"choices": [choice]} | no_usage)

        await chunk({"role": "assistant", "content": ""})
        sent = shown = 0
        async for update in ticket.updates():
            text = update.text.rstrip()  # a complete answer has no spaces at its end
            if len(text) > sent:
                logprobs = self._logprobs(request, answer, shown, update.shown)
                await chunk({"content": text[sent:]}, logprobs=logprobs)
                sent, shown = len(text), max(shown, update.shown)
            if update.ending:
                rest = answer.request.scores is not None and shown < update.shown
                logprobs = self._logprobs(request, answer, shown, update.shown) if rest else None
                await chunk({}, update.ending, logprobs)
        if wants_usage:
            await reply.event(named | {"choices": [], "usage": _usage(answer)})
        await reply.end(b"data: [DONE]\n\n")


class Reply:
    """Sends a response: one JSON object, or server-sent events.

    Args:
        send: ASGI send function.

    Attributes:
        has_begun: Whether the status and the headers have been sent.
    """

    def __init__(self, send: Send):
        self._send = send
        self.has_begun = False

    async def whole(self, value: Json) -> None:
        """Sends a JSON object as the whole response."""
        body = json.dumps(value).encode()
        await self._begin("application/json", [(b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def event(self, value: Json) -> None:
        """Sends a JSON object as a server-sent event."""
        if not self.has_begun:
            await self._begin("text/event-stream; charset=utf-8", _NO_BUFFERS)
        body = b"data: " + json.dumps(value).encode() + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """Sends the last bytes of the body and ends the response."""
        await self._send({"type": "http.response.body", "body": body})

    async def _begin(self, kind: str, more: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", kind.encode()), *more]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        await self._send(start)
        self.has_begun = True


_NO_BUFFERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


async def unless_gone(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """Awaits `work` and returns its result; cancels `work` if the client disconnects.

    Args:
        receive: ASGI receive function of the request, whose body must have been read.
        work: Awaitable that computes the result.

    Raises:
        RequestError: The client disconnected.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestError("the client disconnected", status=CLIENT_IS_GONE)
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _naming(request: ChatRequest, kind: str) -> Json:
    name = f"chatcmpl-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": request.model}


def _usage(answer: Answer) -> dict[str, int]:
    whole = answer.reply
    return {
        "prompt_tokens": whole.prompt_tokens,
        "completion_tokens": whole.new_tokens,
        "total_tokens": whole.prompt_tokens + whole.new_tokens,
    }

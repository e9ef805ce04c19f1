"""The page at `/`: chat with a model, and with its base beside it, by Gradio."""

import asyncio
import dataclasses
import html
import importlib
import os
import random
import tempfile
import traceback
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_jax.config import ConfigError
from llava_jax.sampling import Sampling
from llava_jax.serving.conversation import to_prompt
from llava_jax.serving.images import check_image
from llava_jax.serving.limits import Limits, RequestError
from llava_jax.serving.schema import ImagePart, TextPart
from llava_jax.serving.schema import Message as ChatMessage
from llava_jax.serving.service import Service

USUAL_NEW_TOKENS = 512  # as LLaVA's own page has it
_FRAME_SECONDS = 0.05  # between two states of the page that are sent
_DAY = 24 * 60 * 60

_CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto; }
.chat .bubble-wrap { padding-top: 2.5rem; }
.chat button:is([aria-label="Share"], [aria-label="Clear"]),
.chat .icon-button-wrapper:has([aria-label="Share"], [aria-label="Clear"]) { display: none; }
.chat { height: calc(100dvh - 20rem) !important; min-height: 16rem; }
@media (max-width: 700px) { .two .chat { height: 40dvh !important; } }
"""


@dataclasses.dataclass
class Exchange:
    """A question and what became of it, by the names of the models that were asked.

    Attributes:
        text: The question.
        images: Files.
        answers: As far as they have come.
        errors: Why there is none, or no more of one.
    """

    text: str
    images: tuple[str, ...]
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    def shown(self, name: str) -> str:
        """What the page shows as a model's answer."""
        error = f"[{self.errors[name]}]" if name in self.errors else ""
        return " ".join(filter(None, (self.answers[name], error))) or "…"


def load_gradio() -> Any:
    """Gradio, which takes seconds, told to send nothing home.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return importlib.import_module("gradio")


def add_page(app: FastAPI, service: Service, ending: asyncio.Event) -> None:
    """Puts the page on an application, behind all that it has so far. As `load_gradio`.

    Args:
        app: The application.
        service: That answers.
        ending: See `PageGuard`.
    """
    gr = load_gradio()
    fonts = importlib.import_module("gradio.themes.utils.fonts")
    system = [fonts.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [fonts.Font(name) for name in ("ui-monospace", "monospace")]
    folder = tempfile.TemporaryDirectory(prefix="llava_jax-")
    app.state.uploads = folder  # removed with the application
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    app.add_middleware(PageGuard, ending=ending)
    gr.mount_gradio_app(
        app,
        _Page(gr, service, Path(folder.name)).blocks(),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        max_file_size=service.limits.image_bytes,
        theme=gr.themes.Soft(primary_hue="blue", font=system, font_mono=mono),
        css=_CSS,
    )


class PageGuard:
    """Around the page: browsers load nothing from elsewhere, and hold up no end of the server.

    Args:
        app: What is guarded.
        ending: Set when the server is to end: to the application, all clients have then left. A
            page keeps a connection open for as long as it is shown.
    """

    POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"

    def __init__(self, app: ASGIApp, ending: asyncio.Event):
        self._app, self._ending = app, ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers."""
        if scope["type"] != "http" or not scope["path"].startswith("/gradio_api/"):
            await self._app(scope, receive, self._with_policy(send))
            return

        async def receive_on() -> Message:
            received = asyncio.ensure_future(receive())
            ending = asyncio.ensure_future(self._ending.wait())
            try:
                await asyncio.wait((received, ending), return_when=asyncio.FIRST_COMPLETED)
                return received.result() if received.done() else {"type": "http.disconnect"}
            finally:
                received.cancel()
                ending.cancel()

        await self._app(scope, receive_on, self._with_policy(send))

    def _with_policy(self, send: Send) -> Send:
        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", self.POLICY.encode())
                message["headers"] = [*message.get("headers", ()), policy]
            await send(message)

        return send_on


class _Page:
    """What is on it, and what happens.

    Args:
        gr: Gradio.
        service: That answers.
        folder: Where uploaded images are.
    """

    def __init__(self, gr: Any, service: Service, folder: Path):
        self._gr, self._service, self._folder = gr, service, folder
        self._names = service.names

    def blocks(self) -> Any:
        """The page."""
        gr, names = self._gr, self._names
        with gr.Blocks(title=names[0], delete_cache=(_DAY // 24, _DAY)) as page:
            # State stays here: a Chatbot as an input would take whatever a client says it holds.
            exchanges = gr.State([], time_to_live=_DAY)
            with gr.Row(elem_classes="two" if len(names) > 1 else None):
                columns, chats = zip(*[self._chat(name) for name in names], strict=True)
            box = gr.MultimodalTextbox(
                placeholder="Ask something; paste or upload an image",
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                show_label=False,
                autofocus=True,
                elem_id="question",
            )
            with gr.Row():
                regenerate = gr.Button("Regenerate", size="sm", elem_id="regenerate")
                clear = gr.Button("Clear", size="sm", elem_id="clear")
            compare = gr.Checkbox(
                len(names) > 1,
                label=f"Compare with {names[-1]}",
                visible=len(names) > 1,
                elem_id="compare",
            )
            settings = self._settings()
            outputs = [box, exchanges, *chats]
            inputs = [exchanges, compare, *settings]
            submit = box.submit(self._ask, [box, *inputs], outputs, **_UNQUEUED)
            again = regenerate.click(
                self._regenerate, inputs, outputs, cancels=[submit], **_UNQUEUED
            )
            asked = [submit, again]
            box.stop(self._ready, None, box, cancels=asked)
            clear.click(self._clear, None, outputs, cancels=asked)
            show = lambda on: [gr.Column(visible=on or i == 0) for i in range(len(names))]
            compare.change(show, compare, list(columns))
        return page

    def _chat(self, name: str) -> tuple[Any, Any]:
        gr = self._gr
        with gr.Column(min_width=300) as column:
            chat = gr.Chatbot(
                label=name,
                render_markdown=False,  # what is typed and answered is text
                elem_classes="chat",
                buttons=[],
                allow_file_downloads=False,
                feedback_options=None,
            )
        return column, chat

    def _settings(self) -> list[Any]:
        gr = self._gr
        most = self._service.limits.new_tokens
        with gr.Accordion("Settings", open=False), gr.Row():
            return [
                gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest words"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all words"),
                gr.Slider(
                    1,
                    most,
                    min(USUAL_NEW_TOKENS, most),
                    step=1,
                    label="Max new tokens",
                    info="of an answer",
                ),
            ]

    async def _ask(
        self, asked: dict[str, Any], exchanges: list[Exchange], compare: bool, *settings: float
    ) -> AsyncIterator[list[Any]]:
        text, images = (asked.get("text") or "").strip(), tuple(asked.get("files") or ())
        if text or images:
            exchanges = [*exchanges, Exchange(text, images)]
            async for state in self._answer(exchanges, compare, settings):
                yield state

    async def _regenerate(
        self, exchanges: list[Exchange], compare: bool, *settings: float
    ) -> AsyncIterator[list[Any]]:
        if exchanges:
            *before, last = exchanges
            exchanges = [*before, Exchange(last.text, last.images)]
            async for state in self._answer(exchanges, compare, settings):
                yield state

    async def _answer(
        self, exchanges: list[Exchange], compare: bool, settings: Sequence[float]
    ) -> AsyncIterator[list[Any]]:
        """States of the page while the last question is answered."""
        names = self._names if compare else self._names[:1]
        tasks = [asyncio.ensure_future(self._follow(name, exchanges, *settings)) for name in names]
        busy = self._gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        try:
            pending = set(tasks)
            while pending:
                yield [busy, exchanges, *self._shown(exchanges)]
                busy = self._gr.skip()
                _, pending = await asyncio.wait(pending, timeout=_FRAME_SECONDS)
            yield [self._ready(), exchanges, *self._shown(exchanges)]
        finally:
            for task in tasks:
                task.cancel()

    async def _follow(
        self,
        name: str,
        exchanges: list[Exchange],
        temperature: float,
        top_p: float,
        new_tokens: float,
    ) -> None:
        """Keeps a model's answer to the last question in it as it comes."""
        last, limits = exchanges[-1], self._service.limits
        messages = self._messages(name, exchanges)
        last.answers[name] = ""
        try:
            with self._service.enter() as ticket:
                await ticket.begin(
                    name,
                    lambda assistant: to_prompt(
                        messages,
                        limits,
                        max_length=assistant.max_length,
                        read=partial(_read_upload, self._folder),
                    ),
                    new_tokens=max(1, int(new_tokens)),
                    sampling=Sampling(temperature, top_p=top_p, seed=random.getrandbits(32)),
                )
                async for update in ticket.updates():
                    last.answers[name] = update.text.rstrip()
        except (RequestError, ConfigError) as error:
            last.errors[name] = str(error)
        except Exception:
            traceback.print_exc()
            last.errors[name] = "something went wrong; the server's console says what"

    def _messages(self, name: str, exchanges: list[Exchange]) -> list[ChatMessage]:
        """The conversation as one model had it; where it was not asked, as the first had it.

        Questions that nothing was answered to are left out, but for the last.
        """
        messages = []
        for exchange in exchanges:
            said = exchange.answers.get(name) or exchange.answers.get(self._names[0], "")
            if not said and exchange is not exchanges[-1]:
                continue
            images = [ImagePart(type="image_url", image_url=path) for path in exchange.images]
            text = TextPart(type="text", text=exchange.text)
            messages.append(ChatMessage(role="user", content=[*images, text]))
            messages.append(ChatMessage(role="assistant", content=said))
        return messages[:-1]

    def _shown(self, exchanges: list[Exchange]) -> list[list[dict[str, Any]]]:
        """The messages of every chat."""
        chats = []
        for name in self._names:
            messages = []
            for exchange in exchanges:
                if name not in exchange.answers:
                    continue
                files = [{"path": path} for path in exchange.images]
                text = [_as_text(exchange.text)] if exchange.text else []
                messages += [{"role": "user", "content": part} for part in (*files, *text)]
                messages.append({"role": "assistant", "content": _as_text(exchange.shown(name))})
            chats.append(messages)
        return chats

    def _clear(self) -> list[Any]:
        return [self._ready(), [], *([] for _ in self._names)]

    def _ready(self) -> Any:
        return self._gr.MultimodalTextbox(submit_btn=True, stop_btn=False, interactive=True)


def _as_text(text: str) -> dict[str, str]:
    """A message's content; a chat without Markdown takes HTML still."""
    return {"type": "text", "text": html.escape(text, quote=False)}


# The service has a queue of its own.
_UNQUEUED: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}


def _read_upload(folder: Path, path: str, limits: Limits) -> bytes:
    """An image that was uploaded.

    Raises:
        RequestError: It is gone, or none that may be read.
    """
    place = Path(path).resolve()
    try:
        if not place.is_relative_to(folder.resolve()) or not place.is_file():
            raise OSError
        with place.open("rb") as file:
            data = file.read(limits.image_bytes + 1)
    except OSError:
        raise RequestError(
            "an image of this conversation is gone; clear it, and upload anew"
        ) from None
    check_image(data, limits)
    return data

"""Builds the web page at `/` with Gradio: a chat with a model, and optionally with its base."""

import asyncio
import contextlib
import dataclasses
import html
import importlib
import os
import random
import traceback
from collections.abc import AsyncIterator, Sequence
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from llava_jax.disk import Json
from llava_jax.errors import ConfigError
from llava_jax.generation.sampling import Sampling
from llava_jax.serving.limits import RequestError
from llava_jax.serving.page_guard import PageGuard
from llava_jax.serving.schema import ImagePart, TextPart
from llava_jax.serving.schema import Message as ChatMessage
from llava_jax.serving.service import Service
from llava_jax.serving.uploads import KEPT_SECONDS, Uploads, add_upload_routes

USUAL_NEW_TOKENS = 512  # the default of LLaVA's own page
_FRAME_SECONDS = 0.1  # between two updates of the page
_CLIENT = "the page"
"""Name under which the queue counts all visitors of the page as one client."""
MAX_EXCHANGES = 100
"""Largest number of questions that are kept in a conversation."""
MAX_CHARACTERS = 32_000
"""Largest number of characters that are kept in a conversation. The number is limited because each
update of the page sends the whole conversation."""

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
    """One question with its answers.

    Attributes:
        text: Text of the question.
        images: Paths of the uploaded images of the question.
        answers: Texts of the answers that were generated so far, by model name.
        errors: Texts of errors by model name, for answers that are missing or incomplete.
    """

    text: str
    images: tuple[str, ...]
    answers: dict[str, str] = dataclasses.field(default_factory=dict)
    errors: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def characters(self) -> int:
        """Number of characters of the question and its answers."""
        return len(self.text) + sum(map(len, self.answers.values()))

    def shown(self, name: str) -> str:
        """Returns the text that the page shows as a model's answer."""
        error = f"[{self.errors[name]}]" if name in self.errors else ""
        return " ".join(filter(None, (self.answers[name], error))) or "…"


def load_gradio() -> ModuleType:
    """Imports Gradio with its analytics switched off and returns the module.

    The import takes several seconds.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return importlib.import_module("gradio")


def add_page(app: FastAPI, service: Service) -> None:
    """Adds the page to an application.

    Routes that the application already has take precedence over the routes of the page.

    Args:
        app: Application that gets the page.
        service: Service that generates the answers.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
    """
    gr = load_gradio()
    fonts = importlib.import_module("gradio.themes.utils.fonts")
    system = [fonts.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [fonts.Font(name) for name in ("ui-monospace", "monospace")]
    uploads = Uploads(service.limits)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder)
    blocks = _Page(gr, service, uploads).blocks()
    # Gradio sets `has_launched` in `launch`, which is never called for a mounted page. Before that,
    # Gradio reads any file whose path a client sends.
    blocks.has_launched = True
    page = FastAPI()
    page.add_middleware(CORSMiddleware)  # allows no origin; without it, Gradio adds its own
    gr.mount_gradio_app(
        page,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Soft(primary_hue="blue", font=system, font_mono=mono),
        css=_CSS,
    )
    add_upload_routes(app, uploads, service.bodies)
    app.mount("/", PageGuard(page, service.bodies, uploads, blocks))
    start = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Any]:
        with contextlib.closing(uploads):
            async with start(app) as state, page.router.lifespan_context(page):
                yield state

    app.router.lifespan_context = lifespan


class _Page:
    """Components and event handlers of the page.

    Args:
        gr: The module gradio.
        service: Service that generates the answers.
        uploads: Images that visitors have uploaded.
    """

    def __init__(self, gr: ModuleType, service: Service, uploads: Uploads):
        self._gr, self._service, self._uploads = gr, service, uploads
        self._names = service.names

    def blocks(self) -> Any:
        """Builds the page and returns it as a `gradio.Blocks`."""
        gr, names = self._gr, self._names
        with gr.Blocks(title=names[0]) as page:
            # A State stays on the server. With a Chatbot as input, clients could forge messages.
            exchanges = gr.State([], time_to_live=KEPT_SECONDS)
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
            can_compare = len(names) > 1
            label = f"Compare with {', '.join(names[1:])}"
            compare = gr.Checkbox(can_compare, label=label, visible=can_compare, elem_id="compare")
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
            if can_compare:
                show = lambda on: [gr.Column(visible=on or i == 0) for i in range(len(names))]
                compare.change(show, compare, list(columns))
        return page

    def _chat(self, name: str) -> tuple[Any, Any]:
        gr = self._gr
        with gr.Column(min_width=300) as column:
            chat = gr.Chatbot(
                label=name,
                render_markdown=False,  # questions and answers are plain text
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
                gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: most likely words"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: all words are possible"),
                gr.Slider(
                    1,
                    most,
                    min(USUAL_NEW_TOKENS, most),
                    step=1,
                    label="Max new tokens",
                    info="per answer",
                ),
            ]

    async def _ask(
        self, asked: Json, exchanges: list[Exchange], compare: bool, *settings: float
    ) -> AsyncIterator[list[object]]:
        text = asked["text"].strip()
        images = tuple(str(self._uploads.path(file)) for file in asked["files"])
        if text or images:
            exchanges = [*exchanges, Exchange(text, images)][-MAX_EXCHANGES:]
            while len(exchanges) > 1 and sum(e.characters for e in exchanges) > MAX_CHARACTERS:
                exchanges = exchanges[1:]
            async for state in self._answer(exchanges, compare, settings):
                yield state

    async def _regenerate(
        self, exchanges: list[Exchange], compare: bool, *settings: float
    ) -> AsyncIterator[list[object]]:
        if exchanges:
            *before, last = exchanges
            exchanges = [*before, Exchange(last.text, last.images)]
            async for state in self._answer(exchanges, compare, settings):
                yield state

    async def _answer(
        self, exchanges: list[Exchange], compare: bool, settings: Sequence[float]
    ) -> AsyncIterator[list[object]]:
        """Generates all answers to the last question; yields the page's outputs meanwhile."""
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
        """Generates a model's answer to the last question and stores it in the exchange."""
        last = exchanges[-1]
        last.answers[name] = ""
        try:
            with self._service.enter(_CLIENT) as ticket:
                await ticket.begin(
                    name,
                    self._messages(name, exchanges),
                    self._read_upload,
                    new_tokens=max(1, int(new_tokens)),
                    sampling=Sampling(temperature, top_p=top_p, seed=random.getrandbits(32)),
                )
                async for update in ticket.updates():
                    last.answers[name] = update.text.rstrip()
        except (RequestError, ConfigError) as error:
            last.errors[name] = str(error)
        except Exception:
            traceback.print_exc()
            last.errors[name] = "an internal error occurred; the log of the server shows it"

    async def _read_upload(self, name: str) -> bytes:
        return self._uploads.path(name).read_bytes()

    def _messages(self, name: str, exchanges: list[Exchange]) -> list[ChatMessage]:
        """Returns the conversation with the answers of one model.

        If this model was not asked a question, the answer of the first model is used. Questions
        without an answer are left out, except the last question.
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

    def _shown(self, exchanges: list[Exchange]) -> list[list[Json]]:
        """Returns the messages that each model's chat shows."""
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

    def _clear(self) -> list[object]:
        return [self._ready(), [], *([] for _ in self._names)]

    def _ready(self) -> object:
        return self._gr.MultimodalTextbox(submit_btn=True, stop_btn=False, interactive=True)


def _as_text(text: str) -> dict[str, str]:
    """Returns the content of a message, escaped because a chat without Markdown renders HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


# The service has its own queue, so Gradio need not limit the number of events.
_UNQUEUED: Json = {"concurrency_limit": None, "show_progress": "hidden"}

"""Answers for the API and the page: models by name, a bounded queue, limits, figures."""

import asyncio
import dataclasses
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar, cast

from llava_jax.data.conversation import SampleError
from llava_jax.generation.assistant import Answer, Assistant
from llava_jax.generation.sampling import Sampling
from llava_jax.serving.bodies import CLIENT_IS_GONE, Bodies
from llava_jax.serving.conversation import to_prompt
from llava_jax.serving.engine_thread import EngineFailed, EngineThread, Job, Update
from llava_jax.serving.images import Images
from llava_jax.serving.limits import Limits, RequestError
from llava_jax.serving.prometheus import Metrics
from llava_jax.serving.schema import Message

MAX_READERS = 4
"""Threads that read prompts."""

_Result = TypeVar("_Result")


class Service:
    """Models that answer.

    Args:
        assistants: Assistants by the names that requests use, the default first.
        limits: Limits of requests.

    Attributes:
        metrics: Metrics of all requests.
        engine: The thread that generates.
        readers: The threads that read prompts.
        compiler: The thread that compiles for prompts of new sizes.
        bodies: Reads the bodies of requests.
        images: Reads the images of requests.
        ending: Set when the server is to end, before answers in progress are given up.
        waiting: Requests without a token.
    """

    def __init__(self, assistants: Mapping[str, Assistant], limits: Limits):
        self.limits, self.metrics, self.waiting = limits, Metrics(), 0
        self.ending = asyncio.Event()
        self.bodies, self.images = Bodies(limits, self.ending), Images(limits)
        self._waiting_of: Counter[str] = Counter()
        self.engine = EngineThread(assistants)
        self.readers = ThreadPoolExecutor(
            min(MAX_READERS, os.cpu_count() or 1), thread_name_prefix="reader"
        )
        self.compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        self._assistants = dict(assistants)
        self._usual_wait = 1.0

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self._assistants)

    def start(self) -> None:
        """Begins to answer."""
        self.engine.start()

    def stop(self) -> None:
        """Ends all."""
        for threads in (self.readers, self.compiler):
            threads.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()

    def enter(self, client: str) -> "Ticket":
        """Takes a place in the queue; in the event loop alone, as all of a ticket.

        Args:
            client: The client's address.

        Raises:
            RequestError: It is full, or the engine has ended.
        """
        try:
            if self.engine.failure:
                raise RequestError(f"the engine has ended: {self.engine.failure}", status=503)
            if self.waiting >= self.limits.queue:
                raise self._full(f"{self.waiting} requests are waiting, which is as many as may")
            if self._waiting_of[client] >= self.limits.client_queue:
                raise self._full(
                    f"{self._waiting_of[client]} requests of {client} are waiting already"
                )
        except RequestError as error:
            self.count(error.status)
            raise
        return Ticket(self, client)

    def _full(self, text: str) -> RequestError:
        seconds = min(60, max(1, round(self._usual_wait)))
        return RequestError(text, status=429, code="queue_full", retry_after=seconds)

    def note_waiting(self, client: str, change: int) -> None:
        """Notes that a client's request begins to wait (1), or waits no more (-1)."""
        self.waiting += change
        self._waiting_of[client] += change
        self._waiting_of += Counter()  # drops those without any

    def assistant(self, name: str) -> Assistant:
        """A model by its name.

        Raises:
            RequestError: There is no model of this name.
        """
        if name not in self._assistants:
            raise RequestError(
                f"there is no model {name[:100]!r} here; there is {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return self._assistants[name]

    def count(self, status: int) -> None:
        """Notes that a request is over."""
        self.metrics.requests.labels(str(status)).inc()

    def note_wait(self, seconds: float) -> None:
        """Notes how long one waited for its first token."""
        self.metrics.first_seconds.observe(seconds)
        self._usual_wait += 0.1 * (seconds - self._usual_wait)


class Ticket:
    """One request's place, from the queue to its end; to be used in a `with`.

    Leaving it gives up what is not over, which frees the slot.
    """

    def __init__(self, service: Service, client: str):
        self._service, self._client = service, client
        self._began = time.monotonic()
        self._deadline = asyncio.get_running_loop().time() + service.limits.seconds
        self._job: Job | None = None
        self._state: Literal["waiting", "running", "over"] = "over"

    def __enter__(self) -> "Ticket":
        self._become("waiting")
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, RequestError):
            status = error.status
        elif isinstance(error, Exception):
            status = 500
        else:
            status = 200 if self._state == "over" else CLIENT_IS_GONE
        if self._state != "over":
            self._become("over")
            if self._job is not None:
                self._job.is_cancelled = True
        self._service.count(status)

    async def read(
        self, task: Callable[[], _Result], threads: ThreadPoolExecutor | None = None
    ) -> _Result:
        """What a function returns that runs in a thread: a reader's, unless others are given.

        Raises:
            RequestError: Time is up.
        """
        loop = asyncio.get_running_loop()
        return await self.in_time(loop.run_in_executor(threads or self._service.readers, task))

    async def in_time(self, work: Awaitable[_Result]) -> _Result:
        """What comes of it before time is up. As `read`."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError:
            seconds = self._service.limits.seconds
            text = f"the request took longer than {seconds:g} s"
            raise RequestError(text, status=504, code="timeout") from None

    async def begin(
        self,
        model: str,
        messages: list[Message],
        fetch: Callable[[str], Awaitable[bytes]],
        *,
        new_tokens: int | None,
        sampling: Sampling,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Reads a conversation, and asks for its answer.

        Args:
            model: The model's name.
            messages: The conversation; cleared when it has been read.
            fetch: Returns the image file that a URL of the conversation names.
            new_tokens: Most tokens of the answer; None is as many as may be.
            sampling: How they are chosen.
            stop: Texts that end it.

        Raises:
            RequestError: It cannot be answered.
        """
        assistant, limits = self._service.assistant(model), self._service.limits
        most = min(new_tokens or limits.new_tokens, limits.new_tokens)
        prompt = await self.read(
            partial(to_prompt, messages, limits, max_length=assistant.max_length)
        )
        messages.clear()  # images need not stay for as long as the answer takes
        pixels = []
        for url in prompt.images:
            image = await self.in_time(fetch(cast("str", url)))
            decoding = self._service.images.decode(image, assistant.reader.transform)
            pixels.append(await self.in_time(decoding))
        prompt = dataclasses.replace(prompt, images=tuple(pixels))

        def task() -> Answer:
            try:
                return assistant.begin(prompt, max_new_tokens=most, sampling=sampling, stop=stop)
            except SampleError as error:
                code = "context_length_exceeded" if error.kind == "length" else None
                raise RequestError(str(error), code=code, param="messages") from error

        answer = await self.read(task)
        if not assistant.is_compiled(answer):  # so that the others need not wait for it
            await self.read(partial(assistant.compile, answer), self._service.compiler)
        self._job = Job(model, answer)
        self._service.engine.submit(self._job)
        return answer

    async def updates(self) -> AsyncIterator[Update]:
        """Yields how far the answer has come, until it is over.

        Raises:
            RequestError: It never will be, or not in time.
        """
        assert self._job is not None
        model, counted = self._job.model, 0
        metrics = self._service.metrics
        while self._state != "over":
            try:
                update = await self.in_time(self._job.next())
            except EngineFailed as error:
                raise RequestError(str(error), status=500, code="engine_failed") from error
            metrics.new_tokens.labels(model).inc(update.new_tokens - counted)
            counted = update.new_tokens
            if self._state == "waiting":
                self._become("running")
                metrics.prompt_tokens.labels(model).inc(len(self._job.answer.request.input_ids))
                self._service.note_wait(time.monotonic() - self._began)
            if update.ending:
                self._become("over")
                metrics.seconds.observe(time.monotonic() - self._began)
            yield update

    def _become(self, state: Literal["waiting", "running", "over"]) -> None:
        gauges = {
            "waiting": self._service.metrics.waiting,
            "running": self._service.metrics.running,
        }
        if self._state in gauges:
            gauges[self._state].dec()
        if state in gauges:
            gauges[state].inc()
        self._service.note_waiting(self._client, (state == "waiting") - (self._state == "waiting"))
        self._state = state

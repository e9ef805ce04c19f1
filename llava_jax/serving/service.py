"""Answers the requests of the API and of the web page, with a bounded queue and time limits."""

import asyncio
import dataclasses
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar, cast

from llava_jax.errors import SampleError
from llava_jax.generation.answer import Answer
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.sampling import Sampling
from llava_jax.serving.bodies import CLIENT_IS_GONE, Bodies
from llava_jax.serving.conversation import to_prompt
from llava_jax.serving.engine_thread import EngineFailed, EngineThread, Job, Update
from llava_jax.serving.images import Images
from llava_jax.serving.limits import Limits, RequestError
from llava_jax.serving.logprobs import TokenWriter
from llava_jax.serving.prometheus import Metrics
from llava_jax.serving.schema import Message

MAX_READERS = 4
"""Largest number of threads that read prompts."""

_Result = TypeVar("_Result")


class Service:
    """Generates answers with one or several models.

    Args:
        assistants: Assistants by model name. The web page asks the first model, and asks the other
            models only for comparison.
        limits: Limits of requests.

    Attributes:
        limits: Limits of requests.
        metrics: Metrics of all requests.
        engine: Thread that generates the answers.
        readers: Thread pool that reads prompts.
        compiler: Thread pool with one thread, which compiles programs for new prompt sizes.
        bodies: Reader of request bodies.
        images: Reader of the images in requests.
        ending: Event that is set when the server begins to shut down, while answers are still in
            progress.
        waiting: Number of requests that wait for their first token.
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
        self._token_writers: dict[str, TokenWriter] = {}
        # Moving average of the seconds until the first token; clients get it as Retry-After.
        self._usual_wait = 1.0

    @property
    def names(self) -> list[str]:
        """Names of the models, in the order of `assistants`."""
        return list(self._assistants)

    def start(self) -> None:
        """Starts the engine thread."""
        self.engine.start()

    def stop(self) -> None:
        """Stops all threads; unfinished answers end with an error."""
        for threads in (self.readers, self.compiler):
            threads.shutdown(wait=False, cancel_futures=True)
        self.engine.stop()

    def enter(self, client: str) -> "Ticket":
        """Returns a ticket for a request, if the queue has room.

        The ticket takes its place in the queue when its `with` block begins. This method and the
        ticket must be used in the thread of the event loop.

        Args:
            client: IP address of the client, or another name under which its requests are counted.

        Raises:
            RequestError: The queue is full, or the engine has ended.
        """
        try:
            if self.engine.failure:
                text = f"this server has failed and must be restarted: {self.engine.failure}"
                raise RequestError(text, status=503)
            if self.waiting >= self.limits.queue:
                text = f"{self.waiting} requests are waiting, which is the limit; try again later"
                raise self._full(text)
            if self._waiting_of[client] >= self.limits.client_queue:
                raise self._full(
                    f"{self._waiting_of[client]} requests from {client} are waiting, which is the "
                    "limit for one client; try again later"
                )
        except RequestError as error:
            self.count(error.status)
            raise
        return Ticket(self, client)

    def _full(self, text: str) -> RequestError:
        seconds = min(60, max(1, round(self._usual_wait)))
        return RequestError(text, status=429, code="queue_full", retry_after=seconds)

    def note_waiting(self, client: str, change: int) -> None:
        """Adds `change` (1, 0 or -1) to the number of waiting requests, in total and per client."""
        self.waiting += change
        self._waiting_of[client] += change
        self._waiting_of += Counter()  # removes clients whose count is 0

    def assistant(self, name: str) -> Assistant:
        """Returns the assistant of a model.

        Raises:
            RequestError: There is no model with this name.
        """
        if name not in self._assistants:
            raise RequestError(
                f"this server has no model {name[:100]!r}; its models are: {', '.join(self.names)}",
                status=404,
                code="model_not_found",
                param="model",
            )
        return self._assistants[name]

    def token_writer(self, name: str) -> TokenWriter:
        """Returns the writer of log probabilities for a model."""
        if name not in self._token_writers:
            self._token_writers[name] = TokenWriter(self._assistants[name].reader.tokenizer)
        return self._token_writers[name]

    def count(self, status: int) -> None:
        """Counts a finished request by its HTTP status."""
        self.metrics.requests.labels(str(status)).inc()

    def note_wait(self, seconds: float) -> None:
        """Records how many seconds a request waited for its first token."""
        self.metrics.first_seconds.observe(seconds)
        self._usual_wait += 0.1 * (seconds - self._usual_wait)


class Ticket:
    """Tracks one request from the queue to the end of its answer; used in a `with` statement.

    Leaving the `with` block cancels an unfinished answer, which frees its slot in the engine.

    Args:
        service: Service that generates the answer.
        client: IP address of the client, or another name under which its requests are counted.
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
        """Runs a function in a thread and returns its result.

        Args:
            task: Function to run.
            threads: Thread pool to run the function in; None takes the `readers` of the service.

        Raises:
            RequestError: The request took longer than `Limits.seconds`.
        """
        loop = asyncio.get_running_loop()
        return await self.in_time(loop.run_in_executor(threads or self._service.readers, task))

    async def in_time(self, work: Awaitable[_Result]) -> _Result:
        """Awaits `work` and returns its result.

        Raises:
            RequestError: The request took longer than `Limits.seconds`.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                return await work
        except TimeoutError:
            seconds = self._service.limits.seconds
            text = f"the request took longer than {seconds:g} s, which is the limit of this server"
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
        continues: bool = False,
        wants_scores: bool = False,
    ) -> Answer:
        """Reads a conversation, submits it to the engine and returns the answer object.

        The engine fills the answer object while it generates; see `updates`.

        Args:
            model: Name of the model.
            messages: Messages of the conversation. The list is cleared after it has been read.
            fetch: Function that returns the contents of the image file at a URL.
            new_tokens: Largest number of tokens of the answer; None for the server's limit.
            sampling: Sampling parameters.
            stop: Strings that end the answer.
            continues: Whether the model continues the last message, which is from the assistant.
            wants_scores: Whether to compute the log probabilities of the tokens.

        Raises:
            RequestError: The model does not exist, the conversation or one of its images cannot be
                used, or the request took longer than `Limits.seconds`.
        """
        assistant, limits = self._service.assistant(model), self._service.limits
        most = min(new_tokens or limits.new_tokens, limits.new_tokens)
        longest = assistant.max_length
        prompt = await self.read(
            partial(to_prompt, messages, limits, max_length=longest, continues=continues)
        )
        messages.clear()  # the data of the images is not needed while the answer is generated
        pixels = []
        for url in prompt.images:
            image = await self.in_time(fetch(cast("str", url)))
            decoding = self._service.images.decode(
                image, assistant.reader.transform, tiled=assistant.reader.is_tiled(prompt)
            )
            pixels.append(await self.in_time(decoding))
        prompt = dataclasses.replace(prompt, images=tuple(pixels))

        def task() -> Answer:
            try:
                return assistant.begin(
                    prompt,
                    max_new_tokens=most,
                    sampling=sampling,
                    stop=stop,
                    wants_scores=wants_scores,
                )
            except SampleError as error:
                code = "context_length_exceeded" if error.kind == "length" else None
                raise RequestError(str(error), code=code, param="messages") from error

        answer = await self.read(task)
        # The engine could also compile the program, but then all other answers would wait.
        if not assistant.is_compiled(answer):
            await self.read(partial(assistant.compile, answer), self._service.compiler)
        self._job = Job(model, answer)
        self._service.engine.submit(self._job)
        return answer

    async def updates(self) -> AsyncIterator[Update]:
        """Yields the state of the answer whenever tokens were added, until the answer is complete.

        Raises:
            RequestError: The engine failed, or the request took longer than `Limits.seconds`.
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

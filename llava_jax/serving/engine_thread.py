"""The one thread that generates: requests of all models come and go between its steps."""

import asyncio
import contextlib
import dataclasses
import itertools
import queue
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Literal

from llava_jax.generation.assistant import Answer, Assistant


@dataclasses.dataclass(frozen=True)
class Update:
    """How far an answer has come.

    Attributes:
        text: All of it so far.
        new_tokens: Likewise.
        ending: Why it is over, if it is.
    """

    text: str
    new_tokens: int
    ending: Literal["stop", "length"] | None


class EngineFailed(Exception):
    """The model could not go on with an answer."""


_ENDED = EngineFailed("the server is ending")


class Job:
    """An answer that the thread is to generate; its updates are read in the event loop.

    Only the latest is kept: a slow reader misses some, and costs no memory.

    Args:
        model: Which model's.
        answer: Begun, not added.
    """

    def __init__(self, model: str, answer: Answer):
        self.model, self.answer = model, answer
        self.is_cancelled = False  # set in the loop, read in the thread
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._latest: Update | EngineFailed | None = None

    def publish(self, latest: Update | EngineFailed) -> None:
        """Called by the thread."""
        self._latest = latest
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody reads it
            self._loop.call_soon_threadsafe(self._changed.set)

    async def next(self) -> Update:
        """Waits for the next one.

        Raises:
            EngineFailed: There will be none.
        """
        await self._changed.wait()
        self._changed.clear()
        latest = self._latest
        if isinstance(latest, EngineFailed):
            raise latest
        assert latest is not None
        return latest


class EngineThread:
    """Runs the assistants; nothing else may, while it does.

    One thread for all of them: where a model is spread over devices, programs must start on all of
    these in the same order.

    Args:
        assistants: Assistants by the names of their models.

    Attributes:
        failure: Why it generates no more, if something ended it.
    """

    def __init__(self, assistants: Mapping[str, Assistant]):
        self.failure: str | None = None
        self._lanes = {name: _Lane(assistant) for name, assistant in assistants.items()}
        self._arrivals: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ending, self._has_ended = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begins to take jobs."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hands over a job; may be called from any thread."""
        with self._ending:
            if self._has_ended:
                job.publish(_ENDED)
            else:
                self._arrivals.put(job)

    def stop(self) -> None:
        """Ends the thread after its current step; what is not over never will be."""
        self._arrivals.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                for lane in self._lanes.values():
                    lane.turn()
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            with self._ending:  # nothing arrives after this
                self._has_ended = True
            while not self._arrivals.empty():
                if job := self._arrivals.get():
                    job.publish(_ENDED)
            for lane in self._lanes.values():
                lane.end()

    def _receive(self) -> bool:
        """Takes what has arrived, and waits for it if there is nothing else to do."""
        while True:
            is_busy = any(lane.is_busy for lane in self._lanes.values())
            try:
                job = self._arrivals.get(block=not is_busy)
            except queue.Empty:
                return True
            if job is None:
                return False
            self._lanes[job.model].waiting.append(job)


class _Lane:
    """One assistant, the jobs that wait for it, and those it generates."""

    def __init__(self, assistant: Assistant):
        self.waiting: deque[Job] = deque()
        self._assistant = assistant
        self._running: dict[Answer, Job] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._running)

    def turn(self) -> None:
        """Fills free slots, and generates a token of every answer."""
        try:
            for job in itertools.chain(self._admit(), self._step()):
                answer = job.answer
                if answer.ending:
                    del self._running[answer]
                job.publish(Update(answer.text, len(answer.request.tokens), answer.ending))
        except Exception as error:
            traceback.print_exc()
            self._fail(EngineFailed(f"the model failed: {type(error).__name__}"))
            self._assistant.reset()

    def end(self) -> None:
        """Tells all jobs that they get no answer."""
        self._running |= {job.answer: job for job in self.waiting}
        self.waiting.clear()
        self._fail(_ENDED)

    def _fail(self, error: EngineFailed) -> None:
        for job in self._running.values():
            job.publish(error)
        self._running.clear()

    def _admit(self) -> Iterator[Job]:
        for job in [job for job in self._running.values() if job.is_cancelled]:
            self._assistant.remove(job.answer)
            del self._running[job.answer]
        while self.waiting and self._assistant.free:
            job = self.waiting.popleft()
            if not job.is_cancelled:
                self._running[job.answer] = job
                self._assistant.add(job.answer)
                yield job

    def _step(self) -> Iterator[Job]:
        for answer in self._assistant.step():
            yield self._running[answer]

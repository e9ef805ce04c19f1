"""Runs the thread that generates all answers; answers can start and end between two steps."""

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

from llava_jax.generation.answer import Answer
from llava_jax.generation.assistant import Assistant


@dataclasses.dataclass(frozen=True)
class Update:
    """State of an answer at one moment.

    Attributes:
        text: Text of the answer so far.
        new_tokens: Number of tokens generated so far.
        shown: Number of tokens whose text is in `text`.
        ending: "stop" if the model or a stop string ended the answer, "length" if the
            answer reached its largest length, None while the answer is incomplete.
    """

    text: str
    new_tokens: int
    shown: int
    ending: Literal["stop", "length"] | None


class EngineFailed(Exception):
    """Raised if an answer cannot be completed, because the model failed or the engine has ended."""


_ENDED = EngineFailed("the server stopped generating before the answer was complete")


class Job:
    """Passes one answer to the engine thread, and passes its updates back to the event loop.

    Only the latest update is kept, so that a slow reader does not fill the memory.

    Args:
        model: Name of the model.
        answer: Answer that `Assistant.begin` returned.

    Attributes:
        model: Name of the model.
        answer: Answer that is generated.
        is_cancelled: Set to True in the event loop to cancel the job; the engine thread then
            removes the job before its next step.
    """

    def __init__(self, model: str, answer: Answer):
        self.model, self.answer = model, answer
        self.is_cancelled = False
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._latest: Update | EngineFailed | None = None

    def publish(self, latest: Update | EngineFailed) -> None:
        """Stores an update or an error, and wakes the reader; may be called from any thread."""
        self._latest = latest
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._changed.set)

    async def next(self) -> Update:
        """Waits for a new update and returns the latest update.

        Raises:
            EngineFailed: The answer cannot be completed.
        """
        await self._changed.wait()
        self._changed.clear()
        latest = self._latest
        if isinstance(latest, EngineFailed):
            raise latest
        assert latest is not None
        return latest


class EngineThread:
    """Generates the answers of all models in one thread.

    While this thread runs, no other thread may call `add`, `step`, `remove` or `reset` of the
    assistants. All models share the thread because programs that run on several devices must start
    in the same order on each device.

    Args:
        assistants: Assistants by model name.

    Attributes:
        failure: Text of the error that ended the thread; None if there was no such error.
    """

    def __init__(self, assistants: Mapping[str, Assistant]):
        self.failure: str | None = None
        self._lanes = {name: _Lane(assistant) for name, assistant in assistants.items()}
        self._arrivals: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ending, self._has_ended = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Passes a job to the thread. If the thread has ended, the job gets an error."""
        with self._ending:
            if self._has_ended:
                job.publish(_ENDED)
            else:
                self._arrivals.put(job)

    def stop(self) -> None:
        """Ends the thread after its current step; unfinished answers get an error."""
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
            with self._ending:  # after this, `submit` accepts no jobs
                self._has_ended = True
            while not self._arrivals.empty():
                if job := self._arrivals.get():
                    job.publish(_ENDED)
            for lane in self._lanes.values():
                lane.end()

    def _receive(self) -> bool:
        """Takes new jobs from the queue; waits for a job if no lane is busy.

        Returns False if the thread must end.
        """
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
    """One assistant with its waiting jobs and its running jobs."""

    def __init__(self, assistant: Assistant):
        self.waiting: deque[Job] = deque()
        self._assistant = assistant
        self._running: dict[Answer, Job] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._running)

    def turn(self) -> None:
        """Starts jobs in free slots, generates a token per answer and publishes the updates."""
        try:
            for job in itertools.chain(self._admit(), self._step()):
                answer = job.answer
                if answer.ending:
                    del self._running[answer]
                count = len(answer.request.tokens)
                job.publish(Update(answer.text, count, answer.shown, answer.ending))
        except Exception as error:
            traceback.print_exc()
            text = f"the model failed with {type(error).__name__}; the server's log shows why"
            self._fail(EngineFailed(text))
            self._assistant.reset()

    def end(self) -> None:
        """Publishes an error to all jobs, because the thread ends."""
        self._running |= {job.answer: job for job in self.waiting}
        self.waiting.clear()
        self._fail(_ENDED)

    def _fail(self, error: EngineFailed) -> None:
        for job in self._running.values():
            job.publish(error)
        self._running.clear()

    def _admit(self) -> Iterator[Job]:
        """Removes cancelled jobs, starts waiting jobs, and yields each started job."""
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
        """Generates one token per running answer, and yields the jobs of these answers."""
        for answer in self._assistant.step():
            yield self._running[answer]

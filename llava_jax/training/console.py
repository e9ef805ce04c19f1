"""Shows the metrics and the progress of a run on the console, and appends them to metrics.jsonl."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from llava_jax.data.batch import Batch
from llava_jax.disk import append_rows
from llava_jax.report.rows import Row
from llava_jax.training.trackers import Tracker

Item = TypeVar("Item")

PLAIN_SECONDS = 10.0
"""Minimum number of seconds between two progress lines if the output is not a terminal."""


class Reporter:
    """Writes a row for each step to metrics.jsonl, shows the step, and logs it to the trackers.

    On a terminal, a progress bar shows the steps. On other outputs, a line of text is printed every
    few seconds. An object of this class is a context manager.

    Args:
        path: Path of metrics.jsonl; its directory must exist.
        first_step: Number of steps done before this start of the run.
        total_steps: Number of steps of the whole run.
        trackers: Services that receive each step and each evaluation.
        quiet: Whether to write and show nothing; True in all processes except the main process.

    Attributes:
        console: Console that all output goes to.
        is_shown: Whether this process writes and shows the rows.
    """

    def __init__(
        self,
        path: Path,
        first_step: int,
        total_steps: int,
        trackers: Sequence[Tracker] = (),
        *,
        quiet: bool = False,
    ):
        self.console = Console(quiet=quiet, soft_wrap=True, highlight=False)
        self.is_shown = not quiet
        self._total = total_steps
        self._trackers = [*trackers]
        self._last_plain = -math.inf
        self._last_time = time.monotonic()
        self._clock = _Clock(first_step, total_steps)
        self._path = path
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("{task.fields[what]} {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "compiling", total=total_steps, completed=first_step, what="step"
            )

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def log(self, row: Row, device_bytes: int | None = None) -> None:
        """Records one optimizer step.

        Args:
            row: Row of metrics.jsonl with at least the fields step, loss, learning_rate and tokens.
                `log` adds the field `seconds`, which is the time since the previous row.
            device_bytes: Peak memory of a device in bytes, which `log` adds to the row; None if the
                peak is unknown.
        """
        now = time.monotonic()
        row = row | {"seconds": round(now - self._last_time, 4)}
        row |= {"device_bytes": device_bytes} if device_bytes else {}
        self._last_time = now
        if self.is_shown:
            append_rows(self._path, [row])
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        self._track(lambda tracker: tracker.log_step(row | {"tokens_per_second": speed}))
        memory = f"  {device_bytes / 2**30:.1f} GiB" if device_bytes else ""
        loss = math.nan if row["loss"] is None else row["loss"]
        text = f"loss {loss:.4f}  lr {row['learning_rate']:.2e}  {speed:,.0f} tokens/s{memory}"
        text = f"{text}  {self._clock.left(row['step'])} left"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif now - self._last_plain > PLAIN_SECONDS or row["step"] == self._total:
            self._last_plain = now
            self.console.print(f"step {row['step']}/{self._total}  {text}")

    def log_eval(self, row: Row, images: Sequence[Sequence[Path]], text: str) -> None:
        """Shows an evaluation and passes it to the trackers.

        Args:
            row: Row of evaluations.jsonl.
            images: Image files of each example in the row.
            text: Result of the evaluation in one line, for the console.
        """
        self.say(text)
        self._track(lambda tracker: tracker.log_eval(row, images))

    def _track(self, log: Callable[[Tracker], None]) -> None:
        """Calls `log` with each tracker. If a call fails, the tracker is removed."""
        for tracker in [*self._trackers]:
            try:
                log(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self.say(f"{name} failed and is now turned off: {type(error).__name__}: {error}")

    def track(self, items: Iterable[Item], count: int, what: str) -> Iterator[Item]:
        """Yields items, and shows how many of them were taken.

        Args:
            items: Items to yield, for example the batches of an evaluation.
            count: Number of items.
            what: Text in front of the numbers, for example "eval, step 0:".
        """
        task = self._bar.add_task("", total=count, what=what) if self._bar else None
        last = time.monotonic()
        try:
            for done, item in enumerate(items):
                now = time.monotonic()
                if task is None and now - last > PLAIN_SECONDS:
                    last = now
                    self.say(f"{what} {done}/{count} batches")
                yield item
                if self._bar and task is not None:
                    self._bar.advance(task)
        finally:
            if self._bar and task is not None:
                self._bar.remove_task(task)

    @contextmanager
    def compiling(self, name: str, batch: Batch) -> Iterator[None]:
        """Excludes the time of a context from the time left, if a step is compiled in the context.

        JAX compiles a step when it is called with arrays of new shapes.

        Args:
            name: Name of the step that is called in the context.
            batch: Batch that the step is called with.
        """
        with self._clock.excluding_first((name, *(x.shape for x in jax.tree.leaves(batch)))):
            yield

    def skip_time(self) -> None:
        """Excludes the time since the last row from the seconds of the next row.

        The first call starts the clock of the time left, so that it counts from the first step on.
        """
        self._last_time = time.monotonic()
        self._clock.start()

    def say(self, text: str | Table) -> None:
        """Prints a line of text or a table, above the progress bar if there is one."""
        self.console.print(text, markup=False)


class _Clock:
    """Estimates the time until the end of a run, from the time since its first step.

    Args:
        first_step: Number of steps done before this start of the run.
        total_steps: Number of steps of the whole run.
    """

    def __init__(self, first_step: int, total_steps: int):
        self._first_step, self._total = first_step, total_steps
        self._started, self._excluded, self._is_running = time.monotonic(), 0.0, False
        self._seen: set[tuple[object, ...]] = set()

    def start(self) -> None:
        """Starts the clock, unless it runs already."""
        if not self._is_running:
            self._started, self._excluded, self._is_running = time.monotonic(), 0.0, True

    @contextmanager
    def excluding_first(self, key: tuple[object, ...]) -> Iterator[None]:
        """Does not count the time of a context whose key is new."""
        started = time.monotonic()
        yield
        if key not in self._seen:
            self._seen.add(key)
            self._excluded += time.monotonic() - started

    def left(self, step: int) -> str:
        """Returns the estimated time after a step, for example "1:02:03"."""
        counted = time.monotonic() - self._started - self._excluded
        seconds = round(counted / max(step - self._first_step, 1) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"

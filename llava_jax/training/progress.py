"""What a run says while it runs: a progress display, and metrics.jsonl."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from llava_jax.disk import append_rows
from llava_jax.training.trackers import Tracker

PLAIN_SECONDS = 10.0
"""Without a terminal, a line of progress at most this often."""


class Reporter:
    """Writes a row a step to metrics.jsonl, and shows it.

    On a terminal it is a live bar, elsewhere a plain line from time to time.

    Args:
        path: metrics.jsonl, in a directory that is there.
        first_step: Steps done before.
        total_steps: Steps of the whole run.
        trackers: What else is told of each step and measurement.
        quiet: Neither write nor show: for all processes but one.
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
        self._started = (self._last_time, first_step)
        self._path = path
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task("compiling", total=total_steps, completed=first_step)

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def log(self, row: dict[str, Any], device_bytes: int | None = None) -> None:
        """Records one optimizer step.

        Args:
            row: At least step, loss, learning_rate and tokens; the seconds since the last row are
                added.
            device_bytes: Peak memory of a device, if it is known; then it is added too.
        """
        now = time.monotonic()
        row = row | {"seconds": round(now - self._last_time, 4)}
        row |= {"device_bytes": device_bytes} if device_bytes else {}
        self._last_time = now
        if self.is_shown:
            append_rows(self._path, [row])
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        self._tell(lambda tracker: tracker.log_step(row | {"tokens_per_second": speed}))
        memory = f"  {device_bytes / 2**30:.1f} GiB" if device_bytes else ""
        loss = math.nan if row["loss"] is None else row["loss"]
        text = f"loss {loss:.4f}  rate {row['learning_rate']:.2e}  {speed:,.0f} tokens/s{memory}"
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif now - self._last_plain > PLAIN_SECONDS or row["step"] == self._total:
            self._last_plain = now
            self.console.print(f"step {row['step']}/{self._total}  {text}  {self._left(row, now)}")

    def log_held_out(
        self, row: dict[str, Any], pictures: Sequence[Sequence[Path]], text: str
    ) -> None:
        """Tells of a measurement on held-out data.

        Args:
            row: Its row of evaluations.jsonl.
            pictures: Files with the images of each of its examples.
            text: The same in a line.
        """
        self.say(text)
        self._tell(lambda tracker: tracker.log_held_out(row, pictures))

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        """Tells all trackers; one that fails is told nothing more, and ends no run."""
        for tracker in [*self._trackers]:
            try:
                say(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                name = type(tracker).__name__
                self.say(f"{name} is told nothing more: {type(error).__name__}: {error}")

    def skip_time(self) -> None:
        """Leaves out the time since the last row: it went into something other than a step."""
        self._last_time = time.monotonic()

    def say(self, text: str | Table) -> None:
        """Prints a line or a table above the bar."""
        self.console.print(text, markup=False)

    def _left(self, row: dict[str, Any], now: float) -> str:
        started, first_step = self._started
        rate = (now - started) / max(row["step"] - first_step, 1)
        seconds = round(rate * (self._total - row["step"]))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

"""Shows the metrics and the progress of a run on the console, and appends them to metrics.jsonl."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from llava_jax.disk import append_rows
from llava_jax.report.rows import Row
from llava_jax.training.trackers import Tracker

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
        if self._bar:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif now - self._last_plain > PLAIN_SECONDS or row["step"] == self._total:
            self._last_plain = now
            self.console.print(f"step {row['step']}/{self._total}  {text}  {self._left(row, now)}")

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

    def skip_time(self) -> None:
        """Excludes the time since the last row from the seconds of the next row."""
        self._last_time = time.monotonic()

    def say(self, text: str | Table) -> None:
        """Prints a line of text or a table, above the progress bar if there is one."""
        self.console.print(text, markup=False)

    def _left(self, row: Row, now: float) -> str:
        """Returns the estimated time until the end of the run, for example "1:02:03 left"."""
        started, first_step = self._started
        per_step = (now - started) / max(row["step"] - first_step, 1)
        seconds = round(per_step * (self._total - row["step"]))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"

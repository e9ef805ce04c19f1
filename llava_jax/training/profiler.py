"""A profile of some of a run's steps, which xprof opens."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profiler:
    """Traces the steps of a window; each process its own devices.

    Args:
        directory: Where traces are written.
        window: The first and the last step; None traces nothing.
    """

    def __init__(self, directory: Path, window: tuple[int, int] | None):
        self._directory, self._window = directory, window
        self.is_tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_tracing:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Begins or ends the trace where the window does.

        Args:
            step: The step to be taken.
            state: What it is taken from. It is waited for, lest parts of steps be traced.
        """
        first, last = self._window or (0, 0)
        if step == first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self.is_tracing = True
        elif self.is_tracing and step == last + 1:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.is_tracing = False

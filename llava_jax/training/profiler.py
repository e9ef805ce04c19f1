"""Profiles some of a run's steps, for xprof."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class Profiler:
    """Traces a range of steps. Each process traces its own devices.

    Args:
        directory: Directory for the traces.
        window: First and last step of the range; None traces nothing.
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
        """Starts or stops the trace if the range starts at this step or has ended before it.

        Args:
            step: The next step.
            state: State before this step. The trace starts and stops only when it is computed, so
                that no step is traced in part.
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

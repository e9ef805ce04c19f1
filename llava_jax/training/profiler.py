"""Profiles some steps of a run with JAX's profiler; use xprof to view the traces."""

from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Context manager that traces a range of steps. Each process traces its own devices.

    Args:
        directory: Directory that the traces are written to.
        window: First and last step to trace; None traces nothing.

    Attributes:
        is_tracing: Whether a trace is being recorded.
    """

    def __init__(self, directory: Path, window: tuple[int, int] | None):
        self._directory, self._window = directory, window
        self.is_tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_tracing:
            jax.profiler.stop_trace()

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before the first step of the range, and stops it after the last step.

        Args:
            step: Number of the step that runs next.
            state: Train state before that step. The trace starts and stops only after the device
                has computed this state, so that no step is traced only partly.
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

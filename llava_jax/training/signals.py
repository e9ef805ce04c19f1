"""Handles SIGTERM and SIGINT (Ctrl-C), so that a run saves its state before it stops."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from llava_jax.distributed.multihost import is_main_process

_MESSAGE = (
    b"stopping after the current step is finished and saved; press Ctrl-C again to stop at once\n"
)


class Stopped(BaseException):
    """Raised when a signal stops the run; the message says at which point of the run.

    Args:
        number: Number of the signal.
        where: Point of the run, for example "after step 5".

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, number: int, where: str):
        super().__init__(where)
        self.signal = number


class StopRequest:
    """Context manager that lets SIGTERM and Ctrl-C stop a run only after the current step.

    Outside of `deferred`, a signal stops the run at once, by raising `Stopped`. A second Ctrl-C
    always ends the process at once.

    Attributes:
        signal: Number of the signal that was received; None if no signal was received.
    """

    signal: int | None = None

    def __init__(self):
        self._in_steps = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """In this context, a received signal only sets `signal` and does not raise `Stopped`."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def raise_if_asked(self, where: str) -> None:
        """Raises Stopped if a signal was received.

        Args:
            where: Point of the run that the message names, for example "after step 5".

        Raises:
            Stopped: A signal was received.
        """
        if self.signal is not None:
            raise Stopped(self.signal, where)

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._pass_over
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook

    def _pass_over(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Passes an exception that Python cannot propagate to the old hook, except `Stopped`."""
        # If a signal arrives during a callback of the garbage collector, Python cannot propagate
        # `Stopped` and would print a traceback. The run still stops when it next checks `signal`.
        if unraisable.exc_type is not Stopped:
            self._hook(unraisable)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: sets `signal`, and stops the run now or after the current step."""
        is_new, self.signal = self.signal is None, number
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next Ctrl-C ends the process at once
        # SIGTERM may arrive twice: SLURM sends it to each process and also to the watchdog of the
        # process, which forwards it.
        if not is_new:
            return
        if not self._in_steps:
            raise Stopped(number, "while no training step was running")
        if is_main_process():
            with contextlib.suppress(OSError):
                os.write(1, _MESSAGE)  # print fails if the signal interrupted another print

"""Signals that end a run in order."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from llava_jax.processes import is_first

_SAID = b"stopping: this step is finished and saved; Ctrl-C again ends at once\n"


class Stopped(BaseException):
    """A signal ended the run; its text says where."""

    def __init__(self, number: int, where: str):
        super().__init__(where)
        self.signal = number


class StopRequest:
    """Takes SIGTERM and Ctrl-C: a step that has begun is finished, and saved.

    Before the first step and after the last there is nothing to finish, so they end the run where
    it is. A second Ctrl-C ends it at once, wherever.

    Attributes:
        signal: The one that came; None before.
    """

    signal: int | None = None

    def __init__(self):
        self._in_steps = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While steps are taken: a signal is noted, and waits to be asked for."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def raise_if_asked(self, where: str) -> None:
        """Ends the run if a signal came.

        Raises:
            Stopped: It did.
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
        # A signal may come while a callback of the garbage collector runs. Python cannot raise it
        # and would print a traceback. `signal` is set, so the run ends where it next asks for it.
        if unraisable.exc_type is not Stopped:
            self._hook(unraisable)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        is_new, self.signal = self.signal is None, number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not is_new:  # SLURM sends SIGTERM to a process and to its guard, which passes it on
            return
        if not self._in_steps:
            raise Stopped(number, "outside of steps")
        if is_first():
            with contextlib.suppress(OSError):
                os.write(1, _SAID)  # print fails where the signal came in the midst of a print

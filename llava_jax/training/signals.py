"""Handles SIGTERM and SIGINT (Ctrl-C), which stop a run after it has saved its state."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from llava_jax.distributed.multihost import is_main_process

_MESSAGE = b"stopping: this step is finished and saved; press Ctrl-C again to stop at once\n"


class Stopped(BaseException):
    """A signal stopped the run; the text says at which point.

    Attributes:
        signal: Number of the signal.
    """

    def __init__(self, number: int, where: str):
        super().__init__(where)
        self.signal = number


class StopRequest:
    """Handles SIGTERM and Ctrl-C so that the current step is finished and saved first.

    Before the first step and after the last one there is nothing to finish, so a signal stops the
    run at once. A second Ctrl-C always stops it at once.

    Attributes:
        signal: Number of the signal that was received; None if there was none.
    """

    signal: int | None = None

    def __init__(self):
        self._in_steps = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While this context is open, a signal only sets `signal`, and the loop asks for it."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def raise_if_asked(self, where: str) -> None:
        """Stops the run if a signal was received.

        Args:
            where: At which point of the run this is, for the message.

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
        # A signal may come while a callback of the garbage collector runs. Python cannot raise it
        # and would print a traceback. `signal` is set, so the run stops where it next asks for it.
        if unraisable.exc_type is not Stopped:
            self._hook(unraisable)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        is_new, self.signal = self.signal is None, number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # SLURM sends SIGTERM to each process and also to its watchdog, which passes it on.
        if not is_new:
            return
        if not self._in_steps:
            raise Stopped(number, "outside of steps")
        if is_main_process():
            with contextlib.suppress(OSError):
                os.write(1, _MESSAGE)  # print would fail if the signal interrupted another print

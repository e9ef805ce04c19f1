"""Signals, wherever they come."""

import os
import signal
import sys

import pytest

from llava_jax.stop import Stopped, StopRequest


def test_a_signal_that_comes_twice_ends_once():
    with StopRequest() as stop:
        with pytest.raises(Stopped, match="outside of steps"):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM


def test_a_signal_may_come_in_the_midst_of_a_print(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def print_again(text: str) -> None:
        raise RuntimeError("reentrant call")  # as a buffered stream does

    with StopRequest() as stop, stop.deferred():
        with monkeypatch.context() as patched:
            patched.setattr(sys.stdout, "write", print_again)
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert capfd.readouterr().out.startswith("stopping: ")

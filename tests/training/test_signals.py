"""Signals, wherever they come."""

import os
import signal
import subprocess
import sys

import pytest

from llava_jax.training.signals import Stopped, StopRequest


def test_a_signal_that_comes_twice_ends_once():
    with StopRequest() as stop:
        with pytest.raises(Stopped, match="while no training step was running"):
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
    assert capfd.readouterr().out.startswith("stopping after ")


IN_A_CALLBACK = """
import gc, os, signal
from llava_jax.training.signals import Stopped, StopRequest
calls = iter(range(10))
gc.callbacks.append(lambda *_: next(calls) == 0 and os.kill(os.getpid(), signal.SIGTERM))
with StopRequest() as stop:
    gc.collect()
    print("goes on")
    try:
        stop.raise_if_asked("later")
    except Stopped as stopped:
        print(stopped)
"""


def test_a_signal_in_a_callback_that_cannot_raise_stops_the_run_later():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["goes on", "later"]
    assert "Traceback" not in done.stderr


TWICE = """
import os, signal
from llava_jax.training.signals import StopRequest
with StopRequest() as stop, stop.deferred():
    os.kill(os.getpid(), signal.SIGINT)
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""


def test_a_second_ctrl_c_ends_at_once():
    """In a process of its own, which it ends."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert done.stdout.splitlines()[0].startswith("stopping after ")
    assert done.stdout.splitlines()[1:] == ["goes on"]

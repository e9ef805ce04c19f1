"""Worker processes that die, and whose parent dies."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from llava_jax.data.workers import WorkerError, read_ahead, write_progress
from llava_jax.errors import ConfigError


def read(number: int) -> np.ndarray:
    """A batch of two records, 2 * number and the next; that of 7 is deadly."""
    for record in (2 * number, 2 * number + 1):
        write_progress(record)
        if record == 7:
            os.kill(os.getpid(), signal.SIGKILL)
    return np.array([number])


def test_a_worker_that_dies_is_an_error_that_names_its_record():
    made = []
    with pytest.raises(WorkerError, match="exit code -9") as error:
        made.extend(batch.item() for batch in read_ahead(read, 0, 2))
    assert made == [0, 1, 2][: len(made)]  # what it had made and not sent is lost
    assert error.value.record == 7


_PARENT = """
import sys, time
sys.path.insert(0, "tests/data")
from test_workers import idle
from llava_jax.data.workers import read_ahead
if __name__ == "__main__":
    print(next(read_ahead(idle, 0, 1)).item(), flush=True)
    time.sleep(60)
"""


def idle(number: int) -> np.ndarray:
    return np.array([os.getpid()])


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks at processes in /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while _is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def large(number: int) -> dict[str, np.ndarray]:
    if number == 3:
        raise ConfigError("three")
    return {"small": np.arange(4) + number, "large": np.full((50, 50), number, np.float32)}


@pytest.mark.parametrize("most_bytes", [0, 50, 20_000])
def test_batches_are_the_same_however_they_come(most_bytes):
    """Through a pipe, in shared memory, or some arrays this way and some that."""
    made = []
    with pytest.raises(ConfigError, match="three") as error:
        made.extend(read_ahead(large, 0, 2, most_bytes=most_bytes))
    assert "In a worker process" in error.value.__notes__[0]
    assert len(made) == 3  # none of which a later one has overwritten
    for number, batch in enumerate(made):
        np.testing.assert_array_equal(batch["small"], large(number)["small"])
        np.testing.assert_array_equal(batch["large"], large(number)["large"])


class UnreadableError(Exception):
    def __init__(self, name: str, place: int):
        super().__init__(f"{name} at {place}")


def unreadable(number: int) -> np.ndarray:
    raise UnreadableError("nothing", number)


def unpicklable(number: int) -> np.ndarray:
    error = ValueError("nothing at 0")
    error.lock = threading.Lock()  # pyright: ignore[reportAttributeAccessIssue]
    raise error


@pytest.mark.parametrize(
    ("read", "name"), [(unreadable, "UnreadableError"), (unpicklable, "ValueError")]
)
def test_an_error_that_cannot_be_pickled_is_told_all_the_same(read, name):
    with pytest.raises(RuntimeError, match=f"{name}: nothing at 0") as error:
        next(read_ahead(read, 0, 1))
    assert "In a worker process" in error.value.__notes__[0]


_INTERRUPTED = """
import signal, sys
sys.path.insert(0, "tests/data")
from test_workers import idle
from llava_jax.data.workers import read_ahead
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: None)
    print("begins", flush=True)
    print(len(list(read_ahead(idle, 0, 2, stop=4))), flush=True)
"""


def test_workers_ignore_an_interrupt_while_they_start(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(_INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "begins\n"
        while parent.poll() is None:
            os.killpg(parent.pid, signal.SIGINT)
            time.sleep(0.05)
        assert parent.stdout.read() == "4\n"

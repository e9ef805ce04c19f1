"""One process at a time that writes into a directory."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tiny_run import environment

from llava_jax.distributed import lock
from llava_jax.distributed.lock import NAME, hold
from llava_jax.errors import ConfigError

LEASE = 1.5
OTHER_HOST = f"filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=a\nduration={LEASE}\n"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE", LEASE), ("HEARTBEAT", 0.2), ("TRY", 0.5)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)


HOLDER = f"""
import sys, time
from pathlib import Path
from llava_jax.distributed import lock
lock.LEASE_SECONDS, lock.HEARTBEAT_SECONDS = {LEASE}, 0.2
with lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=-1, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_says_who_is_there_until_that_one_is_killed(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    since = r"2\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    said = rf"is used by process {holder.pid} on machine \S+ since {since}\."
    for number in (None, signal.SIGSTOP):  # one that sleeps may wake up
        if number:
            holder.send_signal(number)
            time.sleep(2 * LEASE)
        with pytest.raises(ConfigError, match=said) as refused, hold(tmp_path):
            raise AssertionError
        assert f"stop it (kill {holder.pid})" in str(refused.value)
    holder.kill()
    holder.wait()
    start = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - start < 0.5
    assert capsys.readouterr().out == ""


def test_one_that_was_killed_and_whose_parent_has_not_noticed(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
):
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with hold(tmp_path):
        said = capsys.readouterr().out
        assert f"belongs to process {holder.pid}" in said
        assert "has ended, but its lock could not be taken over at once" in said


def test_one_of_another_machine_is_taken_over_when_it_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / NAME).write_text(OTHER_HOST)
    start = time.monotonic()
    with hold(tmp_path):
        assert time.monotonic() - start > LEASE
    assert "belongs to process 1 on machine elsewhere" in capsys.readouterr().out


def test_one_of_another_machine_that_works(tmp_path: Path):
    (tmp_path / NAME).write_text(OTHER_HOST + "since=2030-01-01 00:00:00 UTC\n")
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.2):
            (tmp_path / NAME).touch()

    thread = threading.Thread(target=work)
    thread.start()
    said = "process 1 on machine elsewhere since 2030-01-01"
    with pytest.raises(ConfigError, match=said) as refused, hold(tmp_path):
        raise AssertionError
    assert "kill" not in str(refused.value)  # here, that number may be a process of somebody else's
    over.set()
    thread.join()


@pytest.mark.parametrize("content", [b"", bytes(300), b"\xff\xfe"])
def test_a_damaged_lock_is_taken_over(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lock, "TRY_SECONDS", 3.0)
    (tmp_path / NAME).write_bytes(content)
    with hold(tmp_path):
        assert f"pid={os.getpid()}\n" in (tmp_path / NAME).read_text()


def test_one_that_loses_its_lock_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ended = threading.Event()
    monkeypatch.setattr(lock, "exit_now", lambda status: ended.set())
    with hold(tmp_path):
        (tmp_path / NAME).unlink()
        assert ended.wait(10)
    said = f"this process has lost the lock {tmp_path / NAME} (marker-missing"
    assert said in capsys.readouterr().err


def test_a_directory_that_nothing_was_written_into_is_removed(tmp_path: Path):
    with hold(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()
    with hold(tmp_path):
        (tmp_path / "file").touch()
    assert (tmp_path / "file").exists()
    assert not (tmp_path / NAME).exists()


def test_a_directory_that_is_removed_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The last holder removes it between two looks that making a directory takes."""
    make, calls = Path.mkdir, iter(range(9))

    def mkdir(path: Path, **more: bool) -> None:
        if next(calls) == 0:
            raise FileExistsError(path)
        make(path, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with hold(tmp_path / "new"):
        assert (tmp_path / "new" / NAME).exists()


def test_what_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), hold(tmp_path / "file"):
        raise AssertionError


def test_of_many_at_once_one_has_it(tmp_path: Path):
    """Over and over; another comes in only when the one before has gone."""
    inside, seen = [], []

    def work() -> None:
        for _ in range(5):
            with ExitStack() as stack:
                try:
                    stack.enter_context(hold(tmp_path))
                except ConfigError:
                    continue
                inside.append(1)
                seen.append(len(inside))
                time.sleep(0.01)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*seen} == {1}

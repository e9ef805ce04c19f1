"""Runs each process of a run under a parent process, which reports in one line why its child ended.

When a process of a run is lost, JAX's runtime aborts the other processes with a dump of C++ frames.
A process cannot prevent its own abort. With JAX 0.10.2, the loss of process 0 aborts the others
even with `jax_enable_recoverability`. A callback for missed heartbeats does not help, because a
collective that fails in a C++ thread also ends the process, and Python cannot catch an abort. So a
parent process reads the stderr of its child, and reports the loss in one sentence. A run of one
process has no parent process.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from llava_jax.jax_compat import is_fatal_line, lost_peer

LOST = 75
"""Exit status of a child that could not reach another process of the run. Its parent then exits
with status 1."""


def guarded(main: Callable[[], int]) -> int:
    """Runs `main` in a child process, and returns its exit status in both processes.

    The parent forwards SIGTERM to the child. It ignores SIGINT, because Ctrl-C in a terminal also
    reaches the child.

    Args:
        main: Function that runs the program and returns its exit status.

    Returns:
        Exit status of the child; 1 if the child lost another process of the run, and 128 plus the
        number of the signal if a signal ended the child.
    """
    reading, writing = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        os.close(reading)
        os.dup2(writing, sys.stderr.fileno())
        os.close(writing)
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()
        return main()
    os.close(writing)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held = _pass_on(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == LOST or (held and status == -signal.SIGABRT):
        print(
            f"error: {lost_peer(held)} has ended or cannot be reached, so this process ends too; "
            "the output of the lost process may say why. To continue, run the same command again "
            "for all processes",
            file=sys.stderr,
        )
        return 1
    if status < 0:
        cause = ", usually because memory ran out" if status == -signal.SIGKILL else ""
        print(f"error: the process was ended by signal {-status}{cause}", file=sys.stderr)
    if status <= 0:
        sys.stderr.write(held)
    return status if status >= 0 else 128 - status


def _pass_on(reading: int) -> str:
    """Copies lines to stderr until a line announces an abort; returns that and all later lines."""
    held = b""
    with open(reading, "rb") as lines:
        for line in lines:
            if held or is_fatal_line(line):
                held += line
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
    return held.decode(errors="replace")


def end_with(parent: int) -> None:
    """Waits until the parent process has ended, and then ends this process at once.

    A parent that is killed cannot end its child, so the child runs this function in a thread.

    Args:
        parent: Process id of the parent.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def exit_now(status: int) -> NoReturn:
    """Ends this process at once, without waiting for the other processes, which will notice this.

    Args:
        status: Exit status.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

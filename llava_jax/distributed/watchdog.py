"""A parent process above each process of a run, which says in one line what ended its child.

When a process of a run is lost, JAX's runtime aborts the others with a dump of C++ frames. Nothing
inside a process prevents that: with JAX 0.10.2, the loss of process 0 aborts the others even with
`jax_enable_recoverability`, a callback for missed heartbeats does not help because a collective
that fails in a C++ thread ends the process too, and Python cannot catch an abort. So a parent reads
what its child writes to stderr, and reports the loss in a sentence. A run of one process has none.
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
"""Exit status of a process that could not reach another one. Its parent then exits with 1."""


def guarded(main: Callable[[], int]) -> int:
    """Runs `main` in a child; returns its exit status, in the parent and in the child.

    Signals that are meant for the run reach it: SIGTERM is passed on, and Ctrl-C reaches all
    processes of a terminal's job.
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
            f"error: {lost_peer(held)} has ended or cannot be reached, and so this one ends; what "
            "that one printed may say why. The same command, for all of them, continues",
            file=sys.stderr,
        )
        return 1
    if status < 0:
        cause = ", usually because memory ran out" if status == -signal.SIGKILL else ""
        print(f"error: ended by signal {-status}{cause}", file=sys.stderr)
    if status <= 0:
        sys.stderr.write(held)
    return status if status >= 0 else 128 - status


def _pass_on(reading: int) -> str:
    """Passes lines on to stderr until one announces an abort; returns that one and the rest."""
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
    """Ends this process if its parent is killed, which then cannot end it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def exit_now(status: int) -> NoReturn:
    """Ends this process at once, without waiting for others; these notice."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""A process above the one that works, where a run has several: it says in a line what ended it.

When one process of a run is lost, JAX aborts the others with a dump of C++ frames, and nothing
inside a process keeps it from that. So a parent reads what its child writes to stderr.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

LOST = 75
"""Exit status of a process that could not reach another. The guard's own is then 1."""

_DOOM = (b"coordination_service", b"distributed service detected fatal errors", b"gloo::")
"""In what JAX's runtime writes when it finds that a process is lost; it aborts soon after."""


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
            f"error: {_who(held)} has ended or cannot be reached, and so this one ends; what that "
            "one printed may say why. The same command, for all of them, continues",
            file=sys.stderr,
        )
        return 1
    if status < 0:
        cause = ", mostly for want of memory" if status == -signal.SIGKILL else ""
        print(f"error: ended by signal {-status}{cause}", file=sys.stderr)
    if status <= 0:
        sys.stderr.write(held)
    return status if status >= 0 else 128 - status


def _pass_on(reading: int) -> str:
    """Passes lines on to stderr until they tell of a lost process; returns those, at the end."""
    held = b""
    with open(reading, "rb") as lines:
        for line in lines:
            if held or any(sign in line for sign in _DOOM):
                held += line
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()
    return held.decode(errors="replace")


def _who(held: str) -> str:
    """Which process JAX's message names."""
    if named := re.search(r"stopped sending heartbeats\):\s*(\d[\d\s,]*)", held):
        return f"process {', '.join(re.findall(r'[0-9]+', named[1]))} of this run (from 0)"
    if "RegisterTask" in held:
        return "JAX's service in process 0 of this run"
    if "leader task" in held:
        return "process 0 of this run (from 0)"
    return "another process of this run"


def end_with(parent: int) -> None:
    """Ends this process when its parent was killed and could not."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def exit_now(status: int) -> NoReturn:
    """Ends this process at once, without waiting for others; these notice."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""Where the processes of a run meet before JAX joins them, so that each learns who is missing.

JAX's own service waits without a message and then aborts its process. So process 0 listens at the
coordinator's address until all processes have come, and only then leaves the port to JAX.
"""

import contextlib
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable

from llava_jax.disk import Json
from llava_jax.errors import ConfigError

WAIT_SECONDS = 300
"""The longest time that a process waits for the others."""

FIRST_LINE_SECONDS, LINE_SECONDS = 15, 60
"""A process that waits says so after the first of these, and then in intervals of the second."""

_TRY_SECONDS, _ACCEPT_SECONDS, _PAUSE_SECONDS = 5, 1, 0.1
_MAX_LINE = 4096
"""Bytes of the longest message that is read."""


class Lines:
    """Says what is waited for, not too often."""

    def __init__(self):
        self._started = time.monotonic()
        self._next = FIRST_LINE_SECONDS

    @property
    def seconds(self) -> float:
        """Since the wait began."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Prints the text if a line is due."""
        if self.seconds >= self._next:
            print(f"waiting for {text}", file=sys.stderr, flush=True)
            self._next = self.seconds + LINE_SECONDS


def meet_at(address: str, count: int, number: int) -> None:
    """Returns when all processes of a run have come to an address.

    Args:
        address: host:port, where process 0 runs.
        count: Processes of the run.
        number: The number of this process, from 0.

    Raises:
        ConfigError: Process 0 cannot be reached there, or not every process comes exactly once.
    """
    host, port = _split(address)
    problem = None if 0 <= number < count else _out_of_range(number, count)
    if number == 0:
        try:
            listener = _listen(port)
            threading.Thread(
                target=_receive_all, args=(listener, address, count), daemon=True
            ).start()
        except OSError as error:
            problem = (
                f"process 0 of this run cannot listen on port {port}: {error.strerror}. Give each "
                "process a JAX_PROCESS_ID of its own, or take another port for all"
            )
    lines = Lines()
    while True:
        reason = _report(host, port, count, number)
        if reason is None:
            return
        if problem is not None and lines.seconds > _TRY_SECONDS:  # nobody else can be informed
            raise ConfigError(problem)
        if lines.seconds > WAIT_SECONDS:
            raise ConfigError(
                f"process 0 of this run could not be reached at {address} for {WAIT_SECONDS} s: "
                f"{reason}. Start it there, let its port through firewalls, and give all processes "
                "its address (JAX_COORDINATOR_ADDRESS)"
            )
        lines.say(f"process 0 of this run at {address}: {reason}")
        time.sleep(_PAUSE_SECONDS)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"the address of process 0 is {address!r}, but must be host:port, such as "
            "10.0.0.1:1234; set JAX_COORDINATOR_ADDRESS"
        )
    return host.strip("[]"), int(port)


def _out_of_range(number: int, count: int) -> str:
    return (
        f"process {number} of {count}: numbers go from 0 to {count - 1}; set JAX_PROCESS_ID and "
        "JAX_NUM_PROCESSES"
    )


def _report(host: str, port: int, count: int, number: int) -> str | None:
    """Reports to process 0 and waits for its answer; says why there is none.

    Raises:
        ConfigError: Process 0 says what is wrong.
    """
    hello = {"count": count, "number": number, "where": f"{platform.node()}, pid {os.getpid()}"}
    try:
        with socket.create_connection((host, port), _TRY_SECONDS) as connection:
            _send(connection, hello)
            connection.settimeout(WAIT_SECONDS + _TRY_SECONDS)  # process 0 ends its wait before
            error = _receive(connection)["error"]
    except OSError as failure:
        return failure.strerror or str(failure)
    except (ValueError, KeyError):
        return "what answers there does not wait for processes; does a run go on there already?"
    if error is not None:
        raise ConfigError(error)
    return None


def _send(connection: socket.socket, message: Json) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Json:
    with connection.makefile("rb") as file:
        message = json.loads(file.readline(_MAX_LINE))
    if not isinstance(message, dict):
        raise ValueError(message)
    return message


def _listen(port: int) -> socket.socket:
    host = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    if host not in ("", "::"):
        return socket.create_server((host, port))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _receive_all(listener: socket.socket, address: str, count: int) -> None:
    """What process 0 does beside its own report: hears all, and answers when it knows."""
    came: dict[int, tuple[socket.socket, str]] = {}
    heard: list[socket.socket] = []
    error, until, lines = None, WAIT_SECONDS, Lines()
    listener.settimeout(_ACCEPT_SECONDS)
    with listener:  # closed before anyone is answered, for JAX needs the port next
        while (error or len(came) < count) and lines.seconds < until:
            lines.say(f"the processes of this run: {_state(came, count, address)}")
            try:
                found = _admit(listener.accept()[0], count, came, heard)
            except (OSError, ValueError, KeyError, TypeError):  # nobody came, or it was a stranger
                continue
            if found and error is None:
                error, until = found, lines.seconds + _TRY_SECONDS  # so that all learn of it
    if error is None and len(came) < count:
        error = (
            f"after {WAIT_SECONDS} s, {_state(came, count, address)}. Start all, and give them one "
            "address (JAX_COORDINATOR_ADDRESS), one count (JAX_NUM_PROCESSES) and a number each "
            "(JAX_PROCESS_ID)"
        )
    first = came.get(0, (None,))[0]  # comes last: this process may end as soon as it hears
    for connection in sorted(heard, key=lambda connection: connection is first):
        with contextlib.suppress(OSError), connection:
            _send(connection, {"error": error})


def _state(came: Collection[int], count: int, address: str) -> str:
    missing = listed(number for number in range(count) if number not in came)
    return f"{len(came)} of {count} have come to {address}, but not number {missing}"


def listed(numbers: Iterable[int], most: int = 8) -> str:
    """Numbers of processes as text, not too many."""
    first = list(map(str, numbers))
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return ", ".join(first[:most]) + more


def _admit(
    connection: socket.socket,
    count: int,
    came: dict[int, tuple[socket.socket, str]],
    heard: list[socket.socket],
) -> str | None:
    """Hears one process; says what is wrong with it."""
    connection.settimeout(_TRY_SECONDS)
    try:
        hello = _receive(connection)
        number, theirs, where = int(hello["number"]), int(hello["count"]), str(hello["where"])
    except BaseException:
        connection.close()
        raise
    heard.append(connection)
    if theirs != count:
        return (
            f"process {number} ({where}) is one of {theirs} processes, process 0 one of {count}; "
            "set the same JAX_NUM_PROCESSES for all"
        )
    if not 0 <= number < count:
        return f"{where}: {_out_of_range(number, count)}"
    if number in came and not _has_left(came[number][0]):
        return (
            f"two processes have the number {number}: {came[number][1]}, and {where}; give each "
            "a JAX_PROCESS_ID of its own"
        )
    came[number] = connection, where
    return None


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_TRY_SECONDS)

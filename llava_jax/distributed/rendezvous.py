"""Waits for all processes of a run before JAX joins them, and reports missing processes.

JAX's own service waits without a message and then aborts the process. So process 0 listens at the
coordinator's address until all processes have reported, and only then frees the port for JAX.
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
"""Longest time in seconds that a process waits for the other processes."""

FIRST_LINE_SECONDS, LINE_SECONDS = 15, 60
"""Seconds after which a waiting process prints its first line, and seconds between the lines that
follow."""

_TRY_SECONDS, _ACCEPT_SECONDS, _PAUSE_SECONDS = 5, 1, 0.1
_MAX_LINE = 4096
"""Largest number of bytes that are read from a message."""


class Lines:
    """Prints at intervals what a process is waiting for."""

    def __init__(self):
        self._started = time.monotonic()
        self._next = FIRST_LINE_SECONDS

    @property
    def seconds(self) -> float:
        """Returns the number of seconds since the wait began."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Prints "waiting for {text}", unless the last line was printed a short time ago."""
        if self.seconds >= self._next:
            print(f"waiting for {text}", file=sys.stderr, flush=True)
            self._next = self.seconds + LINE_SECONDS


def meet_at(address: str, count: int, number: int) -> None:
    """Waits until all processes of a run have reported to process 0.

    Args:
        address: Address of process 0, as host:port.
        count: Number of processes of the run.
        number: Number of this process, from 0.

    Raises:
        ConfigError: Process 0 cannot be reached at the address, or a process is missing, uses the
            number of another process, or expects a different number of processes.
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
                "process a different JAX_PROCESS_ID, or use another port for all processes"
            )
    lines = Lines()
    while True:
        reason = _report(host, port, count, number)
        if reason is None:
            return
        if problem is not None and lines.seconds > _TRY_SECONDS:  # no other process 0 answers
            raise ConfigError(problem)
        if lines.seconds > WAIT_SECONDS:
            raise ConfigError(
                f"process 0 of this run could not be reached at {address} for {WAIT_SECONDS} s: "
                f"{reason}. Start process 0 there, open its port in firewalls, and give all "
                "processes its address (JAX_COORDINATOR_ADDRESS)"
            )
        lines.say(f"process 0 of this run at {address}: {reason}")
        time.sleep(_PAUSE_SECONDS)


def _split(address: str) -> tuple[str, int]:
    """Splits an address into host and port; raises ConfigError if one is missing or invalid."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"the address of process 0 is {address!r}, but must be host:port, for example "
            "10.0.0.1:1234; set JAX_COORDINATOR_ADDRESS"
        )
    return host.strip("[]"), int(port)


def _out_of_range(number: int, count: int) -> str:
    """Returns the error message for a process number that is too high or negative."""
    return (
        f"the process number {number} is not in the range 0 to {count - 1}; set JAX_PROCESS_ID and "
        "JAX_NUM_PROCESSES"
    )


def _report(host: str, port: int, count: int, number: int) -> str | None:
    """Reports to process 0 and waits for the answer; returns the reason if there is no answer.

    Raises:
        ConfigError: Process 0 answers with an error.
    """
    hello = {"count": count, "number": number, "where": f"{platform.node()}, pid {os.getpid()}"}
    try:
        with socket.create_connection((host, port), _TRY_SECONDS) as connection:
            _send(connection, hello)
            connection.settimeout(WAIT_SECONDS + _TRY_SECONDS)  # process 0 stops waiting earlier
            error = _receive(connection)["error"]
    except OSError as failure:
        return failure.strerror or str(failure)
    except (ValueError, KeyError):
        return "another program answers there; check whether another run uses the port"
    if error is not None:
        raise ConfigError(error)
    return None


def _send(connection: socket.socket, message: Json) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> Json:
    """Reads a message; raises ValueError unless it is a JSON object."""
    with connection.makefile("rb") as file:
        message = json.loads(file.readline(_MAX_LINE))
    if not isinstance(message, dict):
        raise ValueError(message)
    return message


def _listen(port: int) -> socket.socket:
    """Listens on a port, at the address in JAX_COORDINATOR_BIND_ADDRESS or at all addresses."""
    host = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")[0].strip("[]")
    if host not in ("", "::"):
        return socket.create_server((host, port))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _receive_all(listener: socket.socket, address: str, count: int) -> None:
    """Collects the reports of all processes, in a thread of process 0, and answers them."""
    came: dict[int, tuple[socket.socket, str]] = {}
    heard: list[socket.socket] = []
    error, until, lines = None, WAIT_SECONDS, Lines()
    listener.settimeout(_ACCEPT_SECONDS)
    with listener:  # closed before the answers, because JAX needs the port next
        while (error or len(came) < count) and lines.seconds < until:
            lines.say(f"the processes of this run: {_state(came, count, address)}")
            try:
                found = _admit(listener.accept()[0], count, came, heard)
            except (OSError, ValueError, KeyError, TypeError):  # no connection, or an invalid one
                continue
            if found and error is None:
                error, until = found, lines.seconds + _TRY_SECONDS  # time for other reports
    if error is None and len(came) < count:
        error = (
            f"after {WAIT_SECONDS} s, {_state(came, count, address)}. Start all processes, with "
            "the same address (JAX_COORDINATOR_ADDRESS), the same count (JAX_NUM_PROCESSES) and "
            "different numbers (JAX_PROCESS_ID)"
        )
    # Process 0 is answered last, because it may end as soon as it has the answer.
    first = came.get(0, (None,))[0]
    for connection in sorted(heard, key=lambda connection: connection is first):
        with contextlib.suppress(OSError), connection:
            _send(connection, {"error": error})


def _state(came: Collection[int], count: int, address: str) -> str:
    """Describes how many processes have reported, and which processes are missing."""
    missing = listed(number for number in range(count) if number not in came)
    return (
        f"{len(came)} of {count} processes have connected to {address}, but not process {missing}"
    )


def listed(numbers: Iterable[int], most: int = 8) -> str:
    """Formats process numbers as text: the first `most` numbers, and a count of the others."""
    first = list(map(str, numbers))
    more = f" and {len(first) - most} more" if len(first) > most else ""
    return ", ".join(first[:most]) + more


def _admit(
    connection: socket.socket,
    count: int,
    came: dict[int, tuple[socket.socket, str]],
    heard: list[socket.socket],
) -> str | None:
    """Reads the report of one process; returns an error message if the report is wrong."""
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
            f"process {number} ({where}) expects {theirs} processes, but process 0 expects "
            f"{count}; set the same JAX_NUM_PROCESSES for all processes"
        )
    if not 0 <= number < count:
        return f"{where}: {_out_of_range(number, count)}"
    if number in came and not _has_left(came[number][0]):
        return (
            f"two processes have the number {number}: {came[number][1]}, and {where}; give each "
            "process a different JAX_PROCESS_ID"
        )
    came[number] = connection, where
    return None


def _has_left(connection: socket.socket) -> bool:
    """Returns True if the other end has closed the connection."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_TRY_SECONDS)

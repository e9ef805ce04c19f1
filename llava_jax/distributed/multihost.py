"""Connects the processes of a run, which execute the same program, each on its own devices.

The processes exchange texts and numbers through JAX's coordination service, which does not use the
devices. All functions also work in a run of one process.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from llava_jax.distributed.environment import is_multiprocess, limit_pinned_memory
from llava_jax.distributed.rendezvous import WAIT_SECONDS, Lines, listed, meet_at
from llava_jax.distributed.watchdog import LOST, exit_now
from llava_jax.errors import ConfigError, RunError
from llava_jax.jax_compat import (
    CoordinationClient,
    find_cluster,
    is_lost_peer,
    is_timeout,
    process_state,
)

HEARTBEAT_SECONDS = int(os.environ.get("LLAVA_JAX_HEARTBEAT_SECONDS", "60"))
"""Seconds without a heartbeat after which a process counts as lost and the other processes end."""

JOIN_SECONDS = 60
"""Longest time in seconds that JAX may take to join the processes after they have met."""

SHUTDOWN_SECONDS = 600
"""Longest time in seconds that a process waits for slower processes at the end of a run. It does
not wait for lost processes."""

END_SECONDS = 10
"""Longest time in seconds that a process with an error waits for the other processes, which may
have the same error."""

Value = TypeVar("Value")
"""A value that can be written as JSON; tuples become lists."""

_ENDED = "llava_jax/ended/"
"""Prefix of the keys under which processes publish why they end. A key is the prefix and the number
of the process."""


def join() -> None:
    """Joins the other processes of the run, if the environment names several processes.

    JAX finds the processes by itself under SLURM (srun), Open MPI, on TPU slices and in Kubernetes'
    indexed jobs. Elsewhere, each process needs the variables JAX_COORDINATOR_ADDRESS (host:port of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call this function before JAX is used.

    Raises:
        ConfigError: A value in the environment is missing or wrong, or a process does not join.
    """
    if jax.distributed.is_initialized() or not is_multiprocess():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    try:
        address, count, number = find_cluster(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _number("JAX_NUM_PROCESSES"),
            _number("JAX_PROCESS_ID"),
            WAIT_SECONDS,
        )
        if address is None or count is None or number is None:
            given = f"the address of process 0 is {address}, the number of processes is {count}, "
            given += f"and the number of this process is {number}."
            raise ValueError(given.replace("None", "unknown"))
        if count > 1:
            meet_at(address, count, number)
        # Without this, JAX's client would use the proxy that the environment sets for downloads.
        os.environ.setdefault("no_grpc_proxy", address.rpartition(":")[0].strip("[]"))
        jax.config.update("jax_check_proxy_envs", False)
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError, LookupError, OSError) as error:
        raise ConfigError(
            f"the environment names several processes, but they cannot be connected: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process, or "
            "JAX_NUM_PROCESSES=1 for a run of one process"
        ) from error
    limit_pinned_memory(processes_of_machine())


def _number(name: str) -> int | None:
    """Reads an integer from an environment variable; returns None if the variable is not set."""
    text = os.environ.get(name)
    if text is not None and not re.fullmatch(r"-?[0-9]+", text):
        raise ConfigError(f"{name}={text!r} is not an integer")
    return None if text is None else int(text)


def say(text: str) -> None:
    """Prints a line of text in process 0, and nothing in other processes."""
    if is_main_process():
        print(text, flush=True)


def is_main_process() -> bool:
    """Returns True if this process is process 0, which prints and writes the run's text files."""
    return process_state().process_id == 0


def is_alone() -> bool:
    """Returns True if this process is the only process of the run."""
    return process_state().num_processes == 1


def local_devices() -> int:
    """Returns the number of devices of this process.

    Raises:
        ConfigError: JAX cannot use these devices, or cannot connect them to the devices of other
            processes.
    """
    try:
        return jax.local_device_count()
    except RuntimeError as error:
        raise ConfigError(f"JAX cannot use the devices of all processes: {error}") from error


def report_and_exit(message: str, status: int = 1) -> int:
    """Prints why the run ends; if all processes have the same message, only process 0 prints it.

    If the other processes do not end too, this process publishes its message for the other
    processes, and exits without returning.

    Args:
        message: Message to print.
        status: Exit status.

    Returns:
        The exit status.
    """
    state = process_state()
    if state.client is None:
        print(message, file=sys.stderr)
        return status
    try:
        state.client.key_value_set(f"{_ENDED}{state.process_id}", message)
        # All processes find most errors at about the same time. If process 0 did not wait for the
        # others, JAX's service would end with process 0, and the others would report this instead.
        state.client.wait_at_barrier("all end", 1000 * END_SECONDS)
        is_said = state.client.key_value_try_get(f"{_ENDED}0") == message
    except jax.errors.JaxRuntimeError:  # others continue, or process 0 is lost
        print(message, file=sys.stderr)
        exit_now(status)
    if is_main_process() or not is_said:
        print(message, file=sys.stderr)
    jax.distributed.shutdown()  # together: a process that leaves earlier counts as lost
    return status


def leave_others() -> NoReturn:
    """Ends this process because another process is lost.

    If the lost process left a message, this process prints the message and exits with status 1;
    otherwise, this process exits with the status `LOST`.
    """
    client = process_state().client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if client is not None and (message := _message_of_ended(client)):
            print(f"error: {message}", file=sys.stderr)
            exit_now(1)
    exit_now(LOST)


def _message_of_ended(client: CoordinationClient) -> str | None:
    """Returns the message that an ended process left, or None if no process has left one."""
    for name, message in client.key_value_dir_get(_ENDED):
        number = name.removeprefix(_ENDED)
        ended = f"process {number} of this run (counted from 0) has ended"
        return f"{ended}, so all processes end. {message}"
    return None


def is_lost(error: BaseException | None) -> bool:
    """Returns True if an error or its cause says that another process could not be reached."""
    while error is not None:
        # XLA's errors have one of these two types.
        if isinstance(error, RuntimeError | ValueError) and is_lost_peer(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def rows_here(sharding: NamedSharding, size: int) -> list[int]:
    """Returns the indices of the batch rows on the devices of this process, in ascending order.

    A process passes these rows to `jax.make_array_from_process_local_data`.

    Args:
        sharding: Sharding of the rows over all devices.
        size: Number of rows of the whole batch.
    """
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for index in slices if index for row in range(size)[index[0]]})


def all_reduce_max(values: Callable[[], Sequence[int]]) -> Callable[[], list[int]]:
    """Starts to compute the maximum of each value over all processes; all processes must call this.

    Args:
        values: Function that returns the int32 values of this process. With several processes, the
            function is called at once, so that the maximum is computed in the background. In a run
            of one process, the function is called when the result is requested.

    Returns:
        Function that waits for the maximum of each value and returns the list of maxima.
    """
    if jax.process_count() == 1:
        return lambda: list(values())
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    own = np.tile(np.array(values(), np.int32), (jax.local_device_count(), 1))
    shape = (mesh.size, own.shape[1])
    answer = _highest(jax.make_array_from_process_local_data(sharding, own, shape))
    return lambda: np.asarray(answer).tolist()


@jax.jit
def _highest(values: Int32[Array, "devices n"]) -> Int32[Array, " n"]:
    return jnp.max(values, 0)


_exchanges = itertools.count()


def all_gather_values(value: Value) -> list[Value]:
    """Returns the values of all processes, ordered by process number; all processes must call this.

    Args:
        value: Value of this process; it must be possible to write it as JSON.

    Raises:
        RunError: A process has ended without calling this function; the error quotes the message of
            that process.
    """
    state = process_state()
    if state.client is None:
        return [value]
    key = f"llava_jax/{next(_exchanges)}/"
    state.client.key_value_set(f"{key}{state.process_id}", json.dumps(value))
    if state.process_id == 0:
        values = [_wait_for(f"{key}{number}") for number in range(state.num_processes)]
        state.client.key_value_set(f"{key}all", f"[{','.join(values)}]")
    return json.loads(_wait_for(f"{key}all"))


def _wait_for(key: str) -> str:
    """Waits until a text is published, and returns it.

    If a process is lost in the meantime, JAX ends this process.
    """
    client, lines = process_state().client, Lines()
    assert client is not None
    while True:
        try:
            return client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if not is_timeout(error):
                raise
        if message := _message_of_ended(client):
            raise RunError(message)
        if is_main_process():
            lines.say(f"process {key.rsplit('/', 1)[1]} of this run, which is slower")


def broadcast_from_main(value: Value) -> Value:
    """Returns the value of process 0; all processes must call this."""
    return all_gather_values(value)[0]


def processes_of_machine() -> int:
    """Returns the number of the run's processes on this machine; all processes must call this."""
    return all_gather_values(platform.node()).count(platform.node())


def barrier() -> None:
    """Waits until all processes have called this function."""
    all_gather_values(None)


def differences(facts: dict[str, object]) -> list[str]:
    """Compares facts between all processes; all processes must call this.

    Args:
        facts: Values by name; it must be possible to write them as JSON.

    Returns:
        For each fact, one line of text per value that differs from the value of process 0.
    """
    facts = dict(json.loads(json.dumps(facts)))
    first = broadcast_from_main(facts if is_main_process() else {})
    own = {name: facts.get(name) for name in first | facts if facts.get(name) != first.get(name)}
    others: dict[tuple[str, str], list[int]] = {}
    for number, differing in enumerate(all_gather_values(own)):
        for name, value in differing.items():
            others.setdefault((name, repr(value)), []).append(number)
    return [
        f"  {name}: {first.get(name)!r} in process 0, {value} in process {listed(numbers)}"
        for (name, value), numbers in others.items()
    ]


def this_process() -> str:
    """Describes this process by its number, for messages."""
    state = process_state()
    return f"process {state.process_id} of {state.num_processes} (counted from 0)"

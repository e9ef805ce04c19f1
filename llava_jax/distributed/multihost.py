"""Several processes that run one program, each on some of the devices.

Texts and numbers that all processes must know go through JAX's coordination service, which needs
neither devices nor equal programs. A process that is alone may call everything here too.
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

from llava_jax.distributed.environment import is_multiprocess
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
"""A process that sends no heartbeat for so long counts as lost, and the others end."""

JOIN_SECONDS = 60
"""The longest time that JAX takes to join the processes once all have come."""

SHUTDOWN_SECONDS = 600
"""The longest wait for slower processes at the end of a run; nobody waits for a lost one."""

END_SECONDS = 10
"""A process that ends with an error waits so long for others that end with the same one."""

Value = TypeVar("Value")
"""What JSON can hold; a tuple comes back as a list."""

_ENDED = "llava_jax/ended/"
"""The prefix of the keys under which a process that ends publishes why, one for each number."""


def join() -> None:
    """Joins the other processes of the run, if the environment names any.

    JAX finds them by itself under SLURM (srun), Open MPI, on TPU slices and in Kubernetes' indexed
    jobs. Elsewhere, each process needs the variables JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID. This must be called before JAX is used.

    Raises:
        ConfigError: The environment does not say enough, or not all processes come.
    """
    if jax.distributed.is_initialized() or not is_multiprocess():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        address, count, number = find_cluster(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _number("JAX_NUM_PROCESSES"),
            _number("JAX_PROCESS_ID"),
            WAIT_SECONDS,
        )
        if address is None or count is None or number is None:
            given = f"address {address}, {count} processes, process {number}"
            raise ValueError(f"{given.replace('None', 'unknown')}.")
        if count > 1:
            meet_at(address, count, number)
        # Otherwise JAX's client uses the proxy that the environment names for downloads.
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
            f"the environment names several processes, but they cannot be joined: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process, or "
            "JAX_NUM_PROCESSES=1 for a run of one process"
        ) from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not re.fullmatch(r"-?[0-9]+", text):
        raise ConfigError(f"{name}={text!r} is not a number")
    return None if text is None else int(text)


def say(text: str) -> None:
    """Prints a line, in the first process alone."""
    if is_main_process():
        print(text, flush=True)


def is_main_process() -> bool:
    """Whether this process is number 0, which prints and writes the run's text files."""
    return process_state().process_id == 0


def is_alone() -> bool:
    """Whether this is the only process of the run."""
    return process_state().num_processes == 1


def local_devices() -> int:
    """The number of devices of this process.

    Raises:
        ConfigError: JAX cannot use them, or not together with those of the other processes.
    """
    try:
        return jax.local_device_count()
    except RuntimeError as error:
        raise ConfigError(f"JAX cannot use the devices of all processes: {error}") from error


def report_and_exit(message: str, status: int = 1) -> int:
    """Prints why a run ends, once if all processes say the same; returns the exit status.

    A process that ends while the others do not exits here, and leaves its message to them.
    """
    state = process_state()
    if state.client is None:
        print(message, file=sys.stderr)
        return status
    try:
        state.client.key_value_set(f"{_ENDED}{state.process_id}", message)
        # Most mistakes are found by all processes at about the same time. If process 0 did not wait
        # for the others, it would take JAX's service with it, and they would report its loss.
        state.client.wait_at_barrier("all end", 1000 * END_SECONDS)
        is_said = state.client.key_value_try_get(f"{_ENDED}0") == message
    except jax.errors.JaxRuntimeError:  # others go on, or process 0 and its service are lost
        print(message, file=sys.stderr)
        exit_now(status)
    if is_main_process() or not is_said:
        print(message, file=sys.stderr)
    jax.distributed.shutdown()  # all together: a process that left before would count as lost
    return status


def leave_others() -> NoReturn:
    """Ends this process because another one is lost; quotes the message that this one left."""
    client = process_state().client
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if client is not None and (message := _message_of_ended(client)):
            print(f"error: {message}", file=sys.stderr)
            exit_now(1)
    exit_now(LOST)


def _message_of_ended(client: CoordinationClient) -> str | None:
    """The message that a process left which has ended; None if all go on."""
    for name, message in client.key_value_dir_get(_ENDED):
        number = name.removeprefix(_ENDED)
        return f"process {number} of this run (from 0) has ended, so all do. {message}"
    return None


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another process could not be reached."""
    while error is not None:
        # XLA's errors arrive as one of these two types.
        if isinstance(error, RuntimeError | ValueError) and is_lost_peer(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def rows_here(sharding: NamedSharding, size: int) -> list[int]:
    """The numbers of the rows that this process' devices hold, in order.

    A process gives these rows to `jax.make_array_from_process_local_data`.

    Args:
        sharding: How the rows are divided among all devices.
        size: Number of rows of all processes.
    """
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for index in slices if index for row in range(size)[index[0]]})


def all_reduce_max(values: Callable[[], Sequence[int]]) -> Callable[[], list[int]]:
    """Starts to compute the highest of each value among all processes, which must all call this.

    Args:
        values: Gives this process' values. With several processes it is called at once, because
            the result must be on its way while the devices work; a process that is alone calls it
            when the result is asked for.

    Returns:
        A function that waits for the result and returns it.
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
    """Gathers a value of each process, in the order of their numbers; all must call this.

    Args:
        value: Anything that JSON can hold.

    Raises:
        RunError: A process ended instead of calling this; quotes its message.
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
    """Waits for a published text, as long as all processes live; JAX ends this one otherwise."""
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
    """Returns the value of process 0; all must call this."""
    return all_gather_values(value)[0]


def devices_of_machine() -> int:
    """The number of this run's devices on this process' machine; all must call this."""
    return all_gather_values(platform.node()).count(platform.node()) * jax.local_device_count()


def barrier() -> None:
    """Waits until all processes have called this."""
    all_gather_values(None)


def differences(facts: dict[str, object]) -> list[str]:
    """Compares facts among all processes, which must all call this; a line for each difference.

    Args:
        facts: Values by name that JSON can hold.
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
    """This process' number, for messages."""
    state = process_state()
    return f"process {state.process_id} of {state.num_processes} (from 0)"

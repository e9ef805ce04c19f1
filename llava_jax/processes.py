"""Several processes that run one program, each on some of the devices.

Everything here is trivial for a process that is alone.
"""

import contextlib
import io
import os
import platform
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # no public function meets without computing
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from llava_jax.config import ConfigError
from llava_jax.environment import has_others
from llava_jax.guard import leave

HEARTBEAT_SECONDS = int(os.environ.get("LLAVA_JAX_HEARTBEAT_SECONDS", "60"))
"""A process not heard of for so long is lost, and the others end."""

SHUTDOWN_SECONDS = 600
"""Longest wait, at a good end, for slower processes; one that is lost is not waited for."""

END_SECONDS = 10
"""A mistake of all processes is found by all of them in so long."""


def join() -> None:
    """Joins the other processes of the run, if the environment tells of any.

    JAX finds them by itself under SLURM (srun), Open MPI, on TPU slices and in Kubernetes' indexed
    jobs. Elsewhere, each process has JAX_COORDINATOR_ADDRESS (host:port of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Must come before JAX is used.

    Raises:
        ConfigError: The environment does not say enough, or they do not come.
    """
    if jax.distributed.is_initialized() or not has_others():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    try:
        jax.distributed.initialize(
            num_processes=number("JAX_NUM_PROCESSES"),
            process_id=number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the environment tells of several processes, but they cannot be joined: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or "
            "JAX_NUM_PROCESSES=1 for a run of one"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes text and speaks."""
    return distributed.global_state.process_id == 0


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Where all may end at once, by a mistake or by `--help`: what they say then is said once.

    Only those who end join the others for it, so a command line is read before JAX is started.

    Raises:
        ConfigError: They cannot be joined.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except ConfigError as error:
        join()
        sys.exit(end(f"error: {error}"))
    except SystemExit as error:
        join()
        sys.exit(end(said.getvalue(), error.code if isinstance(error.code, int) else 1))


def end(said: str, status: int = 1) -> int:
    """Says why a run ends, once if it is for all processes; returns the exit status."""
    together = all_end()
    if is_first() or not together:
        print(said, file=sys.stderr)
    if not together:
        leave(status)
    return status


def all_end() -> bool:
    """Waits whether all processes come here, and so end together; one that is alone does."""
    client = distributed.global_state.client
    try:
        if client is not None:
            client.wait_at_barrier("all end", 1000 * END_SECONDS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process could not be reached."""
    return re.search("gloo|nccl", str(error), re.IGNORECASE) is not None


def rows_here(sharding: NamedSharding, size: int) -> list[int]:
    """Those of `size` rows, spread over devices, that this process' devices have; in order."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for index in slices if index for row in range(size)[index[0]]})


def place_rows(
    values: np.ndarray, sharding: NamedSharding, rows: Sequence[int], size: int
) -> jax.Array:
    """An array of `size` rows on all devices, of which this process has but its own.

    Args:
        values: [rows, ...]. This process' rows.
        sharding: Along rows alone.
        rows: Their numbers, from `rows_here`.
        size: Of all processes' rows.
    """

    def shard(index: Any) -> np.ndarray:
        wanted = range(size)[index[0]]
        start = int(np.searchsorted(rows, wanted.start))
        return values[start : start + len(wanted)]

    return jax.make_array_from_callback((size, *values.shape[1:]), sharding, shard)


def highest_of(value: Callable[[], int]) -> Callable[[], int]:
    """Asks all processes, which must all ask, for the highest of their values.

    Returns:
        The answer, when it is called; until then nothing waits. It is of the moment of asking, and
        for a process that is alone of the moment of the call.
    """
    if jax.process_count() == 1:
        return value
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    rows = rows_here(sharding, mesh.size)
    answer = _highest(place_rows(np.full(len(rows), value(), np.int32), sharding, rows, mesh.size))
    return lambda: int(answer)


@jax.jit
def _highest(values: Int32[Array, " devices"]) -> Int32[Array, ""]:
    return jnp.max(values)


def of_all(value: int) -> list[int]:
    """What each process says, in their order; all must ask. Up to 64 bits."""
    if jax.process_count() == 1:
        return [value]
    halves = np.array([value], np.int64).view(np.int32)
    told = np.ascontiguousarray(multihost_utils.process_allgather(halves), np.int32)
    return told.reshape(-1).view(np.int64).tolist()


def from_first(value: int) -> int:
    """What the first process says; all must ask."""
    return of_all(value)[0]


def devices_of_machine() -> int:
    """This run's devices that share this process' machine; all processes must ask."""
    machine = zlib.crc32(platform.node().encode())
    return of_all(machine).count(machine) * jax.local_device_count()


def meet() -> None:
    """Waits until all processes are here."""
    of_all(0)

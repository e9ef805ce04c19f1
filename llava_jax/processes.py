"""Several processes that run one program, each on some of the devices.

Everything here is trivial for a process that is alone.
"""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

HEARTBEAT_SECONDS = 60
"""A process not heard of for so long is lost, and the others end."""

SHUTDOWN_SECONDS = 60
"""Longest wait, at the end, for processes that are slower."""


def join() -> None:
    """Joins the other processes of the run, if the environment tells of any.

    JAX finds them by itself under SLURM (srun), Open MPI, on TPU slices and in Kubernetes' indexed
    jobs. Elsewhere, each process has JAX_COORDINATOR_ADDRESS (host:port of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Must come before JAX is used.
    """
    if jax.distributed.is_initialized() or not _has_others():
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"),
        process_id=number("JAX_PROCESS_ID"),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def _has_others() -> bool:
    has = os.environ.get
    in_tpu_vm = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))) and find_spec("libtpu")
    return (
        bool(has("JAX_COORDINATOR_ADDRESS"))
        or ("SLURM_STEP_NODELIST" in os.environ and int(has("SLURM_NTASKS", "1")) > 1)
        or int(has("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in has("TPU_WORKER_HOSTNAMES", "")
        or "JOB_COMPLETION_INDEX" in os.environ
        or bool(in_tpu_vm)
    )


def is_first() -> bool:
    """Whether this process is the one that writes text and speaks."""
    return jax.process_index() == 0


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


def any_of(flag: Callable[[], bool]) -> Callable[[], bool]:
    """Asks all processes, which must all ask: whether the flag of any is set.

    Returns:
        The answer, when it is called; until then nothing waits. It is of the moment of asking, and
        for a process that is alone of the moment of the call.
    """
    if jax.process_count() == 1:
        return flag
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    rows = rows_here(sharding, mesh.size)
    answer = _any(place_rows(np.full(len(rows), flag()), sharding, rows, mesh.size))
    return lambda: bool(answer)


@jax.jit
def _any(flags: Bool[Array, " devices"]) -> Bool[Array, ""]:
    return jnp.any(flags)


def from_first(value: int) -> int:
    """What the first process says; all must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def meet(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

"""Several processes that run one program, each on some of the devices.

Everything here is trivial for a process that is alone.
"""

import contextlib
import io
import itertools
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # no public function meets without computing
from jax._src.clusters import ClusterEnv  # nor finds a cluster's processes without joining them
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from llava_jax.distributed.environment import is_multiprocess
from llava_jax.distributed.rendezvous import WAIT_SECONDS, Lines, listed, meet_at
from llava_jax.distributed.watchdog import LOST, exit_now
from llava_jax.errors import ConfigError, RunError

HEARTBEAT_SECONDS = int(os.environ.get("LLAVA_JAX_HEARTBEAT_SECONDS", "60"))
"""A process not heard of for so long is lost, and the others end."""

JOIN_SECONDS = 60
"""JAX joins processes that have all come in so long."""

SHUTDOWN_SECONDS = 600
"""Longest wait, at a good end, for slower processes; one that is lost is not waited for."""

END_SECONDS = 10
"""A mistake of all processes is found by all of them in so long."""

_ENDED = "llava_jax/ended/"
"""Below it, by its number, is what a process said that ended before the others."""


def join() -> None:
    """Joins the other processes of the run, if the environment tells of any.

    JAX finds them by itself under SLURM (srun), Open MPI, on TPU slices and in Kubernetes' indexed
    jobs. Elsewhere, each process has JAX_COORDINATOR_ADDRESS (host:port of the first),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. Must come before JAX is used.

    Raises:
        ConfigError: The environment does not say enough, or they do not come.
    """
    if jax.distributed.is_initialized() or not is_multiprocess():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _number("JAX_NUM_PROCESSES"),
            _number("JAX_PROCESS_ID"),
            local_device_ids=None,
            cluster_detection_method=None,
            initialization_timeout=WAIT_SECONDS,
        )
        if address is None or count is None or number is None:
            given = f"address {address}, {count} processes, process {number}"
            raise ValueError(f"{given.replace('None', 'unknown')}.")
        if count > 1:
            meet_at(address, count, number)
        # JAX's client would go through a proxy that the environment has for downloads.
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
            f"the environment tells of several processes, but they cannot be joined: {error} Set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or "
            "JAX_NUM_PROCESSES=1 for a run of one"
        ) from error


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not re.fullmatch(r"-?[0-9]+", text):
        raise ConfigError(f"{name}={text!r} is no number")
    return None if text is None else int(text)


def say(text: str) -> None:
    """Prints a line, in the first process alone."""
    if is_main_process():
        print(text, flush=True)


def is_main_process() -> bool:
    """Whether this process is the one that writes text and speaks."""
    return distributed.global_state.process_id == 0


def is_alone() -> bool:
    """Whether the run has this process only."""
    return distributed.global_state.num_processes == 1


def local_devices() -> int:
    """The devices of this process.

    Raises:
        ConfigError: JAX cannot use them, or not together with those of the other processes.
    """
    try:
        return jax.local_device_count()
    except RuntimeError as error:
        raise ConfigError(f"JAX cannot use the devices of all processes: {error}") from error


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Where all may end at once, by a mistake or by `--help`: what they say then is said once.

    Only those who end join the others for it, so a command line is read before JAX is started.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except ConfigError as error:
        _join_to_end(f"error: {error}", 1)
    except SystemExit as error:
        _join_to_end(said.getvalue(), error.code if isinstance(error.code, int) else 1)


def _join_to_end(said: str, status: int) -> NoReturn:
    try:
        join()
    except ConfigError as error:
        said = f"{said}\nerror: {error}"
    sys.exit(report_and_exit(said, status))


def report_and_exit(said: str, status: int = 1) -> int:
    """Says why a run ends, once if all processes say the same; returns the exit status."""
    here, together, is_said = distributed.global_state, True, False
    if here.client is not None:
        try:
            here.client.key_value_set(f"{_ENDED}{here.process_id}", said)
            together = all_end()
            is_said = together and here.client.key_value_try_get(f"{_ENDED}0") == said
        except jax.errors.JaxRuntimeError:  # process 0 is lost, and JAX's service with it
            together = False
    if is_main_process() or not is_said:
        print(said, file=sys.stderr)
    if not together:
        exit_now(status)
    jax.distributed.shutdown()  # together, or who ends later takes the others for lost
    return status


def leave_others() -> NoReturn:
    """Ends this process when another is lost; quotes what that one said, if it could."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if said := _said_by_others(distributed.global_state.client):
            print(f"error: {said}", file=sys.stderr)
            exit_now(1)
    exit_now(LOST)


def _said_by_others(client: Any) -> str | None:
    """What a process said that has ended."""
    for name, said in client.key_value_dir_get(_ENDED):
        return (
            f"process {name.removeprefix(_ENDED)} of this run (from 0) has ended, so all do. {said}"
        )
    return None


def all_end() -> bool:
    """Waits whether all processes come here, and so end together; one that is alone does."""
    client = distributed.global_state.client
    try:
        if client is not None:
            client.wait_at_barrier("all end", 1000 * END_SECONDS)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def is_lost(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that another process could not be reached."""
    while error is not None:
        if isinstance(error, RuntimeError | ValueError) and _LOST.match(str(error)):  # XLA's
            return True
        error = error.__cause__ or error.__context__
    return False


_LOST = re.compile(r"[A-Z_]+: .*(?i:gloo|nccl|coordination_?service|heartbeat)", re.DOTALL)


def rows_here(sharding: NamedSharding, size: int) -> list[int]:
    """Those of `size` rows, spread over devices, that this process' devices have; in order."""
    slices = sharding.addressable_devices_indices_map((size,)).values()
    return sorted({row for index in slices if index for row in range(size)[index[0]]})


def device_put_rows(
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


def all_reduce_max(values: Callable[[], Sequence[int]]) -> Callable[[], list[int]]:
    """Asks all processes, which must all ask, for the highest of each of their values.

    Returns:
        The answer, when it is called; until then nothing waits. It is of the moment of asking, and
        for a process that is alone of the moment of the call.
    """
    if jax.process_count() == 1:
        return lambda: list(values())
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    sharding = NamedSharding(mesh, PartitionSpec("devices"))
    rows = rows_here(sharding, mesh.size)
    own = np.tile(np.array(values(), np.int32), (len(rows), 1))
    answer = _highest(device_put_rows(own, sharding, rows, mesh.size))
    return lambda: np.asarray(answer).tolist()


@jax.jit
def _highest(values: Int32[Array, "devices n"]) -> Int32[Array, " n"]:
    return jnp.max(values, 0)


_turn = itertools.count()


def all_gather_values(value: Any) -> list[Any]:
    """What each process says, in their order; all must ask.

    It goes by JAX's coordination service: neither devices nor equal programs are needed.

    Args:
        value: JSON can hold it.

    Raises:
        RunError: A process ended instead; says what it said.
    """
    here = distributed.global_state
    if here.client is None:
        return [value]
    place = f"llava_jax/{next(_turn)}/"
    here.client.key_value_set(f"{place}{here.process_id}", json.dumps(value))
    if here.process_id == 0:
        values = [_wait_for(f"{place}{number}") for number in range(here.num_processes)]
        here.client.key_value_set(f"{place}all", f"[{','.join(values)}]")
    return json.loads(_wait_for(f"{place}all"))


def _wait_for(key: str) -> str:
    """Waits for what a process says, as long as all live; JAX ends this one if another is lost."""
    here, lines = distributed.global_state, Lines()
    assert here.client is not None
    while True:
        try:
            return here.client.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if said := _said_by_others(here.client):
            raise RunError(said)
        if is_main_process():
            lines.say(f"process {key.rsplit('/', 1)[1]} of this run, which is slower")


def broadcast_from_main(value: Any) -> Any:
    """What the first process says; all must ask."""
    return all_gather_values(value)[0]


def devices_of_machine() -> int:
    """This run's devices that share this process' machine; all processes must ask."""
    return all_gather_values(platform.node()).count(platform.node()) * jax.local_device_count()


def barrier() -> None:
    """Waits until all processes are here."""
    all_gather_values(None)


def differences(facts: dict[str, Any]) -> list[str]:
    """Compares facts among all processes, which must all ask; a line for each that differs.

    Args:
        facts: By name; JSON can hold them.
    """
    facts = json.loads(json.dumps(facts))
    first = broadcast_from_main(facts if is_main_process() else None)
    own = {name: facts.get(name) for name in first | facts if facts.get(name) != first.get(name)}
    told: dict[tuple[str, str], list[int]] = {}
    for number, differing in enumerate(all_gather_values(own)):
        for name, value in differing.items():
            told.setdefault((name, repr(value)), []).append(number)
    return [
        f"  {name}: {first.get(name)!r} in process 0, {value} in process {listed(numbers)}"
        for (name, value), numbers in told.items()
    ]


def this_process() -> str:
    """Its number, for messages."""
    here = distributed.global_state
    return f"process {here.process_id} of {here.num_processes} (from 0)"

"""Collects all private and version-bound names of JAX, XLA and Orbax that this package uses.

A new version may change or remove these names without notice. Therefore no other module of the
package uses such a name. Each name is documented with its purpose and the version that it was
tested with; if no version is given, this is JAX 0.10.2. tests/test_jax_compat.py fails if a name
is missing or no longer has an effect.

Two other modules parse the text of compiled modules: `planning/hlo.py` contains the grammar, and
`planning/flops.py` contains the names of library calls. The tests of these modules parse text from
the installed XLA.

JAX is imported inside the functions, because some of these names are needed before JAX may be
imported.
"""

import ctypes
import importlib.metadata
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable
from unittest.mock import patch

if TYPE_CHECKING:
    import jax

# Options of XLA's compilers ---------------------------------------------------------------------

Options = dict[str, str | bool]
"""Type of the argument `compiler_options` of `jax.jit`."""

CPU_OPTIONS: Options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""Options for loops over bfloat16 layers on a CPU. XLA's CPU backend slices bfloat16 arrays as
float32 (always in JAX 0.10, only on some CPUs in JAX 0.12). The disabled pass would move the
conversion out of the loop, so that all weights would be copied to float32 at once."""

_JAXLIB = [int(x) for x in re.findall(r"\d+", importlib.metadata.version("jaxlib"))]
STREAMING_OPTIONS: Options = {"xla_disable_hlo_passes": "dynamic-slice-annotator"}
if _JAXLIB >= [0, 11, 2]:
    STREAMING_OPTIONS = {}
"""Options for GPU programs that use host memory. The disabled pass makes the GPU's copy engine copy
slices. Without it, kernels copy them, and no other kernel runs meanwhile (measured on an H200). In
jaxlib 0.10.2, the pass is wrong for loops that slice backwards or one layer ahead; gradients would
be wrong without an error (openxla/xla #46231, #46308)."""

OVERLAP_OPTIONS: Options = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_async_compute_limit": "8",
}
"""Options for GPU programs that use several GPUs or host memory. XLA then communicates and copies
while it computes, which is off by default (JAX 0.10). The second option is the largest number of
copies from or to host memory that are in progress at a time; by default (2), most copies have to
wait. The compiler for TPUs needs no option for this."""

NO_OVERLAP_OPTIONS: Options = {"xla_gpu_enable_latency_hiding_scheduler": False}
"""Options that take back `OVERLAP_OPTIONS`, to measure their effect."""


def compiler_options(
    platform: str, *, dtype: str = "bfloat16", uses_host: bool = False, devices: int = 1
) -> Options | None:
    """Returns the argument `compiler_options` of `jax.jit` for a program of this package.

    Args:
        platform: Platform of the devices: "cpu", "gpu" or "tpu".
        dtype: Dtype of the weights that are not trained.
        uses_host: Whether the program reads or writes arrays in host memory.
        devices: Number of devices that the program runs on.

    Returns:
        The options; None if the program needs none.
    """
    if platform == "cpu":
        return {**CPU_OPTIONS} if dtype == "bfloat16" else None
    if platform != "gpu":
        return None
    streaming = STREAMING_OPTIONS if uses_host else {}
    return {**streaming, **(OVERLAP_OPTIONS if uses_host or devices > 1 else {})} or None


PLANNING_OPTIONS: Options = {"xla_gpu_enable_triton_gemm": False}
"""Additional options for compiling for an absent GPU. XLA then cannot tune kernels, and finds no
Triton tiling for some matrix products."""

COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that change the output of the compilers."""

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
"""Environment variable: whether JAX reserves its part of a GPU's memory at start (default true)."""

GPU_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""New name and old name of the environment variable for the fraction of a GPU's memory that XLA
uses (default 0.75)."""

PINNED_MEMORY_GB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""Environment variable for the largest amount of host memory that a process pins with XLA:GPU, in
GiB (default 64), in spite of its name. XLA reads the variable when it first uses the devices."""

COMPILE_ONLY_VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    # The value does not matter, because a topology replaces it. If there is no value, libtpu asks a
    # metadata server, and prints warnings if there is no such server.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling uses no chip, so no chip has to be free
}
"""Environment variables that let a process compile for devices that are absent."""


# Starting JAX -----------------------------------------------------------------------------------

PLUGIN_LOGGER = "jax._src.xla_bridge"
"""Logger of the module in which JAX loads its plugins for GPUs and TPUs."""


def shorten_plugin_errors(*, has_gpu: bool) -> None:
    """Replaces the traceback that JAX logs if a plugin cannot start by one line, or by nothing.

    JAX continues without the plugin. On a machine with the packages for CUDA but without a GPU, the
    plugin always fails.

    Args:
        has_gpu: Whether the machine has a GPU. If it has one, the line says why JAX does not use
            it; otherwise, nothing is logged.
    """

    def shorten(record: logging.LogRecord) -> bool:
        if record.exc_info is None or not str(record.msg).startswith("Jax plugin configuration"):
            return True
        error = record.exc_info[1]
        record.msg = "JAX cannot use the GPU of this machine: %s. `llava-jax doctor` shows more"
        record.args, record.exc_info, record.exc_text = (str(error).rstrip("."),), None, None
        return has_gpu

    logging.getLogger(PLUGIN_LOGGER).addFilter(shorten)


# Several processes ------------------------------------------------------------------------------


@runtime_checkable
class CoordinationClient(Protocol):
    """Client of JAX's coordination service; each method may raise JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, /) -> None:
        """Publishes a text under a key."""
        ...

    def key_value_try_get(self, key: str, /) -> str:
        """Returns the text of a key, or raises an error if the key is not published."""
        ...

    def key_value_dir_get(self, prefix: str, /) -> list[tuple[str, str]]:
        """Returns all published keys that start with a prefix, and their texts."""
        ...

    def blocking_key_value_get(self, key: str, timeout_ms: int, /) -> str:
        """Waits for a key and returns its text; `is_timeout` recognizes the error of a timeout."""
        ...

    def wait_at_barrier(self, name: str, timeout_ms: int, /) -> None:
        """Waits until all processes have reached the barrier."""
        ...


@runtime_checkable
class ProcessState(Protocol):
    """Index of this process, number of processes, and client of the coordination service."""

    process_id: int
    num_processes: int
    client: CoordinationClient | None


def process_state() -> ProcessState:
    """Returns JAX's state of this process.

    The public functions `jax.process_index` and `jax.process_count` would initialize the devices,
    and no public function returns the client.
    """
    from jax._src import distributed

    return distributed.global_state


def find_cluster(
    address: str | None, count: int | None, number: int | None, timeout_seconds: int
) -> tuple[str | None, int | None, int | None]:
    """Returns the address of process 0, the number of processes and the index of this process.

    JAX reads values that are None from the environment variables of SLURM, Open MPI, Kubernetes or
    a TPU slice. The only public function that does so, `jax.distributed.initialize`, also connects
    the processes, and prints nothing while it waits for missing processes.

    Args:
        address: Address of process 0, or None.
        count: Number of processes, or None.
        number: Index of this process, or None.
        timeout_seconds: Largest number of seconds that the detection may take.
    """
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        address,
        count,
        number,
        local_device_ids=None,
        cluster_detection_method=None,
        initialization_timeout=timeout_seconds,
    )
    return found[:3]


def is_timeout(error: Exception) -> bool:
    """Returns True if an error says that the client of the coordination service timed out."""
    return "DEADLINE_EXCEEDED" in str(error)


_LOST_PEER = re.compile(r"[A-Z_]+: .*(?i:gloo|nccl|coordination_?service|heartbeat)", re.DOTALL)
"""Matches an error status of XLA from a library for collectives or the coordination service."""


def is_lost_peer(message: str) -> bool:
    """Returns True if an error message of XLA says that another process cannot be reached."""
    return _LOST_PEER.match(message) is not None


_FATAL = (b"coordination_service", b"distributed service detected fatal errors", b"gloo::")


def is_fatal_line(line: bytes) -> bool:
    """Returns True if a line on stderr says that JAX's runtime is about to abort the process."""
    return any(sign in line for sign in _FATAL)


LOST_NUMBERS = "stopped sending heartbeats):"
LOST_SERVICE = "RegisterTask"
LOST_FIRST = "leader task"


def lost_peer(text: str) -> str:
    """Returns a description of the lost process, for error messages.

    Args:
        text: Text that JAX's runtime wrote to stderr before it aborted the process.
    """
    if named := re.search(rf"{re.escape(LOST_NUMBERS)}\s*(\d[\d\s,]*)", text):
        return f"process {', '.join(re.findall(r'[0-9]+', named[1]))} of this run (counted from 0)"
    if LOST_SERVICE in text:
        return "JAX's service in process 0 of this run"
    if LOST_FIRST in text:
        return "process 0 of this run (counted from 0)"
    return "another process of this run"


# Compiling for absent devices -------------------------------------------------------------------


def compile_for_topology(
    lowered: "jax.stages.Lowered",
    devices: "Sequence[jax.Device]",
    options: Mapping[str, str | bool],
) -> tuple[Any, str]:
    """Compiles a lowered function for the devices of a topology.

    No public function accepts a module that was lowered for devices outside the topology.

    Args:
        lowered: Function that was lowered for other devices, for example CPUs.
        devices: Devices of the topology, which may be absent.
        options: Compiler options; the options that the function was jitted with are not used.

    Returns:
        XLA's memory statistics, and the text of the compiled module.
    """
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    client, count = devices[0].client, len(devices)
    settings = compiler.get_compile_options(
        1,
        count,
        device_assignment=np.arange(count).reshape(1, count),
        env_options_overrides=cast("dict[str, str]", dict(options)),
        backend=client,
    )
    executable = client.compile(
        lowered.compiler_ir("stablehlo"),
        executable_devices=xla_client.DeviceList(tuple(devices)),
        compile_options=settings,
    )
    return executable.get_compiled_memory_stats(), executable.hlo_modules()[0].to_string()


@contextmanager
def lowering_for_gpu(capability: str) -> Iterator[None]:
    """Returns a context in which kernels and callbacks are lowered for a GPU that is not attached.

    JAX lowers a callback only for devices of the mesh. Since JAX 0.11, Pallas asks for the type of
    the attached GPU, and the public `AbstractDevice` has only few types (JAX 0.12).

    Args:
        capability: Compute capability of the GPU, for example "8.6".
    """
    from jax._src.interpreters.mlir import ModuleContext

    number = int(capability.replace(".", ""))
    backend = lambda context, optional=False: None if optional else context.backend
    with ExitStack() as changes:
        changes.enter_context(patch.object(ModuleContext, "get_backend", backend))
        if _JAXLIB >= [0, 11]:
            from jax._src.pallas.triton import gpu_info  # pyright: ignore

            new = {"gpu_version": None, "arch_name": capability, "compute_capability": number}
            info = lambda: gpu_info.GpuInfo(**new)
            changes.enter_context(patch.object(gpu_info, "get_gpu_info", info))
        yield


def hide_triton_deprecation() -> None:
    """Hides the warning of JAX 0.11 and newer that Pallas will drop its kernels for Triton.

    JAX warns each time it lowers a kernel, and a user can do nothing about it. The docstring of
    `models/flash.py` describes the alternatives.
    """
    warnings.filterwarnings("ignore", TRITON_DEPRECATED, DeprecationWarning)


TRITON_DEPRECATED = "The Pallas Triton backend is deprecated"
"""Beginning of the warning's text."""

_TOO_LARGE = re.compile(r"([\d.]+)([KMGT])(?:\) exceeds available HBM| of [\d.]+[KMGT] hbm)")


def bytes_of_too_large(message: str) -> int | None:
    """Returns the number of bytes that a program needs, from an error of the TPU compiler.

    Older versions of libtpu use the second form of the pattern. Other errors give None.
    """
    found = _TOO_LARGE.search(message)
    return found and int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


def is_out_of_memory(message: str) -> bool:
    """Returns True if an error message of XLA says that memory could not be allocated.

    XLA:GPU allocates memory while it compiles, because it executes kernels to compare their speed.
    Its errors may contain the error of the allocation.
    """
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


COPYING_PLATFORMS = ("gpu",)
"""Platforms on which `readable_in_place` has an effect. On CPUs, JAX copies nothing."""


def readable_in_place(array: "jax.Array") -> "jax.Array":
    """Returns an array with the same memory, which NumPy reads without copying it.

    JAX copies an array in pinned memory of a GPU when it becomes a NumPy array, and keeps the copy
    until the array is deleted (measured with JAX 0.11.2 on an H200). If the private attribute
    `_npy_value` is set, JAX returns this instead. The given array is not changed. The result, and
    NumPy arrays made from it, must not be used after the given array is deleted or donated.

    Args:
        array: Array in host memory. Arrays of other platforms than GPUs are returned as they are.
    """
    import jax
    import numpy as np

    # Orbax waits for an array only when it becomes a NumPy array, which it then is already.
    jax.block_until_ready(array)
    shards: list[Any] = [shard.data for shard in array.addressable_shards]
    if shards[0].device.platform not in COPYING_PLATFORMS:
        return array
    same = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
    for shard in same.addressable_shards:
        data: Any = shard.data
        memory = (ctypes.c_uint8 * data.nbytes).from_address(data.unsafe_buffer_pointer())
        data._npy_value = np.frombuffer(memory, data.dtype).reshape(data.shape)
        data._npy_value.flags.writeable = False
    return same


# The text of compiled modules -------------------------------------------------------------------

DUMP_TO, DUMP_OPTIONS = "xla_dump_to", {"xla_dump_hlo_as_text": True}
"""Option whose value is a folder, and options with which XLA writes text files there."""

COPY_ENGINE = "dynamic_slice_config"
"""Part of the text of a slice that the GPU's copy engine copies; see `STREAMING_OPTIONS`."""

CALLBACK = "_python_gpu_callback"
"""Part of the text of a call of a Python function, whose result is copied from host memory."""

HOST_SPACE = "S(5)"
"""Part of the shape of an array in host memory, in the text of a module for GPUs or TPUs."""


def bounded_loop(iterations: int) -> "AbstractContextManager[object]":
    """Returns a context in which a traced loop gets a name that contains its maximum length.

    If the number of iterations of a loop depends on data, neither XLA's cost analysis nor
    `planning/hlo.py` can find this number. XLA keeps the name in the metadata of each instruction.

    Args:
        iterations: Maximum number of iterations of the loop.
    """
    import jax

    return jax.named_scope(f"bounded_loop_{iterations}_iterations")


_LOOP_BOUND = re.compile(r'bounded_loop_(\d+)_iterations\)*/while"')


def loop_bound(attributes: str) -> int | None:
    """Returns the maximum number of iterations that `bounded_loop` gave to a loop; None if none.

    Args:
        attributes: Attributes of the loop's instruction, from the text of the compiled module.
    """
    found = _LOOP_BOUND.search(attributes)
    return found and int(found[1])


# Orbax ------------------------------------------------------------------------------------------

ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name of a checkpoint while the checkpoint is written (Orbax 0.12.8)."""

ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""Name of a file that Orbax writes when a checkpoint gets its final name (Orbax 0.12.8)."""


def is_late_callback(error: BaseException | None) -> bool:
    """Returns True if an unhandled exception is only a consequence of a failed save.

    If a write fails, Orbax raises an error and closes its event loop while TensorStore is still
    writing other data. Each of these writes then finds a closed loop and prints an exception on
    stderr (Orbax 0.12.8). The function also returns True for any other closed event loop, because
    the exception is the same.
    """
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

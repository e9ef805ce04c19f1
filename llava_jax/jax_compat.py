"""Every private or version-bound name of JAX, XLA and Orbax that this package uses.

Nobody promises that these names stay. So each says at which version it was seen and what it is
for, no other module of the package uses one, and tests/test_jax_compat.py fails when one is gone
or has no effect any more. Unless something else is said, they were seen with JAX 0.10.2.

The text of compiled modules has two readers of its own: `planning/hlo.py` knows its grammar, and
`planning/flops.py` the names of library calls. Their tests read what the installed XLA writes.

JAX is imported inside the functions, because the command line and the environment need some of
these names before JAX may be imported.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import jax

# Options of XLA's compilers ---------------------------------------------------------------------

Options = dict[str, str | bool]
"""What `jax.jit` takes as `compiler_options`."""

CPU_OPTIONS: Options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
"""For loops over bfloat16 layers on a CPU. XLA's CPU backend slices bfloat16 as float32, and this
pass would move the conversion out of the loop, and so make a float32 copy of all weights."""

STREAMING_OPTIONS: Options = {"xla_disable_hlo_passes": "dynamic-slice-annotator"}
"""For GPU programs that use host memory. XLA:GPU may compute wrong gradients where a loop slices
host memory backwards, because this pass annotates such slices wrongly (openxla/xla #46231, seen
with jaxlib 0.11.0). `tools/gpu_check.py` compares the gradients on a real GPU."""

OVERLAP_OPTIONS: Options = {"xla_gpu_enable_latency_hiding_scheduler": True}
"""For programs of several GPUs: XLA then communicates while it computes. It is off by default (JAX
0.10); the TPU's compiler needs no option for it."""

PLANNING_OPTIONS: Options = {"xla_gpu_enable_triton_gemm": False, **STREAMING_OPTIONS}
"""For compiling without a GPU. Nothing can be tuned then, and for some products XLA finds no Triton
tiling. A compile-only client ignores the options of `jax.jit`, so the others are here too."""


def as_flags(options: Mapping[str, str | bool]) -> list[str]:
    """Options as words of the variable XLA_FLAGS."""
    text = lambda value: str(value).lower() if isinstance(value, bool) else value
    return [f"--{name}={text(value)}" for name, value in options.items()]


COMPILER_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Environment variables that change what the compilers produce."""

GPU_MEMORY_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The variable for XLA's share of a GPU's memory (default 0.75), and its old name."""

PINNED_MEMORY_GB = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The variable for the most host memory that XLA:GPU pins, in 10^9 bytes (default 64)."""

COMPILE_ONLY_VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    # Any type will do, because a topology overrules it. Without one, libtpu asks a metadata server
    # and complains that there is none.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so none has to be free
}
"""Variables that let a process compile for devices that are absent."""


# Several processes ------------------------------------------------------------------------------


@runtime_checkable
class CoordinationClient(Protocol):
    """The methods of JAX's coordination service that are used; each may raise JaxRuntimeError."""

    def key_value_set(self, key: str, value: str, /) -> None:
        """Publishes a text."""
        ...

    def key_value_try_get(self, key: str, /) -> str:
        """Returns a published text, or raises if there is none."""
        ...

    def key_value_dir_get(self, prefix: str, /) -> list[tuple[str, str]]:
        """Returns all published keys with a prefix, and their texts."""
        ...

    def blocking_key_value_get(self, key: str, timeout_ms: int, /) -> str:
        """Waits for a text; `is_timeout` is true of the error that ends the wait."""
        ...

    def wait_at_barrier(self, name: str, timeout_ms: int, /) -> None:
        """Waits for all processes."""
        ...


@runtime_checkable
class ProcessState(Protocol):
    """This process' number, the number of processes, and the client that connects them, if any."""

    process_id: int
    num_processes: int
    client: CoordinationClient | None


def process_state() -> ProcessState:
    """JAX's state of this process. The public functions start the devices or compute something."""
    from jax._src import distributed

    return distributed.global_state


def find_cluster(
    address: str | None, count: int | None, number: int | None, timeout_seconds: int
) -> tuple[str | None, int | None, int | None]:
    """Completes the address of process 0, the number of processes and this process' number.

    JAX reads them from the variables of SLURM, Open MPI, Kubernetes or a TPU slice. Its only public
    function for that also joins the processes, and in silence waits for those that do not come.
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
    """Whether the coordination service's client gave up waiting."""
    return "DEADLINE_EXCEEDED" in str(error)


_LOST_PEER = re.compile(r"[A-Z_]+: .*(?i:gloo|nccl|coordination_?service|heartbeat)", re.DOTALL)
"""A status of XLA, and who reports it: the libraries of collectives, or the service."""


def is_lost_peer(message: str) -> bool:
    """Whether an error message of XLA says that another process could not be reached."""
    return _LOST_PEER.match(message) is not None


_FATAL = (b"coordination_service", b"distributed service detected fatal errors", b"gloo::")


def is_fatal_line(line: bytes) -> bool:
    """Whether a line that the runtime writes to stderr says that it will abort soon."""
    return any(sign in line for sign in _FATAL)


LOST_NUMBERS = "stopped sending heartbeats):"
LOST_SERVICE = "RegisterTask"
LOST_FIRST = "leader task"


def lost_peer(text: str) -> str:
    """Names the process that is lost, from what the runtime wrote before it aborted."""
    if named := re.search(rf"{re.escape(LOST_NUMBERS)}\s*(\d[\d\s,]*)", text):
        return f"process {', '.join(re.findall(r'[0-9]+', named[1]))} of this run (from 0)"
    if LOST_SERVICE in text:
        return "JAX's service in process 0 of this run"
    if LOST_FIRST in text:
        return "process 0 of this run (from 0)"
    return "another process of this run"


# Compiling for absent devices -------------------------------------------------------------------


def compile_for_topology(
    lowered: "jax.stages.Lowered", devices: "Sequence[jax.Device]"
) -> tuple[Any, str]:
    """Compiles a lowered function for the devices of a topology.

    No public function takes a module that was lowered for other devices than the topology's.

    Returns:
        XLA's memory statistics, and the text of the compiled module.
    """
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    client, count = devices[0].client, len(devices)
    options = compiler.get_compile_options(
        1, count, device_assignment=np.arange(count).reshape(1, count), backend=client
    )
    executable = client.compile(
        lowered.compiler_ir("stablehlo"),
        executable_devices=xla_client.DeviceList(tuple(devices)),
        compile_options=options,
    )
    return executable.get_compiled_memory_stats(), executable.hlo_modules()[0].to_string()


_TOO_LARGE = re.compile(r"([\d.]+)([KMGT])(?:\) exceeds available HBM| of [\d.]+[KMGT] hbm)")


def bytes_of_too_large(message: str) -> int | None:
    """The bytes that a step needs, from the error of the TPU's compiler that refuses it.

    The second form is that of older versions of libtpu. None is returned for any other error.
    """
    found = _TOO_LARGE.search(message)
    return found and int(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))


# The text of compiled modules -------------------------------------------------------------------


def bounded_loop(iterations: int) -> "AbstractContextManager[object]":
    """Gives a loop that is traced inside it a name with the most iterations that it may take.

    XLA's cost analysis, and ours, cannot know how often a loop runs whose length depends on data.
    The name is part of the metadata that XLA keeps for each instruction.
    """
    import jax

    return jax.named_scope(f"bounded_loop_{iterations}_iterations")


_LOOP_BOUND = re.compile(r'bounded_loop_(\d+)_iterations\)*/while"')


def loop_bound(attributes: str) -> int | None:
    """The bound that `bounded_loop` gave to a loop of a compiled module; None if there is none."""
    found = _LOOP_BOUND.search(attributes)
    return found and int(found[1])


# Orbax ------------------------------------------------------------------------------------------

ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of a checkpoint's name while it is written (Orbax 0.12.8)."""

ORBAX_METADATA = "_CHECKPOINT_METADATA"
"""A file that Orbax writes when it gives the checkpoint its final name (Orbax 0.12.8)."""


def is_late_callback(error: BaseException | None) -> bool:
    """Whether an exception that nobody can handle is the useless one of a failed save.

    When a write fails, Orbax raises and closes its event loop while TensorStore still has other
    writes under way. Each of these then finds a closed loop and complains on stderr (Orbax 0.12.8).
    The error of any other closed loop looks the same.
    """
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

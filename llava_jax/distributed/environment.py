"""Reads the environment of a process, and prepares it before JAX is imported."""

import hashlib
import importlib.metadata
import io
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

from llava_jax.jax_compat import (
    COMPILE_ONLY_VARIABLES,
    GPU_MEMORY_SHARES,
    PINNED_MEMORY_GB,
    shorten_plugin_errors,
)

GIB = 2**30

POOL_SHARE = 0.94
"""Fraction of a GPU's memory that XLA's pool may use. The rest is for the driver, for libraries
such as NCCL, and for a display."""

RESERVE_SHARE = 0.07
"""Fraction of a device's memory that plans reserve: what is not in the pool, and 0.01 for gaps
between arrays in the pool."""

HOST_SHARE = 0.9
"""Fraction of host memory that plans use, and that all processes on a host may pin together. The
rest is for the system, for Python, and for worker processes with the batches that they prepare."""


def quiet_libraries() -> None:
    """Keeps libraries from printing messages at their start that a user cannot act on.

    Call this function before JAX or transformers is imported.
    """
    if find_spec("torch") is None:
        # transformers would print that models need PyTorch, but only its tokenizers are used.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    shorten_plugin_errors(has_gpu=has_nvidia_gpu())


def has_nvidia_gpu() -> bool:
    """Returns True if this machine shows an NVIDIA GPU, even if its driver or JAX cannot use it."""
    return any(map(os.path.exists, ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")))


def prepare_for_training() -> None:
    """Allows XLA:GPU to use all memory that plans assume to be available.

    Environment variables that the user has set are not changed. In a run of several processes,
    `multihost.join` sets the limit of pinned memory, because it counts the processes of a host.
    """
    if not os.environ.keys() & set(GPU_MEMORY_SHARES):
        os.environ[GPU_MEMORY_SHARES[0]] = str(POOL_SHARE)
    if not is_multiprocess():
        limit_pinned_memory(1)


def limit_pinned_memory(processes: int) -> None:
    """Sets the limit of the memory that XLA:GPU pins, unless the user has set it.

    XLA pins memory only when a program needs it. Call this before the devices are used.

    Args:
        processes: Number of processes of the run on this host.
    """
    os.environ.setdefault(PINNED_MEMORY_GB, str(host_memory_share(processes) // GIB))


def host_memory_share(processes: int) -> int:
    """Returns the host memory that one process may use, in bytes: whole GiB, at least one.

    It is not more than the limit of pinned memory that the user has set.

    Args:
        processes: Number of processes of the run on this host, which share its memory.
    """
    share = max(int(HOST_SHARE * host_memory()) // processes // GIB, 1) * GIB
    asked = os.environ.get(PINNED_MEMORY_GB, "")
    return min(share, int(asked) * GIB) if asked.isdigit() else share


def print_any_text() -> None:
    """Makes stdout escape the invalid bytes of file names that are not valid UTF-8."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a test may have replaced stdout
        sys.stdout.reconfigure(errors="backslashreplace")


def host_memory() -> int:
    """Returns the memory of this machine, or the container's memory limit if lower, in bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # contains "max" if there is no limit
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def available_memory() -> int:
    """Returns the memory that new processes can use without swapping, in bytes.

    The kernel's estimate includes caches that it can free. A container's limit is respected, but
    not what other processes of the container use.
    """
    file = Path("/proc/meminfo")  # Linux only
    lines = file.read_text().splitlines() if file.is_file() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([host_memory(), *(1024 * size for size in kib)])


def prepare_for_planning() -> None:
    """Prepares this process to compile for absent devices, and not to use attached devices."""
    os.environ.update(COMPILE_ONLY_VARIABLES)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # XLA logs every program that does not fit; the planner reports these programs itself.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def is_multiprocess() -> bool:
    """Returns True if the environment says that this process is one of several in a run."""
    has = os.environ.get
    if "JAX_NUM_PROCESSES" in os.environ:
        return has("JAX_NUM_PROCESSES") != "1"
    on_tpu = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0"))) and find_spec("libtpu")
    return (
        bool(has("JAX_COORDINATOR_ADDRESS"))
        or ("SLURM_STEP_NODELIST" in os.environ and int(has("SLURM_NTASKS", "1")) > 1)
        or int(has("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in (has("TPU_PROCESS_ADDRESSES") or has("TPU_WORKER_HOSTNAMES", ""))
        or int(has("MEGASCALE_NUM_SLICES", "1")) > 1
        or "JOB_COMPLETION_INDEX" in os.environ
        # On a Cloud TPU machine, JAX asks the metadata server for the other processes.
        or bool(on_tpu and "TPU_SKIP_MDS_QUERY" not in os.environ)
    )


def hash_code() -> str:
    """Returns the SHA-256 hash, in hexadecimal, of the Python files of this package."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that influence the results of a run."""
    packages = (
        *("llava_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
        *("transformers", "tokenizers", "pillow", "grain"),
    )
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}

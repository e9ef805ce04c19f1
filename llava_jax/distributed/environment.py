"""What the environment says, and what must be set in it, before JAX is imported."""

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
    OVERLAP_OPTIONS,
    PINNED_MEMORY_GB,
    PLANNING_OPTIONS,
    as_flags,
)

GIB = 2**30

RESERVE_SHARE = 0.06
"""The share of a device's memory that plans leave to the driver, its libraries and programs."""


def prepare_for_training() -> None:
    """Gives XLA:GPU all of the memory that plans count on; values that the user has set stay."""
    if not os.environ.keys() & set(GPU_MEMORY_SHARES):
        os.environ[GPU_MEMORY_SHARES[0]] = str(1 - RESERVE_SHARE)
    # This is a limit: XLA pins memory only when a program needs it.
    os.environ.setdefault(PINNED_MEMORY_GB, str(host_memory() // 10**9))


def print_any_text() -> None:
    """Lets stdout print the names of files that are not UTF-8, with their odd bytes escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a test may have replaced it
        sys.stdout.reconfigure(errors="backslashreplace")


def host_memory() -> int:
    """Bytes of this machine's memory, or of its container's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # says "max" if there is no limit
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def prepare_for_planning(devices: int = 1) -> None:
    """Lets this process compile for absent devices, and keeps it from using those that are here."""
    os.environ.update(COMPILE_ONLY_VARIABLES)
    options = PLANNING_OPTIONS | (OVERLAP_OPTIONS if devices > 1 else {})
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *as_flags(options)])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # XLA logs what does not fit, and so does the planner.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def is_multiprocess() -> bool:
    """Whether the environment says that this process is one of several."""
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
        # On a Cloud TPU's own machine, JAX asks the metadata server for the other processes.
        or bool(on_tpu and "TPU_SKIP_MDS_QUERY" not in os.environ)
    )


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes."""
    packages = (
        *("llava_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
        *("transformers", "tokenizers", "pillow", "grain"),
    )
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}

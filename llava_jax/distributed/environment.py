"""What the environment tells, and what must be set in it, before JAX is imported."""

import importlib.metadata
import io
import os
import platform
import sys
from importlib.util import find_spec
from pathlib import Path

PLANNING_FLAGS = (
    # Without a GPU nothing can be tuned, and some products then find no Triton tiling.
    "--xla_gpu_enable_triton_gemm=false",
    # See program.STREAMING_OPTIONS; a compile-only client takes no options of a jit.
    "--xla_disable_hlo_passes=dynamic-slice-annotator",
)
OVERLAP_FLAGS = ("--xla_gpu_enable_latency_hiding_scheduler=true",)  # program.OVERLAP_OPTIONS


def prepare_for_training() -> None:
    """Lets XLA:GPU have all of the memory that plans count on; what the user has set stays."""
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(1 - RESERVE_SHARE)  # XLA's own is 0.75
    gigabytes = str(host_memory() // 10**9)  # of pinned memory, taken when needed; XLA's own is 64
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", gigabytes)


def print_any_text() -> None:
    """Lets printed lines have names of files that are not UTF-8; their odd bytes are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a test may have put something else there
        sys.stdout.reconfigure(errors="backslashreplace")


def host_memory() -> int:
    """Bytes of this machine's memory, or of its container's."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # "max" where there is none
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(machine, int(text)) if text.isdigit() else machine


def prepare_for_planning(devices: int = 1) -> None:
    """Lets this process compile for devices that are not here, and use none that are."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    # Any will do, a topology overrules it; without one libtpu asks a metadata server and complains.
    os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is used, so none need be free
    flags = (*PLANNING_FLAGS, *(OVERLAP_FLAGS if devices > 1 else ()))
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA tells of what does not fit; so do we


def is_multiprocess() -> bool:
    """Whether the environment tells of several processes."""
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
        # A Cloud TPU's own machine, which asks its metadata server.
        or bool(on_tpu and "TPU_SKIP_MDS_QUERY" not in os.environ)
    )


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what a run computes."""
    packages = (
        *("llava_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
        *("transformers", "tokenizers", "pillow", "grain"),
    )
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


GIB = 2**30


RESERVE_SHARE = 0.06
"""The share of a device's memory that plans leave to the driver, its libraries and programs."""

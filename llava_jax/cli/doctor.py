"""Implements `llava-jax doctor`, which prints the facts about a machine that bug reports need."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_jax.cli.arguments import Parser
from llava_jax.distributed.environment import (
    GIB,
    available_memory,
    has_nvidia_gpu,
    host_memory,
    prepare_for_training,
    print_any_text,
    versions,
)
from llava_jax.jax_compat import (
    GPU_MEMORY_SHARES,
    PINNED_MEMORY_GB,
    PREALLOCATE,
    STREAMING_OPTIONS,
)
from llava_jax.planning.devices import BFLOAT16_CAPABILITY

PROG = "llava-jax doctor"
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
"""Packages with JAX's plugins for accelerators."""

VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NCCL_", "HF_HUB_", "HF_HOME", "OMP_NUM_")
"""Prefixes of the environment variables that doctor prints, if they are set."""

SLOW_VARIABLES = {
    "JAX_DISABLE_JIT": "nothing is compiled",
    "JAX_DEBUG_NANS": "JAX checks the result of every program for NaN",
    "JAX_ENABLE_X64": "some numbers have 64 instead of 32 bits",
}
"""Environment variables of JAX that slow training down, and why they do."""

DEVICE_SECONDS = 60
"""Longest time in seconds that JAX may take to start its devices. A healthy GPU takes about 5."""

START = [sys.executable, "-m", "llava_jax", "doctor", "--devices"]
"""Command that prints the fields of a `Device` as JSON in its last line."""

WIDTH, INDENT = 100, 15  # of the output, in characters

DRIVER_FILE = Path("/proc/driver/nvidia/version")
CACHE = Path("runs/.compilation_cache")  # of runs with the default output_dir
MIN_FREE_GIB = 20  # of disk; a checkpoint of 7B LoRA takes 4 GB, and three of them may exist
MIN_HOST_GIB = 16  # 7B LoRA with streamed weights keeps 15.2 GiB in host memory


@dataclasses.dataclass(frozen=True)
class Device:
    """The devices of this machine that JAX uses.

    Attributes:
        platform: Platform of the devices: "cpu", "gpu" or "tpu".
        kind: Name of the type of the devices.
        count: Number of devices.
        capability: Compute capability of a GPU, for example 8.6; None for other devices.
        limit: Bytes of a device's memory that XLA may use; None if the device does not report them.
        kinds: Names of the kinds of memory that a device can use.
    """

    platform: str
    kind: str
    count: int
    capability: float | None
    limit: int | None
    kinds: list[str]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status 0."""
    parser = Parser(
        prog=PROG,
        description="Prints versions, devices, memory, disks and caches of this machine, and what "
        "would make training slow. Paste the output into a bug report.",
    )
    parser.add_argument("--devices", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    # The environment is described before this process changes it.
    variables = _try(describe_variables)
    prepare_for_training()
    if given.devices:
        print(json.dumps(_start_devices()))
        return 0
    print_any_text()
    device, problem = find_device()
    facts: dict[str, Callable[[], str]] = {
        "system": describe_system,
        "packages": lambda: ", ".join(f"{name} {version}" for name, version in versions().items()),
        "accelerator": describe_plugins,
        "devices": lambda: problem or describe_device(device),
        "device memory": lambda: describe_memory(device),
        "host": describe_host,
        "pinned memory": describe_pinned,
        "disk": describe_disks,
        "compiled": describe_cache,
        "variables": lambda: variables,
        "slow": lambda: "\n".join(find_slow(device)) or "nothing that doctor knows of",
    }
    for name, fact in facts.items():
        for line in _try(fact).split("\n"):
            first, more = f"{name:{INDENT}}", " " * INDENT
            print(textwrap.fill(line, WIDTH, initial_indent=first, subsequent_indent=more))
    return 0


def _try(fact: Callable[[], str]) -> str:
    """Returns a fact, or the error that prevents finding it."""
    try:
        return fact()
    except Exception as error:  # the other facts may explain the error
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())})"


def find_device() -> tuple[Device | None, str]:
    """Starts JAX in another process, which may crash or hang, and returns the devices it uses.

    Returns:
        The devices, or None if JAX cannot start; and a text that says why it cannot start, or "".
    """
    # JAX would otherwise reserve most of a GPU's memory, which a running training may need.
    variables = os.environ | {PREALLOCATE: "false"}
    try:
        done = subprocess.run(
            START, env=variables, capture_output=True, text=True, timeout=DEVICE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"JAX does not start: it has no result after {DEVICE_SECONDS} s"
    errors = done.stderr.splitlines()
    if done.returncode:
        return None, f"JAX does not start (status {done.returncode}): {' '.join(errors[-1:])}"
    try:
        device = Device(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        return None, f"JAX does not start: its answer cannot be read: {done.stdout[-200:]}"
    said = [line for line in errors if "JAX cannot use" in line]
    return device, "; ".join([describe_device(device), *said]) if said else ""


def _start_devices() -> dict[str, Any]:
    """Starts JAX in this process, and returns the fields of a `Device`."""
    import jax

    devices = jax.local_devices()
    first = devices[0]
    capability = getattr(first, "compute_capability", None)
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": len(devices),
        "capability": None if capability is None else float(capability),
        "limit": (first.memory_stats() or {}).get("bytes_limit"),
        "kinds": sorted(memory.kind for memory in first.addressable_memories()),
    }


def describe_system() -> str:
    """Returns the operating system, the processor and the number of CPU cores."""
    return f"{platform.platform()}, {len(os.sched_getaffinity(0))} CPU cores"


def describe_plugins() -> str:
    """Returns the installed plugins of JAX for accelerators, and the driver of NVIDIA GPUs."""
    found = {name: _version(name) for name in PLUGINS}
    plugins = [f"{name} {version}" for name, version in found.items() if version]
    gpu = "an NVIDIA GPU" if has_nvidia_gpu() else "no NVIDIA GPU"
    return f"{', '.join(plugins) or 'no plugin of JAX'}; {gpu}; driver: {_driver() or 'none'}"


def _version(package: str) -> str | None:
    """Returns the version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Returns the version of the NVIDIA driver; None if there is no driver."""
    if DRIVER_FILE.is_file():
        words = DRIVER_FILE.read_text().splitlines()[0].split()
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=2)
    return done.stdout.split("\n")[0].strip() or None


def describe_device(device: Device | None) -> str:
    """Returns the number and the type of the devices."""
    if device is None:
        return "unknown"
    capability = f", compute capability {device.capability}" if device.capability else ""
    return f"{device.count} x {device.kind} ({device.platform}{capability})"


def describe_memory(device: Device | None) -> str:
    """Returns the memory of a device, and the kinds of memory that it can use."""
    if device is None:
        return "unknown"
    limit = "not reported" if device.limit is None else f"{device.limit / GIB:.1f} GiB"
    return f"limit {limit}; kinds: {', '.join(device.kinds)}"


def describe_host() -> str:
    """Returns the memory of this machine or container, and how much of it is available."""
    return f"{host_memory() / GIB:.1f} GiB of memory, {available_memory() / GIB:.1f} available"


def describe_pinned() -> str:
    """Returns the limits of host memory that cannot be swapped, which devices read directly."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:.0f} MiB"
    return f"ulimit -l {locked}; limit of XLA's pool {PINNED_MEMORY_GB}={_pool()}"


def _pool() -> str:
    return os.environ.get(PINNED_MEMORY_GB, "not set")


def describe_disks() -> str:
    """Returns the free space where runs are written and where downloads are cached."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    parts = []
    for name, directory in (("working directory", Path.cwd()), ("downloads", home)):
        usage = shutil.disk_usage(_existing(directory))
        parts.append(
            f"{name} {directory}: {usage.free / GIB:.0f} of {usage.total / GIB:.0f} GiB free"
        )
    return "; ".join(parts)


def _existing(directory: Path) -> Path:
    """Returns the directory, or its closest parent that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def describe_cache() -> str:
    """Returns the directory of compiled programs, and how much it contains."""
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE))
    files = [file for file in directory.glob("*-cache") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{directory}: {len(files)} programs, {size / 2**20:.0f} MiB"


def describe_variables() -> str:
    """Returns the environment variables that change how JAX works, and their values."""
    is_shown = lambda name: name.startswith(VARIABLES) and not name.endswith(("TOKEN", "KEY"))
    found = {name: x for name, x in sorted(os.environ.items()) if is_shown(name)}
    return ", ".join(f"{name}={value}" for name, value in found.items()) or "none"


def find_slow(device: Device | None) -> Iterator[str]:
    """Yields one line for each thing that would make training slow, with its reason.

    Args:
        device: Devices that JAX uses; None if JAX cannot start.
    """
    if device is not None and device.platform == "cpu":
        yield f"training on the CPU, because {_why_cpu()}"
    if device is not None and device.platform != "cpu" and device.limit is None:
        yield "the device does not report its memory; set memory.limit_gib, so that plans can fit"
    if device is not None and (device.capability or BFLOAT16_CAPABILITY) < BFLOAT16_CAPABILITY:
        yield (
            f"compute capability {device.capability} has no units for bfloat16, so bfloat16 "
            "products are computed in float32"
        )
    if device is not None and device.platform == "gpu" and STREAMING_OPTIONS:
        yield (
            "this version of jaxlib computes nothing while it copies weights from host memory; use "
            "Python 3.12 or newer with jax 0.11.2 or newer"
        )
    for name, why in SLOW_VARIABLES.items():
        if os.environ.get(name, "0").lower() not in ("0", "false", ""):
            yield f"{name}={os.environ[name]}: {why}"
    if os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in ("0", "false"):
        yield "JAX_ENABLE_COMPILATION_CACHE is off, so every start compiles all programs again"
    for name in GPU_MEMORY_SHARES:
        share = os.environ.get(name, "1")
        if share.replace(".", "", 1).isdigit() and float(share) < 0.9:
            yield f"{name}={share}: plans get only this fraction of a GPU's memory"
    if available_memory() < MIN_HOST_GIB * GIB:
        yield (
            f"{available_memory() / GIB:.1f} GiB of host memory are available; 7B LoRA with "
            "streamed weights needs 15.2"
        )
    if (free := shutil.disk_usage(Path.cwd()).free) < MIN_FREE_GIB * GIB:
        yield f"{free / GIB:.0f} GiB of disk are free; each checkpoint of 7B LoRA takes 4 GB"


def _why_cpu() -> str:
    """Returns the most likely reason why JAX uses the CPU."""
    if (chosen := os.environ.get("JAX_PLATFORMS")) is not None:
        return f"JAX_PLATFORMS={chosen}"
    if not has_nvidia_gpu():
        return "JAX has found no accelerator"
    if not any(_version(name) for name in PLUGINS if "cuda" in name):
        return "JAX for NVIDIA GPUs is not installed: pip install -e '.[cuda13]'"
    if _driver() is None:
        return "this machine has a GPU but no NVIDIA driver"
    return "JAX's plugin for NVIDIA GPUs cannot start; the line `devices` shows the error"


if __name__ == "__main__":
    sys.exit(main())

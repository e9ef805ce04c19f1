"""Describes the device and the host, and measures pinned host memory."""

import os
import resource
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from llava_jax.distributed.environment import GIB, host_memory, versions
from llava_jax.distributed.host_memory import PINNED_HOST
from llava_jax.gpu_check.cases import sizes_here
from llava_jax.gpu_check.results import Figure
from llava_jax.gpu_check.runner import DEVICE
from llava_jax.jax_compat import PINNED_MEMORY_GB
from llava_jax.planning import usage

SMI = ("name", "driver_version", "memory.total", "memory.used", "pcie.link.gen.current",
       "pcie.link.gen.max", "pcie.link.width.current", "clocks.max.sm")  # fmt: skip
SMI_SECONDS = 10
POOL_ERROR = 0.1
"""Largest allowed difference from the predicted size of the pinned pool, relative to this size."""

COPIES = 5  # copies that are timed in each direction


def describe_machine() -> Iterator[Figure]:
    """Yields versions, the device with its memory, and the limits of the host."""
    device = jax.devices()[0]
    yield Figure(DEVICE, device.device_kind)
    if device.platform == "cpu":
        yield Figure("note", "no accelerator was found, so all checks use the CPU and small models")
    yield Figure("number of devices", float(jax.device_count()))
    yield Figure("versions", ", ".join(f"{name} {x}" for name, x in versions().items()))
    yield Figure("platform", device.client.platform_version)
    yield Figure("compute capability", getattr(device, "compute_capability", None))
    yield Figure("memory kinds", ", ".join(sorted(x.kind for x in device.addressable_memories())))
    stats = device.memory_stats() or {}
    yield Figure("memory stats", ", ".join(f"{k} {v}" for k, v in stats.items()) or None)
    limit = stats.get("bytes_limit")
    yield Figure("memory limit of XLA", None if limit is None else limit / GIB, "GiB")
    yield Figure("host memory", host_memory() / GIB, "GiB")
    yield Figure("CPU cores", float(len(os.sched_getaffinity(0))))
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    yield Figure(
        "ulimit -l", "unlimited" if unlimited else locked / 2**20, "" if unlimited else "MiB"
    )
    yield Figure("limit of XLA's pinned pool", os.environ.get(PINNED_MEMORY_GB), "GiB")
    yield Figure("free disk", shutil.disk_usage(Path.cwd()).free / GIB, "GiB")
    yield Figure("nvidia-smi", nvidia_smi())


def nvidia_smi() -> str | None:
    """Returns what nvidia-smi says about the GPUs; None if it does not exist or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return "; ".join(done.stdout.strip().splitlines()) or None


def pinned_pool() -> Iterator[Figure]:
    """Measures the host memory that XLA pins for arrays, and the speed of copies over PCIe."""
    sizes, device = sizes_here(), jax.devices()[0]
    on_host = SingleDeviceSharding(device, memory_kind=PINNED_HOST)
    block = np.ones(sizes.pool_block, np.uint8)
    jax.block_until_ready(jax.device_put(np.ones(8, np.uint8), on_host))  # starts the device
    available, resident, pinned = available_memory(), resident_bytes(), _status_bytes("VmPin")
    arrays = []
    for _ in range(sizes.pool_blocks):
        arrays.append(jax.block_until_ready(jax.device_put(block, on_host)))
    asked = sizes.pool_block * sizes.pool_blocks
    is_pool = device.platform != "cpu"  # on a CPU, each array has its own memory
    predicted = usage.pinned_pool(asked) if is_pool else asked
    taken = resident_bytes() - resident
    yield Figure("asked", asked / GIB, "GiB")
    # The driver may not count its pinned pages as resident memory of the process.
    lost = available - available_memory()
    found = max(taken, lost) if is_pool else taken
    expected = f"{predicted / GIB:.3g} GiB within {POOL_ERROR:.0%}"
    passed = abs(found / predicted - 1) <= POOL_ERROR
    yield Figure("taken", found / GIB, "GiB", expected, passed)
    yield Figure("growth of VmRSS", taken / GIB, "GiB")
    yield Figure("decrease of MemAvailable", lost / GIB, "GiB")
    grown = None if pinned is None else ((_status_bytes("VmPin") or 0) - pinned) / GIB
    yield Figure("growth of VmPin", grown, "GiB")
    on_device = SingleDeviceSharding(device)
    there = jax.block_until_ready(jax.device_put(arrays[0], on_device))
    yield copy_speed("copy from pinned memory to the device", arrays[0], on_device)
    yield copy_speed("copy from the device to pinned memory", there, on_host)


def copy_speed(name: str, array: jax.Array, sharding: SingleDeviceSharding) -> Figure:
    """Returns the median speed at which an array is copied to another memory."""
    seconds = []
    for _ in range(COPIES):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(array, sharding, may_alias=False))
        seconds.append(time.perf_counter() - start)
    return Figure(name, array.nbytes / statistics.median(seconds) / 1e9, "GB/s")


def resident_bytes() -> int:
    """Returns the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def available_memory() -> int:
    """Returns the memory of this machine that processes can still take, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


def _status_bytes(name: str) -> int | None:
    """Returns a field of /proc/self/status in bytes; None if the kernel does not report it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(f"{name}:")), None)


class MemoryWatch:
    """Context that watches the memory of the host.

    Attributes:
        resident: Growth of this process's resident memory since the context began, at its largest,
            in bytes.
        taken: Decrease of the machine's available memory since the context began, at its largest,
            in bytes. Unlike `resident`, this contains the pages that a driver pins.
    """

    INTERVAL = 0.002  # seconds between two measurements

    def __enter__(self) -> "MemoryWatch":
        self._before = resident_bytes(), available_memory()
        self.resident = self.taken = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(self.INTERVAL):
            resident, available = self._before
            self.resident = max(self.resident, resident_bytes() - resident)
            self.taken = max(self.taken, available - available_memory())

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

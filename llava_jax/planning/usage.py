"""Defines what a plan needs of a device and a host, and prints it as a table."""

import dataclasses

from llava_jax.distributed.environment import GIB, HOST_SHARE, RESERVE_SHARE
from llava_jax.planning.beside import CHECKPOINT, READ_AHEAD
from llava_jax.planning.forecast import Forecast
from llava_jax.planning.peak import LargeArray

REST = "activations and temporaries"  # the term of a `Usage` for all other memory


def pinned_pool(asked: int) -> int:
    """Returns the size in bytes of XLA:GPU's pool of pinned memory, unless its limit is lower.

    The pool consists of regions. The first region has 2 MiB, and each new region is twice as large
    as the last one, so the whole pool has nearly a power of two bytes (`BFCAllocator::Extend` in
    XLA). The pool never becomes smaller.

    Args:
        asked: Bytes of the arrays in the pool.
    """
    return 1 << max(asked - 1, 0).bit_length() if asked else 0


def reserve_of(capacity: int, outside: int) -> int:
    """Returns the bytes of device memory that are reserved for the runtime.

    They are a share of the memory, but on a small GPU at least what is not in XLA's pool.

    Args:
        capacity: Size of the device's memory.
        outside: Device memory that is not in XLA's pool; see `beside.outside_pool`.
    """
    return max(int(RESERVE_SHARE * capacity), outside)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Memory, transfers and FLOPs of a plan, per device. All values are in bytes except `flops`.

    Attributes:
        device: Device memory of a step by term, for example "gradients"; the sum is `total`.
        host: Pinned host memory of a step by term; the sum is `host_total`.
        total: Peak of the device memory, from the compiler: arguments, results and temporaries.
        host_total: Peak of the pinned host memory, from the compiler.
        pcie: Bytes that cross PCIe in one optimizer step, in both directions together.
        capacity: Size of the device's memory.
        flops: FLOPs of the matrix products of one optimizer step, as compiled; None if they could
            not be counted.
        host_capacity: Host memory that a run may use for this device; None if it is unknown.
        device_beside: Device memory that a run needs beside a step, by term.
        host_beside: Host memory that a run needs beside a step, by term.
        outside: Device memory that is not in XLA's pool; see `beside.outside_pool`.
        pooled: Number of devices that share one pool of pinned memory, which grows by doubling; 0
            if the platform has no such pool.
        forecast: Forecast of the step's duration; None for devices other than GPUs, or if the
            compiled step could not be read.
        shares_host: Whether device and host share one memory, whose size is `capacity`, as on CPUs.
        out_of_memory: Whether the compiler ran out of memory, so that `total` is only a bound.
        largest: Largest arrays at the peak of the device memory; empty if they are unknown.
    """

    device: dict[str, int]
    host: dict[str, int]
    total: int
    host_total: int
    pcie: int
    capacity: int
    flops: int | None
    host_capacity: int | None = None
    device_beside: dict[str, int] = dataclasses.field(default_factory=dict)
    host_beside: dict[str, int] = dataclasses.field(default_factory=dict)
    outside: int = 0
    pooled: int = 0
    forecast: Forecast | None = None
    shares_host: bool = False
    out_of_memory: bool = False
    largest: tuple[LargeArray, ...] = ()

    @property
    def fits(self) -> bool:
        """Returns True if the plan fits into device memory and into host memory (if known)."""
        return not self.out_of_memory and self.headroom >= 0 and self.host_headroom >= 0

    @property
    def reserve(self) -> int:
        """Returns the bytes of device memory that are reserved for the runtime."""
        return reserve_of(self.capacity, self.outside)

    @property
    def device_needed(self) -> int:
        """Returns the bytes of device memory for a step and for what a run needs beside it.

        If device and host share one memory, the arrays in host memory count too.
        """
        on_device = self.total + sum(self.device_beside.values())
        return on_device + (self.host_needed + self.pool_growth if self.shares_host else 0)

    @property
    def host_needed(self) -> int:
        """Returns the bytes of host memory for a step and for what a run needs beside it."""
        return self.host_total + sum(self.host_beside.values())

    @property
    def headroom(self) -> int:
        """Returns the unused bytes of device memory; negative if the plan does not fit."""
        return self.capacity - self.reserve - self.device_needed

    @property
    def pool_growth(self) -> int:
        """Returns the bytes that the pool of pinned memory has in addition, because it doubles.

        The limit of the pool is `host_capacity`, so the growth makes no plan too large. If the pool
        grows to its limit, a checkpoint takes memory of the host's reserve.
        """
        if not self.pooled:
            return 0
        others = sum(self.host_beside.get(term, 0) for term in (CHECKPOINT, READ_AHEAD))
        pinned = self.host_needed - others
        pool = pinned_pool(pinned * self.pooled) // self.pooled
        most = pool if self.host_capacity is None else self.host_capacity - others
        return max(min(pool, most) - pinned, 0)

    @property
    def host_headroom(self) -> int:
        """Returns the unused bytes of host memory; 0 if the size of host memory is unknown."""
        if self.host_capacity is None:
            return 0
        return self.host_capacity - self.host_needed - self.pool_growth


def usage_table(usage: Usage) -> str:
    """Returns a table, as text, of the memory by term, the totals, and the cost of a step."""
    lines = [f"{'':32}{'device GiB':>11}{'host GiB':>11}"]
    row = lambda name, device, host: f"{name:32}{device / GIB:11.2f}{host / GIB:11.2f}"
    lines += [row(term, usage.device[term], usage.host[term]) for term in usage.device]
    lines.append(row("sum: a train step", usage.total, usage.host_total))
    for term in usage.device_beside:
        lines.append(row(term, usage.device_beside[term], usage.host_beside[term]))
    lines.append(row("growth of the pinned pool", 0, usage.pool_growth))
    on_host = usage.host_needed + usage.pool_growth
    lines.append(row("sum: a run", usage.device_needed, on_host))
    known = usage.host_capacity is not None
    rest = (usage.capacity, usage.reserve, usage.headroom)
    if usage.host_capacity is None:
        on_host = (f"{'not given':>11}", "", "")
    else:
        host = usage.host_capacity / HOST_SHARE
        sizes = (host, host - usage.host_capacity, usage.host_headroom)
        on_host = tuple(f"{size / GIB:11.2f}" for size in sizes)
    names = ("memory", "reserve for the runtime", "headroom")
    for name, size, text in zip(names, rest, on_host, strict=True):
        lines.append(f"{name:32}{size / GIB:11.2f}{text}")
    if usage.forecast is None:  # a forecast has the copies of the compiled step
        lines.append(f"PCIe: {usage.pcie / GIB:.1f} GiB per optimizer step, in both directions")
    flops = "not counted" if usage.flops is None else f"{usage.flops:.3e}"
    lines.append(f"FLOPs: {flops} per device and optimizer step, in matrix products")
    verdict = "fits" if usage.fits else "does not fit"
    return "\n".join(
        [*lines, verdict if known else f"{verdict}; the size of host memory is not given"]
    )


def largest_table(usage: Usage) -> str:
    """Returns a table, as text, of the largest arrays at the peak of device memory."""
    lines = [f"{x.size / GIB:8.2f} GiB  {x.shape:28} {x.name}" for x in usage.largest]
    return "\n".join(["largest arrays when the step needs the most device memory:", *lines])

"""Forecasts the duration of a compiled train step, and which of its copies computation hides.

The text of a compiled module for GPUs lists the instructions of a program in the order in which the
GPU starts them. An asynchronous copy begins at a `-start` instruction, and the program waits for
its end at the `-done` instruction. So the forecast goes through the text with a clock: computation
takes time, a copy occupies PCIe, and a `-done` instruction waits until its copy has ended. Weights
on disk are read while the GPU computes, but nothing runs while they are copied to the GPU.

The forecast assumes that computation and copies reach fixed fractions of the peak rates. On an H200
(docs/gpu_results.md), a LoRA step of a 7B model took 4 % longer than its forecast, and a streamed
step whose copies do not overlap took 3 % less.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llava_jax.distributed.environment import GIB
from llava_jax.jax_compat import CALLBACK, COPY_ENGINE, HOST_SPACE
from llava_jax.planning.collectives import KINDS, moved_bytes
from llava_jax.planning.devices import Rates
from llava_jax.planning.flops import product_flops
from llava_jax.planning.hlo import (
    ARRAY,
    NAME,
    Computation,
    Instruction,
    called,
    iterations,
    nbytes,
    operands,
    parse,
)

PRODUCTS, MEMORY, LINKS = 0.7, 0.85, 0.8
"""Assumed fractions of the peak rates that matrix products, other operations, and copies over PCIe
and NVLink reach."""

DISK_RATE = 3e9
"""Assumed number of bytes that a disk reads per second: an NVMe disk for PCIe 3.0. A disk for SATA
reads about 0.55e9 bytes per second."""

FROM_HOST, TO_HOST, BETWEEN = "from host", "to host", "between devices"
"""Directions of copies. Copies in different directions do not slow each other down."""

FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota")
)
"""Instructions that take no time."""

WAITED = 0.01
"""A copy counts as hidden if the program waits for at most this fraction of its duration."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Forecast of one optimizer step on one device.

    Attributes:
        seconds: Duration of the step.
        serial_seconds: Duration if no copy ran beside computation.
        copied: Bytes that cross PCIe by direction, FROM_HOST or TO_HOST.
        hidden: Bytes of the copies that the program does not wait for, by direction.
        disk: Bytes that are read from files.
    """

    seconds: float
    serial_seconds: float
    copied: dict[str, int]
    hidden: dict[str, int]
    disk: int = 0


def forecast(text: str, rates: Rates, disk: int = 0) -> Forecast:
    """Forecasts one execution of a compiled train step.

    Args:
        text: Text of the scheduled module, from the compiler for GPUs.
        rates: Peak rates of the device that the module was compiled for.
        disk: Bytes that all devices together read from files.

    Raises:
        ValueError: A loop has an unknown length, a library call is unknown, or the text does not
            describe a compiled module.
    """
    module, entry = parse(text)

    @functools.cache
    def of(name: str) -> _Costs:
        clock = _Clock(module, rates, of)
        for instruction in module[name].values():
            clock.run(instruction, module[name])
        return clock.costs

    costs = of(entry)
    directions = (FROM_HOST, TO_HOST)
    return Forecast(
        seconds=max(costs.seconds, disk / DISK_RATE),
        serial_seconds=costs.serial + disk / DISK_RATE,
        copied={way: costs.copied[way] for way in directions},
        hidden={way: costs.hidden[way] for way in directions},
        disk=disk,
    )


@dataclasses.dataclass
class _Costs:
    """Costs of a computation: time with and without overlap, and bytes by direction."""

    seconds: float = 0.0
    serial: float = 0.0
    copied: Counter[str] = dataclasses.field(default_factory=Counter)
    hidden: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, other: "_Costs", times: int = 1) -> None:
        """Adds the costs of a computation that runs `times` times."""
        self.seconds += times * other.seconds
        self.serial += times * other.serial
        for own, more in ((self.copied, other.copied), (self.hidden, other.hidden)):
            own.update({way: times * size for way, size in more.items()})


class _Copy(NamedTuple):
    """A copy that has started: the time of its end, its size in bytes, and its duration."""

    end: float
    size: int
    seconds: float
    way: str


class _Clock:
    """Steps through one computation.

    Args:
        module: All computations of the module.
        rates: Peak rates of the device.
        of: Function that returns the costs of a computation by its name.

    Attributes:
        costs: Costs so far; `costs.seconds` is the time on the clock.
    """

    def __init__(
        self,
        module: Mapping[str, Computation],
        rates: Rates,
        of: Callable[[str], _Costs],
    ):
        self._module, self._rates, self._of = module, rates, of
        self._busy: dict[str, float] = {}  # time when the last copy in a direction ends
        self._copies: dict[str, _Copy] = {}
        self.costs = _Costs()

    def run(self, instruction: Instruction, scope: Computation) -> None:
        """Advances the clock by one instruction."""
        opcode = instruction.opcode
        if opcode in FREE:
            return
        moved = _moved(instruction, scope)
        if opcode.endswith("-done"):
            started = NAME.findall(instruction.operands)[0]
            if started in self._copies:  # else it is computation, which is counted at its start
                self._wait(self._copies.pop(started))
        elif moved and opcode.endswith("-start") and not _by_kernel(instruction, self._module):
            self._copies[instruction.name] = self._start(*moved)
        elif moved:
            self._wait(self._start(*moved))
        elif opcode == "while":
            body = instruction.attributes.partition("body=")[2].partition(",")[0]
            times = iterations(instruction, self._module)
            self.costs.add(self._of(body), times)
        elif opcode in ("call", "conditional"):
            inner = [self._of(name) for name in called(instruction)]
            self.costs.add(max(inner, key=lambda costs: costs.seconds, default=_Costs()))
        else:
            seconds = _seconds(instruction, scope, self._module, self._rates)
            self.costs.add(_Costs(seconds, seconds))

    def _start(self, way: str, size: int) -> _Copy:
        seconds = size / (LINKS * (self._rates.link if way == BETWEEN else self._rates.pcie))
        self._busy[way] = max(self._busy.get(way, 0.0), self.costs.seconds) + seconds
        return _Copy(self._busy[way], size, seconds, way)

    def _wait(self, copy: _Copy) -> None:
        wait = max(copy.end - self.costs.seconds, 0.0)
        hidden = copy.size if wait <= WAITED * copy.seconds else 0
        sizes = Counter({copy.way: copy.size}), Counter({copy.way: hidden})
        self.costs.add(_Costs(wait, copy.seconds, *sizes))


def _moved(instruction: Instruction, scope: Computation) -> tuple[str, int] | None:
    """Returns the direction and the bytes of a copy; None if the instruction copies nothing.

    A slice of a larger array is copied, or written, so the smallest array is what moves.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "custom-call" and CALLBACK in instruction.attributes:
        return FROM_HOST, nbytes(instruction.shape)
    arrays = operands(instruction, scope)
    if opcode in KINDS:
        return BETWEEN, sum(moved_bytes(instruction, scope).values())
    if opcode in ("while", "conditional", "call") or opcode.endswith("-done"):
        return None
    result = _result(instruction)
    to_host = HOST_SPACE in result
    if not to_host and not any(HOST_SPACE in array for array in arrays):
        return None
    found = [array for shape in (*arrays, result) for array in ARRAY.finditer(shape)]
    sizes = [nbytes(array[0]) for array in found if array[2]]  # an index has no dimensions
    return (TO_HOST if to_host else FROM_HOST), min(sizes)


def _by_kernel(instruction: Instruction, module: Mapping[str, Computation]) -> bool:
    """Returns True if a kernel copies a slice, so that no other kernel runs beside the copy."""
    inner = [x for name in called(instruction) for x in module[name].values()]
    slices = [x for x in inner if x.opcode in ("dynamic-slice", "dynamic-update-slice")]
    return not all(COPY_ENGINE in x.attributes for x in slices)


def _result(instruction: Instruction) -> str:
    """Returns the shape of an instruction's result, also if the instruction is asynchronous."""
    shape = instruction.shape
    if instruction.opcode == "fusion-start":  # the shape is ((operands), result, state)
        return shape.partition("), ")[2]
    if instruction.opcode == "copy-start":  # the shape is (result, operand, state)
        return shape.partition("]")[0] + "]" + shape.partition("]")[2].partition("}")[0]
    return shape


def _seconds(
    instruction: Instruction, scope: Computation, module: Mapping[str, Computation], rates: Rates
) -> float:
    """Returns the time of an instruction that computes: its products, or its memory accesses."""
    inner = [(x, module[name]) for name in called(instruction) for x in module[name].values()]
    flops = sum(product_flops(*pair) for pair in ((instruction, scope), *inner))
    products = flops / (PRODUCTS * rates.products)
    return max(products, _traffic(instruction, scope, module) / (MEMORY * rates.memory))


def _traffic(
    instruction: Instruction, scope: Computation, module: Mapping[str, Computation]
) -> int:
    """Returns the bytes that an instruction reads and writes in device memory.

    Of an array of which only slices are read or written, only the slices count.
    """
    if instruction.opcode in ("dynamic-slice", "gather"):
        return 2 * nbytes(instruction.shape)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * nbytes(operands(instruction, scope)[1])
    bodies = [module[name] for name in called(instruction)]
    read = written = 0
    for index, shape in enumerate(operands(instruction, scope)):
        parts = [part for body in bodies if (part := _slices_of(index, body)) is not None]
        read += min([nbytes(shape), *parts])
    updates = [
        nbytes(operands(x, body)[1])
        for body in bodies
        for x in body.values()
        if x.opcode == "dynamic-update-slice"
    ]
    written = sum(updates) if updates else nbytes(_result(instruction))
    return read + written


def _slices_of(index: int, body: Computation) -> int | None:
    """Returns the bytes of all slices that a fusion takes of an operand.

    Args:
        index: Index of the operand.
        body: Computation of the fusion.

    Returns:
        The bytes; None if the fusion also uses the operand as a whole.
    """
    name = next(
        (x.name for x in body.values() if x.opcode == "parameter" and x.operands == str(index)),
        None,
    )
    users = [x for x in body.values() if name in NAME.findall(x.operands)]
    if all(x.opcode in ("dynamic-slice", "gather") for x in users):
        return sum(nbytes(x.shape) for x in users)
    if all(x.opcode == "dynamic-update-slice" for x in users):
        return 0
    return None


def describe_forecast(found: Forecast, rates: Rates) -> str:
    """Returns two lines of text: which copies are hidden, and the duration with its assumptions."""
    copied, hidden = (sum(sizes.values()) / GIB for sizes in (found.copied, found.hidden))
    copies = "copies over PCIe: none"
    if copied:
        copies = (
            f"copies over PCIe: {hidden:.1f} of {copied:.1f} GiB per optimizer step "
            f"({100 * hidden / copied:.0f} %) are hidden by computation"
        )
    if found.disk:
        copies += (
            f"\ndisk: at most {found.disk / GIB:.1f} GiB are read per optimizer step, in "
            f"{found.disk / DISK_RATE:.1f} s (assumes {DISK_RATE / 1e9:.0f} GB/s); what stays in "
            "the operating system's cache is not read again"
        )
    return (
        f"{copies}\nforecast: {found.seconds:.1f} s per optimizer step; "
        f"{found.serial_seconds:.1f} s if nothing overlapped (assumes {100 * PRODUCTS:.0f} % of "
        f"{rates.products / 1e12:.0f} TFLOP/s, {100 * MEMORY:.0f} % of {rates.memory / 1e9:.0f} "
        f"GB/s of memory, and {100 * LINKS:.0f} % of {rates.pcie / 1e9:.0f} GB/s of PCIe)"
    )

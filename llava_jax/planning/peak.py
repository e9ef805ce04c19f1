"""Finds the largest arrays in device memory at the peak of a compiled step.

XLA writes the assignment of arrays to memory as text files, if it is asked to dump them. No public
function returns it: the serialized assignment in XLA's memory statistics is empty for absent GPUs.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llava_jax.jax_compat import DUMP_OPTIONS, DUMP_TO, Options

ASSIGNMENT, LIVE_RANGES = "*-buffer-assignment.txt", "*-live-range.txt"
"""Names of the files: the buffer of each array in memory, and the time in which each is needed."""

DEVICE_COLOR = "0"
"""Number that XLA gives to device memory in the file of the assignment."""

SCOPES = ("vision", "projector", "attention", "feed_forward", "decoder", "loss", "optimizer")
"""Names of the parts of a step, which the model gives to `jax.named_scope`."""


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """An array in device memory.

    Attributes:
        size: Size in bytes.
        shape: Dtype and shape, for example "bf16[2048,4096]".
        name: Path of a parameter, or the part of the step and the operation that make the array.
    """

    size: int
    shape: str
    name: str


def dump_options(folder: Path) -> Options:
    """Returns the compiler options with which XLA writes the files to a folder."""
    return {DUMP_TO: str(folder), **DUMP_OPTIONS}


def largest_arrays(folder: Path, text: str, count: int = 10) -> tuple[LargeArray, ...]:
    """Returns the largest arrays at the peak of device memory, the largest first.

    Args:
        folder: Folder to which XLA wrote its files.
        text: Text of the compiled module.
        count: Largest number of arrays to return.

    Returns:
        The arrays; none if XLA did not write the files, or in another form.
    """
    files = [next(folder.glob(name), None) for name in (ASSIGNMENT, LIVE_RANGES)]
    if None in files:
        return ()
    assignment, ranges = (file.read_text() for file in files if file)
    values = list(_values(assignment, _times(ranges)))
    if not values:
        return ()
    steps = np.zeros(2 + max(value.stop for value in values), np.int64)
    for buffer, start, stop in _intervals(values):
        steps[start] += buffer[2]
        steps[stop + 1] -= buffer[2]
    peak = int(np.argmax(np.cumsum(steps)))
    at_peak = {value.buffer: value for value in values if value.start <= peak <= value.stop}
    largest = sorted(at_peak.values(), key=lambda value: -value.buffer[2])[:count]
    names = _names(text)
    return tuple(
        LargeArray(value.buffer[2], value.shape, _name(value, values, names)) for value in largest
    )


@dataclasses.dataclass(frozen=True)
class _Value:
    """A value of the program: its instruction, and its buffer and time in memory.

    Attributes:
        instruction: Name of the instruction.
        shape: Dtype and shape.
        buffer: Number of the allocation, offset in the allocation in bytes, and size in bytes. The
            values of a loop's carry have the same buffer.
        start: Time of the instruction.
        stop: Time of the last use.
    """

    instruction: str
    shape: str
    buffer: tuple[int, int, int]
    start: int
    stop: int


_ALLOCATION = re.compile(r"allocation (\d+):")
_VALUE = re.compile(
    r" value: <\d+ (?P<instruction>\S+?)(?P<index>\{[\d,]*\})?(?: \(phi\))? @(?P<color>\d+)> "
    r"\(size=(?P<size>\d+),offset=(?P<offset>\d+)\): (?P<shape>[^{]*)"
)
_TIME = re.compile(r"^    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$", re.MULTILINE)


def _times(ranges: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Returns the first and the last time of each value, by instruction and index."""
    found = _TIME.findall(ranges.partition("BufferLiveRange:")[2])
    return {(name, index): (int(start), int(stop)) for name, index, start, stop in found}


def _values(assignment: str, times: dict[tuple[str, str], tuple[int, int]]) -> Iterable[_Value]:
    """Yields the values in device memory."""
    allocation = 0
    for line in assignment.splitlines():
        if begins := _ALLOCATION.match(line):
            allocation = int(begins[1])
        found = _VALUE.match(line)
        if found is None or found["color"] != DEVICE_COLOR:
            continue
        time = times.get((found["instruction"], found["index"] or "{}"))
        if time is not None:
            buffer = allocation, int(found["offset"]), int(found["size"])
            yield _Value(found["instruction"], found["shape"], buffer, *time)


def _intervals(values: list[_Value]) -> Iterable[tuple[tuple[int, int, int], int, int]]:
    """Yields each time in which a buffer is in use; the values of a carry count once."""
    in_order = sorted(values, key=lambda value: (value.buffer, value.start))
    buffer, start, stop = in_order[0].buffer, in_order[0].start, in_order[0].stop
    for value in in_order[1:]:
        if value.buffer == buffer and value.start <= stop + 1:
            stop = max(stop, value.stop)
        else:
            yield buffer, start, stop
            buffer, start, stop = value.buffer, value.start, value.stop
    yield buffer, start, stop


_COMPUTATION = re.compile(r"(?:ENTRY )?%?(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(\S+) = ")
_OPERATION, _CALLED = re.compile(r'op_name="([^"]*)"'), re.compile(r"calls=%?([\w.-]+)")


def _names(text: str) -> dict[str, str]:
    """Returns the name that JAX gave to each instruction's operation.

    A fusion without such a name has the name of an operation inside it.
    """
    names: dict[str, str] = {}
    inside: dict[str, str] = {}
    computation = ""
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            computation = begins[1]
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        operation, called = _OPERATION.search(line), _CALLED.search(line)
        name = operation[1] if operation else inside.get(called[1] if called else "")
        if name:
            names[instruction[1]] = inside[computation] = name
    return names


_ARGUMENT = re.compile(r"\b(mu|nu|trainable|frozen)\['([^']*)'\]")
_KINDS = {"mu": "first moment of ", "nu": "second moment of ", "trainable": "", "frozen": ""}


def _name(value: _Value, values: list[_Value], names: dict[str, str]) -> str:
    """Returns the name of an array; the element of a carry has the name of an earlier value."""
    same = [
        other for other in values if other.buffer == value.buffer and other.shape == value.shape
    ]
    same.sort(key=lambda other: abs(other.start - value.start))
    known = (names[other.instruction] for other in same if other.instruction in names)
    operation = next(known, value.instruction)
    if "/" not in operation:
        argument = _ARGUMENT.search(operation.replace("\\'", "'"))
        return f"{_KINDS[argument[1]]}{argument[2]}" if argument else operation
    parts = [part for part in SCOPES if re.search(rf"\b{part}\b", operation)]
    phase = "backward" if "transpose(" in operation else "forward"
    return " ".join([phase, *parts[:1], operation.rpartition("/")[2]])

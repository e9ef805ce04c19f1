"""Reads the text of compiled modules: which instructions an execution runs, and how often.

If the length of a loop depends on data, `jax_compat.bounded_loop` can write an upper bound of the
length into the loop's name.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from llava_jax.jax_compat import loop_bound

COMPUTATION = re.compile(r"(ENTRY )?(%[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"  (?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\(([^)]*)\)?(.*)")
CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
NAME = re.compile(r"%[\w.-]+")
ARRAY = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\]")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """A line of a module's text, in the form `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


Computation = dict[str, Instruction]
"""The instructions of a computation by name."""


def total(text: str, cost: Callable[[Instruction, Computation], Mapping[str, int]]) -> Counter[str]:
    """Sums the costs of all instructions in one execution of a compiled module, on one device.

    An instruction in a loop counts once per iteration. Of the branches of a conditional, only the
    branch with the highest cost counts.

    Args:
        text: Text of the optimized module, from `jax.stages.Compiled.as_text`.
        cost: Function that takes an instruction and its computation, and returns the costs of the
            instruction by kind, without the computations that the instruction calls.

    Returns:
        The total cost of each kind.

    Raises:
        ValueError: An instruction with a cost is in a loop of unknown length, or the text does not
            describe a compiled module.
    """
    module, entry = parse(text)

    @functools.cache
    def of(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for instruction in module[name].values():
            found.update(of_instruction(instruction, module[name]))
        return found

    def of_instruction(instruction: Instruction, scope: Computation) -> Counter[str]:
        inner = [of(name) for name in called(instruction)]
        if instruction.opcode == "conditional":
            return max(inner, key=Counter.total)
        found = sum(inner, Counter(cost(instruction, scope)))
        if instruction.opcode == "while" and found:
            times = iterations(instruction, module)
            return Counter({kind: times * count for kind, count in found.items()})
        return found

    return of(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a module by name, and the name of the entry computation."""
    module: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := INSTRUCTION.match(line):
            module[name][found[1]] = Instruction(*found.groups())
        elif found := COMPUTATION.match(line):
            name = found[2]
            module[name] = {}
            entry = name if found[1] else entry
    if not entry:
        raise ValueError(f"this is not the text of a compiled module: {text[:100]!r}")
    return module, entry


def iterations(loop: Instruction, module: Mapping[str, Computation]) -> int:
    """Returns the number of iterations of a while loop, or an upper bound of this number.

    Raises:
        ValueError: Neither the number nor an upper bound is known.
    """
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    # The compiler for TPUs does not write the number of iterations. But JAX's loops of fixed length
    # count up from 0 while the counter is less than a constant, so the constant is this number.
    condition = module[re.findall(r"condition=(%[\w.-]+)", loop.attributes)[0]]
    for test in condition.values():
        if test.opcode == "compare" and "direction=LT" in test.attributes:
            limit = condition[NAME.findall(test.operands)[1]]
            if limit.opcode == "constant":
                return int(limit.operands)
    bound = loop_bound(loop.attributes)
    if bound is not None:
        return bound
    raise ValueError(f"cannot count a loop of unknown length: {loop.attributes[:300]}")


def called(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls, without loop conditions."""
    return [
        name for names in CALLED.findall(instruction.attributes) for name in NAME.findall(names)
    ]


def operands(instruction: Instruction, scope: Computation) -> list[str]:
    """Returns the shapes of an instruction's operands, as text."""
    return [scope[name].shape for name in NAME.findall(instruction.operands)]


def sizes(shape: str) -> list[int]:
    """Returns the dimensions of an array, for example [8, 128] for "bf16[8,128]{1,0}".

    Args:
        shape: Shape of an array as text, or of a tuple, whose first array is used.
    """
    return [int(size) for size in re.findall(r"\d+", re.findall(r"\[([\d,]*)\]", shape)[0])]


def nbytes(shape: str) -> int:
    """Returns the size in bytes of an array with the given shape, or of all arrays of a tuple."""
    known = {"pred": 8, "token": 0}
    bits = lambda kind: known[kind] if kind in known else int(re.findall(r"\d+", kind)[0])
    count = lambda dims: math.prod(int(size) for size in dims.split(",") if size)
    return sum(bits(kind) * count(dims) for kind, dims in ARRAY.findall(shape)) // 8

"""Reads the text of compiled modules: what an execution does, and how often.

A loop whose length is known only when it runs has a bound in its name (`jax_compat.bounded_loop`).
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
    """A line of a module's text: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


Computation = dict[str, Instruction]


def total(text: str, cost: Callable[[Instruction, Computation], Mapping[str, int]]) -> Counter[str]:
    """Adds up what the instructions of a compiled module cost when it runs, on one device.

    Of the branches of a conditional, the one with the highest cost counts.

    Args:
        text: The optimised module, as `jax.stages.Compiled.as_text` gives it.
        cost: The cost of an instruction in its computation, without the computations it calls.

    Raises:
        ValueError: An instruction with a cost is in a loop of unknown length, or the text is not
            that of a module.
    """
    module, entry = _parse(text)

    @functools.cache
    def of(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for instruction in module[name].values():
            found.update(of_instruction(instruction, module[name]))
        return found

    def of_instruction(instruction: Instruction, scope: Computation) -> Counter[str]:
        called = CALLED.findall(instruction.attributes)
        inner = [of(name) for names in called for name in NAME.findall(names)]
        if instruction.opcode == "conditional":
            return max(inner, key=Counter.total)
        found = sum(inner, Counter(cost(instruction, scope)))
        if instruction.opcode == "while" and found:
            iterations = _iterations(instruction, module)
            return Counter({kind: iterations * count for kind, count in found.items()})
        return found

    return of(entry)


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """The module's computations by name, and which of them is its entry."""
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
        raise ValueError(f"not the text of a compiled module: {text[:100]!r}")
    return module, entry


def _iterations(loop: Instruction, module: dict[str, Computation]) -> int:
    if known := TRIPS.search(loop.attributes):
        return int(known[1])
    # The TPU's compiler does not write the count. JAX's loops of fixed length count from 0 and go
    # on while the count is less than a constant.
    condition = module[re.findall(r"condition=(%[\w.-]+)", loop.attributes)[0]]
    for test in condition.values():
        if test.opcode == "compare" and "direction=LT" in test.attributes:
            limit = condition[NAME.findall(test.operands)[1]]
            if limit.opcode == "constant":
                return int(limit.operands)
    bound = loop_bound(loop.attributes)
    if bound is not None:
        return bound
    raise ValueError(f"a loop of unknown length: {loop.attributes[:300]}")


def operands(instruction: Instruction, scope: Computation) -> list[str]:
    """Shapes of the operands."""
    return [scope[name].shape for name in NAME.findall(instruction.operands)]


def sizes(shape: str) -> list[int]:
    """[8, 128] of "bf16[8,128]{1,0}", of a tuple its first array's."""
    return [int(size) for size in re.findall(r"\d+", re.findall(r"\[([\d,]*)\]", shape)[0])]


def nbytes(shape: str) -> int:
    """Bytes of an array, or of all arrays in a tuple."""
    bits = lambda kind: int(re.findall(r"\d+", kind)[0]) if kind != "pred" else 8
    count = lambda dims: math.prod(int(size) for size in dims.split(",") if size)
    return sum(bits(kind) * count(dims) for kind, dims in ARRAY.findall(shape)) // 8

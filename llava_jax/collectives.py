"""Counts what a compiled module moves among its devices."""

import re
from collections import Counter

from llava_jax.hlo import Computation, Instruction, nbytes, operands, total

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
CHAIN = re.compile(rf' (?:{"|".join(KINDS)})\(.*chain_id="(\d+)"')
"""Beside products, the TPU's compiler runs a collective in pieces, each written as the whole."""


def collective_bytes(text: str) -> Counter[str]:
    """Bytes of collectives by kind, when a compiled module runs, on one device.

    What counts is the whole that a device takes part in: what it has after a gather, what it adds
    to a sum. Of that its links carry (n - 1) / n among n devices; of an `all-reduce`, twice that.

    Args:
        text: The optimised module, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: A collective is in a loop of unknown length, or the text is no module's.
    """
    pieces = Counter(CHAIN.findall(text))
    found: Counter[str] = Counter()
    for (kind, chain), count in total(text, _moved).items():
        found[kind] += count // max(pieces[chain], 1)
    return found


def _moved(instruction: Instruction, scope: Computation) -> dict[tuple[str, str], int]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return {}
    moved = sum(map(nbytes, operands(instruction, scope)))
    if kind == "all-gather":  # one that is only started gives its operands too
        moved = nbytes(instruction.shape) - (moved if kind != instruction.opcode else 0)
    chain = re.findall(r'chain_id="(\d+)"', instruction.attributes)
    return {(kind, chain[0] if chain else ""): moved}

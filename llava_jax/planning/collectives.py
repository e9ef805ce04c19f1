"""Counts the bytes that a compiled module moves between devices."""

from collections import Counter

from llava_jax.planning.hlo import Computation, Instruction, nbytes, operands, total

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def collective_bytes(text: str) -> Counter[str]:
    """Returns the bytes of collectives in one execution of a module, on one device and by kind.

    For an all-gather, the bytes of the result are counted; for every other collective, the bytes of
    the operands. With n devices, the links of a device carry (n - 1) / n of these bytes, and twice
    as many for an all-reduce.

    Args:
        text: Text of the optimized module, from `jax.stages.Compiled.as_text`.

    Raises:
        ValueError: A collective is in a loop of unknown length; collectives are fused with matrix
            products, as by the compiler for TPUs; or the text does not describe a compiled module.
    """
    # Such a fusion divides a collective into pieces. In the text, each piece has the size of the
    # whole collective.
    if "async_collective_fusion" in text:
        raise ValueError("cannot count collectives that are fused with matrix products, as on TPUs")
    return total(text, moved_bytes)


def moved_bytes(instruction: Instruction, scope: Computation) -> dict[str, int]:
    """Returns the bytes of one instruction by its kind; empty if it is not a collective."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return {}
    own = sum(map(nbytes, operands(instruction, scope)))
    if kind != "all-gather":
        return {kind: own}
    # The result of an all-gather-start also contains the operands.
    return {kind: nbytes(instruction.shape) - (0 if kind == instruction.opcode else own)}

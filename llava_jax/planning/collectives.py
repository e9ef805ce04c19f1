"""Counts what a compiled module moves among its devices."""

from collections import Counter

from llava_jax.planning.hlo import Computation, Instruction, nbytes, operands, total

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def collective_bytes(text: str) -> Counter[str]:
    """Bytes of collectives by kind, when a compiled module runs, on one device.

    What counts is the whole that a device takes part in: what it has after a gather, what it adds
    to a sum. Of that its links carry (n - 1) / n among n devices; of an `all-reduce`, twice that.

    Args:
        text: The optimised module, as `jax.stages.Compiled.as_text` gives it.

    Raises:
        ValueError: A collective is in a loop of unknown length, or is written more often than it
            runs, as by the TPU's compiler; or the text is no module's.
    """
    if "async_collective_fusion" in text:  # one beside products: each of its pieces is written so
        raise ValueError("cannot count collectives that are fused with products, as on TPUs")
    return total(text, _moved)


def _moved(instruction: Instruction, scope: Computation) -> dict[str, int]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return {}
    own = sum(map(nbytes, operands(instruction, scope)))
    if kind != "all-gather":
        return {kind: own}
    # One that is only started gives its operands too.
    return {kind: nbytes(instruction.shape) - (0 if kind == instruction.opcode else own)}

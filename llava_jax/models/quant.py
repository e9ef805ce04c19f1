"""Frozen weights in 4 or 8 bits: pytrees that are stacked, sliced and sharded like arrays.

NF4 (QLoRA, Dettmers et al., 2023) keeps 4 bits a weight and the largest magnitude (absmax) of every
64 in a row; double quantisation keeps the absmax in 8 bits (Dettmers et al., 2022). Codes are those
of bitsandbytes, two to a uint8: Orbax does not restore uint4. int8 keeps a scale an output channel.

The arrays of a matrix [out, in] have the outputs first and then the inputs, where they can: what
shards the weight shards them. Those of a stack have a layer axis before that.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from llava_jax.config import LLM_LINEARS, Quantisation

BLOCK, NESTED_BLOCK = 64, 256  # weights that share an absmax; absmaxes that share theirs
CHUNK = 2**16  # weights quantised at once: what is made of them stays in the processor's cache

# QLoRA, appendix E: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
NF4 = np.array([
    -1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0, 0.0795803,
    0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1], np.float32)  # fmt: skip

# Signed dynamic 8-bit numbers (Dettmers et al., 2022): 0, 1, and of either sign the middles of 2^i
# equal intervals of each decade below 1, from one above 1e-7 to 64 above 0.1.
_MIDDLES = [(0.1 + 0.9 * (j + 0.5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for j in range(2**i)]
DYNAMIC = np.array(sorted([0, 1, *_MIDDLES, *(-x for x in _MIDDLES)]), np.float32)
# The place of a value's nearest entry is the number of these, the midpoints, that it exceeds.
NF4_BOUNDS, DYNAMIC_BOUNDS = ((table[:-1] + table[1:]) / 2 for table in (NF4, DYNAMIC))


class QuantisationError(Exception):
    """A weight that cannot be quantised. It does not say which: that is the caller's to add."""


# Leaves are arrays or what stands for them (shapes, shardings), so they have no narrower type.
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NestedAbsmax:
    """The absmax of NF4 blocks in 8 bits.

    Attributes:
        codes: Places in `DYNAMIC`, uint8 [*L, out, in / 64].
        absmax: The largest magnitude of every 256 in a row, float32 [*L, out * in / 64 / 256].
        offset: The mean, which was taken off before, float32 [*L].
    """

    codes: Any
    absmax: Any
    offset: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight:
    """A weight in 4 bits: NF4[codes] * absmax.

    Attributes:
        codes: Places in `NF4`, the first of two in the high bits, uint8 [*L, out, in / 2].
        absmax: The largest magnitude in each block, float32 [*L, out, in / 64] or `NestedAbsmax`.
    """

    codes: Any
    absmax: Any
    shape = property(lambda self: (*self.codes.shape[:-1], 2 * self.codes.shape[-1]))
    kind = property(lambda self: "nf4_double" if isinstance(self.absmax, NestedAbsmax) else "nf4")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A weight in 8 bits: codes * scale.

    Attributes:
        codes: From -127 to 127, int8 [*L, out, in].
        scale: A 127th of the largest magnitude in each output channel, float32 [*L, out, 1].
    """

    codes: Any
    scale: Any
    shape = property(lambda self: self.codes.shape)
    kind = property(lambda self: "int8")


Quantised = Nf4Weight | Int8Weight


def is_quantised(path: str) -> bool:
    """Whether a parameter is one to quantise: the weight of a linear in the decoder's blocks."""
    names = tuple(f".{name}.weight" for name in LLM_LINEARS)
    return path.startswith("llm.layers.") and path.endswith(names)


def abstract(kind: Quantisation, shape: tuple[int, ...]) -> Quantised:
    """A quantised weight without data: ShapeDtypeStructs.

    Args:
        kind: How it is quantised.
        shape: Of the weight, [out, in], or of a stack, [L, out, in].

    Raises:
        QuantisationError: NF4's inputs are not whole blocks (bitsandbytes' would run over rows).
    """
    *layers, rows, columns = shape
    array = lambda dtype, *rest: jax.ShapeDtypeStruct((*layers, *rest), dtype)
    if kind == "int8":
        return Int8Weight(array(jnp.int8, rows, columns), array(jnp.float32, rows, 1))
    if columns % BLOCK:
        found = f"a weight {list(shape)} has {columns}"
        raise QuantisationError(f"{kind} takes {BLOCK} inputs a block, {found}; take int8 or none")
    absmax, blocks = array(jnp.float32, rows, columns // BLOCK), rows * columns // BLOCK
    if kind == "nf4_double":
        nested = array(jnp.float32, -(-blocks // NESTED_BLOCK)), array(jnp.float32)
        absmax = NestedAbsmax(array(jnp.uint8, rows, columns // BLOCK), *nested)
    return Nf4Weight(array(jnp.uint8, rows, columns // 2), absmax)


def quantise(weight: np.ndarray, kind: Quantisation) -> Quantised:
    """Quantises a matrix on the host, to NumPy arrays of the shapes and dtypes of `abstract`.

    Args:
        weight: [out, in], float32, bfloat16 or float16.
        kind: How to. It needs little more memory than the result, and no copy of the weight.

    Raises:
        QuantisationError: A wrong shape or dtype, or a value that is not finite.
    """
    if weight.ndim != 2 or weight.dtype not in (np.float32, np.float16, jnp.bfloat16):
        found = f"{weight.dtype} {list(weight.shape)}"
        raise QuantisationError(f"expected a matrix in 32 or 16 bit floats, found {found}")
    spec = abstract(kind, weight.shape).codes
    codes = np.empty(spec.shape, spec.dtype)
    rows, limit = (weight, 127) if kind == "int8" else (weight.reshape(-1, BLOCK), 1)
    absmax = np.empty((len(rows), 1), np.float32)
    count = max(1, CHUNK // rows.shape[1])
    for place in (slice(start, start + count) for start in range(0, len(rows), count)):
        absmax[place], scaled = _normalise(rows[place].astype(np.float32), limit)
        if kind == "int8":
            codes[place] = np.rint(scaled)
        else:
            nearest = np.add.reduce([scaled > bound for bound in NF4_BOUNDS], dtype=np.uint8)
            codes.reshape(-1, BLOCK // 2)[place] = nearest[:, ::2] << 4 | nearest[:, 1::2]
    if kind == "int8":
        return Int8Weight(codes, absmax / np.float32(limit))
    absmax = absmax.reshape(len(weight), -1)
    return Nf4Weight(codes, _nest(absmax) if kind == "nf4_double" else absmax)


def _nest(absmax: Float32[np.ndarray, "out blocks"]) -> NestedAbsmax:
    offset = absmax.mean(dtype=np.float64).astype(np.float32)
    padded = np.pad((absmax - offset).ravel(), (0, -absmax.size % NESTED_BLOCK))
    nested, scaled = _normalise(padded.reshape(-1, NESTED_BLOCK), 1)
    codes = np.searchsorted(DYNAMIC_BOUNDS, scaled.ravel()[: absmax.size]).astype(np.uint8)
    return NestedAbsmax(codes.reshape(absmax.shape), nested[:, 0], np.asarray(offset))


def _normalise(rows: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's largest magnitude, and the row times what makes that `limit` (or nearer zero)."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise QuantisationError("found infinity or NaN; the weights are damaged, get them again")
    return largest, rows * (np.float32(1) / np.maximum(largest, limit * 1e-38) * limit)


def dequantise(weight: Quantised, dtype: Any) -> Float[Array, "out in"]:
    """The weight of one layer, computed in float32 and rounded to `dtype`."""
    if isinstance(weight, Int8Weight):
        return (jnp.asarray(weight.codes, jnp.float32) * weight.scale).astype(dtype)
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        values = _dynamic(absmax.codes)
        nested = jnp.repeat(absmax.absmax, NESTED_BLOCK)[: values.size].reshape(values.shape)
        absmax = values * nested + absmax.offset
    codes = weight.codes.reshape(*absmax.shape, BLOCK // 2)
    halves = [_look_up(NF4, half) * absmax[:, :, None] for half in (codes >> 4, codes & 15)]
    return jnp.stack([half.astype(dtype) for half in halves], axis=-1).reshape(weight.shape)


def _look_up(table: np.ndarray, codes: Array) -> Array:
    """`table[codes]` as selects, a level for each bit: on a TPU a gather takes far longer."""
    values = list(table.astype(np.float32))
    for bit in range(len(table).bit_length() - 1):
        high = (codes >> bit & 1).astype(bool)
        values = [jnp.where(high, *pair) for pair in zip(values[1::2], values[::2], strict=True)]
    return values[0]


def _dynamic(codes: Array) -> Array:
    """`DYNAMIC[codes]`, but for the last bit, by its definition: too many entries for selects."""
    place = codes.astype(jnp.int32) - 127
    size = jnp.maximum(jnp.abs(place), 1)
    decade = 31 - jax.lax.clz(size)
    share = (size.astype(jnp.float32) + 0.5) / (1 << decade).astype(jnp.float32) - 1
    value = (0.1 + 0.9 * share) * _look_up(10.0 ** np.arange(-6, 2), decade)
    return jnp.sign(place).astype(jnp.float32) * jnp.where(size == 128, 1, value)

"""Quantizes frozen weights to 4 or 8 bits. Quantized weights are pytrees.

NF4 (QLoRA, Dettmers et al., 2023) stores 4 bits for each weight, and the largest magnitude (absmax)
of each block of 64 consecutive weights. Double quantization stores each absmax in 8 bits (Dettmers
et al., 2022). The codes are the same as in bitsandbytes, but packed in another order. int8 stores
one scale for each output channel.

The arrays of an NF4 weight are transposed and packed into uint32, so that TPUs, whose tiles have 8
rows of 128 numbers of 32 bits, need no copies in other layouts. A block is one tile column of the
codes and becomes 8 tile columns of the weight, which all have the same row of absmax. Arrays of
8-bit numbers have two possible layouts, and XLA would copy whole stacks from one to the other.

The code is written by hand because bitsandbytes needs PyTorch and no library has NF4 for JAX.

Where possible, the arrays of a quantized matrix [out, in] have the axes of the matrix or of its
transpose, so that these arrays are sharded like the matrix. The arrays of a stack also have a
leading layer axis.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8, UInt32

from llava_jax.config import LLM_LINEARS, Quantisation

BLOCK, NESTED_BLOCK = 64, 256  # weights per absmax; absmax values per second-level absmax
LANES = 128  # numbers in a row of a TPU's tile
CHUNK = 2**16  # weights quantized at a time, so that intermediate results fit into a CPU's cache

# NF4 (QLoRA, appendix E): quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.
NF4 = np.array([
    -1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0, 0.0795803,
    0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1], np.float32)  # fmt: skip

# The 256 signed dynamic 8-bit numbers (Dettmers et al., 2022): 0, 1, and the midpoints of intervals
# with both signs. For i from 0 to 6, the decade that ends at 10^(i - 6) has 2^i equal intervals.
_MIDDLES = [(0.1 + 0.9 * (j + 0.5) / 2**i) * 10.0 ** (i - 6) for i in range(7) for j in range(2**i)]
DYNAMIC = np.array(sorted([0, 1, *_MIDDLES, *(-x for x in _MIDDLES)]), np.float32)
# Midpoints between the entries of each table. The number of midpoints below a value is the index of
# the entry nearest to the value.
NF4_BOUNDS, DYNAMIC_BOUNDS = ((table[:-1] + table[1:]) / 2 for table in (NF4, DYNAMIC))


class QuantisationError(Exception):
    """Raised if a weight cannot be quantized.

    The message does not contain the path of the weight; the caller adds the path.
    """


Leaf = Any
"""An array, or an object that replaces an array in a tree, such as a shape or a sharding."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NestedAbsmax:
    """Absmax of NF4 blocks in 8 bits (double quantization): DYNAMIC[codes] * absmax + offset.

    In a stack, *L is the layer axis; a single matrix has no layer axis.

    Attributes:
        codes: Indices into `DYNAMIC`, four per number, uint32 [*L, groups / 2, 128]. The lowest
            bytes of all numbers are the first fourth of the codes, in the order [out, in / 64].
        absmax: Largest magnitude in each group of 256 consecutive absmax values, after subtraction
            of the offset, float32 [*L, groups]. The number of groups is even; the last groups may
            be padded.
        offset: Mean of the absmax values, which is subtracted before quantization, float32 [*L].
    """

    codes: Leaf
    absmax: Leaf
    offset: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Nf4Weight:
    """Weight in 4 bits: NF4[codes] * absmax.

    Attributes:
        codes: Indices into `NF4`, eight per number, uint32 [*L, in / 8, out]. The numbers of a
            block are 8 rows. Their lowest 4 bits are the first 8 codes of the block.
        absmax: Largest magnitude in each block, float32 [*L, in / 64, out] or `NestedAbsmax`.
        is_transposed: True, because the matrix is [out, in].
    """

    codes: Leaf
    absmax: Leaf
    is_transposed: ClassVar = True
    shape = property(
        lambda self: (*self.codes.shape[:-2], self.codes.shape[-1], 8 * self.codes.shape[-2])
    )
    kind = property(lambda self: "nf4_double" if isinstance(self.absmax, NestedAbsmax) else "nf4")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """Weight in 8 bits: codes * scale.

    Attributes:
        codes: Integers from -127 to 127, int8 [*L, out, in].
        scale: Largest magnitude in each output channel, divided by 127, float32 [*L, out, 1].
    """

    codes: Leaf
    scale: Leaf
    shape = property(lambda self: self.codes.shape)
    kind = property(lambda self: "int8")


Quantised = Nf4Weight | Int8Weight


def is_quantised(path: str) -> bool:
    """Returns True if the parameter at `path` can be quantized.

    Only the weights of linear layers in the decoder's blocks can be quantized.
    """
    names = tuple(f".{name}.weight" for name in LLM_LINEARS)
    return path.startswith("llm.layers.") and path.endswith(names)


def abstract(kind: Quantisation, shape: tuple[int, ...]) -> Quantised:
    """Returns a quantized weight made of ShapeDtypeStructs.

    Args:
        kind: Quantization format.
        shape: Shape of the weight, [out, in], or of a stack of weights, [layers, out, in].

    Raises:
        QuantisationError: The format is NF4 and the number of inputs is not a multiple of 64, so
            that bitsandbytes' blocks would cross rows.
    """
    *layers, rows, columns = shape
    array = lambda dtype, *rest: jax.ShapeDtypeStruct((*layers, *rest), dtype)
    if kind == "int8":
        return Int8Weight(array(jnp.int8, rows, columns), array(jnp.float32, rows, 1))
    if columns % BLOCK:
        found = f"the weight {list(shape)} has {columns} inputs"
        raise QuantisationError(
            f"{kind} needs a multiple of {BLOCK} inputs, but {found}; set quantize to int8 or None"
        )
    absmax = array(jnp.float32, columns // BLOCK, rows)
    if kind == "nf4_double":
        pairs = -(-rows * columns // BLOCK // (2 * NESTED_BLOCK))
        nested = array(jnp.float32, 2 * pairs), array(jnp.float32)
        absmax = NestedAbsmax(array(jnp.uint32, pairs, LANES), *nested)
    return Nf4Weight(array(jnp.uint32, columns // 8, rows), absmax)


def quantise(weight: np.ndarray, kind: Quantisation) -> Quantised:
    """Quantizes a matrix on the host.

    Args:
        weight: Matrix [out, in] in float32, bfloat16 or float16. It is quantized in parts, so that
            no full copy is needed.
        kind: Quantization format.

    Returns:
        Quantized weight of NumPy arrays, with the shapes and dtypes that `abstract` gives.

    Raises:
        QuantisationError: The weight has a wrong shape or dtype, or contains infinity or NaN.
    """
    if weight.ndim != 2 or weight.dtype not in (np.float32, np.float16, jnp.bfloat16):
        found = f"{weight.dtype} {list(weight.shape)}"
        raise QuantisationError(f"expected a matrix of 32-bit or 16-bit floats, found {found}")
    dtype = abstract(kind, weight.shape).codes.dtype
    rows, limit = (weight, 127) if kind == "int8" else (weight.reshape(-1, BLOCK), 1)
    codes = np.empty((len(rows), rows.shape[1] if kind == "int8" else BLOCK // 8), dtype)
    absmax = np.empty((len(rows), 1), np.float32)
    count = max(1, CHUNK // rows.shape[1])
    for chunk in (slice(start, start + count) for start in range(0, len(rows), count)):
        absmax[chunk], scaled = _normalise(rows[chunk].astype(np.float32), limit)
        if kind == "int8":
            codes[chunk] = np.rint(scaled)
        else:
            nearest = np.add.reduce([scaled > bound for bound in NF4_BOUNDS], dtype=np.uint8)
            eights = nearest.view("<u8")  # eight codes, each in a byte
            pairs = eights[:, ::2] | eights[:, 1::2] << np.uint64(4)
            codes[chunk] = _packed(pairs.view(np.uint8).reshape(-1, 4, 8))
    if kind == "int8":
        return Int8Weight(codes, absmax / np.float32(limit))
    codes, absmax = (x.reshape(len(weight), -1) for x in (codes, absmax))
    nested = _nest(absmax) if kind == "nf4_double" else _transposed(absmax)
    return Nf4Weight(_transposed(codes), nested)


def _packed(parts: UInt8[np.ndarray, "*rows 4 columns"]) -> UInt32[np.ndarray, "*rows columns"]:
    """Packs four bytes into each number, the first part into the lowest bits."""
    return np.ascontiguousarray(parts.swapaxes(-1, -2)).view("<u4")[..., 0]


def _transposed(x: np.ndarray) -> np.ndarray:
    """Returns the transpose of a matrix, copied in parts that fit into a CPU's cache."""
    y = np.empty(x.shape[::-1], x.dtype)
    for part in (slice(start, start + BLOCK) for start in range(0, len(x), BLOCK)):
        y[:, part] = x[part].T
    return y


def _nest(absmax: Float32[np.ndarray, "out blocks"]) -> NestedAbsmax:
    """Quantizes the absmax of NF4 blocks to 8 bits (double quantization)."""
    offset = absmax.mean(dtype=np.float64).astype(np.float32)
    padded = np.pad((absmax - offset).ravel(), (0, -absmax.size % (2 * NESTED_BLOCK)))
    nested, scaled = _normalise(padded.reshape(-1, NESTED_BLOCK), 1)
    codes = np.searchsorted(DYNAMIC_BOUNDS, scaled).astype(np.uint8)
    codes = _packed(codes.reshape(4, -1).swapaxes(0, 1)[:, :, None]).reshape(-1, LANES)
    return NestedAbsmax(codes, nested[:, 0], np.asarray(offset))


def _normalise(rows: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest magnitude of each row, and the rows scaled to at most `limit`."""
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise QuantisationError(
            "the weight contains infinity or NaN, so the file is damaged; copy or download it again"
        )
    return largest, rows * (np.float32(1) / np.maximum(largest, limit * 1e-38) * limit)


def dequantise(weight: Quantised, dtype: DTypeLike) -> Float[Array, "out in"]:
    """Returns the weight of one layer, [out, in], computed in float32 and rounded to `dtype`."""
    if isinstance(weight, Int8Weight):
        return (jnp.asarray(weight.codes, jnp.float32) * weight.scale).astype(dtype)
    absmax = weight.absmax
    if isinstance(absmax, NestedAbsmax):
        absmax = _nested(absmax).ravel()[: 8 * weight.codes.size // BLOCK]
        absmax = absmax.reshape(weight.shape[0], -1).T
    codes = _unpacked(weight.codes.reshape(len(absmax), 1, 8, -1), 4)
    blocks = _look_up(NF4, codes) * absmax[:, None, None]
    return blocks.astype(dtype).reshape(weight.shape[::-1]).T


def _unpacked(codes: UInt32[Array, "rows 1 m n"], bits: int) -> UInt32[Array, "rows parts m n"]:
    """Returns codes with a number of bits; the higher bits of a result belong to other codes."""
    # XLA:GPU would compute multiples of `bits` once for several weights, and therefore unpack these
    # weights together.
    for _ in range(bits):
        codes >>= np.arange(32 // bits, dtype=np.uint32)[None, :, None, None]
    return codes


def _look_up(table: np.ndarray, codes: Array) -> Array:
    """Computes `table[codes]` with one level of selects for each bit of the codes.

    On a TPU, selects are much faster than a gather.
    """
    values = list(table.astype(np.float32))
    for bit in range(len(table).bit_length() - 1):
        high = (codes >> bit & 1).astype(bool)
        values = [jnp.where(high, *pair) for pair in zip(values[1::2], values[::2], strict=True)]
    return values[0]


def _nested(absmax: NestedAbsmax) -> Float32[Array, "rows lanes"]:
    """Computes `DYNAMIC[codes] * absmax + offset`, with a formula for the entries of the table.

    The table is too long for `_look_up`. Only the last bit of an entry may differ.
    """
    codes = _unpacked(absmax.codes[None, None], 8).reshape(-1, LANES) & 255
    index = codes.astype(jnp.int32) - 127
    size = jnp.maximum(jnp.abs(index), 1)
    decade = 31 - jax.lax.clz(size)
    share = (size.astype(jnp.float32) + 0.5) / (1 << decade).astype(jnp.float32) - 1
    value = (0.1 + 0.9 * share) * _look_up(10.0 ** np.arange(-6, 2), decade)
    value = jnp.sign(index).astype(jnp.float32) * jnp.where(size == 128, 1, value)
    nested = jnp.repeat(absmax.absmax, NESTED_BLOCK // LANES)[:, None]
    # The divisor is 1. XLA's CPU backend computes all operations after the last division again for
    # each weight of a block.
    return (value * nested + absmax.offset) / jnp.minimum(size, 1).astype(jnp.float32)

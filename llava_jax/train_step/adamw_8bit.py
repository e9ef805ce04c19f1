"""Implements AdamW with moments of 8 bits per parameter, as an optax transformation.

The moments are quantized in blocks of 256 consecutive values (Dettmers et al., "8-bit Optimizers
via Block-wise Quantization", 2022). Each block keeps its largest magnitude (absmax) in float32, and
each value keeps the index of one of 256 numbers, whose distances grow with their magnitude. The
codes and the absmax are those of bitsandbytes 0.50 on a CPU, but four codes are packed into each
uint32, because XLA:TPU cannot read and write slices of an array of 8-bit numbers in host memory in
one loop.

The code is written by hand because bitsandbytes needs PyTorch and no library has this optimizer for
JAX. This module needs only JAX, NumPy, optax and jaxtyping.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, UInt8, UInt32

BLOCK = 256
"""Number of values that share an absmax."""

MIN_SIZE = 4096
"""Smallest number of elements of a tensor whose moments are quantized. The moments of smaller
tensors are float32."""

POINTS = 2**16
"""Number of equally spaced points from -1 to 1 to which a value is rounded before the nearest of
the 256 numbers is chosen, as in bitsandbytes' kernel for CPUs."""


class Moment(NamedTuple):
    """A quantized moment of a parameter, or of a stack of parameters with the leading axes *S.

    Attributes:
        codes: Indices of numbers, four per number, uint32 [*S, groups, 64 * blocks]. The lowest
            bytes of the 64 numbers of a block are its first 64 codes. So the arrays of a moment
            can be divided like the parameter, along each axis.
        absmax: Largest magnitude of each block, float32 [*S, groups, blocks]. A group is the
            smallest number of rows (slices along the first axis after *S) that fill whole blocks.
            If the rows do not fill whole groups, there is one group, and its last block is
            incomplete.
    """

    codes: UInt32[Array, "*S groups words"]
    absmax: Float[Array, "*S groups blocks"]


class ScaleByAdam8bitState(NamedTuple):
    """State of `scale_by_adam_8bit`.

    Attributes:
        count: int32 []. Number of updates done.
        mu: First moment of each parameter, a `Moment` or a float32 array.
        nu: Second moment of each parameter, a `Moment` or a float32 array.
    """

    count: PyTree
    mu: PyTree
    nu: PyTree


def scale_by_adam_8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    stack_axes: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """Returns a transformation like `optax.scale_by_adam`, with quantized moments.

    Args:
        b1: Decay rate of the first moment.
        b2: Decay rate of the second moment.
        eps: Number that is added to the root of the second moment.
        stack_axes: Function from the parameters to a tree of numbers of leading axes that count
            separate tensors. No block has elements of two tensors. None means 0.
    """

    def init(params: PyTree) -> ScaleByAdam8bitState:
        axes = jax.tree.map(lambda _: 0, params) if stack_axes is None else stack_axes(params)
        zeros = lambda: jax.tree.map(_zeros, params, axes)
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, ScaleByAdam8bitState]:
        del params
        count = optax.safe_increment(state.count)
        # 1 - decay^count, without the rounding error of a difference of similar numbers.
        logarithm = lambda decay: math.log(decay) if decay else -math.inf
        correct = lambda decay: -jnp.expm1(jnp.asarray(count, jnp.float32) * logarithm(decay))
        first, second = correct(b1), jnp.sqrt(correct(b2))

        def one(grad: Array, mu: Moment | Array, nu: Moment | Array) -> tuple:
            # The order of the operands decides which product is rounded, where a multiplication and
            # an addition become one operation; it is the order of PyTorch's kernels.
            new_mu = grad * (1 - b1) + _read(mu, grad.shape, signed=True) * b1
            new_nu = (1 - b2) * grad * grad + _read(nu, grad.shape, signed=False) * b2
            scaled = (new_mu / first) / (jnp.sqrt(new_nu) / second + eps)
            return scaled, _write(new_mu, mu, signed=True), _write(new_nu, nu, signed=False)

        is_moment = lambda x: isinstance(x, Moment)
        flat, structure = jax.tree.flatten(updates)
        moments = (jax.tree.leaves(x, is_leaf=is_moment) for x in (state.mu, state.nu))
        results = zip(*map(one, flat, *moments), strict=True) if flat else ((), (), ())
        scaled, mu, nu = (structure.unflatten(list(leaves)) for leaves in results)
        return scaled, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def numbers(*, signed: bool) -> np.ndarray:
    """Returns the numbers that codes stand for, float32 [256], in ascending order.

    They are 0, 1, and the midpoints of equal intervals of the decades that end at 10^-6 to 1. The
    number of intervals doubles from decade to decade. With `signed`, there are half as many
    intervals, and the midpoints also with a minus sign. The arithmetic is that of PyTorch's
    `linspace` in float32, with which bitsandbytes computes the numbers.
    """
    found = [np.array([0, 1], np.float32)]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        start, end = np.float32(0.1), np.float32(1)
        step = float((end - start) / np.float32(count))
        index = np.arange(count + 1)
        # The second half of the edges is counted from the end.
        edges = np.where(
            index < (count + 1) // 2, float(start) + step * index, end - step * (count - index)
        ).astype(np.float32)
        middles = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        found += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(found))


@functools.cache
def _codes_of_points(*, signed: bool) -> np.ndarray:
    """Returns the code of the number that is nearest to each of the POINTS, uint8 [POINTS]."""
    table = numbers(signed=signed)
    points = np.arange(POINTS, dtype=np.float32) * np.float32(2 / (POINTS - 1)) - np.float32(1)
    above = np.clip(np.searchsorted(table, points), 1, len(table) - 1)
    is_above = table[above] - points < points - table[above - 1]
    return np.where(is_above, above, above - 1).astype(np.uint8)


def _zeros(param: Array, axes: int) -> Moment | Array:
    """Returns a moment with the value 0; `axes` is the number of leading axes of the stack."""
    stack, shape = param.shape[:axes], param.shape[axes:]
    size = math.prod(shape)
    if size < MIN_SIZE:
        return jnp.zeros(param.shape, jnp.float32)
    row = size // shape[0]
    rows = math.lcm(row, BLOCK) // row
    groups = shape[0] // rows if shape[0] % rows == 0 else 1
    blocks = -(-size // (groups * BLOCK))
    codes = jnp.zeros((*stack, groups, blocks * BLOCK // 4), jnp.uint32)
    return Moment(codes, jnp.zeros((*stack, groups, blocks), jnp.float32))


def _read(moment: Moment | Array, shape: tuple[int, ...], *, signed: bool) -> Array:
    """Returns the values of a moment, float32 in the shape of the parameter."""
    if not isinstance(moment, Moment):
        return moment
    codes, absmax = moment
    codes = _unpacked(codes.reshape(*absmax.shape, BLOCK // 4))
    values = jnp.asarray(numbers(signed=signed))[codes] * absmax[..., None]
    return _from_blocks(values, shape)


def _write(values: Array, like: Moment | Array, *, signed: bool) -> Moment | Array:
    """Returns a moment with the given values, quantized in the form of `like`."""
    if not isinstance(like, Moment):
        return values
    blocks = _in_blocks(values, like.absmax.shape)
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    inverse = 1 / jnp.where(absmax == 0, 1, absmax)
    shares = jnp.clip(blocks * inverse[..., None], -1, 1)  # rounding may lead beyond 1
    point = jnp.floor((shares + 1) * ((POINTS - 1) / 2) + 0.5).astype(jnp.int32)
    codes = jnp.asarray(_codes_of_points(signed=signed))[point]
    codes = jnp.where((absmax == 0)[..., None], jnp.uint8(0), codes)
    return Moment(_packed(codes).reshape(like.codes.shape), absmax)


def _packed(codes: UInt8[Array, "*blocks 256"]) -> UInt32[Array, "*blocks 64"]:
    """Packs four codes of a block into each number."""
    parts = jnp.split(codes.astype(jnp.uint32), 4, axis=-1)
    return functools.reduce(jnp.bitwise_or, (part << 8 * i for i, part in enumerate(parts)))


def _unpacked(packed: UInt32[Array, "*blocks 64"]) -> UInt8[Array, "*blocks 256"]:
    """Returns the codes that `_packed` packed."""
    codes = jnp.concatenate([packed >> 8 * i & 255 for i in range(4)], axis=-1)
    # Without the barrier, XLA:GPU would not compute the new moments again where their absmax is
    # known, but keep all of them in float32.
    return jax.lax.optimization_barrier(codes.astype(jnp.uint8))


def _in_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """Returns the elements of x as [*shape, BLOCK]; the last block is filled with 0.

    If nothing is missing in the last block, each axis keeps its sharding.
    """
    if x.size < math.prod(shape) * BLOCK:
        tensors = x.reshape(*shape[:-2], -1)
        missing = math.prod(shape[-2:]) * BLOCK - tensors.shape[-1]
        x = jnp.pad(tensors, [(0, 0)] * (tensors.ndim - 1) + [(0, missing)])
    return x.reshape(*shape, BLOCK)


def _from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """Returns the elements of blocks in their original shape, the inverse of `_in_blocks`."""
    if blocks.size > math.prod(shape):
        tensors = blocks.reshape(*blocks.shape[:-3], -1)
        blocks = tensors[..., : math.prod(shape) // math.prod(tensors.shape[:-1])]
    return blocks.reshape(shape)

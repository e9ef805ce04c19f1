"""Rounds weights to bfloat16 at random, so that small updates are not lost.

A weight in bfloat16 has 8 significant bits, so rounding to the nearest number would undo most
updates, which are smaller than half the distance between two numbers. Stochastic rounding (Gupta et
al., "Deep Learning with Limited Numerical Precision", 2015) chooses the larger of the two nearest
numbers with a probability that is the position between them. So the expected value is exact.
"""

import zlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Key

from llava_jax.models.dropout import random_bits

ROUNDING = 2**31 - 3
"""Number that is folded into the key of a step, to derive the key of its rounding. It is different
from the numbers of samples, from which the keys of dropout masks are derived."""


def stochastic_round(
    x: Float[Array, "*rows columns"],
    dtype: DTypeLike,
    key: Key[Array, ""],
    path: str,
    first_row: ArrayLike = 0,
) -> Float[Array, "*rows columns"]:
    """Rounds float32 values to bfloat16; the random numbers depend on the position only.

    An element gets the same random number in every division of a parameter into pieces, and on
    every number of devices.

    Args:
        x: Values in float32, at least one axis; the last axis has the columns.
        dtype: bfloat16; float32 returns x itself.
        key: PRNG key of the step.
        path: Path of the parameter.
        first_row: Number of the first row of x in the parameter, if x is a piece of it. A row is a
            vector along the last axis.
    """
    if x.dtype == dtype:
        return x
    for data in (ROUNDING, zlib.crc32(path.encode())):
        key = jax.random.fold_in(key, data)
    rows = first_row + jnp.arange(x[..., 0].size).reshape(x.shape[:-1])
    draw = lambda row: random_bits(jax.random.fold_in(key, row), count=x.shape[-1])
    for _ in rows.shape:  # each axis keeps its sharding, which it would lose if it were reshaped
        draw = jax.vmap(draw)
    drawn = draw(rows)
    # bfloat16 has the upper 16 bits of float32. A random number that is added to the lower 16 bits
    # carries over with the right probability, for both signs. Infinity has no lower bits.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + drawn.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

"""Draws the masks of dropout, which depend on a token and not on its row or its device."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt16

TokenKeys = Key[Array, "B T"] | None
"""One dropout key per token, or None to turn dropout off. Because each token has its own key, its
dropout mask depends neither on the other tokens nor on its row."""


def fold_in(keys: Key[Array, "B T"], data: int | Int[Array, ""]) -> Key[Array, "B T"]:
    """Applies `jax.random.fold_in` with the same `data` to every key, [batch, tokens]."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, data)))(keys)


def position_keys(keys: Key[Array, "I"], count: int) -> Key[Array, "I Q"]:
    """Derives the dropout key of each of `count` positions from the key of each image."""
    at = jnp.arange(count)
    return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(at))(keys)


def dropout(
    x: Float[Array, "B T D"], rate: float, keys: Key[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Zeroes elements with probability `rate` and divides the other elements by 1 - `rate`.

    Args:
        x: Array of shape [batch, tokens, hidden].
        rate: Probability, which is rounded to a multiple of 2^-16.
        keys: One PRNG key per token, [batch, tokens].
    """
    threshold = min(round((1 - rate) * 2**16), 2**16 - 1)
    bits = jax.vmap(jax.vmap(partial(random_bits, count=x.shape[2])))(keys)
    return jnp.where(bits < threshold, x / (1 - rate), 0)


def random_bits(key: Key[Array, ""], count: int) -> UInt16[Array, " N"]:
    """Returns `count` random 16-bit numbers, [N].

    Each random 32-bit number is split into two of them, because drawing a 16-bit number would take
    the same time.
    """
    drawn = jax.random.bits(key, (-(-count // 2),), jnp.uint32)
    return jax.lax.bitcast_convert_type(drawn, jnp.uint16).reshape(-1)[:count]

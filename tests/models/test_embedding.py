"""Embedding tables: the gradients of tokens that occur often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.models.layers import look_up


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(dtype: str):
    table = jnp.ones((8, 16), dtype)
    ids = jnp.full((4, 1024), 3).at[0, :2].set(5)
    gradient = jax.grad(
        lambda table: jnp.sum(look_up(table, ids, jnp.bfloat16) * jnp.bfloat16(0.001)).astype(
            jnp.float32
        )
    )
    found = gradient(table)
    assert found.dtype == dtype
    each = float(jnp.bfloat16(0.001))
    wanted = np.zeros((8, 16))
    wanted[3], wanted[5] = 4094 * each, 2 * each
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=2**-8)

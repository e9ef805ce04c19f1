"""Weights in bfloat16: rounded without bias, by numbers that depend on the position only."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tiny_training import CONFIG, change, run

from llava_jax.config import MeshConfig, TuneConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.train_step.rounding import stochastic_round

KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(0), (3, 64, 33))


def rounded(x: jax.Array, key: jax.Array = KEY, row: int = 0, path: str = "a.weight") -> jax.Array:
    return stochastic_round(x, jnp.bfloat16, key, path, row)


def test_each_value_becomes_one_of_its_two_neighbours():
    x, y = np.array(X), np.array(rounded(X), np.float32)
    below = np.trunc(x.view(np.uint32) // 2**16).astype(np.uint32)
    bits = y.view(np.uint32) // 2**16
    assert np.isin(bits - below, (0, 1)).all()
    assert 0.4 < np.mean(bits - below) < 0.6
    np.testing.assert_array_equal(rounded(jnp.array(y)), y)
    special = jnp.array([jnp.inf, -jnp.inf, 0.0, 1.0, -2.0])
    np.testing.assert_array_equal(rounded(special), special)


def test_the_mean_is_exact():
    """Beside rounding to the nearest number, which loses a small update for ever."""
    many = jax.vmap(lambda seed: rounded(X, jax.random.key(seed)).astype(jnp.float32))
    distance = jnp.abs(X) * 2**-8
    error = jnp.mean(many(jnp.arange(1000)), axis=0) - X
    assert jnp.max(jnp.abs(error) / distance) < 0.2
    assert abs(jnp.mean(error / distance)) < 1e-3

    update, steps = 1e-4, 400
    to_nearest = to_random = jnp.ones((1, 256), jnp.bfloat16)
    for step in range(steps):
        to_nearest = (to_nearest.astype(jnp.float32) + update).astype(jnp.bfloat16)
        to_random = rounded(to_random.astype(jnp.float32) + update, jax.random.key(step))
    assert (to_nearest == 1).all()
    mean = jnp.mean(to_random.astype(jnp.float32))
    np.testing.assert_allclose(mean, 1 + steps * update, rtol=1e-3)


def test_pieces_are_rounded_as_the_whole():
    pieces = [
        rounded(X[i : i + 1, j : j + 16], row=64 * i + j)
        for i in range(3)
        for j in range(0, 64, 16)
    ]
    np.testing.assert_array_equal(jnp.concatenate(pieces, axis=1).reshape(X.shape), rounded(X))


def test_devices_round_their_own_part_of_the_whole():
    """Each device draws only the numbers of its part."""
    x = jax.random.normal(jax.random.key(1), (2, 64, 1024))
    sharding = NamedSharding(
        make_mesh(MeshConfig(fsdp=8), jax.devices()), PartitionSpec(None, "fsdp")
    )
    divided = jax.jit(rounded, in_shardings=sharding, out_shardings=sharding).lower(x).compile()
    assert divided.memory_analysis().temp_size_in_bytes < 4 * x.nbytes / 8
    np.testing.assert_array_equal(divided(jax.device_put(x, sharding)), rounded(x))


def test_devices_train_with_the_same_numbers():
    """Other numbers would change the second loss by more than 1e-4."""
    config = change(
        dataclasses.replace(CONFIG, tune=TuneConfig("full", "frozen", "full")),
        optimizer={"learning_rate": 1e-3, "weight_dtype": "bfloat16", "warmup_ratio": 0.0},
    )
    losses = [
        [row["loss"] for row in run(change(config, mesh={"fsdp": devices}), devices)[0]]
        for devices in (1, 8)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_steps_and_parameters_have_other_numbers():
    """Two independent roundings of a value differ with probability 1 / 3."""
    for other in (rounded(X, jax.random.key(4)), rounded(X, path="b.weight"), rounded(X, row=1)):
        assert 0.3 < jnp.mean(other != rounded(X)) < 0.37

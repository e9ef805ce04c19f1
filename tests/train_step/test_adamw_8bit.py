"""AdamW with moments of 8 bits: learns like AdamW, where equally spaced codes would not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import CONFIG, MODEL, change, random_batch, run

from llava_jax.config import TuneConfig
from llava_jax.train_step.adamw_8bit import BLOCK, Moment, scale_by_adam_8bit


def affine(x: jax.Array) -> jax.Array:
    """Rounds each block to 256 numbers with equal distances, from 0 to its largest."""
    blocks = x.reshape(-1, BLOCK)
    largest = jnp.max(blocks, axis=1, keepdims=True)
    return (jnp.round(blocks / largest * 255) / 255 * largest).reshape(x.shape)


def scale_by_affine() -> optax.GradientTransformation:
    """Adam whose second moment has equally spaced codes."""
    adam = optax.scale_by_adam()

    def update(grads, state, params=None):
        scaled, state = adam.update(grads, state, params)
        return scaled, state._replace(nu=jax.tree.map(affine, state.nu))

    return optax.GradientTransformation(adam.init, update)


def final_loss(scaling: optax.GradientTransformation) -> float:
    """Loss of a linear model after 300 steps; its inputs have very different magnitudes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((512, 64)) * np.logspace(-2, 0, 64), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    optimizer = optax.chain(scaling, optax.scale(-1e-2))
    loss = lambda weight, rows: jnp.mean((x[rows] @ weight.T - y[rows]) ** 2)

    @jax.jit
    def step(done: tuple, seed: jax.Array) -> tuple:
        weight, state = done
        rows = jax.random.randint(jax.random.key(seed), (32,), 0, len(x))
        updates, state = optimizer.update(jax.grad(loss)(weight, rows), state, weight)
        return (optax.apply_updates(weight, updates), state), None

    weight = jnp.zeros((64, 64))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counters with floats
        (weight, _), _ = jax.lax.scan(step, (weight, optimizer.init(weight)), jnp.arange(300))
    return float(loss(weight, slice(None)))


def test_equally_spaced_codes_diverge():
    """Most second moments of a block become 0, so the steps become far too large."""
    start = final_loss(optax.scale(0.0))
    adam, eight_bit, equal = map(
        final_loss, (optax.scale_by_adam(), scale_by_adam_8bit(), scale_by_affine())
    )
    assert adam < 0.1 * start
    assert eight_bit < 1.2 * adam
    assert equal > start


WIDE = dataclasses.replace(
    MODEL, llm=dataclasses.replace(MODEL.llm, hidden_size=64, intermediate_size=128)
)
FULL = dataclasses.replace(CONFIG, model=WIDE, tune=TuneConfig("full", "frozen", "full"))


@pytest.mark.parametrize("name", ["adamw_8bit", "bfloat16"])
def test_a_model_learns_as_with_adamw(name: str):
    fields: dict[str, object] = {"name": "adamw_8bit", "learning_rate": 1e-3}
    if name == "bfloat16":
        fields |= {"weight_dtype": "bfloat16", "gradient_dtype": "bfloat16"}
    losses = {}
    for optimizer in ({"learning_rate": 1e-3}, fields):
        rows, _, state = run(
            change(FULL, optimizer=optimizer), steps=40, make=lambda _: random_batch(0)
        )
        losses[optimizer.get("name", "adamw")] = rows[-1]["loss"]
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.uint8]
        assert bool(moments) == ("name" in optimizer)
    assert losses["adamw"] < 0.8 * rows[0]["loss"]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_moments_take_a_byte_beside_an_absmax():
    state = scale_by_adam_8bit().init({"w": jnp.zeros((64, 256)), "norm": jnp.zeros(256)})
    assert isinstance(state.mu["w"], Moment)
    assert state.mu["w"].codes.nbytes == 64 * 256
    assert state.mu["w"].absmax.nbytes == 4 * 64
    assert state.mu["norm"].dtype == jnp.float32

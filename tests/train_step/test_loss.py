"""The chunked loss against the plain one, and what a token weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.train_step.loss import (
    CHUNK_TOKENS,
    TokenLosses,
    loss_weights,
    next_tokens,
    token_losses,
    weighted_loss,
)


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1)
    return -picked[:, :, 0]


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(5, marks=pytest.mark.slow),
        pytest.param(CHUNK_TOKENS, marks=pytest.mark.slow),
        2 * CHUNK_TOKENS + 7,
    ],
)
def test_chunks_change_neither_loss_nor_gradient(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, length, 16))
    head = jax.random.normal(keys[1], (32, 16))
    targets = jax.random.randint(keys[2], (2, length), 0, 32)
    weights = jax.random.uniform(keys[3], (2, length))
    weights = jnp.where(weights < 0.3, 0, weights)  # not learned
    chunked = lambda h, w: weighted_loss(h, w, targets, weights)
    whole = lambda h, w: jnp.sum(plain(h, w, targets) * weights)
    ours, theirs = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, theirs)
    best = jnp.argmax(jnp.einsum("BTD,VD->BTV", hidden, head), axis=-1)
    learned = weights > 0.3
    expected = TokenLosses(plain(hidden, head, targets), best)
    jax.tree.map(
        lambda ours, all: np.testing.assert_allclose(ours, jnp.where(learned, all, 0), rtol=2e-5),
        token_losses(hidden, head, targets, learned),
        expected,
    )


def test_the_full_logits_never_exist():
    shape = 4, 4 * CHUNK_TOKENS, 8
    vocabulary = 5000

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return weighted_loss(hidden, head, jnp.zeros(shape[:2], jnp.int32), jnp.ones(shape[:2]))

    sizes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (vocabulary, 8))]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*sizes).compile()
    logits = 4 * shape[0] * shape[1] * vocabulary
    assert compiled.memory_analysis().temp_size_in_bytes < logits


def test_logits_are_float32_in_bfloat16_too():
    hidden, head = jnp.ones((1, 3, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    targets, learned = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    assert token_losses(hidden, head, targets, learned).nll.dtype == jnp.float32


def test_logits_of_tokens_that_nobody_learns_are_not_computed():
    """The head has rows that no learned token's loss survives."""
    hidden = jnp.ones((2, 5 * CHUNK_TOKENS, 8)).at[:, CHUNK_TOKENS:].set(jnp.nan)
    learned = jnp.arange(hidden.shape[1])[None] < jnp.array([[3], [CHUNK_TOKENS]])
    targets = jnp.zeros(learned.shape, jnp.int32)
    loss = lambda h, w: weighted_loss(h, w, targets, learned.astype(jnp.float32))
    grads = jax.grad(loss, argnums=(0, 1))(hidden, jnp.ones((16, 8)))
    assert all(jnp.isfinite(grad).all() for grad in grads)


def test_a_position_predicts_the_token_after_it():
    ids, mask = jnp.array([[1, 2, 3]], jnp.int32), jnp.array([[False, True, True]])
    targets, supervised = next_tokens(ids, mask, jnp.ones_like(ids))
    assert targets.tolist() == [[2, 3, 0]]
    assert supervised.tolist() == [[True, True, False]]
    _, supervised = next_tokens(ids, mask, jnp.array([[1, 2, 2]], jnp.int32))
    assert supervised.tolist() == [[False, True, False]]  # no sample predicts the next one's


MASK = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
ROWS = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32)[:, None], 4, axis=1)


def test_every_token_weighs_alike():
    weights = loss_weights(MASK, ROWS, "token", 1)
    np.testing.assert_allclose(weights, np.array(MASK) / 6)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (1, [1 / 9, 1 / 3, 1 / 6, 0]),  # the fourth sample has no answer and no say
        (2, [1 / 8, 1 / 8, 1 / 4, 0]),
        (4, [1 / 6, 1 / 6, 1 / 6, 0]),
    ],
)
def test_published_weighting_means_groups_of_samples(group: int, expected: list[float]):
    weights = loss_weights(MASK, ROWS, "sample_mean", group)
    np.testing.assert_allclose(weights, np.array(MASK) * np.array(expected)[:, None], rtol=1e-6)
    assert float(weights.sum()) == pytest.approx(1.0)
    # Where samples lie does not matter: the first and the third in one row.
    mask = jnp.array([[1, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 0], [0] * 6, [0] * 6], bool)
    places = jnp.array([[1, 1, 1, 1, 3, 3], [2, 2, 2, 2, 0, 0], [4] * 6, [0] * 6], jnp.int32)
    packed = loss_weights(mask, places, "sample_mean", group)
    assert packed[0].tolist() == [*weights[0], *weights[2][:2]]
    assert packed[1, 0] == weights[1, 0]


def test_a_batch_without_answers_weighs_nothing():
    for weighting in ("token", "sample_mean"):
        assert not loss_weights(jnp.zeros((4, 4), bool), ROWS, weighting, 2).any()

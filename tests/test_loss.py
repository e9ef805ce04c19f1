"""The chunked loss against the plain one, and what a token weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.loss import CHUNK_TOKENS, loss_weights, next_tokens, token_losses, weighted_loss


def plain(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=-1)
    return -picked[:, :, 0]


@pytest.mark.parametrize("length", [5, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 7])
def test_chunks_change_neither_loss_nor_gradient(length: int):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, length, 16))
    head = jax.random.normal(keys[1], (32, 16))
    targets = jax.random.randint(keys[2], (2, length), 0, 32)
    weights = jax.random.uniform(keys[3], (2, length))
    chunked = lambda h, w: weighted_loss(h, w, targets, weights)
    whole = lambda h, w: jnp.sum(plain(h, w, targets) * weights)
    ours, theirs = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, theirs)
    best = jnp.argmax(jnp.einsum("BTD,VD->BTV", hidden, head), axis=-1)
    np.testing.assert_array_equal(token_losses(hidden, head, targets).predicted, best)


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
    assert token_losses(hidden, head, jnp.zeros((1, 3), jnp.int32)).nll.dtype == jnp.float32


def test_a_position_predicts_the_token_after_it():
    ids, mask = jnp.array([[1, 2, 3]], jnp.int32), jnp.array([[False, True, True]])
    targets, supervised = next_tokens(ids, mask)
    assert targets.tolist() == [[2, 3, 0]]
    assert supervised.tolist() == [[True, True, False]]


MASK = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)


def test_every_token_weighs_alike():
    weights = loss_weights(MASK, "token", 1)
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
    weights = loss_weights(MASK, "sample_mean", group)
    np.testing.assert_allclose(weights, np.array(MASK) * np.array(expected)[:, None], rtol=1e-6)
    assert float(weights.sum()) == pytest.approx(1.0)


def test_a_batch_without_answers_weighs_nothing():
    for weighting in ("token", "sample_mean"):
        assert not loss_weights(jnp.zeros((4, 4), bool), weighting, 2).any()

"""Cross-entropy in chunks of tokens: the logits of a whole batch never exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llava_jax.models.layers import from_chunks, to_chunks
from llava_jax.models.llava import head_logits
from llava_jax.sharding import constrain

CHUNK_TOKENS = 64
"""Tokens of each sample whose logits exist at one time."""


class TokenLosses(NamedTuple):
    """Per position: the loss of the token that follows, and the token the model would say."""

    nll: Float[Array, "B T"]
    predicted: Int[Array, "B T"]


def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"]
) -> TokenLosses:
    """Negative log-likelihood of `targets` in nats, float32, and the greedy choice."""
    narrow = head.astype(hidden.dtype)  # once, not in every chunk

    def one_chunk(inputs: tuple[jax.Array, jax.Array]) -> TokenLosses:
        hidden, targets = inputs
        logits = head_logits(hidden, narrow)
        return TokenLosses(_nll(logits, targets), jnp.argmax(logits, axis=-1).astype(jnp.int32))

    losses = jax.lax.map(
        one_chunk, (to_chunks(hidden, CHUNK_TOKENS), to_chunks(targets, CHUNK_TOKENS))
    )
    return TokenLosses(*(from_chunks(x, hidden.shape[1]) for x in losses))


@jax.custom_vjp
def weighted_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum of weights x negative log-likelihood of `targets`, float32.

    Its gradients are computed together with it, as the logits come by: products in the dtype of
    `hidden`, the head's added up in float32.
    """
    return jnp.sum(token_losses(hidden, head, targets).nll * weights)


def _with_gradients(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    narrow = constrain(head.astype(hidden.dtype), "vocab", "whole")  # gathered once too

    def one_chunk(
        totals: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, head_grad = totals
        hidden, targets, weights = inputs
        logits = head_logits(hidden, narrow)
        loss += jnp.sum(_nll(logits, targets) * weights)
        shares = jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(targets, head.shape[0])
        grad = (weights[:, :, None] * shares).astype(hidden.dtype)
        wide = {"preferred_element_type": jnp.float32}
        head_grad += jnp.einsum("BTV,BTD->VD", grad, hidden, **wide)
        return (loss, head_grad), jnp.einsum("BTV,VD->BTD", grad, narrow)

    zeros = jnp.zeros(()), jnp.zeros(head.shape, jnp.float32)
    chunks = tuple(to_chunks(x, CHUNK_TOKENS) for x in (hidden, targets, weights))
    (loss, head_grad), hidden_grad = jax.lax.scan(one_chunk, zeros, chunks)
    return loss, (from_chunks(hidden_grad, hidden.shape[1]), head_grad.astype(head.dtype))


def _scaled(grads: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple:
    return *(grad * scale.astype(grad.dtype) for grad in grads), None, None


weighted_loss.defvjp(_with_gradients, _scaled)


def _nll(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def next_tokens(
    input_ids: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """For each position the token after it, and whether that one is supervised."""
    following = lambda x: jnp.pad(x[:, 1:], [(0, 0), (0, 1)])
    return following(input_ids), following(loss_mask)


def loss_weights(supervised: Bool[Array, "B T"], weighting: str, group: int) -> Float[Array, "B T"]:
    """The weight of each token's loss in the loss of the global batch; they sum to 1.

    Args:
        supervised: Tokens that count.
        weighting: "token": all alike. "sample_mean": the mean over each `group` consecutive
            samples' tokens, then the plain mean of the groups.
        group: Samples in a group.
    """
    mask = supervised.astype(jnp.float32)
    if weighting == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    groups = mask.reshape(-1, group, mask.shape[1])
    tokens = jnp.sum(groups, axis=(1, 2), keepdims=True)
    filled = jnp.maximum(jnp.sum(tokens > 0), 1).astype(jnp.float32)
    weights = groups / (jnp.maximum(tokens, 1.0) * filled)
    return weights.reshape(mask.shape)

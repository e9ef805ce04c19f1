"""Cross-entropy in chunks of tokens: the logits of a whole batch never exist."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llava_jax.models.llava import head_logits

CHUNK_TOKENS = 64
"""Tokens of each sample whose logits exist at one time."""


class TokenLosses(NamedTuple):
    """Per position: the loss of the token that follows, and the token the model would say."""

    nll: Float[Array, "B T"]
    predicted: Int[Array, "B T"]


def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"]
) -> TokenLosses:
    """Negative log-likelihood of `targets` in nats, float32, and the greedy choice.

    The backward pass computes each chunk's logits again.
    """
    head = head.astype(hidden.dtype)  # once, not in every chunk
    length = hidden.shape[1]
    chunk = min(CHUNK_TOKENS, length)
    chunks = -(-length // chunk)

    def to_chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, chunk, *x.shape[2:]), 1, 0)

    def from_chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], chunks * chunk)[:, :length]

    @jax.checkpoint
    def one_chunk(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, TokenLosses]:
        hidden, targets = inputs
        logits = head_logits(hidden, head)
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - chosen
        return None, TokenLosses(nll, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    _, losses = jax.lax.scan(one_chunk, None, (to_chunks(hidden), to_chunks(targets)))
    return TokenLosses(*map(from_chunks, losses))


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

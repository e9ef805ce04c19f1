"""Cross-entropy of the supervised tokens, some at a time.

The logits of a whole batch never exist, and those of tokens without a loss are not computed: the
supervised tokens of each row are moved to its front, and the loop over chunks ends with the last of
these.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from llava_jax.distributed.sharding import shard_map_rows
from llava_jax.jax_compat import bounded_loop
from llava_jax.models.layers import Params, from_chunks, to_chunks
from llava_jax.models.llava import head_logits

Carry = TypeVar("Carry")

CHUNK_TOKENS = 64
"""Tokens of each row whose logits exist at a time."""


class TokenLosses(NamedTuple):
    """Loss of the following token at each position, and the token that greedy decoding chooses.

    Both are 0 where the following token is not supervised.
    """

    nll: Float[Array, "B T"]
    predicted: Int[Array, "B T"]


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    learned: Bool[Array, "B T"],
) -> TokenLosses:
    """Negative log-likelihood of `targets` in nats, float32, and the greedy choice."""
    narrow = head.astype(hidden.dtype)  # here, so that it is cast once and not in every chunk
    pieces = _Pieces(learned)

    def one_chunk(index: jax.Array, done: TokenLosses) -> TokenLosses:
        logits = head_logits(pieces.take(hidden, index), narrow)
        nll, _ = _nll(logits, pieces.take(targets, index))
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.tree.map(partial(_write, index), done, TokenLosses(nll, predicted))

    empty = TokenLosses(pieces.zeros((), jnp.float32), pieces.zeros((), jnp.int32))
    done = pieces.loop(one_chunk, empty)
    return TokenLosses(*(jnp.where(learned, pieces.put_back(x), 0) for x in done))


def weighted_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """The sum of weights x negative log-likelihood of `targets`, float32.

    The gradients are computed together with the loss, chunk by chunk: products in the dtype of
    `hidden`, and the sum for the head in float32. Every device computes its own rows only.
    """
    axes, params = {"head": ("vocab", "model")}, {"head": head}
    return jnp.sum(shard_map_rows(_local_loss, axes, params, hidden, targets, weights))


@jax.custom_vjp
def _local_loss(
    params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> Float[Array, "1"]:
    losses = token_losses(hidden, params["head"], targets, weights != 0)
    return jnp.sum(losses.nll * weights)[None]


def _with_gradients(
    params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[Params, jax.Array]]:
    head = params["head"]
    narrow = head.astype(hidden.dtype)
    pieces = _Pieces(weights != 0)

    def one_chunk(
        index: jax.Array, done: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        loss, head_grad, hidden_grad = done
        here, target, weight = (pieces.take(x, index) for x in (hidden, targets, weights))
        logits = head_logits(here, narrow)
        nll, log_sum = _nll(logits, target)
        loss += jnp.sum(nll * weight)
        shares = jnp.exp(logits - log_sum[:, :, None]) - jax.nn.one_hot(target, head.shape[0])
        grad = (weight[:, :, None] * shares).astype(hidden.dtype)
        wide = {"preferred_element_type": jnp.float32}
        head_grad += jnp.einsum("BTV,BTD->VD", grad, here, **wide)
        new = jnp.einsum("BTV,VD->BTD", grad, narrow)
        return loss, head_grad, _write(index, hidden_grad, new)

    zeros = jnp.zeros(()), jnp.zeros(head.shape, jnp.float32)
    empty = pieces.zeros(hidden.shape[2:], hidden.dtype)
    loss, head_grad, hidden_grad = pieces.loop(one_chunk, (*zeros, empty))
    grads = {"head": head_grad.astype(head.dtype)}, pieces.put_back(hidden_grad)
    return loss[None], grads


def _scaled(grads: tuple[Params, jax.Array], scale: jax.Array) -> tuple:
    return *jax.tree.map(lambda grad: grad * scale[0].astype(grad.dtype), grads), None, None


_local_loss.defvjp(_with_gradients, _scaled)


class _Pieces:
    """The tokens of rows in pieces of some tokens of each row, the supervised ones first."""

    def __init__(self, learned: Bool[Array, "B T"]):
        length = learned.shape[1]
        self._count = -(-length // CHUNK_TOKENS)
        padded = jnp.pad(learned, ((0, 0), (0, -length % self._count)))
        order = jnp.argsort(~padded, axis=1, stable=True)
        self._pieces = to_chunks(order, CHUNK_TOKENS)
        self._inverse = jnp.argsort(order, axis=1)[:, :length]
        most = jnp.max(jnp.sum(learned, axis=1))
        self._iterations = -(-most // self._pieces.shape[2])

    def take(self, x: Shaped[Array, "B T *rest"], index: Int[Array, ""]) -> Array:
        """Piece number `index` of the rows: [B, chunk, ...]; zeros after the last token."""
        here = self._pieces[index].reshape(*self._pieces.shape[1:], *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, here, axis=1, mode="fill", fill_value=0)

    def zeros(
        self, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Shaped[Array, "chunks B chunk *rest"]:
        """Zeros for all pieces, with an array of this shape for each token."""
        return jnp.zeros((*self._pieces.shape, *shape), dtype)

    def loop(self, body: Callable[[jax.Array, Carry], Carry], done: Carry) -> Carry:
        """Carries `done` through all pieces that have a supervised token."""
        with bounded_loop(self._count):
            return jax.lax.fori_loop(0, self._iterations, body, done)

    def put_back(self, x: Shaped[Array, "chunks B chunk *rest"]) -> Shaped[Array, "B T *rest"]:
        """Rows with their tokens in the original order."""
        inverse = self._inverse.reshape(*self._inverse.shape, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(from_chunks(x, self._pieces[:, 0].size), inverse, axis=1)


def _write(index: Int[Array, ""], pieces: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(pieces, new, index, 0)


def _nll(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Negative log-likelihood of targets, and the logarithm of the softmax's denominator."""
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    return log_sum - chosen, log_sum


def next_tokens(
    input_ids: Int[Array, "B T"], loss_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """The token after each position, and whether it is supervised and of the same segment."""
    following = lambda x: jnp.pad(x[:, 1:], [(0, 0), (0, 1)])
    learned = following(loss_mask) & (following(segment_ids) == segment_ids)
    return following(input_ids), learned


def loss_weights(
    learned: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    weighting: str,
    group: int,
) -> Float[Array, "B T"]:
    """The weight of each token's loss in the loss of the global batch; they sum to 1.

    Args:
        learned: Supervised tokens.
        segment_ids: Sample of each token: 1 + its index in the global batch, which has as many
            samples as rows.
        weighting: "token" gives all the same weight. "sample_mean" is the mean over the tokens of
            each `group` consecutive samples, and then the mean of these.
        group: Samples in a group.
    """
    mask = learned.astype(jnp.float32)
    if weighting == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    groups = jnp.maximum(segment_ids - 1, 0) // group
    tokens = jnp.zeros(learned.shape[0] // group).at[groups].add(mask)
    filled = jnp.maximum(jnp.sum(tokens > 0), 1).astype(jnp.float32)
    return mask / (jnp.maximum(tokens, 1.0) * filled)[groups]

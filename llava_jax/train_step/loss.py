"""Computes the cross-entropy of the supervised tokens, one chunk of tokens at a time.

The logits of a whole batch never exist at the same time, and logits are computed for few tokens
that have no loss: the supervised tokens of each row are moved to the front of the row, and the loop
over the chunks ends with the last chunk that contains a supervised token.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from llava_jax.distributed.sharding import shard_map_tokens
from llava_jax.jax_compat import bounded_loop
from llava_jax.models.layers import Params, from_chunks, to_chunks
from llava_jax.models.llava import head_logits

Carry = TypeVar("Carry")

CHUNK_TOKENS = 64
"""Maximum number of tokens per row whose logits exist at the same time."""


class TokenLosses(NamedTuple):
    """Loss and greedy prediction of the next token at each position of a batch.

    Both fields are 0 at positions whose next token is not supervised.

    Attributes:
        nll: float32 [batch, tokens]. Negative log-likelihood of the next token, in nats.
        predicted: int32 [batch, tokens]. Next token that greedy decoding chooses.
    """

    nll: Float[Array, "B T"]
    predicted: Int[Array, "B T"]


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    learned: Bool[Array, "B T"],
) -> TokenLosses:
    """Returns the loss and the greedy prediction of each supervised target.

    Args:
        hidden: Final hidden states, [batch, tokens, hidden].
        head: Output matrix of the decoder, [vocabulary, hidden]. The function casts the matrix to
            the dtype of `hidden`.
        targets: Next token of each position, int [batch, tokens].
        learned: Mask of the positions whose target is supervised, bool [batch, tokens].
    """
    axes, params = {"head": ("vocab", "model")}, {"head": head}
    return shard_map_tokens(_local_losses, axes, params, hidden, targets, learned)


def _local_losses(
    params: Params, hidden: jax.Array, targets: jax.Array, learned: jax.Array
) -> TokenLosses:
    """Returns the result of `token_losses` for one device's tokens."""
    narrow = params["head"].astype(hidden.dtype)  # one cast instead of one per chunk
    pieces = _Pieces(learned)

    def one_chunk(index: jax.Array, done: TokenLosses) -> TokenLosses:
        logits = head_logits(pieces.take(hidden, index), narrow)
        nll, _ = _nll(logits, pieces.take(targets, index))
        predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.tree.map(partial(_write, index), done, TokenLosses(nll, predicted))

    empty = TokenLosses(pieces.zeros((), jnp.float32), pieces.zeros((), jnp.int32))
    done = pieces.loop(one_chunk, empty)
    return TokenLosses(*(jnp.where(learned, pieces.put_back(x), 0) for x in done))


@jax.named_scope("loss")
def weighted_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, ""]:
    """Returns the sum of `weights` x negative log-likelihood of `targets`, a float32 scalar.

    The gradients with respect to `hidden` and `head` are computed together with the loss, chunk by
    chunk. Matrix products have operands in the dtype of `hidden`; the gradient of `head` is summed
    in float32. Each device computes only its own tokens.

    Args:
        hidden: Final hidden states, [batch, tokens, hidden].
        head: Output matrix of the decoder, [vocabulary, hidden].
        targets: Next token of each position, int [batch, tokens].
        weights: Weight of each target's loss, float32 [batch, tokens]; 0 if the target is not
            supervised.
    """
    axes, params = {"head": ("vocab", "model")}, {"head": head}
    return jnp.sum(shard_map_tokens(_local_loss, axes, params, hidden, targets, weights))


@jax.custom_vjp
def _local_loss(
    params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> Float[Array, "1 1"]:
    """Returns the weighted loss of one device's tokens, [1, 1]."""
    losses = _local_losses(params, hidden, targets, weights != 0)
    return jnp.sum(losses.nll * weights)[None, None]


def _with_gradients(
    params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[Params, jax.Array]]:
    """Returns the result of `_local_loss`, and its gradients for use in the backward pass."""
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
        # The gradient of the loss with respect to the logits is weight x (softmax - one-hot).
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
    return loss[None, None], grads


def _scaled(grads: tuple[Params, jax.Array], scale: jax.Array) -> tuple:
    """Multiplies the gradients by the upstream gradient; targets and weights have no gradient."""
    return *jax.tree.map(lambda grad: grad * scale[0, 0].astype(grad.dtype), grads), None, None


_local_loss.defvjp(_with_gradients, _scaled)


class _Pieces:
    """Reorders each row so that supervised tokens come first, and splits the rows into pieces.

    Each piece has the same number of tokens from every row.
    """

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
        """Returns piece number `index` of x, [B, chunk, ...], padded with 0 at the end of rows."""
        here = self._pieces[index].reshape(*self._pieces.shape[1:], *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, here, axis=1, mode="fill", fill_value=0)

    def zeros(
        self, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Shaped[Array, "chunks B chunk *rest"]:
        """Returns zeros for all pieces; each token has an array of the given shape."""
        return jnp.zeros((*self._pieces.shape, *shape), dtype)

    def loop(self, body: Callable[[jax.Array, Carry], Carry], done: Carry) -> Carry:
        """Calls `body` for each piece that has a supervised token; returns the final carry."""
        with bounded_loop(self._count):
            return jax.lax.fori_loop(0, self._iterations, body, done)

    def put_back(self, x: Shaped[Array, "chunks B chunk *rest"]) -> Shaped[Array, "B T *rest"]:
        """Joins pieces into rows whose tokens have the original order."""
        inverse = self._inverse.reshape(*self._inverse.shape, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(from_chunks(x, self._pieces[:, 0].size), inverse, axis=1)


def _write(index: Int[Array, ""], pieces: Array, new: Array) -> Array:
    """Returns `pieces` with piece number `index` replaced by `new`."""
    return jax.lax.dynamic_update_index_in_dim(pieces, new, index, 0)


def _nll(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the negative log-likelihood of `targets` and the log of the softmax's denominator."""
    chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    return log_sum - chosen, log_sum


def next_tokens(
    input_ids: Int[Array, "B T"], loss_mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Returns the next token of each position, and a mask of the positions that have a loss.

    The mask is True if the next token is supervised and belongs to the same segment. At the last
    position of a row, the token is 0 and the mask is False.

    Args:
        input_ids: Token ids, int [batch, tokens].
        loss_mask: Mask of the supervised tokens, bool [batch, tokens].
        segment_ids: Segment of each token, int [batch, tokens].
    """
    following = lambda x: jnp.pad(x[:, 1:], [(0, 0), (0, 1)])
    learned = following(loss_mask) & (following(segment_ids) == segment_ids)
    return following(input_ids), learned


def loss_weights(
    learned: Bool[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    weighting: str,
    group: int,
) -> Float[Array, "B T"]:
    """Returns the weight of each token's loss in the loss of the global batch.

    The weights are float32 [batch, tokens]. Their sum is 1, or 0 if no token is supervised.

    Args:
        learned: Mask of the positions whose next token is supervised, bool [batch, tokens].
        segment_ids: Sample of each token, int [batch, tokens]: 1 + the index of the sample in the
            global batch; 0 for padding. The global batch has as many samples as rows.
        weighting: "token" gives all supervised tokens the same weight. "sample_mean" takes the mean
            over the supervised tokens of each group of consecutive samples, and then the mean over
            the groups that have supervised tokens.
        group: Number of samples in a group, for "sample_mean".
    """
    mask = learned.astype(jnp.float32)
    if weighting == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    groups = jnp.maximum(segment_ids - 1, 0) // group
    tokens = jnp.zeros(learned.shape[0] // group).at[groups].add(mask)
    filled = jnp.maximum(jnp.sum(tokens > 0), 1).astype(jnp.float32)
    return mask / (jnp.maximum(tokens, 1.0) * filled)[groups]

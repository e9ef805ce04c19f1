"""Chooses the next tokens: greedily, or by sampling in the same way as Hugging Face."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llava_jax.data.batch import Leaf
from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings that choose the tokens of a sequence; the defaults choose the likeliest tokens.

    Attributes:
        temperature: Divisor of the logits; 0 chooses the most likely token.
        top_k: Number of most likely tokens to sample from; None samples from all tokens.
        top_p: Total probability of the most likely tokens to sample from; 1 means all tokens.
        repetition_penalty: Factor for tokens that are already in the prompt or the answer: their
            positive logits are divided by the factor, and their negative logits are multiplied by
            the factor (Keskar et al., 2019).
        seed: Random seed. The samples do not depend on the other sequences of a batch.

    Raises:
        ConfigError: A value is not allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        is_scale = lambda x: 1e-6 <= x <= 1e6  # float32 logits stay finite
        for name, is_good, must in (
            (
                "temperature",
                self.temperature == 0 or is_scale(self.temperature),
                "0, or from 1e-6 to 1e6",
            ),
            ("top_k", self.top_k is None or 1 <= self.top_k < 2**31, "from 1 to 2^31 - 1"),
            ("top_p", 1e-6 <= self.top_p <= 1, "from 1e-6 to 1"),
            ("repetition_penalty", is_scale(self.repetition_penalty), "from 1e-6 to 1e6"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not is_good:
                raise ConfigError(f"{name} = {getattr(self, name)}: the value must be {must}")


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The `Sampling` settings of B sequences, one array [B] per field; top_k 0 means all tokens."""

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    repetition_penalty: Leaf
    seed: Leaf


def to_rows(samplings: Sequence[Sampling]) -> Rows:
    """Returns the settings of several sequences as NumPy arrays."""
    column = lambda name, kind: np.array([getattr(s, name) or 0 for s in samplings], kind)
    return Rows(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        seed=column("seed", np.uint32),
    )


def choose(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    positions: Int[Array, "B"],
    rows: Rows,
) -> Int[Array, "B"]:
    """Returns the next token of each sequence, int32 [B].

    Args:
        logits: Logits of the next token, float32.
        seen: True for the tokens of the vocabulary that are already in the sequence.
        positions: Position of the new token in its sequence. The PRNG key of a token is made from
            this position and the seed of the sequence.
        rows: Settings of each sequence.
    """
    penalty = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = lambda: _draw(warp(logits, rows), positions, rows.seed)
    drawn = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
    return jnp.where(rows.temperature > 0, drawn, greedy)


MAX_ALTERNATIVES = 20
"""Number of likely tokens whose log probabilities are computed beside that of the chosen token."""


class Scores(NamedTuple):
    """Log probabilities (natural logarithms) of the next token of B sequences.

    They are those of the model, before the temperature and the other settings change them.

    Attributes:
        chosen: Log probability of the chosen token.
        ids: Ids of the K most likely tokens, most likely first.
        alternatives: Log probabilities of these tokens.
    """

    chosen: Float[Array, " B"]
    ids: Int[Array, "B K"]
    alternatives: Float[Array, "B K"]


def score(logits: Float[Array, "B V"], tokens: Int[Array, "B"], wanted: Bool[Array, ""]) -> Scores:
    """Returns the log probabilities of the chosen tokens and of the most likely tokens.

    Args:
        logits: Logits of the next token, float32.
        tokens: Chosen tokens.
        wanted: False returns zeros, which takes no time.
    """

    def compute() -> Scores:
        likely = jax.nn.log_softmax(logits, axis=-1)
        alternatives, ids = jax.lax.top_k(likely, count)
        return Scores(jnp.take_along_axis(likely, tokens[:, None], 1)[:, 0], ids, alternatives)

    count = min(MAX_ALTERNATIVES, logits.shape[-1])
    empty = lambda: jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(compute)
    )
    return jax.lax.cond(wanted, compute, empty)


def warp(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Returns the logits divided by the temperature, and -inf for tokens outside top_k and top_p.

    top_p applies to the probabilities of the tokens that top_k keeps.
    """
    # A temperature of 0 is replaced by 1, because the result is not used for a greedy row.
    logits /= jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    ordered = -jnp.sort(-logits, axis=-1)
    vocabulary = logits.shape[-1]
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    least = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    top_p = rows.top_p[:, None]
    is_kept = ((before < top_p) | (top_p == 1)) & (
        ordered > -jnp.inf
    )  # `before` may be 1 by rounding
    kept = jnp.sum(is_kept, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _draw(
    logits: Float[Array, "B V"], positions: Int[Array, "B"], seeds: UInt32[Array, "B"]
) -> Int[Array, "B"]:
    """Samples a token for each sequence, with a PRNG key made from its seed and the position."""

    def one(logits: jax.Array, position: jax.Array, seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits)

    return jax.vmap(one)(logits, positions, seeds).astype(jnp.int32)

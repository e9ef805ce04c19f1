"""Choosing the next token: greedily, or by sampling as in Hugging Face's generation."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llava_jax.data.batch import Leaf
from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults choose the likeliest token.

    Attributes:
        temperature: Divides the logits; 0 is greedy.
        top_k: Number of likeliest tokens to sample from; None samples from all.
        top_p: Sample from the likeliest tokens that together have this probability.
        repetition_penalty: For tokens that are in the prompt or the answer already, positive logits
            are divided by it, and negative ones multiplied (Keskar et al., 2019).
        seed: Seed of the samples. They do not depend on other sequences of the batch.

    Raises:
        ConfigError: A value is not allowed.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        is_scale = lambda x: 1e-6 <= x <= 1e6  # what float32 can divide by
        for name, is_good, must in (
            ("temperature", self.temperature == 0 or is_scale(self.temperature), "0 or more"),
            ("top_k", self.top_k is None or 1 <= self.top_k < 2**31, "from 1 to 2^31 - 1"),
            ("top_p", 1e-6 <= self.top_p <= 1, "above 0, and at most 1"),
            ("repetition_penalty", is_scale(self.repetition_penalty), "above 0"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not is_good:
                raise ConfigError(
                    f"{name} = {getattr(self, name)}: it must be {must}, and of a usual size"
                )


GREEDY = Sampling()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """`Sampling` of B sequences: arrays [B] of its fields; top_k 0 samples from all."""

    temperature: Leaf
    top_k: Leaf
    top_p: Leaf
    repetition_penalty: Leaf
    seed: Leaf


def to_rows(samplings: Sequence[Sampling]) -> Rows:
    """Gathers the settings of several sequences."""
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
    """The next token of each sequence.

    Args:
        logits: Logits, float32.
        seen: Tokens that are in the sequence already.
        positions: Position of the new token in its sequence; with the seed, it gives the key.
        rows: How each row's token is chosen.
    """
    penalty = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draw = lambda: _draw(warp(logits, rows), positions, rows.seed)
    drawn = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy)
    return jnp.where(rows.temperature > 0, drawn, greedy)


def warp(logits: Float[Array, "B V"], rows: Rows) -> Float[Array, "B V"]:
    """Logits divided by the temperature, with -inf for what top_k, and then top_p, exclude."""
    # For a greedy row, the result is not used.
    logits /= jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    ordered = -jnp.sort(-logits, axis=-1)
    vocabulary = logits.shape[-1]
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    least = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    ordered = jnp.where(ordered >= least, ordered, -jnp.inf)
    chances = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(chances, axis=-1) - chances
    top_p = rows.top_p[:, None]
    is_kept = ((before < top_p) | (top_p == 1)) & (ordered > -jnp.inf)  # sums may round up to 1
    kept = jnp.sum(is_kept, axis=-1, keepdims=True)
    least = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
    return jnp.where(logits >= least, logits, -jnp.inf)


def _draw(
    logits: Float[Array, "B V"], positions: Int[Array, "B"], seeds: UInt32[Array, "B"]
) -> Int[Array, "B"]:
    def one(logits: jax.Array, position: jax.Array, seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits)

    return jax.vmap(one)(logits, positions, seeds).astype(jnp.int32)

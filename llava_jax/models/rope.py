"""Computes rotary position embeddings (RoPE; Su et al., 2021), also scaled for long sequences.

Hugging Face's kinds of scaling are computed as in transformers 5:

- "linear" divides all frequencies by `factor`.
- "dynamic" (NTK) raises the base of the frequencies with the length of the sequence, if the
  sequence is longer than `max_position_embeddings`.
- "yarn" (Peng et al., 2023) divides low frequencies by `factor`, keeps high frequencies, and
  interpolates between both, linearly in the index of the frequency. It also multiplies queries and
  keys by a factor.
- "llama3" (Llama 3.1) does the same, linearly in the frequency and without the factor.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llava_jax.config import LlmConfig, RopeScaling

Rope = tuple[Float[Array, "B T E"], Float[Array, "B T E"]]
"""Cosines and sines of the angles that `rotate` uses, multiplied by the factor of "yarn"."""


def make_rope(
    config: LlmConfig, positions: Int[Array, "B T"], lengths: Int[Array, "#B #T"]
) -> Rope:
    """Returns the cosines and sines of the rotation angles of tokens.

    Args:
        config: Sizes of the decoder, with base and scaling of the frequencies.
        positions: Position of each token in its sequence, [batch, tokens].
        lengths: Number of tokens of each token's sequence, [batch, tokens]; a dimension may be 1.
            Only "dynamic" depends on it. transformers takes the longest sequence of a batch, and
            remembers longer sequences of earlier batches; with a fresh model and batches of one
            sequence, both are the same. Here, a sequence depends on no other sequence.
    """
    frequencies, scaling = jnp.asarray(rope_frequencies(config))[None, None], config.rope_scaling
    if scaling is not None and scaling.rope_type == "dynamic":
        excess = jnp.maximum(lengths.astype(jnp.float32) / config.max_position_embeddings - 1, 0)
        base = 1 + scaling.factor * excess[:, :, None]  # factor of rope_theta
        size = config.head_dim
        frequencies *= base ** (-np.arange(0, size, 2, np.float32)[None, None] / (size - 2))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    factor = attention_factor(scaling)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rope_frequencies(config: LlmConfig) -> Float[np.ndarray, "E"]:
    """Returns the frequencies in radians per position, float32 [head size / 2].

    With "dynamic", these are the frequencies of sequences that are not too long.

    Args:
        config: Sizes of the decoder, with base and scaling of the frequencies.
    """
    size, scaling = config.head_dim, config.rope_scaling
    # Each operation is rounded as in transformers. At position 30,000, one rounding of a frequency
    # changes an angle by up to 0.002.
    exponents = np.arange(0, size, 2, np.float32) / np.float32(size)
    powers = (config.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = 1 / powers
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        kept = np.float32(0)
    else:
        length = scaling.original_max_position_embeddings or config.max_position_embeddings
        if scaling.rope_type == "yarn":
            kept = _kept_by_yarn(scaling, size, config.rope_theta, length)
        else:
            low, high = scaling.turns
            kept = np.clip((length * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def _kept_by_yarn(
    scaling: RopeScaling, size: int, theta: float, length: int
) -> Float[np.ndarray, "E"]:
    """Returns the fraction of each frequency that "yarn" does not divide by the factor.

    Args:
        scaling: Scaling of the frequencies.
        size: Head size.
        theta: Base of the frequencies.
        length: Original context length in tokens.
    """
    # Index of the frequency that makes a number of turns in the original context length.
    index = lambda turns: size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    slow, fast = scaling.turns
    first, last = index(fast), index(slow)
    if scaling.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    return 1 - np.clip((np.arange(size // 2, dtype=np.float32) - first) / width, 0, 1)


def attention_factor(scaling: RopeScaling | None) -> float:
    """Returns the factor of rotated queries and keys, which is 1 for all kinds except "yarn"."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    part = lambda weight: 0.1 * weight * math.log(scaling.factor) + 1
    if scaling.mscale and scaling.mscale_all_dim:
        return part(scaling.mscale) / part(scaling.mscale_all_dim)
    return part(1)

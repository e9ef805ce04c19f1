"""The LLaMA decoder (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped queries.

Mistral's is the same up to its sliding window; Qwen2's has biases in the query, key and value
projections.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llava_jax.config import LlmConfig
from llava_jax.distributed.sharding import constrain, logical_axes, shard_map_rows
from llava_jax.errors import ConfigError
from llava_jax.models.attention import ATTENTION
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.layers import (
    KEEP_PRODUCTS,
    Embedding,
    Linear,
    Params,
    RmsNorm,
    TokenKeys,
    Weight,
    from_chunks,
    merge,
    parameter,
    segment_starts,
    split,
    to_chunks,
)
from llava_jax.models.stack import scan_blocks, stack_blocks


def rope_frequencies(config: LlmConfig) -> Float[Array, "E"]:
    """Radians per position of each pair of dimensions (Su et al., 2021), with Llama-3's scaling."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Llama 3.1 divides low frequencies by `factor`, keeps high ones, and interpolates between them.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T E"], sin: Float[Array, "B T E"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head by their angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Each token's distance from the start of its segment."""
    return jnp.arange(segment_ids.shape[1])[None] - segment_starts(segment_ids)


Rope = tuple[Float[Array, "B T E"], Float[Array, "B T E"]]
"""Cosine and sine of the angles that `rotate` takes."""

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Queries [B, T, N, H], keys and values [B, T, K, H] -> [B, T, D]; it also decides the mask."""


class Attention(nnx.Module):
    """The projections of attention; how it is computed is an argument."""

    def __init__(self, config: LlmConfig):
        width, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.head_dim = size
        bias = config.has_qkv_bias
        self.q_proj = Linear(width, queries, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(queries, width, bias=False)

    def __call__(
        self, x: Float[Array, "B T D"], rope: Rope, attend: Attend, keys: TokenKeys = None
    ) -> Float[Array, "B T D"]:
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
        q, k, v = (heads(f(x, keys)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rope), rotate(k, *rope)
        return self.o_proj(attend(q, k, v), keys)


class Mlp(nnx.Module):
    """The gated feed-forward layer (SwiGLU)."""

    def __init__(self, config: LlmConfig):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def __call__(self, x: Float[Array, "B T D"], keys: TokenKeys = None) -> Float[Array, "B T D"]:
        @partial(jax.checkpoint, policy=KEEP_PRODUCTS)
        def down(gate: jax.Array, up: jax.Array) -> jax.Array:
            """The backward pass makes the gated product again: it is wide, and cheap to compute."""
            return self.down_proj(jax.nn.silu(gate) * up, keys)

        return down(self.gate_proj(x, keys), self.up_proj(x, keys))


CHUNK_TOKENS = 512
"""Most tokens of each row that an MLP takes at a time."""


def in_chunks(
    f: Callable[[dict[str, Weight], jax.Array, TokenKeys], jax.Array],
    params: dict[str, Weight],
    x: Float[Array, "B T D"],
    keys: TokenKeys,
) -> Float[Array, "B T D"]:
    """f(params, x, keys), some tokens at a time; the backward pass computes each chunk again.

    So the wide arrays inside f are never kept. Gradients of parameters are summed in float32.

    Args:
        f: A function that treats every token by itself.
        params: Parameters of f; quantised ones have no gradients.
        x: Argument of f.
        keys: Dropout keys; None turns dropout off.
    """
    bare = None if keys is None else jax.random.key_data(keys)  # keys themselves cannot be padded

    def one_chunk(params: dict[str, Weight], x: jax.Array, keys: jax.Array | None) -> jax.Array:
        return f(params, x, None if keys is None else jax.random.wrap_key_data(keys))

    @jax.custom_vjp
    def run(params: dict[str, Weight], x: jax.Array, keys: jax.Array | None) -> jax.Array:
        return jax.lax.map(lambda chunk: one_chunk(params, *chunk), (x, keys))

    def forward(*args: Any) -> tuple[jax.Array, tuple]:
        return run(*args), args

    def backward(residuals: tuple, grads: jax.Array) -> tuple:
        params, *chunks = residuals
        arrays = {path: value for path, value in params.items() if isinstance(value, jax.Array)}

        def body(sums: Params, chunk: tuple) -> tuple[Params, jax.Array]:
            x, keys, grad = chunk
            _, pull = jax.vjp(lambda some, x: one_chunk(params | some, x, keys), arrays, x)
            new, x_grad = pull(grad)
            return {path: sums[path] + new[path].astype(jnp.float32) for path in new}, x_grad

        zeros = {path: jnp.zeros(value.shape, jnp.float32) for path, value in arrays.items()}
        sums, x_grads = jax.lax.scan(body, zeros, (*chunks, grads))
        found = {path: total.astype(arrays[path].dtype) for path, total in sums.items()}
        return dict.fromkeys(params) | found, x_grads, None

    run.defvjp(forward, backward)
    chunks = jax.tree.map(partial(to_chunks, most=CHUNK_TOKENS), (x, bare))
    return from_chunks(run(params, *chunks), x.shape[1])


FEED_FORWARD = ("post_attention_layernorm.", "mlp.")


class Block(nnx.Module):
    """The parameters of one layer; `Llama` applies them."""

    def __init__(self, config: LlmConfig):
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)


class LmHead(nnx.Module):
    """The output matrix, where it is not that of the embeddings."""

    def __init__(self, config: LlmConfig):
        self.weight = parameter(config.vocab_size, config.hidden_size)


class Llama(nnx.Module):
    """A decoder from embeddings to final hidden states; the loss multiplies them by `head`.

    Args:
        config: Sizes.
        compute: How it computes.
    """

    def __init__(self, config: LlmConfig, compute: ComputeConfig):
        self.config = config
        self.compute = compute
        self.attend = ATTENTION[compute.implementation]
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = stack_blocks(Block(config), config.num_hidden_layers)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nnx.data(None) if config.tie_word_embeddings else LmHead(config)

    @property
    def head(self) -> Any:
        """The output matrix [V, D]: that of the embeddings if the two are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight.get_value()

    def rope(self, positions: Int[Array, "B T"]) -> Rope:
        """Cosine and sine of the angles for positions in a sequence."""
        frequencies = rope_frequencies(self.config)[None, None]
        angles = positions.astype(jnp.float32)[:, :, None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        keys: TokenKeys = None,
    ) -> Float[Array, "B T D"]:
        """Normed final hidden states of embeddings x.

        Args:
            x: Token (and image) embeddings.
            segment_ids: 0 for padding; tokens see earlier tokens of their own segment.
            keys: Dropout keys of the adapters; None turns dropout off.

        Raises:
            ConfigError: The sequence is longer than the model's sliding window.
        """
        window = self.config.sliding_window
        if window is not None and x.shape[1] > window:
            raise ConfigError(
                f"a sequence of {x.shape[1]} tokens, but the decoder's sliding_window is {window}, "
                f"and attention in a window is not computed; set data.max_length to {window} at "
                "most"
            )
        context = self.rope(positions_in_segments(segment_ids)), segment_ids

        def apply(
            block: Block, x: jax.Array, context: tuple[Rope, jax.Array], keys: TokenKeys
        ) -> jax.Array:
            rope, segment_ids = context
            attend = partial(self.attend, segment_ids=segment_ids)
            x += block.self_attn(block.input_layernorm(x), rope, attend, keys)
            graphdef, params = split(block)
            blank = dict.fromkeys(params)
            own = {path: value for path, value in params.items() if path.startswith(FEED_FORWARD)}

            # As a function of its own parameters, the MLP can go through the tokens in chunks, and
            # each device can gather the weights once for all of them.
            def feed(own: dict[str, Weight], x: jax.Array, keys: TokenKeys) -> jax.Array:
                block = cast("Block", merge(graphdef, blank | own))
                return block.mlp(block.post_attention_layernorm(x), keys)

            run = partial(in_chunks, feed) if self.compute.remat == "full" else feed
            if self.compute.gather_weights:
                axes = {path: logical_axes(f"llm.layers.{path}")[1:] for path in own}
                run = partial(shard_map_rows, run, axes)
            x += run(own, x, keys)
            return constrain(x, "batch", "tokens", "activations")

        x = constrain(x, "batch", "tokens", "activations")
        x = scan_blocks(self.layers, x, apply, context, keys, self.compute)
        return self.norm(x)

"""Defines the LLaMA decoder (Touvron et al., 2023): RMSNorm, RoPE, SwiGLU, grouped-query attention.

Mistral's decoder differs only in its sliding window, Qwen2's decoder only in having biases in the
query, key and value projections, and Qwen3's decoder only in having RMS norms on the heads of the
queries and keys.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llava_jax.config import LlmConfig
from llava_jax.distributed.sharding import (
    constrain,
    logical_axes,
    rows_per_device,
    shard_map_tokens,
)
from llava_jax.errors import ConfigError
from llava_jax.models.attention import ATTENTION, attend_to_rows
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.dropout import TokenKeys
from llava_jax.models.layers import (
    KEEP_PRODUCTS,
    Embedding,
    Linear,
    Params,
    RmsNorm,
    Weight,
    merge,
    parameter,
    segment_ends,
    segment_starts,
    split,
)
from llava_jax.models.rope import Rope, make_rope
from llava_jax.models.stack import scan_blocks, stack_blocks


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T E"], sin: Float[Array, "B T E"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head's dimensions by their angles, in float32.

    Args:
        x: Queries or keys, [batch, tokens, heads, head size].
        cos: Cosines of the angles, [batch, tokens, head size / 2].
        sin: Sines of the angles, in the same shape.

    Returns:
        Rotated array in the shape and dtype of `x`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def positions_in_segments(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns each token's position in its segment, counted from 0, [batch, tokens]."""
    starts = constrain(segment_starts(segment_ids), "batch", "whole")
    return jnp.arange(segment_ids.shape[1])[None] - starts


def segment_lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the number of tokens of each token's segment, [batch, tokens]."""
    return segment_ends(segment_ids) - segment_starts(segment_ids) + 1


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Function that computes attention, including the mask. Its arguments are queries [B, T, N, H],
keys and values [B, T, K, H], and its result is [B, T, D]."""


class Attention(nnx.Module):
    """Attention layer; the function that computes attention is an argument of the call."""

    def __init__(self, config: LlmConfig):
        width, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        self.head_dim = size
        bias = config.has_qkv_bias
        self.q_proj = Linear(width, queries, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(queries, width, bias=False)
        norm = lambda: RmsNorm(size, config.rms_norm_eps) if config.has_qk_norm else nnx.data(None)
        self.q_norm: RmsNorm | None = norm()
        self.k_norm: RmsNorm | None = norm()

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RmsNorm,
        rope: Rope,
        attend: Attend,
        keys: TokenKeys = None,
    ) -> Float[Array, "B T D"]:
        def project(x: jax.Array) -> tuple[jax.Array, ...]:
            normed = norm(x)
            projections = (self.q_proj, self.k_proj, self.v_proj)
            return tuple(projection(normed, keys) for projection in projections)

        # The backward pass recomputes only the norm, which is cheap. But several devices would
        # gather the weights once more.
        if jax.sharding.get_abstract_mesh().size <= 1:
            project = jax.checkpoint(project, policy=KEEP_PRODUCTS)
        q, k, v = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in project(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        return self.o_proj(attend(q, k, v), keys)


class Mlp(nnx.Module):
    """Gated feed-forward layer (SwiGLU)."""

    def __init__(self, config: LlmConfig):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    @jax.named_scope("feed_forward")
    def __call__(self, x: Float[Array, "B T D"], keys: TokenKeys = None) -> Float[Array, "B T D"]:
        @partial(jax.checkpoint, policy=KEEP_PRODUCTS)
        def down(gate: jax.Array, up: jax.Array) -> jax.Array:
            """Computes the output; the backward pass recomputes silu(gate) * up, which is cheap."""
            return self.down_proj(jax.nn.silu(gate) * up, keys)

        return down(self.gate_proj(x, keys), self.up_proj(x, keys))


CHUNK_TOKENS, DEVICE_TOKENS = 512, 4096
"""Largest number of tokens that an MLP processes at a time: of each row, and of all rows of a
device. Products of more tokens are not faster."""


def in_chunks(
    f: Callable[[dict[str, Weight], jax.Array, TokenKeys], jax.Array],
    params: dict[str, Weight],
    x: Float[Array, "B T D"],
    keys: TokenKeys,
) -> Float[Array, "B T D"]:
    """Computes f(params, x, keys) in chunks of tokens; the backward pass recomputes each chunk.

    The wide arrays inside f therefore exist for only one chunk at a time. Each chunk of x, and in
    the backward pass of the gradient, is replaced by its result, so that there is no second array.
    The gradients of the parameters are summed in float32.

    Args:
        f: Function that treats every token independently.
        params: Parameters of f; quantized parameters get no gradients.
        x: Input of f, [batch, tokens, hidden].
        keys: Dropout keys, one per token; None turns dropout off.
    """
    bare = None if keys is None else jax.random.key_data(keys)  # typed keys cannot be padded
    length, rows = x.shape[1], rows_per_device(len(x))
    count = -(-length // min(CHUNK_TOKENS, max(DEVICE_TOKENS // rows, 1)))
    size = -(-length // count)
    Arrays = tuple[jax.Array | None, ...]

    def chunk_at(index: Int[Array, ""], *arrays: jax.Array | None) -> Arrays:
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=index * size, slice_size=size)
        return jax.tree.map(partial(take, axis=1), arrays)

    def replace(x: jax.Array, new: jax.Array, index: Int[Array, ""]) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, index * size, axis=1)

    def one_chunk(params: dict[str, Weight], x: jax.Array, keys: jax.Array | None) -> jax.Array:
        return f(params, x, None if keys is None else jax.random.wrap_key_data(keys))

    @jax.custom_vjp
    def run(params: dict[str, Weight], x: jax.Array, keys: jax.Array | None) -> jax.Array:
        def body(index: Int[Array, ""], y: jax.Array) -> jax.Array:
            return replace(y, one_chunk(params, *chunk_at(index, y, keys)), index)

        return jax.lax.fori_loop(0, count, body, x)

    def forward(*args: Any) -> tuple[jax.Array, tuple]:
        return run(*args), args

    def backward(residuals: tuple, grads: jax.Array) -> tuple:
        params, *inputs = residuals
        arrays = {path: value for path, value in params.items() if isinstance(value, jax.Array)}

        def body(index: Int[Array, ""], done: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            sums, grads = done
            x, keys, grad = chunk_at(index, *inputs, grads)
            _, pull = jax.vjp(lambda some, x: one_chunk(params | some, x, keys), arrays, x)
            new, x_grad = pull(grad)
            sums = {path: sums[path] + new[path].astype(jnp.float32) for path in new}
            return sums, replace(grads, x_grad, index)

        zeros = {path: jnp.zeros(value.shape, jnp.float32) for path, value in arrays.items()}
        sums, grads = jax.lax.fori_loop(0, count, body, (zeros, grads))
        found = {path: total.astype(arrays[path].dtype) for path, total in sums.items()}
        return dict.fromkeys(params) | found, grads, None

    run.defvjp(forward, backward)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
    return run(params, *jax.tree.map(pad, (x, bare)))[:, :length]


FEED_FORWARD = ("post_attention_layernorm.", "mlp.")
"""Path prefixes of the feed-forward parameters in a block."""


class Block(nnx.Module):
    """Parameters of one decoder layer; `Llama.__call__` computes the layer."""

    def __init__(self, config: LlmConfig):
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config)


class Llama(nnx.Module):
    """Decoder that maps embeddings to final hidden states; the loss multiplies these by `head`.

    Args:
        config: Sizes of the decoder.
        compute: Settings of the computation, such as the attention implementation.
        has_newline: Whether there is a vector that ends the rows of an image's features. It is a
            parameter of the decoder because it is trained with the embedding.
    """

    def __init__(self, config: LlmConfig, compute: ComputeConfig, *, has_newline: bool = False):
        self.config = config
        self.compute = compute
        self.attend = ATTENTION[compute.implementation]
        sizes = config.vocab_size, config.hidden_size
        self.embed_tokens = Embedding(*sizes)
        self.image_newline = parameter(config.hidden_size) if has_newline else nnx.data(None)
        self.layers = stack_blocks(Block(config), config.num_hidden_layers)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nnx.data(None) if config.tie_word_embeddings else Embedding(*sizes)

    @property
    def head(self) -> Any:
        """Returns the output matrix [V, D], which is the embedding matrix if both are tied."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).matrix

    @jax.named_scope("decoder")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        keys: TokenKeys = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalized final hidden states, [batch, tokens, hidden].

        Args:
            x: Embeddings of tokens and images, [batch, tokens, hidden].
            segment_ids: Segment of each token, 0 for padding. A token attends to itself and to
                earlier tokens of its segment.
            keys: Dropout keys of the adapters, one per token; None turns dropout off.

        Raises:
            ConfigError: The sequence is longer than the model's sliding window.
        """
        window = self.config.sliding_window
        if window is not None and x.shape[1] > window:
            raise ConfigError(
                f"a sequence has {x.shape[1]} tokens, but the decoder's sliding_window is "
                f"{window}, and sliding-window attention is not implemented; set data.max_length "
                f"to {window} or less"
            )
        positions, lengths = positions_in_segments(segment_ids), segment_lengths(segment_ids)
        cosines, sines = (
            constrain(angles, "batch", "tokens", "whole")
            for angles in make_rope(self.config, positions, lengths)
        )
        context = (cosines, sines), segment_ids

        def apply(
            block: Block, x: jax.Array, context: tuple[Rope, jax.Array], keys: TokenKeys
        ) -> jax.Array:
            rope, segment_ids = context
            attend = partial(attend_to_rows, self.attend, segment_ids=segment_ids)
            x += block.self_attn(x, block.input_layernorm, rope, attend, keys)
            graphdef, params = split(block)
            blank = dict.fromkeys(params)
            own = {path: value for path, value in params.items() if path.startswith(FEED_FORWARD)}

            # The MLP is a function of its own parameters, so that it can run in chunks of tokens
            # and each device can gather these parameters once for all chunks.
            def feed(own: dict[str, Weight], x: jax.Array, keys: TokenKeys) -> jax.Array:
                block = cast("Block", merge(graphdef, blank | own))
                return x + block.mlp(block.post_attention_layernorm(x), keys)

            run = partial(in_chunks, feed) if self.compute.remat == "full" else feed
            if self.compute.gather_weights:
                # The scale of an adapter is a number, which every device has.
                axes = {
                    path: ()
                    if path.endswith(".lora_scales")
                    else logical_axes(f"llm.layers.{path}")[1:]
                    for path in own
                }
                run = partial(shard_map_tokens, run, axes)
            return constrain(run(own, x, keys), "batch", "tokens", "activations")

        x = constrain(x, "batch", "tokens", "activations")
        x = scan_blocks(self.layers, x, apply, context, keys, self.compute)
        return self.norm(x)

"""The decoder for generation: new tokens, given the keys and values of those before them.

Training loops over stacked layers. With few tokens at a time, that would be slow: XLA copies the
weights of each layer out of the stack before it multiplies with them, on GPUs and CPUs alike, so
they are read twice and written once. Here each layer has arrays of its own, and Python loops over
them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from llava_jax.config import LlmConfig
from llava_jax.models.layers import Params, merge, split
from llava_jax.models.llama import Block, Rope
from llava_jax.models.llava import Llava, head_logits
from llava_jax.models.stack import Leaves


@dataclasses.dataclass(frozen=True)
class Structure:
    """The structure of a model without its decoder's blocks, and of one block."""

    rest: nnx.GraphDef
    block: nnx.GraphDef


class Weights(NamedTuple):
    """The parameters outside the decoder's blocks, and those of each block."""

    rest: Params
    layers: list[Leaves]


class Cache(NamedTuple):
    """Keys and values of one layer, for B sequences of up to S tokens, the first at position 0."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]


def unstack_layers(model: Llava, *, donate: bool = False) -> tuple[Structure, Weights]:
    """Splits a model into what the functions here take: each block has arrays of its own.

    All other arrays are shared with the model.

    Args:
        model: A model with its weights.
        donate: Whether to take the blocks out of the model, which cannot be used afterwards. Then
            at most one parameter of the blocks is in memory twice, unless somebody else refers to
            the model's arrays. Without it, the blocks are in memory twice, and the model stays
            as it is.
    """
    # A second module around the same arrays is cheap, and can be taken apart instead.
    model = model if donate else cast("Llava", merge(*split(model)))
    block, state = nnx.split(model.llm.layers)
    stacks = {path: param.get_value() for path, param in nnx.to_flat_state(state)}
    del state  # It refers to the stacks, each of which is to be freed as soon as it is unstacked.
    model.llm.layers = cast("Any", nnx.data(None))
    layers: list[Leaves] = [{} for _ in range(model.llm.config.num_hidden_layers)]
    while stacks:
        path, stack = stacks.popitem()
        for layer, leaf in zip(layers, _unstack(stack), strict=True):
            layer[path] = leaf
        del stack
    rest, params = split(model)
    return Structure(rest, block), Weights(params, layers)


@jax.jit
def _unstack(stack: PyTree) -> list[PyTree]:
    count = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda leaf: leaf[i], stack) for i in range(count)]


def cache_shape(config: LlmConfig, sequences: int, length: int) -> tuple[int, ...]:
    """Shape of the keys, and of the values, of one layer: [B, K, S, H]."""
    return sequences, config.num_key_value_heads, length, config.head_dim


def prefill(
    structure: Structure,
    weights: Weights,
    caches: list[Cache],
    input_ids: Int[Array, "T"],
    length: Int[Array, ""],
    pixel_values: Float[Array, "I C Y X"] | None,
    row: Int[Array, ""],
) -> tuple[Float[Array, "1 V"], list[Cache]]:
    """Reads a prompt into one row of the caches.

    Args:
        structure: From `unstack_layers`.
        weights: From `unstack_layers`.
        caches: Caches of all layers.
        input_ids: The prompt with its images expanded, padded on the right.
        length: Tokens of the prompt without padding.
        pixel_values: Its images.
        row: Row of the caches for its keys and values.

    Returns:
        The logits of the token that follows, and the caches.
    """
    model = cast("Llava", merge(structure.rest, weights.rest))
    segment_ids = (jnp.arange(input_ids.shape[0]) < length).astype(jnp.int32)[None]
    x = model.embed(input_ids[None], pixel_values)
    rope = model.llm.rope(jnp.arange(input_ids.shape[0])[None])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        written = Cache(_write_row(cache.keys, k, row), _write_row(cache.values, v, row))
        return model.llm.attend(q, k, v, segment_ids), written

    x, filled = _run(structure.block, weights.layers, caches, x, rope, attend)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)
    return head_logits(model.llm.norm(last), model.llm.head)[:, 0], filled


def decode(
    structure: Structure,
    weights: Weights,
    caches: list[Cache],
    tokens: Int[Array, "B"],
    positions: Int[Array, "B"],
) -> tuple[Float[Array, "B V"], list[Cache]]:
    """Reads one more token of every sequence.

    Args:
        structure: From `unstack_layers`.
        weights: From `unstack_layers`.
        caches: Caches of all layers.
        tokens: The newest token of each sequence.
        positions: Its position in the sequence; the tokens before it are in the cache.

    Returns:
        The logits of the tokens that follow, and the caches.
    """
    model = cast("Llava", merge(structure.rest, weights.rest))
    # As one row of B tokens, so that products with weights are those of plain matrices.
    x = model.embed(tokens[None], None)
    rope = model.llm.rope(positions[None])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        write = lambda old, new: old.at[jnp.arange(len(positions)), :, positions].set(new[0])
        written = Cache(write(cache.keys, k), write(cache.values, v))
        return _attend_to_cache(q[0], written, positions)[None], written

    x, filled = _run(structure.block, weights.layers, caches, x, rope, attend)
    return head_logits(model.llm.norm(x), model.llm.head)[0], filled


def _run(
    graphdef: nnx.GraphDef,
    layers: list[Leaves],
    caches: list[Cache],
    x: Float[Array, "B T D"],
    rope: Rope,
    attend: Callable[..., tuple[jax.Array, Cache]],
) -> tuple[Float[Array, "B T D"], list[Cache]]:
    """Runs x through all blocks; `attend(q, k, v, cache)` also returns the updated cache."""
    filled: list[Cache] = []

    def keep(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, written = attend(q, k, v, caches[len(filled)])
        filled.append(written)
        return out

    for leaves in layers:
        params = [(path, nnx.Param(leaf)) for path, leaf in leaves.items()]
        block = cast("Block", nnx.merge(graphdef, nnx.from_flat_state(params)))
        x += block.self_attn(block.input_layernorm(x), rope, keep)
        x += block.mlp(block.post_attention_layernorm(x))
    return x, filled


def _write_row(
    cache: Float[Array, "B K S H"], x: Float[Array, "1 T K H"], row: Int[Array, ""]
) -> Float[Array, "B K S H"]:
    return jax.lax.dynamic_update_slice(cache, x.swapaxes(1, 2), (row, 0, 0, 0))


def _attend_to_cache(
    q: Float[Array, "B N H"], cache: Cache, positions: Int[Array, "B"]
) -> Float[Array, "B D"]:
    """Attention of the newest tokens to their whole sequences, with a float32 softmax."""
    batch, heads, length, size = cache.keys.shape
    q = q.reshape(batch, heads, -1, size)  # G query heads a key head
    logits = jnp.einsum("BKGH,BKSH->BKGS", q, cache.keys, preferred_element_type=jnp.float32)
    logits *= size**-0.5
    is_there = jnp.arange(length)[None] <= positions[:, None]
    logits = jnp.where(is_there[:, None, None], logits, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", shares, cache.values).reshape(batch, -1)

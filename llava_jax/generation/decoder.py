"""Computes the logits of new tokens from the cached keys and values of earlier tokens.

In training, a compiled loop runs over stacked layers. For a few tokens at a time, such a loop would
be slow: on GPUs and on CPUs, XLA copies the weights of each layer out of the stack before a
multiplication, so it reads the weights twice and writes them once. In this module, each layer has
its own arrays, and a Python loop runs over the layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from llava_jax.config import LlmConfig
from llava_jax.models.layers import Params, merge, split, with_layer_scales
from llava_jax.models.llama import Block
from llava_jax.models.llava import ImageInputs, Llava, head_logits
from llava_jax.models.rope import Rope, make_rope
from llava_jax.models.stack import Leaves


@dataclasses.dataclass(frozen=True)
class Structure:
    """Static structures of one decoder block (`block`) and of the rest of the model (`rest`)."""

    rest: nnx.GraphDef
    block: nnx.GraphDef


class Weights(NamedTuple):
    """Parameters of each decoder block (`layers`) and of the rest of the model (`rest`)."""

    rest: Params
    layers: list[Leaves]


class Cache(NamedTuple):
    """Keys and values of one layer, for B sequences of up to S tokens. Positions start at 0."""

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]


def unstack_layers(
    models: Sequence[Llava], *, donate: bool = False
) -> list[tuple[Structure, Weights]]:
    """Splits models into their structures and weights, with separate arrays for each block.

    The arrays outside the blocks are shared with the models. Arrays that several models share are
    still shared afterwards.

    Args:
        models: Models with their weights.
        donate: Whether to move the blocks out of the models. If True, the models cannot be used
            afterwards, and at most one parameter of the blocks is in memory twice, unless other
            references to the models' arrays exist. If False, all blocks are in memory twice, and
            the models are not changed.

    Returns:
        For each model, the arguments `structure` and `weights` of `prefill` and `decode`.
    """
    # Without `donate`, second modules are split, which share their arrays with the models.
    models = [model if donate else cast("Llava", merge(*split(model))) for model in models]
    blocks, stacks = [], []
    for model in models:
        block, state = nnx.split(with_layer_scales(model.llm.layers))
        blocks.append(block)
        stacks.append({path: param.get_value() for path, param in nnx.to_flat_state(state)})
        # `state` refers to the stacks, and each stack must be freed as soon as it is unstacked.
        del state
        model.llm.layers = cast("Any", nnx.data(None))
    layers = [[{} for _ in range(model.llm.config.num_hidden_layers)] for model in models]
    for path in list(dict.fromkeys(path for own in stacks for path in own)):
        unstacked: dict[int, list[PyTree]] = {}
        for own, filled in zip(stacks, layers, strict=True):
            if path in own:
                stack = own.pop(path)
                key = id(jax.tree.leaves(stack)[0])
                unstacked[key] = unstacked.get(key) or _unstack(stack)
                del stack
                for layer, leaf in zip(filled, unstacked[key], strict=True):
                    layer[path] = leaf
    rest = [split(model) for model in models]
    return [
        (Structure(graphdef, block), Weights(params, own))
        for (graphdef, params), block, own in zip(rest, blocks, layers, strict=True)
    ]


@jax.jit
def _unstack(stack: PyTree) -> list[PyTree]:
    """Splits stacked arrays [L, ...] into L arrays."""
    count = jax.tree.leaves(stack)[0].shape[0]
    return [jax.tree.map(lambda leaf: leaf[i], stack) for i in range(count)]


def cache_shape(config: LlmConfig, sequences: int, length: int) -> tuple[int, ...]:
    """Returns the shape of the keys, and of the values, of one layer: [B, K, S, H].

    Args:
        config: Sizes of the decoder, with K key heads of size H.
        sequences: Number B of sequences.
        length: Largest number S of tokens in a sequence.
    """
    return sequences, config.num_key_value_heads, length, config.head_dim


def prefill(
    structure: Structure,
    weights: Weights,
    caches: list[Cache],
    input_ids: Int[Array, "T"],
    length: Int[Array, ""],
    images: ImageInputs | None,
    row: Int[Array, ""],
) -> tuple[Float[Array, "1 V"], list[Cache]]:
    """Processes a prompt, and writes its keys and values into one row of the caches.

    Args:
        structure: Structure from `unstack_layers`.
        weights: Weights from `unstack_layers`.
        caches: Caches of all layers.
        input_ids: Token ids of the prompt with images expanded, padded on the right.
        length: Number of tokens of the prompt, without padding.
        images: Images of the prompt; None if the prompt has no images.
        row: Index of the row in the caches.

    Returns:
        The float32 logits of the next token, and the updated caches.
    """
    model = cast("Llava", merge(structure.rest, weights.rest))
    segment_ids = (jnp.arange(input_ids.shape[0]) < length).astype(jnp.int32)[None]
    x = model.embed(input_ids[None], images)
    positions = jnp.arange(input_ids.shape[0])[None]
    rope = make_rope(model.config.llm, positions, length[None, None])

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
    """Processes the newest token of every sequence, and adds its keys and values to the caches.

    Args:
        structure: Structure from `unstack_layers`.
        weights: Weights from `unstack_layers`.
        caches: Caches of all layers, with the keys and values of the earlier tokens.
        tokens: Newest token of each sequence.
        positions: Position of the newest token in each sequence.

    Returns:
        The float32 logits of the next tokens, and the updated caches.
    """
    model = cast("Llava", merge(structure.rest, weights.rest))
    # The B tokens form one row [1, B], so that multiplications with weights are plain matrix
    # multiplications.
    x = model.embed(tokens[None], None)
    # With "dynamic" RoPE, cached keys keep their frequencies, as in transformers.
    rope = make_rope(model.config.llm, positions[None], positions[None] + 1)

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
    """Applies all blocks to x; `attend(q, k, v, cache)` returns the output and the new cache."""
    filled: list[Cache] = []

    def keep(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, written = attend(q, k, v, caches[len(filled)])
        filled.append(written)
        return out

    for leaves in layers:
        params = [(path, nnx.Param(leaf)) for path, leaf in leaves.items()]
        block = cast("Block", nnx.merge(graphdef, nnx.from_flat_state(params)))
        x += block.self_attn(x, block.input_layernorm, rope, keep)
        x += block.mlp(block.post_attention_layernorm(x))
    return x, filled


def _write_row(
    cache: Float[Array, "B K S H"], x: Float[Array, "1 T K H"], row: Int[Array, ""]
) -> Float[Array, "B K S H"]:
    """Writes the keys, or the values, of a prompt into one row of a cache."""
    return jax.lax.dynamic_update_slice(cache, x.swapaxes(1, 2), (row, 0, 0, 0))


def _attend_to_cache(
    q: Float[Array, "B N H"], cache: Cache, positions: Int[Array, "B"]
) -> Float[Array, "B D"]:
    """Computes the attention of each newest token to its sequence, with a float32 softmax."""
    batch, heads, length, size = cache.keys.shape
    q = q.reshape(batch, heads, -1, size)  # G query heads per key head
    logits = jnp.einsum("BKGH,BKSH->BKGS", q, cache.keys, preferred_element_type=jnp.float32)
    logits *= size**-0.5
    is_there = jnp.arange(length)[None] <= positions[:, None]
    logits = jnp.where(is_there[:, None, None], logits, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("BKGS,BKSH->BKGH", shares, cache.values).reshape(batch, -1)

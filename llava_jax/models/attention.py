"""Attention in four forms: written out, by cuDNN or our own kernels on GPUs, by Pallas' on TPUs.

All are grouped-query attention with a float32 softmax, and take the same arguments: queries, keys,
values, and the segments within which attention is causal; None is all to all. Only the written-out
form holds all logits at once.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from llava_jax.config import AttentionKind
from llava_jax.models.flash import BLOCK, segment_attention
from llava_jax.sharding import on_shards

LEAST_BLOCK, MOST_BLOCK = 128, 512
"""Tokens that the splash kernel takes at a time: a vector register's lanes, and what keeps a
block's logits, 1 MiB, well inside the vector memory of every TPU."""


def causal_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom: earlier tokens of the same segment, and oneself."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    length = segment_ids.shape[1]
    return same & jnp.tri(length, dtype=bool)[None]


def plain_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Attention written out; heads are merged in the result.

    `jax.nn.dot_product_attention` does not lower in bfloat16 under strict dtype promotion (jax
    0.10).
    """
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)  # G query heads a key head
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    logits *= size**-0.5
    if segment_ids is not None:
        mask = causal_mask(segment_ids)
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    shares = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", shares, v).reshape(batch, length, heads * size)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The same by cuDNN's flash attention: for bfloat16 on GPUs of compute capability 8.0 and up.

    Rows must be one segment each, and then padding.
    """
    batch, length = q.shape[:2]
    lengths, is_causal = None, segment_ids is not None
    if segment_ids is not None:
        lengths = jnp.maximum(jnp.sum(segment_ids > 0, axis=1), 1)  # no row may be empty
    if length % 2:  # its backward pass takes even lengths only
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        lengths = jnp.full(batch, length, jnp.int32) if lengths is None else lengths
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=is_causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    return out[:, :length].reshape(batch, length, -1)


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The same for rows of several segments, where cuDNN's takes one; all to all is left to that.

    A segment is a run of tokens. Lengths that are no multiple of the kernel's block are padded with
    tokens of segment 0.
    """
    if segment_ids is None:
        return cudnn_attention(q, k, v)
    kernel = cast("Callable[..., jax.Array]", segment_attention)
    return _on_shards(kernel, q, k, v, segment_ids, BLOCK)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """The same by Pallas' splash attention, for TPUs; every device computes its rows and heads.

    Lengths that are no multiple of the kernel's block are padded with tokens of segment 0.
    """
    causal = segment_ids is not None
    segments = segment_ids if causal else jnp.ones(q.shape[:2], jnp.int32)
    scaled = q * q.shape[3] ** -0.5
    return _on_shards(partial(_splash, causal=causal), scaled, k, v, segments, LEAST_BLOCK)


def _on_shards(
    kernel: Callable[..., jax.Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    block: int,
) -> Float[Array, "B T D"]:
    """Lets every device compute its rows and heads, of lengths that `block` divides."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)  # sharded as the keys are
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)])
    axes = ("batch", "tokens", "heads", "whole")
    attend = on_shards(kernel, ((*axes, "whole"), axes, axes, axes[:2]), (*axes, "whole"))
    out = attend(*map(pad, (q, k, v, segment_ids)))
    return out[:, :length].reshape(batch, length, heads * size)


def _splash(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
) -> Float[Array, "B T K G H"]:
    """What one device computes of splash attention."""
    length, groups = q.shape[1], q.shape[3]
    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * (q.shape[2] * groups)), block_sizes=_blocks(length)
    )
    q = rearrange(q, "b t k g h -> b (k g) t h")
    k, v = (rearrange(x, "b t k h -> b k t h") for x in (k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return rearrange(cast("jax.Array", out), "b (k g) t h -> b t k g h", g=groups)


def _blocks(length: int) -> splash.BlockSizes:
    """The same block for queries and keys, forwards and backwards."""
    size = math.gcd(length, MOST_BLOCK)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


ATTENTION: Mapping[AttentionKind, Callable[..., jax.Array]] = {
    "plain": plain_attention,
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "splash": splash_attention,
}

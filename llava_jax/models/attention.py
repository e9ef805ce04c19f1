"""Four implementations of attention: plain JAX, cuDNN and our kernels on GPUs, Pallas' on TPUs.

All are grouped-query attention with a float32 softmax, and take the same arguments: queries, keys,
values, and the segments within which attention is causal; None is all to all.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from llava_jax.config import AttentionImplementation, ModelConfig, TrainConfig
from llava_jax.distributed.sharding import on_shards
from llava_jax.models.flash import BLOCK, FLASH_HEADS, segment_attention

MIN_BLOCK, MAX_BLOCK = 128, 512
"""Tokens that the splash kernel takes at a time: at least the lanes of a vector register, and
at most so many that the logits of a block, 1 MiB, are well below the vector memory of any TPU."""


QUERIES, MAX_PARTS = 128, 8
"""Queries that `plain_attention` takes at a time, and the most parts that it cuts a sequence into.
Each part is compiled by itself, so a long sequence has larger parts."""


def plain_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Attention in plain JAX, some queries at a time; the result has its heads merged.

    Keys after the last of the queries are skipped. The backward pass computes the logits again from
    the sums of the softmax (Dao et al., 2022), so that none are kept.
    """
    q = rearrange(q, "b t (k g) h -> b k g t h", k=k.shape[2])  # G query heads a key head
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    return _by_parts(q, k, v, segment_ids)


@jax.custom_vjp
def _by_parts(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    return _parts_forward(q, k, v, segment_ids)[0]


def _parts_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, tuple]:
    outs, sums = [], []
    for queries, keys in _parts(k.shape[2], causal=segment_ids is not None):
        logits = _logits(q, k, segment_ids, queries, keys)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        shares = jnp.exp(logits - largest)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        out = _wide("BKGTS,BKSH->BKGTH", shares.astype(v.dtype), v[:, :, keys]) / total
        outs.append(out.astype(v.dtype))
        sums.append(largest + jnp.log(total))
    out = rearrange(jnp.concatenate(outs, axis=3), "b k g t h -> b t (k g h)")
    return out, (q, k, v, segment_ids, out, sums)


def _parts_backward(residuals: tuple, grad: jax.Array) -> tuple:
    q, k, v, segment_ids, out, sums = residuals
    heads = partial(rearrange, pattern="b t (k g h) -> b k g t h", k=k.shape[1], h=k.shape[3])
    grad = heads(grad)
    along = _wide("BKGTH,BKGTH->BKGT", grad, heads(out))[..., None]
    parts = _parts(k.shape[2], causal=segment_ids is not None)
    q_grads, k_grad, v_grad = [], jnp.zeros(k.shape), jnp.zeros(v.shape)
    for (queries, keys), total in zip(parts, sums, strict=True):
        shares = jnp.exp(_logits(q, k, segment_ids, queries, keys) - total)
        here = grad[:, :, :, queries]
        of_shares = _wide("BKGTH,BKSH->BKGTS", here, v[:, :, keys])
        of_logits = shares * (of_shares - along[:, :, :, queries]) * q.shape[-1] ** -0.5
        narrow = of_logits.astype(q.dtype)
        q_grads.append(jnp.einsum("BKGTS,BKSH->BKGTH", narrow, k[:, :, keys]))
        # XLA's CPU backend transposes the first operand, so that is the smaller one here. It has
        # no such product of bfloat16, so the operands are float32.
        wide = lambda x: x.astype(jnp.float32)
        of_keys = jnp.einsum("BKGTH,BKGTS->BKHS", wide(q[:, :, :, queries]), of_logits)
        of_values = jnp.einsum("BKGTH,BKGTS->BKHS", wide(here), shares)
        k_grad = k_grad.at[:, :, keys].add(of_keys.swapaxes(2, 3))
        v_grad = v_grad.at[:, :, keys].add(of_values.swapaxes(2, 3))
    return jnp.concatenate(q_grads, axis=3), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_by_parts.defvjp(_parts_forward, _parts_backward)


def _wide(products: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """An einsum whose result is float32."""
    return jnp.einsum(products, x, y, preferred_element_type=jnp.float32)


def _parts(length: int, *, causal: bool) -> list[tuple[slice, slice]]:
    """The queries of each part, and the keys that any of them may see."""
    size = QUERIES * -(-length // (QUERIES * MAX_PARTS))
    ends = [min(start + size, length) for start in range(0, length, size)]
    starts = [0, *ends[:-1]]
    return [
        (slice(start, end), slice(0, end if causal else length))
        for start, end in zip(starts, ends, strict=True)
    ]


def _logits(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    segment_ids: Int[Array, "B S"] | None,
    queries: slice,
    keys: slice,
) -> Float[Array, "B K G _ _"]:
    """Float32 logits of some queries and keys; the lowest number where a key is not visible.

    With segments, a token sees the tokens of its own segment that are not after it.
    """
    logits = _wide("BKGTH,BKSH->BKGTS", q[:, :, :, queries], k[:, :, keys]) * q.shape[-1] ** -0.5
    if segment_ids is None:
        return logits
    same = segment_ids[:, queries, None] == segment_ids[:, None, keys]
    index = jnp.arange(segment_ids.shape[1])
    sees = same & (index[queries, None] >= index[None, keys])[None]
    return jnp.where(sees[:, None, None], logits, jnp.finfo(jnp.float32).min)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Attention by cuDNN, for bfloat16 on GPUs of compute capability 8.0 and up.

    Each row must be one segment, followed by padding.
    """
    batch, length = q.shape[:2]
    lengths, is_causal = None, segment_ids is not None
    if segment_ids is not None:
        lengths = jnp.maximum(jnp.sum(segment_ids > 0, axis=1), 1)  # no row may be empty
    if length % 2:  # cuDNN's backward pass takes only even lengths
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
    """Attention by our Triton kernels, for rows of several segments, of which cuDNN takes one.

    The tokens of a segment must be next to each other. Attention without segments is left to cuDNN.
    Lengths that are not a multiple of the kernel's block are padded with tokens of segment 0.
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
    """Attention by Pallas' splash kernel, for TPUs; every device computes its own rows and heads.

    Lengths that are not a multiple of the kernel's block are padded with tokens of segment 0.
    """
    causal = segment_ids is not None
    segments = segment_ids if causal else jnp.ones(q.shape[:2], jnp.int32)
    scaled = q * q.shape[3] ** -0.5
    return _on_shards(partial(_splash, causal=causal), scaled, k, v, segments, MIN_BLOCK)


def _on_shards(
    kernel: Callable[..., jax.Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    block: int,
) -> Float[Array, "B T D"]:
    """Runs a kernel on every device's own rows and heads, padded to a multiple of `block`."""
    batch, length, heads, size = q.shape
    q = q.reshape(batch, length, k.shape[2], -1, size)  # heads are sharded as those of the keys
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
    """Splash attention on one device."""
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
    """The same block size for queries and keys, forwards and backwards."""
    size = math.gcd(length, MAX_BLOCK)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


ATTENTION: Mapping[AttentionImplementation, Callable[..., jax.Array]] = {
    "plain": plain_attention,
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "splash": splash_attention,
}


def attention_implementation(
    config: TrainConfig, model: ModelConfig, platform: str, capability: str
) -> AttentionImplementation:
    """The fastest implementation that a device can run.

    Args:
        config: The run.
        model: Sizes of the model.
        platform: "gpu", "tpu" or "cpu".
        capability: Compute capability of a GPU, for example "8.6"; "" elsewhere.
    """
    sizes = model.llm.head_dim, model.vision.hidden_size // model.vision.num_attention_heads
    if config.dtype != "bfloat16":
        return "plain"
    if platform == "tpu" and all(size % 64 == 0 for size in sizes):
        return "splash"
    is_ampere = platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8.0
    if not is_ampere or not all(size <= 128 and size % 8 == 0 for size in sizes):
        return "plain"
    if not config.data.packing:
        return "cudnn"
    return "flash" if sizes[0] in FLASH_HEADS else "plain"

"""Implements attention in four ways: plain JAX, cuDNN and Triton on GPUs, and Pallas on TPUs.

All implementations compute grouped-query attention with a float32 softmax. They have the same
arguments: queries [batch, tokens, heads, head size], keys and values [batch, tokens, key heads,
head size], and segment ids [batch, tokens]. Attention is causal within each segment; without
segment ids (None), all tokens attend to all tokens. The result is [batch, tokens, heads x head
size], in the dtype of the arguments.
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
from llava_jax.distributed.sharding import constrain, on_shards, sequence_size
from llava_jax.models.flash import BLOCK, FLASH_HEADS, segment_attention

MIN_BLOCK, MAX_BLOCK = 128, 512
"""Smallest and largest number of tokens in a block of the splash kernel. A block must fill the
lanes of a vector register. The float32 logits of a block, at most 1 MiB, must be much smaller than
the vector memory of any TPU."""

HEAD_LANES = 64
"""Sizes of heads that the splash kernel supports are multiples of this number."""

OF_ROWS = ("batch", "whole", "heads_of_rows", "whole")
OF_IMAGES = ("images", "whole", "heads", "whole")
"""Logical axes of the keys of text rows, and of the keys of images."""

QUERIES, MAX_PARTS = 128, 8
"""`plain_attention` cuts a sequence into at most MAX_PARTS parts, whose size is a multiple of
QUERIES queries. Because each part is compiled separately, the number of parts is limited."""


def plain_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Computes attention in plain JAX, for one part of the queries at a time.

    If attention is causal, keys after the last query of a part are skipped. No logits are kept for
    the backward pass, which recomputes the logits, and computes the softmax from its saved sums
    (Dao et al., 2022). See the module's docstring for the arguments.
    """
    q = rearrange(q, "b t (k g) h -> b k g t h", k=k.shape[2])  # g: query heads per key head
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
        # XLA's CPU backend transposes the first operand, so the smaller operand comes first. The
        # backend has no such product for bfloat16, so both operands are float32.
        wide = lambda x: x.astype(jnp.float32)
        of_keys = jnp.einsum("BKGTH,BKGTS->BKHS", wide(q[:, :, :, queries]), of_logits)
        of_values = jnp.einsum("BKGTH,BKGTS->BKHS", wide(here), shares)
        k_grad = k_grad.at[:, :, keys].add(of_keys.swapaxes(2, 3))
        v_grad = v_grad.at[:, :, keys].add(of_values.swapaxes(2, 3))
    return jnp.concatenate(q_grads, axis=3), k_grad.astype(k.dtype), v_grad.astype(v.dtype), None


_by_parts.defvjp(_parts_forward, _parts_backward)


def _wide(products: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes an einsum with a float32 result."""
    return jnp.einsum(products, x, y, preferred_element_type=jnp.float32)


def _parts(length: int, *, causal: bool) -> list[tuple[slice, slice]]:
    """Returns, for each part, the slice of its queries and the slice of the keys that it needs."""
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
    """Returns the float32 logits of some queries and keys; masked logits are the lowest float32.

    With segments, a token attends to itself and to earlier tokens of its segment.
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
    """Computes attention with cuDNN, in bfloat16 on GPUs of compute capability 8.0 or higher.

    Each row must be one segment, followed by padding with segment id 0. See the module's docstring
    for the arguments.
    """
    batch, length = q.shape[:2]
    lengths, is_causal = None, segment_ids is not None
    if segment_ids is not None:
        lengths = jnp.maximum(jnp.sum(segment_ids > 0, axis=1), 1)  # no row may be empty
    if length % 2:  # cuDNN's backward pass supports only even lengths
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
    """Computes attention with the Triton kernels of `models.flash`, for rows with several segments.

    Without segments (None), this function calls `cudnn_attention`, which supports only one segment
    per row. The tokens of a segment must be adjacent. Rows are padded to a multiple of the kernel's
    block with tokens of segment 0. See the module's docstring for the arguments.
    """
    if segment_ids is None:
        return cudnn_attention(q, k, v)
    kernel = cast("Callable[..., jax.Array]", segment_attention)
    return _on_shards(kernel, q, k, v, segment_ids, BLOCK, OF_ROWS)


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T D"]:
    """Computes attention with Pallas' splash kernel on TPUs.

    Each device computes its own rows and heads. Rows are padded to a multiple of the kernel's
    smallest block with tokens of segment 0. See the module's docstring for the arguments.
    """
    causal = segment_ids is not None
    segments = segment_ids if causal else jnp.ones(q.shape[:2], jnp.int32)
    scaled = q * q.shape[3] ** -0.5
    kernel, axes = partial(_splash, causal=causal), OF_ROWS if causal else OF_IMAGES
    return _on_shards(kernel, scaled, k, v, segments, MIN_BLOCK, axes)


def _on_shards(
    kernel: Callable[..., jax.Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    block: int,
    axes: tuple[str, ...],
) -> Float[Array, "B T D"]:
    """Runs a kernel on the rows and heads of each device; pads rows to a multiple of `block`."""
    batch, length, heads, size = q.shape
    # The query heads are grouped by key head, so that both kinds of heads are sharded alike.
    q = q.reshape(batch, length, k.shape[2], -1, size)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, -length % block), *[(0, 0)] * (x.ndim - 2)])
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
    """Computes splash attention on one device, with heads padded to a multiple of HEAD_LANES."""
    length, groups, size = q.shape[1], q.shape[3], q.shape[4]
    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * (q.shape[2] * groups)), block_sizes=_blocks(length)
    )
    q = rearrange(q, "b t k g h -> b (k g) t h")
    k, v = (rearrange(x, "b t k h -> b k t h") for x in (k, v))
    q, k, v = (jnp.pad(x, [(0, 0)] * 3 + [(0, -size % HEAD_LANES)]) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
    return rearrange(cast("jax.Array", out)[..., :size], "b (k g) t h -> b t k g h", g=groups)


def _blocks(length: int) -> splash.BlockSizes:
    """Returns equal block sizes for queries and keys, in the forward and the backward pass."""
    size = math.gcd(length, MAX_BLOCK)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def attend_to_rows(
    attend: Callable[..., jax.Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Computes attention of rows whose tokens are divided among the devices of the axis `sequence`.

    As in DeepSpeed-Ulysses (Jacobs et al., 2023), an all-to-all gives each device all tokens of
    some heads, and a second one returns the results to the devices of their tokens. Key heads are
    repeated until each device has one.

    Args:
        attend: Implementation of attention.
        q: Queries, [batch, tokens, heads, head size].
        k: Keys, [batch, tokens, key heads, head size].
        v: Values, in the shape of the keys.
        segment_ids: Segment of each token, [batch, tokens].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if sequence_size(mesh) == 1:
        return attend(q, k, v, segment_ids)
    devices = sequence_size(mesh) * mesh.shape["tensor"]
    repeats = math.lcm(k.shape[2], devices) // k.shape[2]
    of_tokens, of_heads = ("batch", "tokens", "heads", "whole"), OF_ROWS

    def to_heads(x: jax.Array) -> jax.Array:
        # The first constraint makes XLA exchange the gradients in the same way.
        return constrain(constrain(x, *of_tokens), *of_heads)

    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    out = attend(*map(to_heads, (q, k, v)), constrain(segment_ids, *of_heads[:2]))
    return constrain(constrain(out, *of_heads[:3]), *of_tokens[:3])


ATTENTION: Mapping[AttentionImplementation, Callable[..., jax.Array]] = {
    "plain": plain_attention,
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "splash": splash_attention,
}


def attention_implementation(
    config: TrainConfig, model: ModelConfig, platform: str, capability: str
) -> AttentionImplementation:
    """Returns the fastest implementation of attention that a device can run.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        platform: Platform of the device, "gpu", "tpu" or "cpu".
        capability: Compute capability of a GPU, for example "8.6"; "" on other platforms.
    """
    sizes = model.llm.head_dim, model.vision.hidden_size // model.vision.num_attention_heads
    if config.dtype != "bfloat16":
        return "plain"
    if platform == "tpu":
        return "splash"
    is_ampere = platform == "gpu" and capability[:1].isdigit() and float(capability) >= 8.0
    if not is_ampere or not all(size <= 128 and size % 8 == 0 for size in sizes):
        return "plain"
    if not config.data.packing:
        return "cudnn"
    return "flash" if sizes[0] in FLASH_HEADS else "plain"

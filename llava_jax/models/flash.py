"""Computes attention within the segments of packed rows on GPUs, with Triton kernels in Pallas.

The kernels are written by hand because no library has a GPU kernel for segments: JAX's interface to
cuDNN supports only one segment per row. The algorithm is FlashAttention-2 (Dao, 2023):

- The logits of only one block of queries and one block of keys exist at a time.
- The forward pass computes the softmax with a running maximum and a running sum. The backward pass
  recomputes the softmax weights from the logarithms of these sums.
- The tokens of a segment are adjacent. A block of queries therefore needs no keys before the
  segment of its first token, and a block of keys needs no queries after the segment of its last
  token. Blocks that are not needed are skipped.

Pallas' Triton backend is deprecated since JAX 0.11, and is still part of JAX 0.12. Nevertheless,
these kernels serve all GPUs of compute capability 8.0 to 12.1, because no alternative does so with
JAX 0.10.2, the newest version for Python 3.11, and with JAX 0.12:

- Pallas' backend Mosaic GPU has matrix products only for 9.0 and 10.0 in JAX 0.10.2. Products for
  the other GPUs (`mosaic_gpu.mma`) came later; they are part of JAX 0.12.
- cuDNN's packed layout is private in JAX, needs 9.0 or higher, and asks for the attached GPU.
- jax-triton 0.4 needs Python 3.12, JAX 0.11 and the package triton.

JAX's warning about the deprecation is hidden here, and `jax_compat.lowering_for_gpu` makes plans
for absent GPUs possible. When JAX drops the backend, pyproject.toml must exclude that version until
these kernels are ported.

Queries have the shape [B, T, K, G, H], where T is a multiple of `BLOCK`. Triton runs a kernel as
many programs; each program computes one block of one head of one row.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from llava_jax.jax_compat import hide_triton_deprecation
from llava_jax.models.layers import segment_ends, segment_starts

hide_triton_deprecation()

BLOCK, STAGES = 64, 2
"""Number of queries or keys in a block, and number of blocks that are loaded ahead. These are the
largest values that fit into the shared memory (100 KiB) of GPUs of compute capability 8.6 with a
head size of 128."""

FLASH_HEADS = (16, 32, 64, 128)  # head sizes; the sides of Triton's tiles are powers of two

LOWEST = float(jnp.finfo(jnp.float32).min)
LOG2_E = math.log2(math.e)  # the kernels use 2^x, which GPUs compute directly


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def segment_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
    interpret: bool = False,
) -> Float[Array, "B T K G H"]:
    """Computes causal attention within segments.

    Args:
        q: Queries, [batch, tokens, key heads, query heads per key head, head size]. The number of
            tokens must be a multiple of `BLOCK`.
        k: Keys, [batch, tokens, key heads, head size].
        v: Values, in the shape of the keys.
        segment_ids: Segment of each token, [batch, tokens]; the tokens of a segment must be
            adjacent.
        interpret: Whether Pallas emulates the kernels, which needs no GPU but is slow.

    Returns:
        Attention output in the shape and dtype of `q`.
    """
    return _forward(q, k, v, segment_ids, interpret)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, length, keys, groups, _ = q.shape
    query, all_keys, sums, row = _of_queries(q.shape)
    first = segment_starts(segment_ids)[:, ::BLOCK] // BLOCK
    out, log_sums = pl.pallas_call(
        _forward_kernel,
        name="flash_forward",
        grid=(length // BLOCK, keys * groups, batch),
        in_specs=(query, all_keys, all_keys, row(length), row(first.shape[1])),
        out_specs=(query, sums),
        out_shape=(q, jax.ShapeDtypeStruct((batch, keys, groups, length), jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=STAGES),
        interpret=interpret,
    )(q, k, v, segment_ids, first)
    return out, (q, k, v, segment_ids, out, log_sums)


def _backward(interpret: bool, residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple:
    q, k, v, segment_ids, out, log_sums = residuals
    batch, length, keys, groups, size = q.shape
    wide = lambda x: x.astype(jnp.float32)
    # The gradient of a softmax subtracts this product from the gradients of its weights.
    shifts = jnp.einsum("BTKGH,BTKGH->BKGT", wide(out), wide(grad))
    blocks = length // BLOCK
    params = triton.CompilerParams(num_warps=8, num_stages=STAGES)  # with 4 warps, registers spill
    options: dict[str, Any] = {"compiler_params": params, "interpret": interpret}

    query, all_keys, sums, row = _of_queries(q.shape)
    first = segment_starts(segment_ids)[:, ::BLOCK] // BLOCK
    q_grad = pl.pallas_call(
        _query_kernel,
        name="flash_queries",
        grid=(blocks, keys * groups, batch),
        in_specs=(query, all_keys, all_keys, row(length), row(blocks), query, sums, sums),
        out_specs=query,
        out_shape=q,
        **options,
    )(q, k, v, segment_ids, first, grad, log_sums, shifts)

    key = pl.BlockSpec((None, BLOCK, None, size), lambda i, head, b: (b, i, head, 0))
    queries = pl.BlockSpec(
        (None, length, None, groups, size), lambda i, head, b: (b, 0, head, 0, 0)
    )
    all_sums = pl.BlockSpec((None, None, groups, length), lambda i, head, b: (b, head, 0, 0))
    last = segment_ends(segment_ids)[:, BLOCK - 1 :: BLOCK] // BLOCK
    k_grad, v_grad = pl.pallas_call(
        _key_kernel,
        name="flash_keys",
        grid=(blocks, keys, batch),
        in_specs=(queries, key, key, row(length), row(blocks), queries, all_sums, all_sums),
        out_specs=(key, key),
        out_shape=(k, v),
        **options,
    )(q, k, v, segment_ids, last, grad, log_sums, shifts)
    return q_grad, k_grad, v_grad, None


segment_attention.defvjp(_forward, _backward)


def _of_queries(shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns the block specs of a program that handles one block of queries.

    There is one spec each for the queries of the block, for all keys, and for the softmax sums of
    the block. The last result is a function that returns the spec of a row with a given width.
    """
    _, length, _, groups, size = shape
    head = lambda n: (n // groups, n % groups)
    return (
        pl.BlockSpec((None, BLOCK, None, None, size), lambda i, n, b: (b, i, *head(n), 0)),
        pl.BlockSpec((None, length, None, size), lambda i, n, b: (b, 0, n // groups, 0)),
        pl.BlockSpec((None, None, None, BLOCK), lambda i, n, b: (b, *head(n), i)),
        lambda width: pl.BlockSpec((None, width), lambda i, n, b: (b, 0)),
    )


def _forward_kernel(q_ref, k_ref, v_ref, ids_ref, first_ref, out_ref, log_sums_ref):
    """Computes the attention output of one block of queries, and the log2 of its softmax sums."""
    here = pl.program_id(0)
    q = q_ref[...]

    def body(there, carry):
        out, top, total = carry
        k, v = k_ref[_tokens(there), :], v_ref[_tokens(there), :]
        visible = _sees(_marks(ids_ref, here, 1), _marks(ids_ref, there, 0))
        logits = jnp.where(visible, _logits(q, k), LOWEST)
        new_top = jnp.maximum(top, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new_top[:, None])
        shrunk = jnp.exp2(top - new_top)
        out = out * shrunk[:, None] + triton.dot(weights.astype(v.dtype), v)
        return out, new_top, total * shrunk + jnp.sum(weights, axis=1)

    zeros = jnp.zeros(q.shape, jnp.float32)
    start = zeros, jnp.full(BLOCK, LOWEST, jnp.float32), jnp.zeros(BLOCK, jnp.float32)
    out, top, total = jax.lax.fori_loop(first_ref[here], here + 1, body, start)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    log_sums_ref[...] = top + jnp.log2(total)


def _query_kernel(
    q_ref, k_ref, v_ref, ids_ref, first_ref, grad_ref, log_sums_ref, shifts_ref, q_grad_ref
):
    """Computes the gradient of one block of queries."""
    here = pl.program_id(0)
    q, grad, log_sums, shifts = (ref[...] for ref in (q_ref, grad_ref, log_sums_ref, shifts_ref))

    def body(there, q_grad):
        k, v = k_ref[_tokens(there), :], v_ref[_tokens(there), :]
        visible = _sees(_marks(ids_ref, here, 1), _marks(ids_ref, there, 0))
        weights = jnp.where(visible, jnp.exp2(_logits(q, k) - log_sums[:, None]), 0.0)
        grads = weights * (triton.dot(grad, v.T) - shifts[:, None])
        return q_grad + triton.dot(grads.astype(k.dtype), k)

    zeros = jnp.zeros(q.shape, jnp.float32)
    q_grad = jax.lax.fori_loop(first_ref[here], here + 1, body, zeros)
    q_grad_ref[...] = (q_grad * q.shape[-1] ** -0.5).astype(q_grad_ref.dtype)


def _key_kernel(
    q_ref,
    k_ref,
    v_ref,
    ids_ref,
    last_ref,
    grad_ref,
    log_sums_ref,
    shifts_ref,
    k_grad_ref,
    v_grad_ref,
):
    """Computes the gradients of one block of keys and of its values.

    Here the rows of the logits are keys and the columns are queries, unlike in `_query_kernel`.
    """
    here = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]

    def body(there, head, carry):
        k_grad, v_grad = carry
        at = _tokens(there)
        q, grad = q_ref[at, head, :], grad_ref[at, head, :]
        visible = _sees(_marks(ids_ref, there, 0), _marks(ids_ref, here, 1))
        logits = _logits(k, q) - log_sums_ref[head, at][None, :]
        weights = jnp.where(visible, jnp.exp2(logits), 0.0)
        grads = weights * (triton.dot(v, grad.T) - shifts_ref[head, at][None, :])
        return (
            k_grad + triton.dot(grads.astype(q.dtype), q),
            v_grad + triton.dot(weights.astype(grad.dtype), grad),
        )

    def one_head(head, carry):
        return jax.lax.fori_loop(
            here, last_ref[here] + 1, lambda there, carry: body(there, head, carry), carry
        )

    zeros = jnp.zeros(k.shape, jnp.float32)
    k_grad, v_grad = jax.lax.fori_loop(0, q_ref.shape[1], one_head, (zeros, zeros))
    k_grad_ref[...] = (k_grad * k.shape[-1] ** -0.5).astype(k_grad_ref.dtype)
    v_grad_ref[...] = v_grad.astype(v_grad_ref.dtype)


def _tokens(block: jax.Array) -> Any:
    return pl.ds(block * BLOCK, BLOCK)


def _marks(ids_ref: Any, block: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the segment ids and the positions of a block's tokens, for comparison in `_sees`.

    A new axis `axis` of size 1 makes both arrays broadcast against the arrays of another block.
    """
    positions = block * BLOCK + jnp.arange(BLOCK)
    return jnp.expand_dims(ids_ref[_tokens(block)], axis), jnp.expand_dims(positions, axis)


def _sees(query: tuple[jax.Array, jax.Array], key: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns True where a query attends to a key: same segment, and not a later position."""
    return (query[0] == key[0]) & (query[1] >= key[1])


def _logits(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns the scaled products of rows and columns, times log2(e), for use with exp2."""
    return triton.dot(rows, columns.T) * (LOG2_E * rows.shape[-1] ** -0.5)

"""Layers that the vision tower and the decoder share, and the parameters of modules as a dict.

Shapes are written with one capital letter for each dimension, here and in every einsum:

    B batch            T tokens (queries)   S key positions     D model width
    F feed-forward     N heads              K key/value heads   H head size
    V vocabulary       P patches            L layers            R LoRA rank
    M images a sample  I images             C colour channels   Q positions of the tower
    E half a head      G query heads that share a key head

Weights keep PyTorch's layout, [out, in], so checkpoints are copied, never transposed. Blocks are
stacked on axis 0 and scanned.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, Shaped

from llava_jax.models.quant import Quantised, dequantise

Params = dict[str, jax.Array]
"""Parameters by dotted path: Hugging Face's names without the layer index of stacked blocks."""

Weight = jax.Array | Quantised

Abstract = dict[str, Any]
"""Stands for `Params` before there are arrays: ShapeDtypeStructs, with shardings once they are
placed, or `models.quant.Quantised` weights made of these. It has no narrower type, because most
code reads only their `shape`, `dtype` and `sharding`."""

TokenKeys = Key[Array, "B T"] | None
"""A dropout key for each token, so that its mask depends neither on its neighbours nor on the row
that it is in; None turns dropout off."""


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Abstract]:
    """Splits a model into its structure and its parameters (arrays or ShapeDtypeStructs)."""
    graphdef, state = nnx.split(model)
    return graphdef, {
        ".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)
    }


def merge(graphdef: nnx.GraphDef, params: Mapping[str, object]) -> nnx.Module:
    """The inverse of `split`."""
    flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def parameter(*shape: int) -> nnx.Param:
    """A parameter without a value: models are built as shapes, and get their weights later."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


LINEAR, LOW_RANK = "linear", "low_rank"
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(LINEAR, LOW_RANK)
"""A policy for `jax.checkpoint`: keep the outputs of linear layers, and of A in their adapters."""


class Linear(nnx.Module):
    """y = x W^T + b, plus scale * dropout(x) A^T B^T with an adapter. W may be `Quantised`.

    `models.lora.add_adapters` adds the adapter; A is [R, in] and B is [out, R].
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs) if bias else nnx.data(None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0
        self.lora_dropout = 0.0
        self.lora_index = 0  # each linear layer of a block has its own dropout mask

    def __call__(
        self, x: Float[Array, "B T in"], keys: TokenKeys = None
    ) -> Float[Array, "B T out"]:
        weight = self.weight.get_value()
        if isinstance(weight, Quantised):
            y = _quantised_product(x, weight)
        else:
            y = _product(x, weight.astype(x.dtype))
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)[None, None]
        if self.lora_a is not None and self.lora_b is not None:
            keys = None if keys is None else fold_in(keys, self.lora_index)
            arrays = x, self.lora_a[...], self.lora_b[...], keys
            y += _low_rank_product(*arrays, self.lora_scale, self.lora_dropout)
        return checkpoint_name(y, LINEAR)


def _low_rank_product(
    x: Float[Array, "B T in"],
    a: Float[Array, "R in"],
    b: Float[Array, "out R"],
    keys: TokenKeys,
    scale: float,
    rate: float,
) -> Float[Array, "B T out"]:
    x, a, b = gradients_together(x, a, b)
    # The cast comes after the barrier, or devices that share a weight gather it a second time.
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    low: jax.Array = (
        _product(x, a) if keys is None or rate == 0 else _dropped_product(x, a, keys, rate)
    )
    return _product(checkpoint_name(scale * low, LOW_RANK), b)


@jax.custom_vjp
def _product(x: Float[Array, "B T D"], weight: Float[Array, "F D"]) -> Float[Array, "B T F"]:
    return jnp.einsum("BTD,FD->BTF", x, weight)


def _product_backward(operands: tuple, grad: Float[Array, "B T F"]) -> tuple:
    """As JAX's own, except for the order of operands in the weight's gradient.

    XLA's CPU backend transposes the first operand of a product, and computes again, element by
    element, what that operand came from. JAX always puts the gradient first; here the first is the
    smaller of the two. If the weight is frozen, x is kept for nothing, and XLA drops it.
    """
    x, weight = operands
    of_x = jnp.einsum("BTF,FD->BTD", grad, weight)
    if x.shape[-1] < grad.shape[-1]:
        of_weight = jnp.einsum("BTD,BTF->DF", x, grad).T
    else:
        of_weight = jnp.einsum("BTF,BTD->FD", grad, x)
    return of_x, of_weight


_product.defvjp(lambda x, weight: (_product(x, weight), (x, weight)), _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dropped_product(
    x: Float[Array, "B T D"], weight: Float[Array, "F D"], keys: Key[Array, "B T"], rate: float
) -> Float[Array, "B T F"]:
    return _product(dropout(x, rate, keys), weight)


def _drop_again(rate: float, operands: tuple, grad: Float[Array, "B T F"]) -> tuple:
    """The gradients of the product. dropout(x) is large and cheap, so it is computed again."""
    x, weight, keys = operands
    x, keys, grad = jax.lax.optimization_barrier((x, keys, grad))
    dropped, pull = jax.vjp(lambda x: dropout(x, rate, keys), x)
    of_dropped, of_weight = _product_backward((dropped, weight), grad)
    return *pull(of_dropped), of_weight, None


_dropped_product.defvjp(
    lambda x, weight, keys, rate: (_dropped_product(x, weight, keys, rate), (x, weight, keys)),
    _drop_again,
)


@jax.custom_vjp
def _quantised_product(x: Float[Array, "B T D"], weight: Quantised) -> Float[Array, "B T F"]:
    return jnp.einsum("BTD,FD->BTF", x, dequantise(weight, x.dtype))


def _dequantise_again(weight: Quantised, grad: Float[Array, "B T F"]) -> tuple:
    # Without the barrier, XLA would dequantise all weights before the backward pass needs them.
    weight, grad = jax.lax.optimization_barrier((weight, grad))
    return jnp.einsum("BTF,FD->BTD", grad, dequantise(weight, grad.dtype)), None


_quantised_product.defvjp(lambda x, w: (_quantised_product(x, w), w), _dequantise_again)


class Embedding(nnx.Module):
    """A table of vectors, [entries, D]."""

    def __init__(self, entries: int, width: int):
        self.weight = parameter(entries, width)

    def __call__(self, ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        return self.weight[...][ids].astype(dtype)


class RmsNorm(nnx.Module):
    """Root-mean-square norm, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float):
        self.weight = parameter(width)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return _rms_norm(x, self.weight[...], self.eps)


# It is cheap to compute again, and without that a float32 copy of x is kept. The scan over layers
# already prevents common subexpressions from being merged, so `prevent_cse` need not.
@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: Float[Array, "B T D"], weight: Float[Array, " D"], eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)[None, None]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm, in float32."""

    def __init__(self, width: int, eps: float):
        self.weight = parameter(width)
        self.bias = parameter(width)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        weight, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.weight, self.bias))
        return (x32 * weight + bias).astype(x.dtype)


@jax.custom_vjp
def gradients_together(*args: jax.Array) -> tuple[jax.Array, ...]:
    """Returns its arguments, and makes the backward pass compute all their gradients together.

    Without it, the compiler may put off the gradient of a weight to the end of the backward pass,
    and keep everything that it is computed from until then. All arguments must be differentiated.
    """
    return args


gradients_together.defvjp(
    lambda *args: (args, None), lambda _, grads: jax.lax.optimization_barrier(grads)
)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """CLIP's x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def fold_in(keys: Key[Array, "B T"], data: int | Int[Array, ""]) -> Key[Array, "B T"]:
    """`jax.random.fold_in` of every key."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, data)))(keys)


def dropout(
    x: Float[Array, "B T D"], rate: float, keys: Key[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Zeroes elements with probability `rate` (to 2^-16) and scales the others up."""
    width = x.shape[2]
    threshold = min(round((1 - rate) * 2**16), 2**16 - 1)
    draw = lambda key: jax.random.bits(
        key, (-(-width // 2),), jnp.uint32
    )  # drawing 16 bits costs as much
    bits = jax.lax.bitcast_convert_type(jax.vmap(jax.vmap(draw))(keys), jnp.uint16)
    bits = bits.reshape(*x.shape[:2], -1)[:, :, :width]
    return jnp.where(bits < threshold, x / (1 - rate), 0)


def to_chunks(x: Shaped[Array, "B T *rest"], most: int) -> Shaped[Array, "chunks B chunk *rest"]:
    """Cuts rows into equal chunks of at most `most` tokens, as few as possible; pads the last."""
    count = -(-x.shape[1] // most)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % count), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def from_chunks(
    x: Shaped[Array, "chunks B chunk *rest"], length: int
) -> Shaped[Array, "B T *rest"]:
    """The inverse of `to_chunks`, for rows of `length` tokens."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the first token of each token's segment."""
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def segment_ends(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the last token of each token's segment."""
    return segment_ids.shape[1] - 1 - segment_starts(segment_ids[:, ::-1])[:, ::-1]

"""Defines the layers that vision tower and decoder share, and the dicts of model parameters.

Type annotations and einsums name each dimension of an array with one capital letter:

    B batch            T tokens (queries)   S key positions     D model width
    F feed-forward     N heads              K key/value heads   H head size
    V vocabulary       P patches            L layers            R LoRA rank
    M images per row   I images             C color channels    Q positions of the tower
    E half a head      G query heads per key head

Weights have PyTorch's layout, [out, in], so that checkpoints are copied without transposition.
Blocks are stacked on axis 0 and run in a scan.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key, Shaped

from llava_jax.distributed.host_memory import fetch
from llava_jax.models.dropout import TokenKeys, dropout, fold_in
from llava_jax.models.quant import Quantised, dequantise

Params = dict[str, jax.Array]
"""Parameters by dotted path. The paths follow Hugging Face's names, but a stack of blocks has one
parameter for all layers, without the layer index."""

Weight = jax.Array | Quantised

Abstract = dict[str, Any]
"""Shapes of parameters by path: a ShapeDtypeStruct for each array, which has a sharding after
placement, a `Quantised` of ShapeDtypeStructs, or a `DiskStack`. The type of the values is Any,
because most code reads only their `shape`, `dtype` and `sharding`."""


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Abstract]:
    """Splits a model into its structure and a dict of its arrays or ShapeDtypeStructs by path."""
    graphdef, state = nnx.split(model)
    return graphdef, {
        ".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)
    }


def merge(graphdef: nnx.GraphDef, params: Mapping[str, object]) -> nnx.Module:
    """Builds a model from its structure and its parameters; the inverse of `split`."""
    flat = [(tuple(path.split(".")), nnx.Param(value)) for path, value in params.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def parameter(*shape: int) -> nnx.Param:
    """Returns a float32 parameter that has a shape but no value.

    Models are built from such parameters and get their weights later.
    """
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


LINEAR, LOW_RANK = "linear", "low_rank"
KEEP_PRODUCTS = jax.checkpoint_policies.save_only_these_names(LINEAR, LOW_RANK)
"""Policy for `jax.checkpoint` that keeps the outputs of linear layers and of the adapters' A
matrices, and recomputes everything else."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA adapter of a linear layer, or of each layer of a stack of linear layers.

    A stack of L layers has the parameters `lora_a` [L, R, in] and `lora_b` [L, out, R], where R is
    the largest rank of a layer. The rows of A and the columns of B beyond the rank of a layer are
    zero. They stay zero in training, because their gradients are zero.

    Attributes:
        ranks: Rank in each layer; 0 means that the layer has no adapter. A linear layer outside the
            stacks has one entry.
        alphas: Alpha in each layer: the output of the adapter is multiplied by alpha / rank.
        dropout: Dropout rate for the inputs.
        use_rslora: Whether the factor is alpha / sqrt(rank) instead of alpha / rank.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def ranks_and_alphas(self) -> tuple[tuple[int, float], ...]:
        """Rank of each layer, and the alpha that gives the layer's factor as alpha / rank.

        Both are 0 if the layer has no adapter.
        """
        return tuple(
            (rank, alpha * math.sqrt(rank) if self.use_rslora and rank else alpha * (rank > 0))
            for rank, alpha in zip(self.ranks, self.alphas, strict=True)
        )

    @property
    def scales(self) -> tuple[float, ...]:
        """Factor of the output in each layer.

        Layers without adapter have the factor of the first layer that has an adapter.
        """
        some = next(alpha / rank for rank, alpha in self.ranks_and_alphas if rank)
        return tuple(alpha / rank if rank else some for rank, alpha in self.ranks_and_alphas)


class Linear(nnx.Module):
    """Linear layer with an optional bias and LoRA adapter; the weight may be `Quantised`.

    The output is x W^T + b, plus scale * dropout(x) A^T B^T if there is an adapter, which
    `models.lora.add_adapters` adds. A is [R, in] and B is [out, R]. The scale is a number of
    `adapter`. Only if the layers of a stack have different scales, it is an element of
    `lora_scales`, [L], which `with_layer_scales` adds.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool):
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs) if bias else nnx.data(None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.adapter: Adapter | None = None
        self.lora_scales: nnx.Param | None = nnx.data(None)
        self.lora_index = 0  # gives each linear layer of a block its own dropout mask

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
        if self.adapter is not None and self.lora_a is not None and self.lora_b is not None:
            keys = None if keys is None else fold_in(keys, self.lora_index)
            scale = self.adapter.scales[0]
            if self.lora_scales is not None:
                scale = self.lora_scales[...]
            arrays = x, self.lora_a[...], self.lora_b[...], keys
            y += _low_rank_product(*arrays, scale, self.adapter.dropout)
        return checkpoint_name(y, LINEAR)


Stack = TypeVar("Stack", bound=nnx.Module)


def with_layer_scales(stack: Stack) -> Stack:
    """Returns a stack whose adapters have their scales as arrays, if they differ between layers.

    A loop over the layers then slices the scales like the weights.

    Args:
        stack: Module with stacked blocks; it is not changed.
    """
    if not any(_scales_differ(module) for _, module in nnx.iter_modules(stack)):
        return stack
    copy = cast("Stack", merge(*split(stack)))
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Linear) and module.adapter and _scales_differ(module):
            module.lora_scales = nnx.Param(jnp.array(module.adapter.scales, jnp.float32))
    return copy


def _scales_differ(module: nnx.Module) -> bool:
    adapter = module.adapter if isinstance(module, Linear) else None
    return adapter is not None and len({*adapter.scales}) > 1


def _low_rank_product(
    x: Float[Array, "B T in"],
    a: Float[Array, "R in"],
    b: Float[Array, "out R"],
    keys: TokenKeys,
    scale: float | Float[Array, ""],
    rate: float,
) -> Float[Array, "B T out"]:
    """Computes the contribution of an adapter: scale * dropout(x) A^T B^T."""
    x, a, b = gradients_together(x, a, b)
    # The cast must come after `gradients_together`; otherwise, sharded weights are gathered twice.
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    low: jax.Array = (
        _product(x, a) if keys is None or rate == 0 else _dropped_product(x, a, keys, rate)
    )
    # A scale that is rounded to bfloat16 would change all outputs by the same factor.
    is_exact = isinstance(scale, float) and float(np.asarray(scale, x.dtype)) == scale
    scaled = scale * (low if is_exact else low.astype(jnp.float32))
    return _product(checkpoint_name(scaled.astype(x.dtype), LOW_RANK), b)


@jax.custom_vjp
def _product(x: Float[Array, "B T D"], weight: Float[Array, "F D"]) -> Float[Array, "B T F"]:
    return jnp.einsum("BTD,FD->BTF", x, weight)


def _product_backward(operands: tuple, grad: Float[Array, "B T F"]) -> tuple:
    """Computes the gradients of `_product`, like JAX except for the order of operands.

    XLA's CPU backend transposes the first operand of a product. To do so, it recomputes, element by
    element, the operations that produced this operand. JAX always puts the gradient first; here,
    the smaller operand of the weight's gradient comes first. If the weight is frozen, XLA removes
    its unused gradient and the saved x.
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
    """Computes the gradients of `_dropped_product`.

    dropout(x) is large and cheap to compute, so it is recomputed here instead of saved.
    """
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
    # Without the barrier, XLA would dequantize all weights before the backward pass needs them.
    weight, grad = jax.lax.optimization_barrier((weight, grad))
    return jnp.einsum("BTF,FD->BTD", grad, dequantise(weight, grad.dtype)), None


_quantised_product.defvjp(lambda x, w: (_quantised_product(x, w), w), _dequantise_again)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Returns the rows `ids` of a table in `dtype`; the gradient of the table is summed in float32.

    In bfloat16, the sum of the gradients of a frequent token would stop growing after about 256 of
    them.
    """
    return table[ids].astype(dtype)


def _look_up_backward(dtype: DTypeLike, residuals: tuple, grad: Float[Array, "B T D"]) -> tuple:
    table, ids = residuals
    total = jnp.zeros(table.shape, jnp.float32).at[ids].add(grad.astype(jnp.float32))
    return total.astype(table.dtype), None


look_up.defvjp(
    lambda table, ids, dtype: (look_up(table, ids, dtype), (table, ids)), _look_up_backward
)


class Embedding(nnx.Module):
    """Table of embedding vectors, [entries, D], looked up by id.

    If `models.lora.add_adapters` has added `trainable_tokens`, [indices, D], these vectors replace
    the rows `token_indices` of the weight, as PEFT's trainable_token_indices do.
    """

    def __init__(self, entries: int, width: int):
        self.weight = parameter(entries, width)
        self.trainable_tokens: nnx.Param | None = nnx.data(None)
        self.token_indices: tuple[int, ...] = ()

    def __call__(self, ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        weight = fetch(self.weight.get_value())
        vectors = cast("Array", look_up(weight, ids, dtype))
        if self.trainable_tokens is None:
            return vectors
        # Only the vectors of the batch are replaced. A copy of the whole table would take memory,
        # and so would its gradient.
        rows = np.full(weight.shape[0], -1, np.int32)
        rows[list(self.token_indices)] = np.arange(len(self.token_indices))
        row = jnp.asarray(rows)[ids]
        trained = cast("Array", look_up(self.trainable_tokens[...], jnp.maximum(row, 0), dtype))
        return jnp.where(row[:, :, None] >= 0, trained, vectors)

    @property
    def matrix(self) -> Any:
        """Returns the whole table, [entries, D], with the vectors of `trainable_tokens`."""
        weight = self.weight.get_value()
        if self.trainable_tokens is None:
            return weight
        rows = self.trainable_tokens[...].astype(weight.dtype)
        return fetch(weight).at[np.array(self.token_indices)].set(rows)


class RmsNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019) of the last axis, computed in float32."""

    def __init__(self, width: int, eps: float):
        self.weight = parameter(width)
        self.eps = eps

    def __call__(self, x: Float[Array, "B T *N D"]) -> Float[Array, "B T *N D"]:
        return _rms_norm(x, self.weight[...], self.eps)


# The backward pass recomputes the norm, which is cheap, because a float32 copy of x would be kept
# otherwise. `prevent_cse` is not needed: the scan over layers already prevents XLA from merging
# common subexpressions.
@partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: Float[Array, "B T *N D"], weight: Float[Array, " D"], eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(weight.astype(jnp.float32), range(x.ndim - 1))
    return (x32 * weight).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm, computed in float32."""

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

    Without this function, the compiler may delay the gradient of a weight until the end of the
    backward pass and keep the inputs of that gradient in memory until then. All arguments must be
    differentiated.
    """
    return args


gradients_together.defvjp(
    lambda *args: (args, None), lambda _, grads: jax.lax.optimization_barrier(grads)
)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * sigmoid(1.702 x), the activation function of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
}


def to_chunks(x: Shaped[Array, "B T *rest"], most: int) -> Shaped[Array, "chunks B chunk *rest"]:
    """Cuts rows into as few equal chunks as possible, and pads the last chunk with zeros.

    Args:
        x: Array of shape [batch, tokens, ...].
        most: Largest number of tokens in a chunk.

    Returns:
        Array of shape [chunks, batch, tokens per chunk, ...].
    """
    count = -(-x.shape[1] // most)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % count), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def from_chunks(
    x: Shaped[Array, "chunks B chunk *rest"], length: int
) -> Shaped[Array, "B T *rest"]:
    """Joins chunks into rows of `length` tokens; the inverse of `to_chunks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def segment_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns, for each token, the position in the row of the first token of its segment."""
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.diff(segment_ids, axis=1, prepend=-1) != 0
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


def segment_ends(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns, for each token, the position in the row of the last token of its segment."""
    return segment_ids.shape[1] - 1 - segment_starts(segment_ids[:, ::-1])[:, ::-1]

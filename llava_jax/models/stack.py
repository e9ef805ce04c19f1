"""Runs blocks that are stacked on a layer axis, in one compiled loop forward and one backward.

The backward loop is written by hand to save memory in ways that automatic differentiation of a scan
cannot. The loop copies one layer at a time to the device, recomputes that block from its input, and
adds the gradients in place to the sums of earlier micro-batches. The weights of a stack, the inputs
of its blocks and the gradient sums may all be in host memory.

A block begins with attention. In loops over frozen weights in host memory, the attention weights of
the next layer are copied while a layer computes. The other weights of a layer are copied while its
attention is computed, so they need no second buffer. Weights on disk are read layer by layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from llava_jax.distributed.disk_weights import DiskStack, read_layers
from llava_jax.distributed.host_memory import (
    DEVICE,
    HOST,
    add_to,
    fetch,
    is_hosted,
    layer_at,
    loop_with_prefetch,
    move,
    rounded_sum,
    write_layer,
)
from llava_jax.jax_compat import compiler_options
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.dropout import TokenKeys, fold_in
from llava_jax.models.layers import (
    KEEP_PRODUCTS,
    with_layer_scales,
)
from llava_jax.models.paths import is_adapter
from llava_jax.models.quant import Quantised

Block = TypeVar("Block", bound=nnx.Module)
Leaves = dict[tuple[Any, ...], jax.Array | Quantised | DiskStack]
"""Arrays, quantized weights and weights on disk of a block or a stack, by path."""


class jit_for_backend:
    """Applies `jax.jit` to a function, with the compiler options for the default backend.

    The backend is found when the function is called, because importing a module must not start JAX.

    Args:
        f: Function to compile, for example one that loops over stacked layers.
        uses_host: Whether the function reads arrays in host memory.
        options: Keyword arguments of `jax.jit`.
    """

    def __init__(self, f: Callable[..., Any], *, uses_host: bool = False, **options: Any):
        self._jitted = functools.cache(
            lambda platform: jax.jit(
                f, compiler_options=compiler_options(platform, uses_host=uses_host), **options
            )
        )

    def __call__(self, *args: Any) -> Any:
        """Calls the function, compiled for the default backend."""
        return self._jitted(jax.default_backend())(*args)

    def compile(self, *args: Any) -> None:
        """Compiles the function for the arguments, which may be ShapeDtypeStructs."""
        self._jitted(jax.default_backend()).lower(*args).compile()


class Accumulated(NamedTuple):
    """Trainable parameter with the sum of its gradients over earlier micro-batches.

    Differentiate with respect to `total`, not `value`: the gradient is defined as `total` + d loss
    / d value, which is the new sum.

    Attributes:
        value: The parameter.
        total: Sum of the gradients, in the shape of the parameter.
    """

    value: jax.Array
    total: jax.Array


@jax.custom_vjp
def attach(value: Array, total: Array) -> Array:
    """Returns `value` on the device; the gradient of `total` is `total` + d loss / d value.

    See `Accumulated`.
    """
    return fetch(value)


attach.defvjp(
    lambda value, total: (fetch(value), total), lambda total, grad: (None, add_to(total, grad))
)


def attach_beside(x: Array, leaf: Array | Accumulated) -> tuple[Array, Array]:
    """Returns x and a parameter as arrays on the device.

    If the parameter is `Accumulated`, the backward pass adds the parameter's gradient to the sum
    before it continues with x, so that the gradient is not kept in memory.

    Args:
        x: Array that is computed with the parameter, such as final hidden states.
        leaf: Parameter, as an array or `Accumulated`.
    """
    is_sum = isinstance(leaf, Accumulated)
    value = leaf.value if is_sum else leaf
    if is_hosted(value):  # it is copied to the device when x is ready, and not before
        _, value = jax.lax.optimization_barrier((jax.lax.stop_gradient(x), value))
    if not is_sum:
        return x, fetch(value)
    return _attach_beside(x, value, leaf.total)


@jax.custom_vjp
def _attach_beside(x: Array, value: Array, total: Array) -> tuple[Array, Array]:
    return x, fetch(value)


def _add_beside(total: Array, grads: tuple[Array, Array]) -> tuple[Array, None, Array]:
    x_grad, total = jax.lax.optimization_barrier((grads[0], add_to(total, grads[1])))
    return x_grad, None, total


_attach_beside.defvjp(lambda x, value, total: ((x, fetch(value)), total), _add_beside)


def stack_blocks(block: Block, count: int) -> Block:
    """Returns a module whose parameters are those of `block` with a leading layer axis.

    Args:
        block: Module whose parameters are shapes.
        count: Number of layers.
    """
    graphdef, state = nnx.split(block)
    stack = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)
    return nnx.merge(graphdef, jax.tree.map(stack, state))


def scan_blocks(
    stacked: nnx.Module,
    x: Float[Array, "B T D"],
    apply: Callable[..., jax.Array],
    context: PyTree,
    keys: TokenKeys,
    compute: ComputeConfig,
    kept: tuple[int, ...] = (),
) -> Float[Array, "B T F"]:
    """Runs x through stacked blocks: `x = apply(block, x, context, keys)` for each block.

    Args:
        stacked: Module from `stack_blocks`; its parameters are arrays or `Accumulated`, in device
            or host memory.
        x: Input of the first block, [batch, tokens, hidden].
        apply: Function that computes one block.
        context: Arrays that every block receives; the arrays get no gradients.
        keys: Dropout keys of the adapters, one per token; None turns dropout off.
        compute: Settings of the computation. They determine which activations the backward pass
            recomputes, and the memory in which the inputs of blocks are kept.
        kept: Numbers of blocks after which x is returned, if there are several.

    Returns:
        Output of the last block, [batch, tokens, hidden], or the concatenated x of `kept`.
    """
    graphdef, state = nnx.split(with_layer_scales(stacked))
    flat = {path: param.get_value() for path, param in nnx.to_flat_state(state)}

    def step(block: Leaves, x: jax.Array, index: Int[Array, ""], rest: tuple) -> jax.Array:
        context, keys = rest
        params = [(path, nnx.Param(leaf)) for path, leaf in block.items()]
        module = nnx.merge(graphdef, nnx.from_flat_state(params))
        here, *others = jnp.split(x, 1 + len(kept), axis=2)
        y = apply(module, here, context, None if keys is None else fold_in(keys, index))
        pairs = zip(kept, others, strict=True)
        return _join([y, *(jnp.where(index == layer - 1, y, old) for layer, old in pairs)])

    kept = kept if len(kept) > 1 else ()
    # Beside its own output, each block passes on the outputs that are kept.
    x = _join([x, *[jnp.zeros_like(x)] * len(kept)])
    y = _run_stack(flat, x, step, (context, keys), compute)
    return _join(jnp.split(y, 1 + len(kept), axis=2)[1:]) if kept else y


def _join(arrays: list[jax.Array]) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=2)


def _run_stack(
    flat: dict[tuple[Any, ...], Any],
    x: jax.Array,
    step: Callable[..., jax.Array],
    rest: tuple,
    compute: ComputeConfig,
) -> jax.Array:
    """Runs x through all layers: `x = step(block, x, index, rest)` for each layer."""
    if compute.remat == "full":
        totals = {path: leaf.total for path, leaf in flat.items() if isinstance(leaf, Accumulated)}
        values = {
            path: leaf.value if isinstance(leaf, Accumulated) else leaf
            for path, leaf in flat.items()
        }
        return _recomputing(step, compute.offload_activations)(values, totals, x, rest)

    values = {
        path: attach(*leaf) if isinstance(leaf, Accumulated) else leaf
        for path, leaf in flat.items()
    }

    def body(x: jax.Array, layer: tuple[Leaves, jax.Array]) -> tuple[jax.Array, None]:
        block, index = layer
        return step(fetch(block), x, index, rest), None

    if compute.remat == "dots":
        # `prevent_cse` is not needed, because a scan already prevents merging of subexpressions.
        body = jax.checkpoint(body, policy=KEEP_PRODUCTS, prevent_cse=False)
    return jax.lax.scan(body, x, (values, _indices(values)))[0]


def _recomputing(step: Callable[..., jax.Array], offload: bool) -> Callable[..., jax.Array]:
    """Returns a differentiable function of (values, totals, x, rest) that runs the whole stack.

    The forward pass keeps only the input of each block; the backward pass recomputes the block from
    its input.
    """

    def scan(
        values: Leaves, totals: Leaves, x: jax.Array, rest: tuple, keep: bool
    ) -> tuple[jax.Array, PyTree]:
        first, others = _first_used(values, totals)
        indices = _indices(values)
        load = lambda index: fetch(layer_at(first, index))

        def body(
            carry: tuple[jax.Array, Leaves], layer: tuple[Leaves, jax.Array]
        ) -> tuple[tuple[jax.Array, Leaves], PyTree]:
            (x, here), (block, index) = carry, layer
            ahead = load(index + 1)
            kept = move(x, HOST if offload else DEVICE) if keep else None
            block = here | fetch(read_layers(block, index, index + 1))
            return (step(_narrow(block, x), x, index, rest), ahead), kept

        carry = x, load(jnp.zeros((), jnp.int32))
        (x, _), inputs = jax.lax.scan(body, carry, (others, indices))
        return x, inputs

    @jax.custom_vjp
    def run(values: Leaves, totals: Leaves, x: jax.Array, rest: tuple) -> jax.Array:
        return scan(values, totals, x, rest, keep=False)[0]

    def forward(values: Leaves, totals: Leaves, x: jax.Array, rest: tuple) -> tuple:
        y, inputs = scan(values, totals, x, rest, keep=True)
        return y, (values, totals, inputs, rest)

    def backward(residuals: tuple, grad: jax.Array) -> tuple:
        values, totals, inputs, rest = residuals
        depth = inputs.shape[0]
        first, others = _first_used(values, totals)
        # The gradient sums that are needed first, those of the feed-forward layer, and small ones.
        is_early = lambda path: ATTENTION not in path or is_adapter(f".{path[-1]}")
        early = {p: x for p, x in totals.items() if is_hosted(x) and is_early(p)}
        if math.prod(inputs.shape[1:-1]) < EARLY_TOKENS:
            early = {}
        load = lambda done, _: fetch(layer_at(first, depth - 1 - done))

        def body(
            done: jax.Array, here: Leaves, _ahead: Leaves, carry: tuple[jax.Array, Leaves]
        ) -> tuple[jax.Array, Leaves]:
            grad, totals = carry
            index = depth - 1 - done
            block, x = fetch(layer_at((others, inputs), index))
            block = _narrow(read_layers(block, index, index - 1) | here, x)
            frozen = {path: leaf for path, leaf in block.items() if path not in totals}
            trained = {path: leaf for path, leaf in block.items() if path in totals}
            _, pull = jax.vjp(lambda t, x: step(frozen | t, x, index, rest), trained, x)
            sums = layer_at(totals, index)
            # The barrier makes XLA copy these sums while the block is recomputed. Otherwise, their
            # copies begin when the gradients are ready, and the GPU waits for them.
            grad, ready = jax.lax.optimization_barrier((grad, fetch({p: sums[p] for p in early})))
            grads, grad = pull(grad)
            sums = jax.tree.map(rounded_sum, fetch(sums) | ready, grads)
            return grad, write_layer(totals, sums, index)

        grad, totals = loop_with_prefetch(depth, load, body, (grad, totals))
        # `totals` now holds the gradients that `Accumulated` defines; `values` get no gradients.
        return None, totals, grad, None

    run.defvjp(forward, backward)
    return run


EARLY_TOKENS = 4096
"""Smallest number of tokens of a micro-batch with which gradient sums are copied early. Recomputing
a block of fewer tokens takes less time than these copies, which would only take memory."""

ATTENTION = "self_attn"
"""Name of the attention layer in a block, the first layer that has large weights."""


def _first_used(values: Leaves, totals: Leaves) -> tuple[Leaves, Leaves]:
    """Divides the parameters of a stack into those that are copied ahead, and all others.

    The attention weights in host memory are copied ahead if they are frozen, and so are their
    adapters. Float32 weights that are fully trained would take twice the memory, and their
    computation takes longer.
    """
    is_small = lambda path: path not in totals or is_adapter(f".{path[-1]}")
    is_ahead = lambda path: ATTENTION in path and is_small(path)
    on_host = lambda x: any(map(is_hosted, jax.tree.leaves(x)))  # a quantized weight is a tree
    first = {path: x for path, x in values.items() if is_ahead(path) and on_host(x)}
    return first, {path: x for path, x in values.items() if path not in first}


def _narrow(block: Leaves, x: jax.Array) -> Leaves:
    """Casts the matrices of a block to the dtype of its products, that of x, except adapters.

    The barriers prevent XLA from keeping the float32 matrices too, to cast them again in the
    backward pass. Each matrix has its own, so that none waits for the copies of the others.
    """
    narrow = dict(block)
    for path, leaf in block.items():
        if (
            isinstance(leaf, jax.Array)
            and leaf.ndim > 1
            and leaf.dtype != x.dtype
            and not is_adapter(f".{path[-1]}")
        ):
            narrow[path] = jax.lax.optimization_barrier(leaf.astype(x.dtype))
    return narrow


def _indices(values: Leaves) -> PyTree:
    """Returns the layer indices of a stack, int32 [L].

    They are a constant NumPy array, so that XLA knows which layers a loop slices; see
    `STREAMING_OPTIONS` in `jax_compat.py`.
    """
    return np.arange(next(iter(values.values())).shape[0], dtype=np.int32)

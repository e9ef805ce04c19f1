"""Blocks stacked on a layer axis, run in one compiled loop forwards and in one backwards.

The backward loop is written out, because automatic differentiation of a scan cannot do what it
does to save memory: it takes one layer at a time to the device, computes that block again from its
input, and adds the gradients in place to the sums of earlier micro-batches, in whatever memory
these are. So the weights of a stack, the inputs of its blocks and the sums may all be in host
memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from llava_jax.distributed.host_memory import DEVICE, HOST, fetch, layer_at, move, write_layer
from llava_jax.jax_compat import CPU_OPTIONS
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.layers import KEEP_PRODUCTS, TokenKeys, fold_in, gradients_together

Block = TypeVar("Block", bound=nnx.Module)
Leaves = dict[tuple[Any, ...], jax.Array]
"""Arrays of a block or a stack, by their path in it."""


class jit_loop:
    """`jax.jit` for functions that loop over the layers of stacks, with `CPU_OPTIONS` on CPUs.

    Args:
        f: The function.
        options: Options of `jax.jit`.
    """

    def __init__(self, f: Callable[..., Any], **options: Any):
        self._jitted = functools.cache(
            lambda platform: jax.jit(
                f, compiler_options=CPU_OPTIONS if platform == "cpu" else None, **options
            )
        )

    def __call__(self, *args: Any) -> Any:
        """Calls the function."""
        return self._jitted(jax.default_backend())(*args)

    def compile(self, *args: Any) -> None:
        """Compiles the function for such arguments, which may be shapes."""
        self._jitted(jax.default_backend()).lower(*args).compile()


class Accumulated(NamedTuple):
    """A parameter that trains, with the sum of its gradients over earlier micro-batches.

    Differentiate with respect to `total`: the gradient is defined as `total` + d loss / d value.
    """

    value: jax.Array
    total: jax.Array


@jax.custom_vjp
def attach(value: Array, total: Array) -> Array:
    """A parameter outside the stacks, as an array with the gradient that `Accumulated` defines."""
    return value


attach.defvjp(lambda value, total: (value, total), lambda total, grad: (None, total + grad))


def attach_beside(x: Array, leaf: Array | Accumulated) -> tuple[Array, Array]:
    """Returns x and a parameter as arrays.

    If the parameter is `Accumulated`, its gradient is added to the sum before the backward pass
    goes on with x, so that it is not kept.
    """
    if not isinstance(leaf, Accumulated):
        return x, leaf
    x, total = gradients_together(x, leaf.total)
    return x, attach(leaf.value, total)


def stack_blocks(block: Block, count: int) -> Block:
    """A module of `count` blocks like this one: its parameters have a leading layer axis."""
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
) -> Float[Array, "B T D"]:
    """Runs x through stacked blocks: `x = apply(block, x, context, keys)` for each.

    Args:
        stacked: From `stack_blocks`. Parameters are arrays or `Accumulated`, in any memory.
        x: Input of the first block.
        apply: Computes one block.
        context: Arrays that every block sees; no gradient flows to them.
        keys: Dropout keys of the adapters; None turns dropout off.
        compute: What the backward pass computes again, and where it finds the blocks' inputs.
    """
    graphdef, state = nnx.split(stacked)
    flat = {path: param.get_value() for path, param in nnx.to_flat_state(state)}

    def step(block: Leaves, x: jax.Array, index: Int[Array, ""], rest: tuple) -> jax.Array:
        context, keys = rest
        params = [(path, nnx.Param(leaf)) for path, leaf in block.items()]
        module = nnx.merge(graphdef, nnx.from_flat_state(params))
        return apply(module, x, context, None if keys is None else fold_in(keys, index))

    if compute.remat == "full":
        totals = {path: leaf.total for path, leaf in flat.items() if isinstance(leaf, Accumulated)}
        values = {
            path: leaf.value if isinstance(leaf, Accumulated) else leaf
            for path, leaf in flat.items()
        }
        return _recomputing(step, compute.offload_activations)(values, totals, x, (context, keys))

    values = {
        path: attach(*leaf) if isinstance(leaf, Accumulated) else leaf
        for path, leaf in flat.items()
    }

    def body(x: jax.Array, layer: tuple[Leaves, jax.Array]) -> tuple[jax.Array, None]:
        block, index = layer
        return step(fetch(block), x, index, (context, keys)), None

    if compute.remat == "dots":
        # A scan already prevents common subexpressions from being merged.
        body = jax.checkpoint(body, policy=KEEP_PRODUCTS, prevent_cse=False)
    return jax.lax.scan(body, x, (values, _indices(values)))[0]


def _recomputing(step: Callable[..., jax.Array], offload: bool) -> Callable[..., jax.Array]:
    """The stack as one differentiable function of (values, totals, x, rest).

    The forward pass keeps the input of each block, and the backward pass computes the block again.
    """

    def scan(values: Leaves, x: jax.Array, rest: tuple, keep: bool) -> tuple[jax.Array, PyTree]:
        def body(x: jax.Array, layer: tuple[Leaves, jax.Array]) -> tuple[jax.Array, PyTree]:
            block, index = layer
            kept = move(x, HOST if offload else DEVICE) if keep else None
            return step(fetch(block), x, index, rest), kept

        return jax.lax.scan(body, x, (values, _indices(values)))

    @jax.custom_vjp
    def run(values: Leaves, totals: Leaves, x: jax.Array, rest: tuple) -> jax.Array:
        return scan(values, x, rest, keep=False)[0]

    def forward(values: Leaves, totals: Leaves, x: jax.Array, rest: tuple) -> tuple:
        y, inputs = scan(values, x, rest, keep=True)
        return y, (values, totals, inputs, rest)

    def backward(residuals: tuple, grad: jax.Array) -> tuple:
        values, totals, inputs, rest = residuals
        depth = inputs.shape[0]

        def body(done: jax.Array, carry: tuple[jax.Array, Leaves]) -> tuple[jax.Array, Leaves]:
            grad, totals = carry
            index = depth - 1 - done
            block, x = fetch(layer_at((values, inputs), index))  # the only layer on the device
            frozen = {path: leaf for path, leaf in block.items() if path not in totals}
            trained = {path: leaf for path, leaf in block.items() if path in totals}
            _, pull = jax.vjp(lambda t, x: step(frozen | t, x, index, rest), trained, x)
            grads, grad = pull(grad)
            # Written back before the next layer is fetched: a second set of gradients never exists.
            here = jax.tree.map(jnp.add, fetch(layer_at(totals, index)), grads)
            return grad, write_layer(totals, here, index)

        grad, totals = jax.lax.fori_loop(0, depth, body, (grad, totals))
        # The gradient with respect to `totals`, as `Accumulated` defines it; `values` have none.
        return None, totals, grad, None

    run.defvjp(forward, backward)
    return run


def _indices(values: Leaves) -> Int[Array, "L"]:
    return jnp.arange(next(iter(values.values())).shape[0])

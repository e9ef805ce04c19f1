"""One optimizer update, also of what lies in host memory.

What lies there is updated in place, a slice at a time: a layer of a stack, some rows of a matrix.
AdamW treats every element by itself, so slices give what the whole would.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from llava_jax.distributed.host_memory import fetch, is_hosted, slice_at, slice_size, write_slice
from llava_jax.models.layers import Params


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Params,
    scale: Float[Array, ""] | None,
    state: optax.OptState,
    params: Params,
    apply: Bool[Array, ""],
) -> tuple[Params, optax.OptState]:
    """Updates parameters and the optimizer's state; each array stays in its memory.

    Args:
        tx: Treats every element by itself, and takes any selection of the parameters.
        grads: Gradients.
        scale: What they are multiplied by; None leaves them as they are.
        state: The optimizer's.
        params: What trains.
        apply: Whether to; else all stays as it is.
    """
    trees = grads, state, params
    pick = partial(_pick, trees, params.keys())
    update = partial(_update, tx, scale, apply)
    hosted = [path for path in params if any(map(is_hosted, jax.tree.leaves(pick({path}))))]
    parts = [update(*pick(params.keys() - set(hosted)))]
    parts += [_update_slices(update, *pick({path})) for path in hosted]
    is_selection = lambda x: isinstance(x, dict) and x.keys() <= params.keys()
    unite = lambda first, *others: (
        {path: x for part in (first, *others) for path, x in part.items()}
        if is_selection(first)
        else first  # a counter, the same in all
    )
    return jax.tree.map(unite, *parts, is_leaf=is_selection)


def _update(
    tx: optax.GradientTransformation,
    scale: Array | None,
    apply: Array,
    grads: Params,
    state: Any,
    params: Params,
) -> tuple[Params, Any]:
    if scale is not None:
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with floats
        updates, new_state = tx.update(grads, state, params)
    new = cast("Params", optax.apply_updates(params, updates)), new_state
    return jax.tree.map(partial(jnp.where, apply), new, (params, state))


def _update_slices(
    update: Callable[[Params, Any, Params], tuple[Params, Any]],
    grads: Params,
    state: Any,
    params: Params,
) -> tuple[Params, Any]:
    """`update` of one parameter, by slices along its first axis."""
    (param,) = params.values()
    size = slice_size(param.shape)

    def body(index: Int[Array, ""], carry: tuple[Params, Any]) -> tuple[Params, Any]:
        at = lambda x: fetch(slice_at(x, index, size)) if x.ndim else x
        here = jax.tree.map(at, (grads, *carry))
        new = update(here[0], here[2], here[1])
        return jax.tree.map(lambda x, y: write_slice(x, y, index) if x.ndim else x, carry, new)

    return jax.lax.fori_loop(0, param.shape[0] // size, body, (params, state))


def _pick(trees: Any, names: Collection[str], wanted: Collection[str]) -> Any:
    """The entries of `wanted` parameters in every dict of parameters of the trees."""
    is_whole = lambda x: isinstance(x, dict) and x.keys() == names
    some = lambda x: {path: x[path] for path in x if path in wanted} if is_whole(x) else x
    return jax.tree.map(some, trees, is_leaf=is_whole)


def global_norm(grads: Params) -> Float[Array, ""]:
    """The Euclidean norm over all gradients."""

    def squares(grad: Array) -> Array:
        if not is_hosted(grad):
            return jnp.sum(grad**2)
        size = slice_size(grad.shape)
        add = lambda i, total: total + jnp.sum(fetch(slice_at(grad, i, size)) ** 2)
        return jax.lax.fori_loop(0, grad.shape[0] // size, add, jnp.zeros(()))

    return jnp.sqrt(sum(map(squares, grads.values()), jnp.zeros(())))

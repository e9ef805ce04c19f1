"""AdamW over parameter groups, each with its own learning rate."""

import math
from collections.abc import Callable, Collection, Hashable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from llava_jax.config import OptimizerConfig
from llava_jax.distributed.host_memory import fetch, is_hosted, slice_at, slice_size, write_slice
from llava_jax.models.layers import Params
from llava_jax.models.paths import is_adapter

Schedule = optax.Schedule
"""Number of steps done -> learning rate."""

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

GROUPS = ("lora", "llm", "vision", "projector")


def group_of(path: str) -> str:
    """The parameter group that decides a parameter's learning rate: one of GROUPS."""
    part = path.split(".", 1)[0]
    return "lora" if part == "llm" and is_adapter(path) else part


def learning_rates(config: OptimizerConfig, total_steps: int) -> dict[str, Schedule]:
    """Each group's learning rate as a function of the number of steps done."""
    peaks = dict.fromkeys(GROUPS, config.learning_rate)
    if config.projector_learning_rate is not None:
        peaks["projector"] = config.projector_learning_rate
    if config.vision_learning_rate is not None:
        peaks["vision"] = config.vision_learning_rate
    return {group: _schedule(config, peak, total_steps) for group, peak in peaks.items()}


def _schedule(config: OptimizerConfig, peak: float, total_steps: int) -> Schedule:
    """Linear warm-up from 0 over ceil(ratio * steps), then decay to 0 at the last step.

    As in Hugging Face's `get_cosine_schedule_with_warmup`, with which LLaVA was trained: the very
    first step has rate 0.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    shapes = {
        "cosine": lambda progress: 0.5 * (1 + jnp.cos(math.pi * progress)),
        "linear": lambda progress: 1 - progress,
        "constant": lambda progress: jnp.ones_like(progress),
    }

    def schedule(count: Int[ArrayLike, ""]) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        decayed = shapes[config.schedule](progress)
        return peak * jnp.where(count < warmup, count / max(warmup, 1), decayed)

    return schedule


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW with a learning rate for each group; it takes any subset of the parameters.

    Biases and norms do not decay, as in Hugging Face's Trainer.
    """
    decays = lambda params: {
        path: not (path.endswith(".bias") or "norm" in path.rsplit(".", 2)[-2]) for path in params
    }

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            rate,
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        )

    groups: dict[Hashable, optax.GradientTransformation] = {
        group: adamw(rate) for group, rate in learning_rates(config, total_steps).items()
    }
    return optax.multi_transform(groups, lambda params: {path: group_of(path) for path in params})


def clip_scale(norm: Float[Array, ""], limit: float | None) -> Float[Array, ""] | None:
    """Factor that reduces gradients of a global norm to at most `limit`; None for no limit."""
    return None if limit is None else jnp.minimum(1.0, limit / (norm + CLIP_EPS))


def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Params,
    scale: Float[Array, ""] | None,
    state: optax.OptState,
    params: Params,
    apply: Bool[Array, ""],
) -> tuple[Params, optax.OptState]:
    """Updates parameters and the optimizer's state; each array stays in its memory.

    Arrays in host memory are updated one after the other, slice by slice.

    Args:
        tx: An optimizer that treats every element by itself, and takes any subset of parameters.
        grads: Gradients.
        scale: Factor for the gradients; None leaves them as they are.
        state: State of the optimizer.
        params: Parameters that train.
        apply: Whether to apply the update; if not, everything stays as it is.
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
        else first  # a counter, which is the same in all
    )
    return jax.tree.map(unite, *parts, is_leaf=is_selection)


def _update(
    tx: optax.GradientTransformation,
    scale: Array | None,
    apply: Array,
    grads: Params,
    state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState]:
    if scale is not None:
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with floats
        updates, new_state = tx.update(grads, state, params)
    new = cast("Params", optax.apply_updates(params, updates)), new_state
    return jax.tree.map(partial(jnp.where, apply), new, (params, state))


def _update_slices(
    update: Callable[[Params, optax.OptState, Params], tuple[Params, optax.OptState]],
    grads: Params,
    state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState]:
    """`update` of one parameter, by slices along its first axis."""
    (param,) = params.values()
    size = slice_size(param.shape)

    def body(
        index: Int[Array, ""], carry: tuple[Params, optax.OptState]
    ) -> tuple[Params, optax.OptState]:
        at = lambda x: fetch(slice_at(x, index, size)) if x.ndim else x
        here = jax.tree.map(at, (grads, *carry))
        new = update(here[0], here[2], here[1])
        return jax.tree.map(lambda x, y: write_slice(x, y, index) if x.ndim else x, carry, new)

    return jax.lax.fori_loop(0, param.shape[0] // size, body, (params, state))


def _pick(trees: PyTree, names: Collection[str], wanted: Collection[str]) -> PyTree:
    """The trees with only the `wanted` parameters in each of their dicts of parameters."""
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

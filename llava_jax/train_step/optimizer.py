"""Builds AdamW with one learning rate per parameter group, and applies its updates."""

import math
from collections.abc import Callable, Collection, Hashable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PyTree

from llava_jax.config import OptimizerConfig
from llava_jax.distributed.host_memory import (
    count_pieces,
    fetch,
    is_hosted,
    loop_with_prefetch,
    piece_at,
    piece_of,
    slice_size,
    write_after,
    write_piece,
)
from llava_jax.models.layers import Params
from llava_jax.models.paths import is_adapter, is_stacked
from llava_jax.train_step.adamw_8bit import scale_by_adam_8bit
from llava_jax.train_step.rounding import stochastic_round

Schedule = optax.Schedule
"""Function that maps the number of steps done to the learning rate."""

CLIP_EPS = 1e-6  # the value of torch.nn.utils.clip_grad_norm_

GROUPS = ("lora", "llm", "vision", "projector")


def group_of(path: str) -> str:
    """Returns the group of a parameter, one of GROUPS, which determines its learning rate.

    Args:
        path: Dotted path of the parameter.
    """
    part = path.split(".", 1)[0]
    return "lora" if part == "llm" and is_adapter(path) else part


def learning_rates(config: OptimizerConfig, total_steps: int) -> dict[str, Schedule]:
    """Returns the learning-rate schedule of each parameter group.

    Args:
        config: Optimizer settings.
        total_steps: Number of optimizer steps of the whole run.
    """
    peaks = {group: getattr(config, config.rate_field(group)) for group in GROUPS}
    return {group: _schedule(config, peak, total_steps) for group, peak in peaks.items()}


def warmup_steps(config: OptimizerConfig, total_steps: int) -> int:
    """Returns the number of steps in which the learning rate rises: ceil(ratio * total_steps).

    Args:
        config: Optimizer settings.
        total_steps: Number of optimizer steps of the whole run.
    """
    return math.ceil(config.warmup_ratio * total_steps)


def _schedule(config: OptimizerConfig, peak: float, total_steps: int) -> Schedule:
    """Returns a schedule: linear warm-up from 0, then `config.schedule` until `total_steps`.

    The first step of a warm-up has rate 0, as in Hugging Face's `get_cosine_schedule_with_warmup`,
    which LLaVA was trained with.
    """
    warmup = warmup_steps(config, total_steps)
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
    """Returns AdamW with one learning rate per parameter group.

    The optimizer accepts every subset of the model's parameters. Biases and norm weights have no
    weight decay, as in Hugging Face's Trainer.

    Args:
        config: Optimizer settings.
        total_steps: Number of optimizer steps of the whole run, for the learning-rate schedules.
    """
    decays = lambda params: {
        path: not (path.endswith(".bias") or "norm" in path.rsplit(".", 2)[-2]) for path in params
    }
    scale_by_adam = optax.scale_by_adam
    if config.name == "adamw_8bit":
        count_axes = lambda path, _: int(is_stacked(path[0].key))
        stack_axes = partial(jax.tree_util.tree_map_with_path, count_axes)
        scale_by_adam = partial(scale_by_adam_8bit, stack_axes=stack_axes)

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_adam(config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(rate),
        )

    groups: dict[Hashable, optax.GradientTransformation] = {
        group: adamw(rate) for group, rate in learning_rates(config, total_steps).items()
    }
    return optax.multi_transform(groups, lambda params: {path: group_of(path) for path in params})


def clip_scale(norm: Float[Array, ""], limit: float | None) -> Float[Array, ""] | None:
    """Returns the factor that scales gradients down to a global norm of at most `limit`.

    Args:
        norm: Global norm of the gradients, float32 [].
        limit: Largest global norm; None turns clipping off.

    Returns:
        The factor, float32 [], at most 1; None if `limit` is None.
    """
    return None if limit is None else jnp.minimum(1.0, limit / (norm + CLIP_EPS))


@jax.named_scope("optimizer")
def apply_gradients(
    tx: optax.GradientTransformation,
    grads: Params,
    scale: Float[Array, ""] | None,
    state: optax.OptState,
    params: Params,
    apply: Bool[Array, ""],
    key: Key[Array, ""],
) -> tuple[Params, optax.OptState]:
    """Returns the updated parameters and optimizer state; arrays in host memory stay there.

    The update is computed in float32. Parameters in bfloat16 are rounded stochastically; see
    `rounding.py`. If a parameter, its gradient or one of its moments is in host memory, the
    parameter is updated slice by slice, so that only one slice at a time is on the device.

    Args:
        tx: Optimizer that updates each element independently of the others, and accepts every
            subset of the parameters.
        grads: Gradients by parameter path.
        scale: Factor for the gradients, float32 []; None does not scale the gradients.
        state: Optimizer state.
        params: Trainable parameters by path.
        apply: bool []. If False, parameters and moments are returned unchanged, and only the
            counters of the schedules increase. So the learning rate depends on the number of the
            step, and the bias correction of the moments on the number of applied updates.
        key: PRNG key of the step, for stochastic rounding.
    """
    trees = grads, state, params
    pick = partial(_pick, trees, params.keys())
    update = partial(_update, tx, scale, apply, key)
    hosted = [path for path in params if any(map(is_hosted, jax.tree.leaves(pick({path}))))]
    parts = [update(*pick(params.keys() - set(hosted)))]
    parts += [_update_slices(update, *pick({path})) for path in hosted]
    is_selection = lambda x: isinstance(x, dict) and x.keys() <= params.keys()
    # The parts are trees of equal structure, except that each dict of parameters contains only some
    # of the parameters. So the dicts are joined.
    unite = lambda first, *others: (
        {path: x for part in (first, *others) for path, x in part.items()}
        if is_selection(first)
        else first  # a counter, which only the first part has increased
    )
    return jax.tree.map(unite, *parts, is_leaf=is_selection)


def _update(
    tx: optax.GradientTransformation,
    scale: Array | None,
    apply: Array,
    key: Array,
    grads: Params,
    state: optax.OptState,
    params: Params,
    first_row: ArrayLike = 0,
) -> tuple[Params, optax.OptState]:
    """Returns the updated parameters and state; see `apply_gradients` for `apply` and `key`.

    The arrays may be pieces of a parameter; see `stochastic_round` for `first_row`.
    """
    widen = lambda x: x.astype(jnp.float32)
    grads, wide = jax.tree.map(widen, (grads, params))
    if scale is not None:
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counters with floats
        updates, new_state = tx.update(grads, state, wide)
    updated = cast("Params", optax.apply_updates(wide, updates))
    updated = {
        path: stochastic_round(x, params[path].dtype, key, path, first_row)
        for path, x in updated.items()
    }
    new = updated, new_state
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    # Without this exception, a skipped step would delay the schedule, and the learning rate would
    # not be the rate that the train step reports for the number of the step.
    choose = lambda new, old: new if is_schedule(new) else jnp.where(apply, new, old)
    return jax.tree.map(choose, new, (params, state), is_leaf=is_schedule)


def _update_slices(
    update: Callable[..., tuple[Params, optax.OptState]],
    grads: Params,
    state: optax.OptState,
    params: Params,
) -> tuple[Params, optax.OptState]:
    """Calls `update` for one parameter, piece by piece; counters stay unchanged."""
    (param,) = params.values()
    piece = _aligned_piece(param.shape, [x.shape for x in jax.tree.leaves(state) if x.ndim])
    rows = math.prod(piece[:-1])
    Carry = tuple[Params, optax.OptState]

    def load(index: Int[Array, ""], carry: Carry) -> tuple[Params, Params, optax.OptState]:
        take = lambda x: fetch(piece_at(x, index, _share(x.shape, param.shape, piece)))
        return jax.tree.map(lambda x: take(x) if x.ndim else x, (grads, *carry))

    def body(index: Int[Array, ""], here: tuple, ahead: tuple, carry: Carry) -> Carry:
        grad, param, moments = here
        new = write_after(ahead, update(grad, moments, param, index * rows))
        return jax.tree.map(lambda x, y: write_piece(x, y, index) if x.ndim else x, carry, new)

    count, parts = count_pieces(param.shape, piece), param.shape[1] // piece[1]
    return loop_with_prefetch(count, load, body, (params, state), parts)


def _aligned_piece(shape: tuple[int, ...], moments: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Returns the shape of the pieces in which a parameter is updated in host memory.

    The arrays of a moment of 8 bits may have fewer rows than the parameter, and no block may be
    divided.
    """
    choices = piece_of(shape), (slice_size(shape), *shape[1:]), shape
    is_aligned = lambda piece: all(
        n * rows % whole == 0
        for moment in moments
        for n, rows, whole in zip(piece[:2], moment, shape, strict=False)
    )
    return next(filter(is_aligned, choices))


def _share(own: tuple[int, ...], shape: tuple[int, ...], piece: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the part of an array that belongs to a piece of its parameter."""
    rows = [n * rows // whole for n, rows, whole in zip(piece[:2], own, shape, strict=False)]
    return *rows, *own[2:]


def _pick(trees: PyTree, names: Collection[str], wanted: Collection[str]) -> PyTree:
    """Returns the trees with only the `wanted` parameters in each dict of parameters.

    A dict of parameters is recognized by its keys, which are equal to `names`.
    """
    is_whole = lambda x: isinstance(x, dict) and x.keys() == names
    some = lambda x: {path: x[path] for path in x if path in wanted} if is_whole(x) else x
    return jax.tree.map(some, trees, is_leaf=is_whole)


def global_norm(grads: Params) -> Float[Array, ""]:
    """Returns the Euclidean norm over all gradients, float32 []."""

    widened = lambda x: x.astype(jnp.float32)

    def squares(grad: Array) -> Array:
        if not is_hosted(grad):
            return jnp.sum(widened(grad) ** 2)
        piece = slice_size(grad.shape), *grad.shape[1:]
        load = lambda index, _: fetch(piece_at(grad, index, piece))
        add = lambda _index, here, _ahead, total: total + jnp.sum(widened(here) ** 2)
        return loop_with_prefetch(count_pieces(grad.shape, piece), load, add, jnp.zeros(()))

    return jnp.sqrt(sum(map(squares, grads.values()), jnp.zeros(())))

"""AdamW over parameter groups, each with its own learning rate."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from llava_jax.config import OptimizerConfig
from llava_jax.models.lora import is_adapter

Schedule = Callable[[Any], Any]
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
    """AdamW with one learning rate a group; it takes any selection of the parameters.

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

    groups: dict[Any, Any] = {
        group: adamw(rate) for group, rate in learning_rates(config, total_steps).items()
    }
    return optax.multi_transform(groups, lambda params: {path: group_of(path) for path in params})


def clip_scale(norm: Float[Array, ""], limit: float | None) -> Float[Array, ""] | None:
    """What gradients of a global norm are multiplied by, so that it is at most `limit`."""
    return None if limit is None else jnp.minimum(1.0, limit / (norm + CLIP_EPS))

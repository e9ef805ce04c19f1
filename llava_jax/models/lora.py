"""Adds LoRA adapters (Hu et al., 2021) to a model and merges them, as PEFT does."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.config import LoraConfig, TuneConfig
from llava_jax.errors import ConfigError
from llava_jax.models.layers import Linear, parameter
from llava_jax.models.paths import LLM, VISION
from llava_jax.models.quant import Quantised
from llava_jax.models.stack import jit_for_backend


def adapter_configs(
    tune: TuneConfig, lora: LoraConfig, vision_lora: LoraConfig
) -> dict[str, LoraConfig]:
    """Returns the LoRA config of each stack that has adapters, by the path prefix of the stack.

    Args:
        tune: How each part of the model is tuned.
        lora: LoRA config of the decoder.
        vision_lora: LoRA config of the vision tower.

    Raises:
        ConfigError: The decoder is trained in full and the vision tower with adapters; no
            checkpoint format can contain both.
    """
    if (tune.llm, tune.vision) == ("full", "lora"):
        raise ConfigError(
            "tune.llm is 'full' and tune.vision is 'lora', but neither an adapter nor a full model "
            "can contain the result; set tune.vision to 'full' or 'frozen'"
        )
    wanted = {LLM: (tune.llm, lora), VISION: (tune.vision, vision_lora)}
    return {stack: config for stack, (tuning, config) in wanted.items() if tuning == "lora"}


def add_adapters(model: nnx.Module, adapters: dict[str, LoraConfig]) -> None:
    """Adds adapters to the targeted linear layers of `model`, as shapes without values.

    Args:
        model: Model that is changed in place.
        adapters: LoRA config of each stack that gets adapters, by the path prefix of the stack.

    Raises:
        ConfigError: The stack has no linear layer with the name of a target.
    """
    for stack, config in adapters.items():
        linears = {
            path: module
            for keys, module in nnx.iter_modules(model)
            if isinstance(module, Linear) and (path := ".".join(map(str, keys))).startswith(stack)
        }
        names = sorted({path.rsplit(".", 1)[-1] for path in linears})
        if unknown := sorted(set(config.targets) - set(names)):
            raise ConfigError(
                f"the LoRA targets contain {', '.join(unknown)}, but the linear layers in {stack}* "
                f"are {', '.join(names)}; change the targets"
            )
        for path, linear in linears.items():
            if (name := path.rsplit(".", 1)[-1]) in config.targets:
                _add_adapter(linear, config, names.index(name))


def _add_adapter(linear: Linear, config: LoraConfig, index: int) -> None:
    layers, outputs, inputs = linear.weight.get_value().shape
    linear.lora_a = parameter(layers, config.rank, inputs)
    linear.lora_b = parameter(layers, outputs, config.rank)
    linear.lora_scale = config.alpha / config.rank
    linear.lora_dropout = config.dropout
    linear.lora_index = index


@partial(jax.jit, static_argnames="scale")
def merge_layer(
    weight: Float[Array, "F D"], a: Float[Array, "R D"], b: Float[Array, "F R"], scale: float
) -> Float[Array, "F D"]:
    """Returns W + scale B A for one layer, computed in float32 and rounded to the dtype of W.

    Args:
        weight: W, [out, in].
        a: A, [rank, in].
        b: B, [out, rank].
        scale: Factor of the adapter.
    """
    low_rank = jnp.einsum("FR,RD->FD", b, a, precision="highest")
    return (jnp.asarray(weight, jnp.float32) + scale * low_rank).astype(weight.dtype)


@partial(jit_for_backend, static_argnums=3)
def _merge(
    weight: Float[Array, "L F D"], a: Float[Array, "L R D"], b: Float[Array, "L F R"], scale: float
) -> Float[Array, "L F D"]:
    layer = lambda parts: merge_layer(*parts, scale)
    return jax.lax.map(layer, (weight, a, b))  # one layer at a time is in float32


def merge_adapters(model: nnx.Module) -> None:
    """Merges each adapter into its weight, W + scale B A in float32, and removes the adapter.

    Args:
        model: Model that is changed in place.

    Raises:
        ValueError: The weight of an adapter is quantized.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.lora_a is not None and module.lora_b is not None:
            if isinstance(module.weight.get_value(), Quantised):
                raise ValueError(
                    "adapters cannot be merged into quantized weights; load unquantized weights"
                )
            weight, a, b = (p[...] for p in (module.weight, module.lora_a, module.lora_b))
            module.weight = nnx.Param(_merge(weight, a, b, module.lora_scale))
            module.lora_a = module.lora_b = nnx.data(None)

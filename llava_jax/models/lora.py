"""LoRA (Hu et al., 2021) as PEFT defines it: adding adapters to a model, and merging them."""

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
from llava_jax.models.stack import jit_loop


def adapter_configs(
    tune: TuneConfig, lora: LoraConfig, vision_lora: LoraConfig
) -> dict[str, LoraConfig]:
    """The LoRA of each stack that has it.

    Raises:
        ConfigError: One part has adapters and another trains in full, so that no form of checkpoint
            could hold both.
    """
    if (tune.llm, tune.vision) == ("full", "lora"):
        raise ConfigError(
            "tune.llm 'full' with tune.vision 'lora': neither an adapter nor a whole model could "
            "hold the result; set tune.vision to 'full' or 'frozen'"
        )
    wanted = {LLM: (tune.llm, lora), VISION: (tune.vision, vision_lora)}
    return {stack: config for stack, (tuning, config) in wanted.items() if tuning == "lora"}


def add_adapters(model: nnx.Module, adapters: dict[str, LoraConfig]) -> None:
    """Adds adapters to the targeted linear layers of `model`, as shapes.

    Raises:
        ConfigError: A target is not the name of a linear layer of the stack.
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
                f"the targets of LoRA name {', '.join(unknown)}, which {stack}* does not have; "
                f"it has {', '.join(names)}"
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
    """W + scale B A, computed in float32 and returned in the dtype of W."""
    low_rank = jnp.einsum("FR,RD->FD", b, a, precision="highest")
    return (jnp.asarray(weight, jnp.float32) + scale * low_rank).astype(weight.dtype)


@partial(jit_loop, static_argnums=3)
def _merge(
    weight: Float[Array, "L F D"], a: Float[Array, "L R D"], b: Float[Array, "L F R"], scale: float
) -> Float[Array, "L F D"]:
    layer = lambda parts: merge_layer(*parts, scale)
    return jax.lax.map(layer, (weight, a, b))  # only one layer at a time is in float32


def merge_adapters(model: nnx.Module) -> None:
    """Folds each adapter into its weight, W + scale B A in float32, and removes it.

    Raises:
        ValueError: A weight is quantised.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Linear) and module.lora_a is not None and module.lora_b is not None:
            if isinstance(module.weight.get_value(), Quantised):
                raise ValueError(
                    "adapters cannot be merged into quantised weights; load them whole"
                )
            weight, a, b = (p[...] for p in (module.weight, module.lora_a, module.lora_b))
            module.weight = nnx.Param(_merge(weight, a, b, module.lora_scale))
            module.lora_a = module.lora_b = nnx.data(None)

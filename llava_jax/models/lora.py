"""Adds LoRA adapters (Hu et al., 2021) to a model and merges them, as PEFT does."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llava_jax.config import ModelConfig
from llava_jax.models import paths
from llava_jax.models.layers import Abstract, Adapter, Embedding, Linear, parameter
from llava_jax.models.llava import Llava
from llava_jax.models.paths import LLM, PROJECTOR, VISION
from llava_jax.models.quant import Quantised
from llava_jax.models.stack import jit_for_backend


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Trained rows of the embedding or of the output matrix, PEFT's trainable_token_indices.

    Attributes:
        indices: Ids of the tokens, in the order of the rows in `trainable_tokens`.
    """

    indices: tuple[int, ...]


Adapters = Mapping[str, Adapter | TokenRows]
"""Adapters by the path of the module, for example `llm.layers.self_attn.q_proj`."""


@functools.cache
def linear_layers(config: ModelConfig) -> Mapping[str, int]:
    """Returns the number of layers of each linear layer that can have adapters, by its path.

    A linear layer outside the stacks counts as one layer. Vision layers after the feature layer are
    left out, because the output of the model does not depend on them.
    """
    found = {}
    for keys, module in nnx.iter_modules(Llava(config)):
        path = ".".join(map(str, keys))
        if isinstance(module, Linear) and path.startswith((LLM, VISION, PROJECTOR)):
            shape = module.weight.get_value().shape
            found[path] = shape[0] if len(shape) == 3 else 1
    return found


def layers_of(path: str, count: int, config: ModelConfig) -> list[str]:
    """Returns the path of each layer of a linear layer that has `count` layers."""
    return [name for name, _ in paths.layers(path, (count,), config)]


def last_name(path: str) -> str:
    """Returns the name of a module without those of the modules around it."""
    return path.rsplit(".", 1)[-1]


def add_adapters(model: nnx.Module, adapters: Adapters) -> None:
    """Adds adapters to modules of `model`, as shapes without values.

    Args:
        model: Model that is changed in place.
        adapters: Adapters by the path of their module.
    """
    modules = {".".join(map(str, keys)): module for keys, module in nnx.iter_modules(model)}
    for path, adapter in adapters.items():
        module = modules[path]
        if isinstance(module, Linear) and isinstance(adapter, Adapter):
            # Each linear layer of a block has another index, for its own dropout mask.
            part = next(part for part in (LLM, VISION, PROJECTOR) if path.startswith(part))
            beside = [p for p, m in modules.items() if isinstance(m, Linear) and p.startswith(part)]
            _add_adapter(module, adapter, sorted(map(last_name, beside)).index(last_name(path)))
        elif isinstance(module, Embedding) and isinstance(adapter, TokenRows):
            width = module.weight.get_value().shape[1]
            module.trainable_tokens = parameter(len(adapter.indices), width)
            module.token_indices = adapter.indices


def _add_adapter(linear: Linear, adapter: Adapter, index: int) -> None:
    *layers, outputs, inputs = linear.weight.get_value().shape
    rank = max(adapter.ranks)
    linear.lora_a = parameter(*layers, rank, inputs)
    linear.lora_b = parameter(*layers, outputs, rank)
    linear.adapter, linear.lora_index = adapter, index


def adapters_in(model: nnx.Module) -> dict[str, Adapter | TokenRows]:
    """Returns the adapters of a model by the path of their module, as `add_adapters` takes them."""
    found: dict[str, Adapter | TokenRows] = {}
    for keys, module in nnx.iter_modules(model):
        path = ".".join(map(str, keys))
        if isinstance(module, Linear) and module.adapter is not None:
            found[path] = module.adapter
        elif isinstance(module, Embedding) and module.trainable_tokens is not None:
            found[path] = TokenRows(module.token_indices)
    return found


def stored_layers(
    path: str, shape: tuple[int, ...], config: ModelConfig, adapters: Adapters
) -> Iterator[tuple[int, str, tuple[int, ...]]]:
    """Yields the index, the path and the shape of each layer that a file has of a parameter.

    Files have only the layers of an adapter whose rank is not 0, each with its own rank.

    Args:
        path: Path of the parameter.
        shape: Shape of the parameter, with the largest rank.
        config: Sizes of the model.
        adapters: Adapters of the model.
    """
    adapter = adapters.get(path.rpartition(".")[0])
    axis = -2 if path.endswith(".lora_a") else -1
    for index, (name, full) in enumerate(paths.layers(path, shape, config)):
        own = list(full)
        if isinstance(adapter, Adapter) and paths.is_adapter(path):
            own[axis] = adapter.ranks[index]
        if all(own):
            yield index, name, tuple(own)


def count_values(abstract: Abstract, config: ModelConfig, adapters: Adapters) -> int:
    """Returns the number of values of parameters, without the zeros beyond an adapter's rank.

    Args:
        abstract: Arrays or shapes of the parameters, by path.
        config: Sizes of the model.
        adapters: Adapters of the model.
    """
    return sum(
        math.prod(shape)
        for path, leaf in abstract.items()
        for _, _, shape in stored_layers(path, leaf.shape, config, adapters)
    )


def without_padding(values: np.ndarray, path: str, adapters: Adapters) -> np.ndarray:
    """Returns values of `lora_a` in which the rows beyond the rank of each layer are zero.

    Args:
        values: Values of the parameter, [layers, rank, inputs] or [rank, inputs].
        path: Path of the parameter; the values of other parameters are returned unchanged.
        adapters: Adapters of the model.
    """
    adapter = adapters.get(path.removesuffix(".lora_a"))
    if not isinstance(adapter, Adapter) or not path.endswith(".lora_a"):
        return values
    ranks = np.array(adapter.ranks)[:, None, None]
    kept = np.arange(values.shape[-2])[None, :, None] < ranks
    return np.where(kept if values.ndim == 3 else kept[0], values, 0).astype(values.dtype)


def describe(adapters: Adapters) -> list[str]:
    """Returns a text for each part that has adapters, with the ranks and the alphas."""
    texts = []
    for part in (LLM, VISION, PROJECTOR):
        found = [x for path, x in adapters.items() if path.startswith(part)]
        linears = [x for x in found if isinstance(x, Adapter)]
        ranks, alphas = sorted({r for x in linears for r in x.ranks if r}), given_alphas(linears)
        if ranks:
            rank = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            alpha = f"alpha{'s' * (len(alphas) > 1)} {', '.join(f'{x:g}' for x in alphas)}"
            rs = " (rsLoRA)" * any(x.use_rslora for x in linears)
            texts.append(f"adapters with {rank} and {alpha}{rs} in {part}*")
    for path, rows in adapters.items():
        if isinstance(rows, TokenRows):
            texts.append(f"the vectors of {len(rows.indices)} tokens in {path}")
    return texts


def given_alphas(adapters: Iterable[Adapter]) -> list[float]:
    """Returns the alphas of the layers that have adapters, as the user gave them, also for rsLoRA.

    Args:
        adapters: Adapters of some modules.
    """
    pairs = (pair for x in adapters for pair in zip(x.ranks, x.alphas, strict=True))
    return sorted({alpha for rank, alpha in pairs if rank})


@partial(jax.jit, static_argnames="dtype")
def merge_layer(
    weight: Float[Array, "F D"],
    a: Float[Array, "R D"],
    b: Float[Array, "F R"],
    scale: float | Float[Array, ""],
    dtype: DTypeLike | None = None,
) -> Float[Array, "F D"]:
    """Returns W + scale B A for one layer, computed in float32.

    Args:
        weight: W, [out, in].
        a: A, [rank, in].
        b: B, [out, rank].
        scale: Factor of the adapter.
        dtype: Dtype of the result; None means the dtype of W.
    """
    low_rank = jnp.einsum("FR,RD->FD", b, a, precision="highest")
    return (jnp.asarray(weight, jnp.float32) + scale * low_rank).astype(dtype or weight.dtype)


@jit_for_backend
def _merge(
    weight: Float[Array, "L F D"],
    a: Float[Array, "L R D"],
    b: Float[Array, "L F R"],
    scales: Float[Array, " L"],
) -> Float[Array, "L F D"]:
    # one layer at a time is in float32
    return jax.lax.map(lambda layer: merge_layer(*layer), (weight, a, b, scales))


def merge_adapters(model: nnx.Module) -> None:
    """Merges each adapter into its weight, W + scale B A in float32, and removes the adapter.

    Args:
        model: Model that is changed in place.

    Raises:
        ValueError: The weight of an adapter is quantized. The model is not changed then.
    """
    modules = [module for _, module in nnx.iter_modules(model)]
    adapted = [m for m in modules if isinstance(m, Linear) and m.adapter is not None]
    if any(isinstance(module.weight.get_value(), Quantised) for module in adapted):
        raise ValueError(
            "adapters cannot be merged into quantized weights; load unquantized weights"
        )
    for module in adapted:
        assert module.adapter is not None
        assert module.lora_a is not None
        assert module.lora_b is not None
        weight, a, b = (p[...] for p in (module.weight, module.lora_a, module.lora_b))
        scales = module.adapter.scales
        if weight.ndim == 3:
            weight = _merge(weight, a, b, np.array(scales, np.float32))
        else:
            weight = merge_layer(weight, a, b, scales[0])
        module.weight = nnx.Param(weight)
        module.lora_a, module.lora_b = nnx.data(None), nnx.data(None)
        module.adapter, module.lora_index = None, 0
    for module in modules:
        if isinstance(module, Embedding) and module.trainable_tokens is not None:
            module.weight = nnx.Param(module.matrix)
            module.trainable_tokens, module.token_indices = nnx.data(None), ()

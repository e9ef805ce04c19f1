"""Adds LoRA adapters (Hu et al., 2021) to a model and merges them, as PEFT does."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llava_jax.config import ALL_LINEAR, LoraConfig, ModelConfig, TuneConfig
from llava_jax.errors import ConfigError
from llava_jax.models import paths
from llava_jax.models.layers import Abstract, Adapter, Embedding, Linear, parameter
from llava_jax.models.llava import Llava
from llava_jax.models.paths import EMBEDDING, LLM, PROJECTOR, VISION
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


def adapter_configs(
    tune: TuneConfig, lora: LoraConfig, vision_lora: LoraConfig
) -> dict[str, LoraConfig]:
    """Returns the LoRA config of each part that has adapters, by the path prefix of its layers.

    Args:
        tune: How each part of the model is tuned.
        lora: LoRA config of the decoder and of the projector.
        vision_lora: LoRA config of the vision tower.

    Raises:
        ConfigError: The fields contradict each other, or no checkpoint format can store the result.
    """
    if tune.llm == "full" and tune.has_adapters:
        part = "vision" if tune.vision == "lora" else "projector"
        raise ConfigError(
            f"tune.llm is 'full' and tune.{part} is 'lora', but neither an adapter nor a full "
            f"model can contain the result; set tune.{part} to 'full' or 'frozen'"
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(vision_lora, name):
            raise ConfigError(
                f"vision_lora.{name}: the vision tower has no tokens; set lora.{name} instead"
            )
        if getattr(lora, name) and tune.llm != "lora":
            raise ConfigError(
                f"lora.{name} has an effect only beside the decoder's adapters, but tune.llm is "
                f"{tune.llm!r}; set tune.llm to 'lora', or leave lora.{name} out"
            )
    wanted = {LLM: (tune.llm, lora), VISION: (tune.vision, vision_lora)}
    wanted[PROJECTOR] = (tune.projector, lora)
    return {part: config for part, (tuning, config) in wanted.items() if tuning == "lora"}


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


def expand(configs: Mapping[str, LoraConfig], model: ModelConfig) -> dict[str, Adapter | TokenRows]:
    """Returns the adapter of each module, given the LoRA config of each part.

    Args:
        configs: LoRA config of each part that has adapters, as `adapter_configs` returns them.
        model: Sizes of the model.

    Raises:
        ConfigError: A field does not fit the model: a target, a pattern, the index of a layer, a
            module or the id of a token does not exist.
    """
    found: dict[str, Adapter | TokenRows] = {}
    used: set[tuple[str, str | None]] = set()
    for part, config in configs.items():
        linears = {p: n for p, n in linear_layers(model).items() if p.startswith(part)}
        if part != PROJECTOR:  # the projector has no blocks, and all its layers are targets
            _check_targets(part, config, linears)
            linears = {p: n for p, n in linears.items() if config.has_target(_last(p))}
        owner = "vision_lora" if part == VISION else "lora"
        for path, count in linears.items():
            found[path], keys = _expand_one(path, count, config, model)
            used |= {(owner, key) for key in keys}
        if part == LLM:
            _check_vocabulary(config, model)
            if config.trainable_token_indices:
                path = EMBEDDING.removesuffix(".weight")
                found[path] = TokenRows(config.trainable_token_indices)
    for part, config in configs.items():
        owner = "vision_lora" if part == VISION else "lora"
        for key in (*config.rank_pattern, *config.alpha_pattern):
            if (owner, key) not in used:
                example = next(path for path in found if path.startswith(part))
                name = paths.module_name(layers_of(example, 1, model)[0])
                raise ConfigError(
                    f"{owner}.rank_pattern or {owner}.alpha_pattern has {key!r}, which matches no "
                    f"module with an adapter; the name of a module is, for example, {name}"
                )
    return found


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _check_targets(part: str, config: LoraConfig, linears: Mapping[str, int]) -> None:
    """Raises ConfigError if a target or the index of a layer does not exist."""
    names = sorted(map(_last, linears))
    if unknown := sorted({*config.targets} - {*names, ALL_LINEAR}):
        raise ConfigError(
            f"the LoRA targets contain {', '.join(unknown)}, but the linear layers in {part}* "
            f"are {', '.join(names)}; change the targets"
        )
    if ALL_LINEAR in config.targets and len(config.targets) > 1:
        raise ConfigError(
            f"the LoRA targets contain {ALL_LINEAR} and other names; give {ALL_LINEAR} alone"
        )
    layers, count = config.layers_to_transform, max(linears.values())
    if layers is not None and (not layers or max(layers) >= count):
        raise ConfigError(
            f"layers_to_transform is {list(layers)}, but {part}* has the layers 0 to {count - 1}; "
            "give indices of these layers, or None for all layers"
        )


def _check_vocabulary(config: LoraConfig, model: ModelConfig) -> None:
    """Raises ConfigError if `modules_to_save` or `trainable_token_indices` do not fit the model."""
    tokens, size = config.trainable_token_indices, model.llm.vocab_size
    if len({*tokens}) < len(tokens) or max(tokens, default=0) >= size:
        raise ConfigError(
            f"lora.trainable_token_indices {list(tokens)}: the ids must be different, and less "
            f"than {size}, the size of the model's vocabulary"
        )
    if tokens and "embed_tokens" in config.modules_to_save:
        raise ConfigError(
            "lora.trainable_token_indices trains rows of the embedding, but lora.modules_to_save "
            "trains the whole embedding; leave one of them out"
        )
    if model.llm.tie_word_embeddings and "lm_head" in config.modules_to_save:
        raise ConfigError(
            "lora.modules_to_save contains lm_head, but this model uses its embedding as the "
            "output matrix; name embed_tokens instead"
        )


def _expand_one(
    path: str, count: int, config: LoraConfig, model: ModelConfig
) -> tuple[Adapter, set[str | None]]:
    """Returns the adapter of a linear layer, and the patterns that matched the names of layers."""
    chosen = config.layers_to_transform
    ranks, alphas, used = [], [], set()
    for index, layer in enumerate(layers_of(path, count, model)):
        is_chosen = chosen is None or path.startswith(PROJECTOR) or index in chosen
        name = paths.module_name(layer) if is_chosen else ""
        rank_key, alpha_key = (
            _match(patterns, name) for patterns in (config.rank_pattern, config.alpha_pattern)
        )
        used |= {rank_key, alpha_key}
        rank = config.rank if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        ranks.append(rank if is_chosen else 0)
        alphas.append(float(alpha))
    return Adapter(tuple(ranks), tuple(alphas), config.dropout, config.use_rslora), used


def _match(patterns: Mapping[str, object], name: str) -> str | None:
    """Returns the first pattern that matches the end of a module's name, by PEFT's rule."""
    try:
        return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
    except re.error as error:
        raise ConfigError(
            f"rank_pattern or alpha_pattern: {error.pattern!r} is not a regular expression: {error}"
        ) from error


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
            _add_adapter(module, adapter, sorted(map(_last, beside)).index(_last(path)))
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

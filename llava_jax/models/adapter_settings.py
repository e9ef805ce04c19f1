"""Finds out which modules get which adapters, given the LoRA configs of a run."""

import re
from collections.abc import Mapping

from llava_jax.config import ALL_LINEAR, LoraConfig, ModelConfig, TuneConfig
from llava_jax.errors import ConfigError
from llava_jax.models import paths
from llava_jax.models.lora import Adapter, TokenRows, last_name, layers_of, linear_layers
from llava_jax.models.paths import EMBEDDING, LLM, PROJECTOR, VISION


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
            linears = {p: n for p, n in linears.items() if config.has_target(last_name(p))}
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


def _check_targets(part: str, config: LoraConfig, linears: Mapping[str, int]) -> None:
    """Raises ConfigError if a target or the index of a layer does not exist."""
    names = sorted(map(last_name, linears))
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

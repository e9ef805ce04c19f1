"""Classifies parameters by path, and converts paths between stacked parameters and layers."""

import re
from collections.abc import Collection

from llava_jax.config import ModelConfig, TuneConfig


def is_stacked(path: str) -> bool:
    """Returns True if the parameter at `path` is stacked, that is, has a leading layer axis."""
    return re.search(r"\.(layers|tail)\.", path) is not None


def unstacked(path: str, layer: int, config: ModelConfig) -> str:
    """Returns the path of one layer of a stacked parameter.

    For example, layer 3 of `llm.layers.mlp.up_proj.weight` has the path
    `llm.layers.3.mlp.up_proj.weight`. Layers of the vision tail are numbered from
    `config.used_vision_layers`, because the tail follows the used layers.
    """
    stack = "tail" if ".tail." in path else "layers"
    if stack == "tail":
        layer += config.used_vision_layers
    return path.replace(f".{stack}.", f".layers.{layer}.", 1)


def layers(
    path: str, shape: tuple[int, ...], config: ModelConfig
) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the path and the shape of each layer of a parameter.

    For a parameter that is not stacked, the list contains only its own path and shape.
    """
    if not is_stacked(path):
        return [(path, shape)]
    return [(unstacked(path, index, config), shape[1:]) for index in range(shape[0])]


def stacked(parameter: str, config: ModelConfig) -> str:
    """Returns the path of the stacked parameter that contains the layer at the path `parameter`.

    This is the inverse of `unstacked`. A path without a layer number is returned unchanged.
    """
    match = re.search(r"\.layers\.(0|[1-9][0-9]{,3})\.", parameter)
    if match is None:
        return parameter
    is_tail = parameter.startswith("vision.") and int(match[1]) >= config.used_vision_layers
    return parameter.replace(match[0], ".tail." if is_tail else ".layers.", 1)


VISION, LLM, PROJECTOR = "vision.encoder.layers.", "llm.layers.", "projector."
"""Path prefixes of the linear layers to which adapters can be added."""

NEWLINE = "llm.image_newline"
"""Path of the vector that ends the rows of an image's features."""

MODULE_PREFIXES = {
    "llm.": "model.language_model.",
    "llm.lm_head.": "lm_head.",
    NEWLINE: "model.image_newline",
    "vision.": "model.vision_tower.",
    "projector.": "model.multi_modal_projector.",
}
"""Prefixes of the module names in transformers 5, by the prefix of the path."""


def module_name(path: str) -> str:
    """Returns the name that a module has in transformers 5, for a path with a layer index."""
    ours = max((prefix for prefix in MODULE_PREFIXES if path.startswith(prefix)), key=len)
    return MODULE_PREFIXES[ours] + path.removeprefix(ours)


BEHIND_FEATURE = ("vision.encoder.tail.", "vision.post_layernorm.", "vision.head.")
"""Path prefixes of the vision parameters after the feature layer. These parameters are never
trained, because the output of the model does not depend on them."""


TRAINABLE_TOKENS = ".trainable_tokens"
"""End of the paths of trained rows of the embedding or of the output matrix."""


def is_adapter(path: str) -> bool:
    """Returns True if the parameter at `path` belongs to an adapter and not to the base model."""
    return path.endswith((".lora_a", ".lora_b", TRAINABLE_TOKENS))


def is_projector(path: str) -> bool:
    """Returns True if the parameter at `path` belongs to the projector and not to its adapters."""
    return path.startswith(PROJECTOR) and not is_adapter(path)


def is_trainable(path: str, tune: TuneConfig, modules_to_save: Collection[str] = ()) -> bool:
    """Returns True if a parameter is trained.

    Args:
        path: Path of the parameter.
        tune: How each part of the model is trained.
        modules_to_save: Parts of the decoder that are trained in full beside adapters, as in
            `LoraConfig`.
    """
    if is_adapter(path):
        return True
    if path.startswith(BEHIND_FEATURE):
        return False
    part, module = path.split(".")[:2]
    return getattr(tune, part) == "full" or (part == "llm" and module in modules_to_save)


EMBEDDING, HEAD = VOCABULARY = ("llm.embed_tokens.weight", "llm.lm_head.weight")
"""Paths of the decoder's embedding and of its output matrix; a decoder with tied embeddings has no
output matrix."""

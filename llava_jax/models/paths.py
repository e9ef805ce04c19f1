"""Classifies parameters by path, and converts paths between stacked parameters and layers."""

import re

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


VISION, LLM = "vision.encoder.layers.", "llm.layers."
"""Path prefixes of the two stacks of layers to which adapters can be added."""


BEHIND_FEATURE = ("vision.encoder.tail.", "vision.post_layernorm.", "vision.head.")
"""Path prefixes of the vision parameters after the feature layer. These parameters are never
trained, because the output of the model does not depend on them."""


def is_adapter(path: str) -> bool:
    """Returns True if the parameter at `path` belongs to a LoRA adapter."""
    return path.endswith((".lora_a", ".lora_b"))


def is_trainable(path: str, tune: TuneConfig) -> bool:
    """Returns True if the parameter at `path` is trained with the settings `tune`."""
    if is_adapter(path):
        return True
    if path.startswith(BEHIND_FEATURE):
        return False
    return getattr(tune, path.split(".", 1)[0]) == "full"


HEAD = "llm.lm_head.weight"
"""Path of the decoder's output matrix; a decoder with tied embeddings has no such parameter."""

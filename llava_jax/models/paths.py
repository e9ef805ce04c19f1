"""What the path of a parameter says: whether it is stacked, its part, whether it trains."""

import re

from llava_jax.config import ModelConfig, TuneConfig


def is_stacked(path: str) -> bool:
    """Whether a parameter has a leading layer axis."""
    return re.search(r"\.(layers|tail)\.", path) is not None


def unstacked(path: str, layer: int, config: ModelConfig) -> str:
    """Our name of one layer of a stacked parameter.

    For example `llm.layers.mlp.up_proj.weight`, 3 -> `llm.layers.3.mlp.up_proj.weight`; the vision
    tail counts on from where the layers before it stop.
    """
    stack = "tail" if ".tail." in path else "layers"
    if stack == "tail":
        layer += config.used_vision_layers
    return path.replace(f".{stack}.", f".layers.{layer}.", 1)


def layers(
    path: str, shape: tuple[int, ...], config: ModelConfig
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each layer of a parameter, or of the one that is not stacked."""
    if not is_stacked(path):
        return [(path, shape)]
    return [(unstacked(path, index, config), shape[1:]) for index in range(shape[0])]


def stacked(parameter: str, config: ModelConfig) -> str:
    """The path of the parameter that `unstacked` took this layer from."""
    match = re.search(r"\.layers\.(0|[1-9][0-9]{,3})\.", parameter)
    if match is None:
        return parameter
    is_tail = parameter.startswith("vision.") and int(match[1]) >= config.used_vision_layers
    return parameter.replace(match[0], ".tail." if is_tail else ".layers.", 1)


VISION, LLM = "vision.encoder.layers.", "llm.layers."
"""The stacks that adapters go into."""


BEHIND_FEATURE = ("vision.encoder.tail.", "vision.post_layernorm.", "vision.head.")
"""Parameters on which no output depends, so that they never train."""


def is_adapter(path: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return path.endswith((".lora_a", ".lora_b"))


def is_trainable(path: str, tune: TuneConfig) -> bool:
    """Whether a parameter trains."""
    if is_adapter(path):
        return True
    if path.startswith(BEHIND_FEATURE):
        return False
    return getattr(tune, path.split(".", 1)[0]) == "full"


HEAD = "llm.lm_head.weight"
"""The output matrix of the decoder."""

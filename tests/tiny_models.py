"""Configs of models whose images take a wanted number of tokens."""

import math

from llava_jax.config import ModelConfig, VisionConfig
from llava_jax.data.tiles import Sources, image_sources


def model_of(image_token_id: int, image_tokens: int, **fields) -> ModelConfig:
    """A model whose images take so many tokens: a square number, or one less or more."""
    for offset, kind, strategy in (
        (0, "clip_vision_model", "default"),
        (1, "clip_vision_model", "full"),
        (-1, "siglip_vision_model", "default"),
    ):
        side = math.isqrt(image_tokens - offset)
        if side**2 == image_tokens - offset:
            tower = VisionConfig(image_size=2 * side, patch_size=2, model_type=kind)
            fields |= {"image_token_id": image_token_id}
            return ModelConfig(tower, vision_feature_select_strategy=strategy, **fields)
    raise ValueError(image_tokens)


def whole(config: ModelConfig, images: int) -> list[Sources]:
    """The features of so many images that are not cut into tiles."""
    return [image_sources(config, None)] * images

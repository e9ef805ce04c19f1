"""The sizes of a model, with the field names of Hugging Face's configs."""

import dataclasses
from typing import Literal

from llava_jax.errors import ConfigError

LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, CLIP's or SigLIP's. Field names are those of Hugging Face's configs.

    Attributes:
        vision_use_head: Whether there is SigLIP's pooling head. It is kept but never computed.
    """

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: Literal["clip_vision_model", "siglip_vision_model"] = "clip_vision_model"
    vision_use_head: bool = False

    @property
    def has_class_token(self) -> bool:
        return self.model_type == "clip_vision_model"

    @property
    def num_patches(self) -> int:
        """Patches of an image; pixels left over at its right and its bottom are in none."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Number of patches, plus one if there is a class token."""
        return self.num_patches + self.has_class_token


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency scaling. Field names are those of Hugging Face's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlmConfig:
    """A LLaMA, Mistral or Qwen2 decoder. Field names are those of Hugging Face's configs.

    Attributes:
        sliding_window: Number of tokens that a token of Mistral sees, itself included. Longer
            sequences are refused. None is no limit.
    """

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    model_type: Literal["llama", "mistral", "qwen2"] = "llama"
    sliding_window: int | None = None

    @property
    def has_qkv_bias(self) -> bool:
        return self.model_type == "qwen2"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaVA: vision tower, two-layer projector, decoder."""

    vision: VisionConfig = VisionConfig()
    llm: LlmConfig = LlmConfig()
    image_token_id: int = 32000
    pad_token_id: int = 32001
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_hidden_act: str = "gelu"

    @property
    def used_vision_layers(self) -> int:
        """Number of vision blocks before the feature, hidden_states[vision_feature_layer].

        Raises:
            ConfigError: The tower has no such hidden state.
        """
        layer, depth = self.vision_feature_layer, self.vision.num_hidden_layers
        used = layer if layer >= 0 else depth + 1 + layer
        if not 0 < used <= depth:
            raise ConfigError(f"vision_feature_layer {layer} of a vision tower with {depth} layers")
        return used

    @property
    def image_tokens(self) -> int:
        """Number of tokens that one image takes in the sequence.

        "default" drops the first position, as Hugging Face does: CLIP's class token, but SigLIP's
        first patch.
        """
        return self.vision.num_positions - (self.vision_feature_select_strategy == "default")


LLAVA_7B = ModelConfig()


LLAVA_13B = ModelConfig(
    llm=LlmConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    )
)


# The decoder of Llama-3-8B. Its vocabulary is larger by the image token and a padding token.
LLAVA_LLAMA3_8B = ModelConfig(
    llm=LlmConfig(
        vocab_size=128_320,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    image_token_id=128_256,
    pad_token_id=128_257,
)

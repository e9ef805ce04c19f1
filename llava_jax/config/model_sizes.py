"""Defines the sizes of published models, as in the config.json of their Hugging Face versions.

Sources: LLaVA-1.5 (Liu et al., 2023), LLaVA-NeXT, also called LLaVA-1.6 (Liu et al., 2024),
LLaVA-NeXT-Video (Zhang et al., 2024) and LLaVA-OneVision (Li et al., 2024). The vocabularies are
those of the decoders, extended by the new tokens to a multiple of 64 rows.
"""

import dataclasses

from llava_jax.config.model import (
    LlmConfig,
    ModelConfig,
    TilingConfig,
    VideoConfig,
    VisionConfig,
)

SIGLIP = VisionConfig(
    image_size=384,
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=26,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    model_type="siglip_vision_model",
)
"""SigLIP so400m, without its last block and its pooling head, which OneVision does not use."""

NEXT_TILING = TilingConfig(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))

_ONEVISION_SIDES = range(384, 2305, 384)
ONEVISION_TILING = TilingConfig(
    tuple((height, width) for height in _ONEVISION_SIDES for width in _ONEVISION_SIDES),
    max_tiles=9,
    tiles_several_images=False,
)

_VICUNA_7B = LlmConfig()
_VICUNA_13B = LlmConfig(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)
_MISTRAL_7B = LlmConfig(
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rope_theta=1_000_000.0,
    model_type="mistral",
)
_LLAMA3_8B = LlmConfig(
    vocab_size=128_320,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
)
_YI_34B = LlmConfig(
    vocab_size=64064,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    rope_theta=5_000_000.0,
)
_QWEN2_0_5B = LlmConfig(
    vocab_size=152_000,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    tie_word_embeddings=True,
    model_type="qwen2",
)
_QWEN2_7B = LlmConfig(
    vocab_size=152_128,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    model_type="qwen2",
)
_QWEN2_72B = dataclasses.replace(
    _QWEN2_7B,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
# Its vocabulary has unused rows for the new tokens.
_QWEN1_5_72B = dataclasses.replace(
    _QWEN2_72B, vocab_size=152_064, intermediate_size=24576, num_key_value_heads=64
)

LLAVA_7B = ModelConfig()
LLAVA_13B = ModelConfig(llm=_VICUNA_13B)
LLAVA_LLAMA3_8B = ModelConfig(llm=_LLAMA3_8B, image_token_id=128_256, pad_token_id=128_257)

LLAVA_NEXT_7B = ModelConfig(llm=_VICUNA_7B, tiling=NEXT_TILING)
LLAVA_NEXT_13B = ModelConfig(llm=_VICUNA_13B, tiling=NEXT_TILING)
LLAVA_NEXT_MISTRAL_7B = ModelConfig(llm=_MISTRAL_7B, tiling=NEXT_TILING)
LLAVA_NEXT_LLAMA3_8B = ModelConfig(
    llm=_LLAMA3_8B, image_token_id=128_256, pad_token_id=128_257, tiling=NEXT_TILING
)
LLAVA_NEXT_34B = ModelConfig(llm=_YI_34B, image_token_id=64000, pad_token_id=0, tiling=NEXT_TILING)
LLAVA_NEXT_72B = ModelConfig(
    llm=_QWEN1_5_72B, image_token_id=151_646, pad_token_id=151_643, tiling=NEXT_TILING
)
LLAVA_NEXT_VIDEO_7B = ModelConfig(
    llm=_VICUNA_7B,
    image_token_id=32001,
    pad_token_id=0,
    tiling=NEXT_TILING,
    video=VideoConfig(token_id=32000, pooling="average"),
)


def _onevision(llm: LlmConfig) -> ModelConfig:
    return ModelConfig(
        vision=SIGLIP,
        llm=llm,
        image_token_id=151_646,
        pad_token_id=151_643,
        tiling=ONEVISION_TILING,
        video=VideoConfig(token_id=151_647, pooling="bilinear"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


ONEVISION_0_5B = _onevision(_QWEN2_0_5B)
ONEVISION_7B = _onevision(_QWEN2_7B)
ONEVISION_72B = _onevision(_QWEN2_72B)

import json
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_jax.config import LlmConfig, ModelConfig, Parts, RopeScaling, VisionConfig
from llava_jax.hf import model_config
from llava_jax.hf.model_config import (
    read_llm_config,
    read_model_config,
    read_parts_config,
    read_vision_config,
    write_model_config,
)
from llava_jax.hf.tensorfile import CheckpointError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The first of llava-hf's, shortened by what is not read.
LLAVA_7B_HF = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


def directory_of(settings: dict, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (model_config.LLAMA_DEFAULTS, LlamaConfig),
        (model_config.CLIP_DEFAULTS, CLIPVisionConfig),
        (model_config.LLAVA_DEFAULTS, LlavaConfig),
    ],
)
def test_defaults_are_those_of_transformers(ours, theirs):
    resolved = theirs().to_dict()
    for name, value in ours.items():
        if value is not None:  # None stands for what depends on other fields
            assert resolved[name] == value, name
    vision = LlavaConfig().vision_config.to_dict()
    for name, value in model_config.LLAVA_VISION_DEFAULTS.items():
        assert vision[name] == value, name


def test_a_released_llava(tmp_path):
    """ModelConfig's own defaults are LLaVA-1.5-7B's."""
    assert read_model_config(directory_of(LLAVA_7B_HF, tmp_path)) == ModelConfig()


def test_nothing_given_is_all_defaults(tmp_path):
    config = read_model_config(directory_of({"model_type": "llava"}, tmp_path))
    assert config.vision == VisionConfig()
    assert (config.llm.vocab_size, config.llm.rms_norm_eps) == (32000, 1e-6)
    assert (config.llm.head_dim, config.llm.num_key_value_heads) == (128, 32)
    assert config.pad_token_id == 2  # no padding token: the end token


ROPE = RopeScaling(**LLAMA3)


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 5e5, ROPE),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3}, 1e4, ROPE),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}, 5e5, ROPE),
    ],
)
def test_rope_of_every_era(settings, theta, scaling, tmp_path):
    llm = read_llm_config(directory_of({"model_type": "llama"} | settings, tmp_path))
    assert (llm.rope_theta, llm.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("top", "text", "tied"),
    [
        ({}, {}, False),
        ({"tie_word_embeddings": True}, {}, True),
        ({}, {"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, True),
    ],
)
def test_either_place_ties_the_head(top, text, tied, tmp_path):
    settings = {"model_type": "llava", "text_config": text} | top
    config = read_model_config(directory_of(settings, tmp_path))
    assert config.llm.tie_word_embeddings == tied
    assert LlavaConfig.from_pretrained(tmp_path).tie_word_embeddings == tied


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next"}, "model_type is 'llava_next', expected 'llava'"),
        ({"text_config": {"model_type": "qwen2"}}, "decoder's model_type is 'qwen2'"),
        ({"text_config": {"hidden_act": "gelu"}}, "decoder's hidden_act is 'gelu'"),
        ({"text_config": {"attention_bias": True}}, "decoder's attention_bias is True"),
        ({"text_config": {"mlp_bias": True}}, "decoder's mlp_bias is True"),
        (
            {"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
            "decoder's rope type is 'linear'",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}},
            "without low_freq_factor, high_freq_factor, original_max",
        ),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "tower's model_type is 'siglip"),
        ({"vision_config": {"image_size": 330}}, "image_size 330 and patch_size 14"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_layer": -26}, "vision_feature_layer -26 of a vision tower with 24"),
        ({"vision_feature_select_strategy": "cls"}, "select_strategy is 'cls'"),
    ],
)
def test_what_is_not_computed_is_refused(change, message, tmp_path):
    directory = directory_of({"model_type": "llava"} | change, tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model_config(directory)
    assert str(directory / "config.json") in str(error.value)


def test_an_unreadable_config_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        read_model_config(tmp_path)


CONFIGS = {
    "7b": ModelConfig(),
    "llama3": ModelConfig(
        llm=LlmConfig(rope_theta=5e5, rope_scaling=ROPE, num_key_value_heads=8)
    ),
    "tied": ModelConfig(
        llm=LlmConfig(vocab_size=49216, hidden_size=576, num_attention_heads=9,
                      num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
        image_token_id=49152, pad_token_id=2, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_config_is_read_alike_by_us_and_transformers(name, tmp_path):
    config = CONFIGS[name]
    write_model_config(config, tmp_path)
    assert read_model_config(tmp_path) == config
    theirs = LlavaConfig.from_pretrained(tmp_path)
    assert str(theirs.dtype).endswith("bfloat16")
    assert theirs.architectures == ["LlavaForConditionalGeneration"]
    assert theirs.image_seq_length == config.image_tokens
    assert theirs.tie_word_embeddings == config.llm.tie_word_embeddings
    assert theirs.text_config.head_dim == config.llm.head_dim
    assert theirs.text_config.rope_parameters["rope_theta"] == config.llm.rope_theta
    theirs.save_pretrained(tmp_path / "again")
    assert read_model_config(tmp_path / "again") == config


def test_separate_parts(tmp_path):
    llm = {"model_type": "llama", "vocab_size": 100, "pad_token_id": 0}
    tower = {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_attention_heads": 16}
    openai = {"model_type": "clip", "vision_config": {}, "vision_config_dict": tower}
    parts = Parts(
        str(directory_of(llm, tmp_path / "llm")), str(directory_of(openai, tmp_path / "clip"))
    )
    assert read_vision_config(parts.vision).hidden_size == 1024
    config = read_parts_config(parts)  # no tokenizer: ids after the vocabulary
    assert (config.image_token_id, config.pad_token_id, config.llm.vocab_size) == (100, 101, 128)
    config = read_parts_config(parts, image_token_id=98, pad_token_id=0)
    assert (config.image_token_id, config.pad_token_id, config.llm.vocab_size) == (98, 0, 100)

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlavaConfig

from llava_jax.config import LlmConfig, ModelConfig, Parts, RopeScaling, VisionConfig
from llava_jax.errors import CheckpointError
from llava_jax.pretrained import model_config
from llava_jax.pretrained.family import MEMBERS
from llava_jax.pretrained.model_config import (
    read_llm_config,
    read_model_config,
    read_parts_config,
    read_vision_config,
    write_model_config,
)
from llava_jax.pretrained.rope_config import ROPE_THETA

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


NEXT = {"model_type": "llava_next", "pad_token_id": 0}


def directory_of(settings: dict, path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    return path


MEMBER_DEFAULTS = {name: member.defaults for name, member in MEMBERS.items()}
DEFAULTS = model_config.DECODERS | model_config.TOWERS | MEMBER_DEFAULTS
# Switches that transformers' configs have for some models only; elsewhere they are off.
SWITCHES = {"attention_bias", "mlp_bias", "vision_use_head"}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_are_those_of_transformers(model_type):
    resolved = AutoConfig.for_model(model_type).to_dict()
    for name, value in DEFAULTS[model_type].items():
        if name in SWITCHES and name not in resolved:
            assert value is False, name
        elif name in ("num_key_value_heads", "head_dim") and value is None:
            heads = resolved["num_attention_heads"]  # it depends on other fields
            expected = {"num_key_value_heads": heads, "head_dim": resolved["hidden_size"] // heads}
            assert resolved.get(name, expected[name]) == expected[name], name
        else:
            assert resolved[name] == value, name
    if model_type in model_config.DECODERS:
        assert resolved["rope_parameters"]["rope_theta"] == ROPE_THETA


@pytest.mark.parametrize("model_type", MEMBERS)
def test_a_members_own_parts_are_those_of_transformers(model_type):
    config = AutoConfig.for_model(model_type)
    vision = config.vision_config.to_dict()
    assert MEMBERS[model_type].vision.items() <= vision.items()
    assert MEMBERS[model_type].text_type == config.text_config.model_type


def test_a_released_llava(tmp_path):
    """ModelConfig's own defaults are LLaVA-1.5-7B's."""
    assert read_model_config(directory_of(LLAVA_7B_HF, tmp_path)) == ModelConfig()


@pytest.mark.parametrize("text", [*model_config.DECODERS, None])
@pytest.mark.parametrize("vision", [*model_config.TOWERS, None])
def test_what_is_not_said_is_its_own_types_default(text, vision, tmp_path):
    """A vision_config that says only what it is has that type's defaults, not LLaVA's tower."""
    settings = {"model_type": "llava", "pad_token_id": 0}
    settings |= {"text_config": {"model_type": text}} if text else {}
    settings |= {"vision_config": {"model_type": vision}} if vision else {}
    config = read_model_config(directory_of(settings, tmp_path))
    theirs = LlavaConfig.from_pretrained(tmp_path)
    for ours, other in ((config.llm, theirs.text_config), (config.vision, theirs.vision_config)):
        for field in dataclasses.fields(ours):
            if field.name not in ("head_dim", "rope_theta", "rope_scaling", "vision_use_head"):
                value = getattr(other, field.name, None)
                assert getattr(ours, field.name) == value, field.name
    assert config.vision.vision_use_head == getattr(theirs.vision_config, "vision_use_head", False)


def test_nothing_given_is_all_defaults(tmp_path):
    config = read_model_config(directory_of({"model_type": "llava"}, tmp_path))
    assert config.vision == VisionConfig()
    assert (config.llm.vocab_size, config.llm.rms_norm_eps) == (32000, 1e-6)
    assert (config.llm.head_dim, config.llm.num_key_value_heads) == (128, 32)
    assert config.pad_token_id == 2  # no padding token: the end token


ROPE = RopeScaling("llama3", **LLAMA3)
LINEAR = RopeScaling("linear", 4.0)
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=32768, truncate=False)


@pytest.mark.parametrize(
    ("settings", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 5e5, ROPE),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3}, 1e4, ROPE),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3}, 5e5, ROPE),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1e4, LINEAR),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1e4, RopeScaling("dynamic", 2.0)),
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {
                    **{"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
                    **{"truncate": False, "beta_fast": None},
                },
            },
            1e6,
            YARN,
        ),
    ],
)
def test_rope_of_every_era(settings, theta, scaling, tmp_path):
    llm = read_llm_config(directory_of({"model_type": "llama"} | settings, tmp_path))
    assert (llm.rope_theta, llm.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),  # 7B v0.2 and later
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False}, None),
        ({"model_type": "qwen3", "sliding_window": 32768, "use_sliding_window": False}, None),
        ({"model_type": "llama", "sliding_window": 512}, None),
    ],
)
def test_sliding_windows(settings, window, tmp_path):
    assert read_llm_config(directory_of(settings, tmp_path)).sliding_window == window


def test_heads_of_qwen3_have_the_size_128(tmp_path):
    """Also if the hidden size divided by the number of heads is another number."""
    settings = {"model_type": "qwen3", "hidden_size": 1024, "num_key_value_heads": 8}
    settings["num_attention_heads"] = 16
    assert read_llm_config(directory_of(settings, tmp_path)).head_dim == 128
    assert read_llm_config(directory_of(settings | {"head_dim": 64}, tmp_path)).head_dim == 64


def test_null_key_heads_are_as_many_as_query_heads(tmp_path):
    settings = {"model_type": "mistral", "num_key_value_heads": None}
    assert read_llm_config(directory_of(settings, tmp_path)).num_key_value_heads == 32


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


YARN_TWICE = {"type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_next_2"}, "'llava_next_2'; supported: 'llava', 'llava_next', .*"),
        (
            NEXT | {"image_grid_pinpoints": [[336, 500]]},
            "multiples of .* 336",
        ),
        (NEXT | {"image_grid_pinpoints": []}, "image_grid_pinpoints is .*; it must be a list"),
        (
            NEXT | {"image_grid_pinpoints": [[336, 336, 336]]},
            "it must be a list of pairs of lengths",
        ),
        (
            NEXT | {"image_grid_pinpoints": [[336, 336 * 10**6]]},
            "it must be a list of pairs of lengths",
        ),
        (NEXT | {"model_type": "llava_next_video", "spatial_pool_mode": "max"}, "'average'"),
        (NEXT | {"model_type": "llava_next_video", "spatial_pool_stride": 25}, "only 24 x 24"),
        (NEXT | {"vision_feature_select_strategy": "full"}, "set it to 'default'"),
        (
            NEXT | {"model_type": "llava_onevision", "vision_aspect_ratio": "anyres"},
            "vision_aspect_ratio is 'anyres'; it must be 'anyres_max_' and a number",
        ),
        (
            NEXT | {"model_type": "llava_onevision", "vision_feature_select_strategy": "default"},
            "not those of 27 x 27 patches; set it to 'full'",
        ),
        ({"model_type": "blip"}, "model_type is 'blip'; supported: 'llava'"),
        ({"text_config": {"model_type": "gemma"}}, "decoder's model_type is 'gemma'; supported: "),
        (
            {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
            "decoder's use_sliding_window is True",
        ),
        (
            {"text_config": {"model_type": "qwen3", "use_sliding_window": True}},
            "decoder's use_sliding_window is True",
        ),
        (
            {"text_config": {"model_type": "qwen3", "attention_bias": True}},
            "decoder's attention_bias is True",
        ),
        (
            {"text_config": {"model_type": "qwen2"}},
            "has neither pad_token_id nor the decoder's eos_token_id",
        ),
        ({"text_config": {"hidden_act": "gelu"}}, "decoder's hidden_act is 'gelu'"),
        ({"text_config": {"attention_bias": True}}, "decoder's attention_bias is True"),
        ({"text_config": {"mlp_bias": True}}, "decoder's mlp_bias is True"),
        (
            {"text_config": {"rope_scaling": {"type": "longrope", "factor": 2.0}}},
            "decoder's rope type is 'longrope'; supported: 'default' or 'linear' or 'dynamic' or",
        ),
        (
            {"text_config": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}},
            "the llama3 RoPE scaling lacks low_freq_factor, high_freq_factor",
        ),
        ({"text_config": {"rope_scaling": {"type": "linear"}}}, "linear RoPE scaling lacks factor"),
        (
            {"text_config": {"rope_scaling": {"type": "linear", "factor": 0.5}}},
            r"rope_scaling.factor = 0.5: it must be at least 1",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "dynamic", "factor": True}}},
            "RoPE scaling: factor is True; it must be float",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}},
            "RoPE scaling: truncate is 1; it must be",
        ),
        (
            {"text_config": {"rope_scaling": YARN_TWICE | {"beta_fast": 1.0, "beta_slow": 32.0}}},
            "'yarn': beta_slow and beta_fast are 32 and 1; the first must be .* below the second",
        ),
        (
            {"text_config": {"rope_scaling": LLAMA3 | {"type": "llama3", "low_freq_factor": 4.0}}},
            "'llama3': low_freq_factor and high_freq_factor are 4 and 4",
        ),
        (
            {"text_config": {"rope_scaling": YARN_TWICE, "rope_theta": 1.0}},
            "yarn RoPE scaling needs a rope_theta above 1",
        ),
        (
            {"text_config": {"rope_scaling": YARN_TWICE, "rope_parameters": {"rope_theta": 1e6}}},
            "both rope_scaling and rope_parameters; move the fields",
        ),
        ({"vision_config": {"model_type": "dinov2"}}, "tower's model_type is 'dinov2'"),
        ({"vision_config": {"image_size": 16}}, "image_size is 16 and patch_size is 32"),
        ({"vision_config": {"image_size": [336, 224]}}, r"image_size is \[336, 224\]"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
        ({"vision_feature_layer": [-2, 0]}, "vision_feature_layer 0 is not the output"),
        ({"vision_feature_layer": []}, "vision_feature_layer is empty"),
        ({"vision_feature_layer": [-2, "a"]}, "vision_feature_layer is .*; it must be"),
        ({"vision_feature_layer": -26}, "vision_feature_layer -26 is not the output of one"),
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
    "linear": ModelConfig(llm=LlmConfig(rope_scaling=LINEAR)),
    "dynamic": ModelConfig(llm=LlmConfig(rope_scaling=RopeScaling("dynamic", 2.0))),
    "yarn": ModelConfig(llm=LlmConfig(model_type="qwen2", rope_scaling=YARN)),
    "mistral": ModelConfig(llm=LlmConfig(model_type="mistral", sliding_window=4096)),
    "mistral, no window": ModelConfig(llm=LlmConfig(model_type="mistral")),
    "qwen2, so400m": ModelConfig(
        VisionConfig(384, 14, 1152, 4304, 27, 16, "gelu_pytorch_tanh", 1e-6,
                     "siglip_vision_model", vision_use_head=True),
        LlmConfig(152064, 3584, 18944, 28, 28, 4, model_type="qwen2", rope_theta=1e6),
        image_token_id=151646, pad_token_id=151643, vision_feature_select_strategy="full",
    ),
    "qwen3": ModelConfig(
        llm=LlmConfig(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True,
                      model_type="qwen3", rope_theta=1e6),
    ),
    "siglip without a head": ModelConfig(VisionConfig(model_type="siglip_vision_model")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_config_is_read_alike_by_us_and_transformers(name, tmp_path):
    config = CONFIGS[name]
    write_model_config(config, tmp_path)
    assert read_model_config(tmp_path) == config
    theirs = LlavaConfig.from_pretrained(tmp_path)
    assert str(theirs.dtype).endswith("bfloat16")
    assert theirs.architectures == ["LlavaForConditionalGeneration"]
    assert theirs.text_config.model_type == config.llm.model_type
    assert getattr(theirs.text_config, "sliding_window", None) == config.llm.sliding_window
    assert theirs.vision_config.model_type == config.vision.model_type
    assert theirs.image_seq_length == config.image_tokens
    assert theirs.tie_word_embeddings == config.llm.tie_word_embeddings
    assert theirs.text_config.head_dim == config.llm.head_dim
    rope = theirs.text_config.rope_parameters
    assert rope["rope_theta"] == config.llm.rope_theta
    if config.llm.rope_scaling is not None:
        scaling = dataclasses.asdict(config.llm.rope_scaling)
        assert {name: x for name, x in scaling.items() if x is not None}.items() <= rope.items()
    theirs.save_pretrained(tmp_path / "again")
    assert read_model_config(tmp_path / "again") == config


def test_a_siglip_in_separate_parts_drops_no_patch(tmp_path):
    llm = {"model_type": "llama", "vocab_size": 100}
    tower = {"image_size": 384, "patch_size": 14, "hidden_size": 1152, "num_attention_heads": 16}
    directories = {
        "alone": {"model_type": "siglip_vision_model"} | tower,
        "with text": {"model_type": "siglip", "vision_config": tower},
    }
    directory_of(llm, tmp_path / "llm")
    for name, settings in directories.items():
        parts = Parts(str(tmp_path / "llm"), str(directory_of(settings, tmp_path / name)))
        config = read_parts_config(parts)
        assert config.vision.model_type == "siglip_vision_model"
        assert (config.vision.hidden_act, config.vision.layer_norm_eps) == (
            "gelu_pytorch_tanh",
            1e-6,
        )
        assert config.vision.vision_use_head
        assert config.image_tokens == 27 * 27


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

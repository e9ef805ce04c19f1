"""Real sizes: transformers' own models, without weights, have our parameters and no others."""

import jax
import pytest
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_jax.config import MeshConfig
from llava_jax.distributed.sharding import make_mesh, with_shardings
from llava_jax.models import paths
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.model_config import read_model_config, write_model_config

CLIP_L = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
          "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336,
          "patch_size": 14}  # fmt: skip
SO400M = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
          "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
          "patch_size": 14}  # fmt: skip
VICUNA_7B = {"model_type": "llama", "vocab_size": 32064}
VICUNA_13B = VICUNA_7B | {"hidden_size": 5120, "intermediate_size": 13824,
                          "num_hidden_layers": 40, "num_attention_heads": 40}  # fmt: skip
LLAMA3_8B = {"model_type": "llama", "vocab_size": 128256, "intermediate_size": 14336,
             "num_key_value_heads": 8}  # fmt: skip
SMOLLM2_135M = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
                "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32064}
QWEN2_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
            "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4}  # fmt: skip
QWEN2_05B = {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
             "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
QWEN3_06B = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
             "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
             "num_key_value_heads": 8, "tie_word_embeddings": True}  # fmt: skip
NO_HEAD = {"num_hidden_layers": 26, "vision_use_head": False}  # of llava-interleave-qwen

# Decoder, tower, feature layer, parameters where they are known.
MODELS = {
    "llava-1.5-7b": (VICUNA_7B, CLIP_L, -2, 7_063_427_072),
    "llava-1.5-13b": (VICUNA_13B, CLIP_L, -2, 13_351_494_656),
    "llama-3-8b": (LLAMA3_8B, CLIP_L, -2, None),
    "smollm2-135m": (SMOLLM2_135M, CLIP_L, -2, None),
    "mistral-7b": (MISTRAL_7B, CLIP_L, -2, None),
    "mistral-7b-so400m": (MISTRAL_7B, SO400M, -2, None),
    "qwen2-7b-so400m": (QWEN2_7B, SO400M, -2, None),
    "llava-interleave-qwen-0.5b": (QWEN2_05B, SO400M | NO_HEAD, -1, None),
    "qwen3-0.6b": (QWEN3_06B, CLIP_L, -2, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_a_parameter_of_ours(name, abstract_params, tmp_path):
    text, vision, layer, count = MODELS[name]
    theirs = LlavaConfig(
        text_config=AutoConfig.for_model(**text),
        vision_config=AutoConfig.for_model(**vision),
        vision_feature_layer=layer,
        pad_token_id=0,
    )
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(theirs)
    expected = {name: tuple(x.shape) for name, x in hf.named_parameters()}
    if count is not None:
        assert sum(x.numel() for x in hf.parameters()) == count

    theirs.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    abstract = abstract_params(config)
    names = {}
    for path, spec in abstract.items():
        if paths.is_stacked(path):
            for index in range(spec.shape[0]):
                parameter = paths.unstacked(path, index, config)
                names[layouts.HF_5_MEMORY.file_name(parameter)] = spec.shape[1:]
        else:
            names[layouts.HF_5_MEMORY.file_name(path)] = spec.shape
    assert names == expected

    for path, spec in with_shardings(abstract, make_mesh(MeshConfig(), jax.devices()[:8])).items():
        assert any("fsdp" in (axes or ()) for axes in spec.sharding.spec), path

    write_model_config(config, tmp_path)
    again = LlavaConfig.from_pretrained(tmp_path)
    assert type(again.text_config) is type(theirs.text_config)
    assert type(again.vision_config) is type(theirs.vision_config)
    assert read_model_config(tmp_path) == config

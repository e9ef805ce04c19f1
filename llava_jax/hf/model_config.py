"""ModelConfig from a checkpoint's config.json, and back.

Hugging Face leaves out of config.json what equals a default, and has moved and renamed fields over
the years. The defaults stand here as data (a test compares them with transformers' own), so what is
read does not depend on transformers' version.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from llava_jax.config import ConfigError, LlmConfig, ModelConfig, Parts, RopeScaling, VisionConfig
from llava_jax.hf import official
from llava_jax.hf.tensorfile import CheckpointError
from llava_jax.hf.tokenizer import IMAGE_TOKEN, has_tokenizer, load_tokenizer

Json = dict[str, Any]

# Defaults of transformers' LlamaConfig, CLIPVisionConfig, LlavaConfig; the same in 4.36 and 5.23.
LLAMA_DEFAULTS: Json = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
CLIP_DEFAULTS: Json = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLAVA_VISION_DEFAULTS: Json = CLIP_DEFAULTS | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
LLAVA_DEFAULTS: Json = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
ROPE_THETA = 10_000.0

VOCABULARY_MULTIPLE = 64  # what a grown vocabulary is rounded up to, as llava-hf's 32064 is


def read_model_config(directory: str | Path) -> ModelConfig:
    """The model that a Hugging Face LLaVA checkpoint's config.json describes.

    Raises:
        CheckpointError: No readable config.json, or a model that this package does not compute.
    """
    file, raw = read_json_config(directory)
    if raw.get("model_type") != "llava":
        raise CheckpointError(f"{file}: model_type is {raw.get('model_type')!r}, expected 'llava'")
    given = _given(raw)
    values = LLAVA_DEFAULTS | given
    text, vision = _given(raw.get("text_config") or {}), _given(raw.get("vision_config") or {})
    _require(file, "multimodal_projector_bias", values["multimodal_projector_bias"], (True,))
    _require(file, "projector_hidden_act", values["projector_hidden_act"], _GELUS)
    strategy = values["vision_feature_select_strategy"]
    _require(file, "vision_feature_select_strategy", strategy, ("default", "full"))
    if not isinstance(values["vision_feature_layer"], int):
        raise CheckpointError(
            f"{file}: vision_feature_layer is {values['vision_feature_layer']}; features of one "
            "layer are supported, not of several"
        )
    if given.get("tie_word_embeddings"):  # either place ties, as in transformers 5
        text["tie_word_embeddings"] = True
    config = ModelConfig(
        vision=_vision_config(file, LLAVA_VISION_DEFAULTS | vision),
        llm=_llm_config(file, LLAMA_DEFAULTS | text),
        image_token_id=values.get("image_token_id", values["image_token_index"]),
        pad_token_id=_pad_token_id(given, text),
        vision_feature_layer=values["vision_feature_layer"],
        vision_feature_select_strategy=strategy,
        projector_hidden_act=values["projector_hidden_act"],
    )
    try:
        _ = config.used_vision_layers
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config


def read_llm_config(directory: str | Path) -> LlmConfig:
    """The decoder that a LlamaForCausalLM directory's config.json describes.

    Raises:
        CheckpointError: No readable config.json, or a decoder that this package does not compute.
    """
    file, raw = read_json_config(directory)
    return _llm_config(file, LLAMA_DEFAULTS | _given(official.decoder_settings(raw)))


def read_vision_config(directory: str | Path) -> VisionConfig:
    """The vision tower of a CLIPVisionModel or CLIPModel directory's config.json.

    Raises:
        CheckpointError: No readable config.json, or a tower that this package does not compute.
    """
    file, raw = read_json_config(directory)
    if raw.get("model_type") == "clip":  # openai's configs say it twice; the second is meant
        raw = (raw.get("vision_config") or {}) | (raw.get("vision_config_dict") or {})
    return _vision_config(file, CLIP_DEFAULTS | _given(raw))


def read_parts_config(
    parts: Parts, image_token_id: int | None = None, pad_token_id: int | None = None
) -> ModelConfig:
    """A LLaVA-1.5 of separate parts.

    Args:
        parts: Where they lie.
        image_token_id: The image token; None takes the one that `tokenizer.load_tokenizer` adds to
            the decoder's tokenizer, or without a tokenizer the first id after the vocabulary.
        pad_token_id: The padding token; None takes it from the same place.

    Returns:
        A config whose vocabulary is the decoder's, grown where it lacks one of the two tokens.

    Raises:
        CheckpointError: A part that cannot be read or is not supported.
    """
    llm, vision, features = read_llm_config(parts.llm), _read_tower(parts), {}
    file, raw = read_json_config(parts.llm)
    if "mm_projector_type" in raw:
        features = official.feature_settings(file, raw)
    if has_tokenizer(parts):
        tokenizer = load_tokenizer(parts)
        own_image = cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        own_pad = cast(int, tokenizer.pad_token_id)
    else:
        own_image, own_pad = llm.vocab_size, llm.vocab_size + 1
    image = own_image if image_token_id is None else image_token_id
    pad = own_pad if pad_token_id is None else pad_token_id
    needed = max(image, pad) + 1
    if needed > llm.vocab_size:
        rounded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        llm = dataclasses.replace(llm, vocab_size=rounded)
    return ModelConfig(vision=vision, llm=llm, image_token_id=image, pad_token_id=pad, **features)


def _read_tower(parts: Parts) -> VisionConfig:
    if parts.vision != parts.llm:
        return read_vision_config(parts.vision)
    tower = official.named_tower(*read_json_config(parts.llm))
    if not isinstance(tower, VisionConfig):
        raise CheckpointError(
            f"{parts.llm} does not say what its vision tower is; name a directory that does: "
            f"llm={parts.llm},vision=DIRECTORY"
        )
    return tower


def read_json_config(directory: str | Path) -> tuple[Path, Json]:
    """A directory's config.json, as it is.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    file = Path(directory) / "config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{directory} has no config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return file, raw


def _given(raw: Json) -> Json:
    """What a config says; null means the default."""
    return {name: value for name, value in raw.items() if value is not None}


_GELUS = ("gelu", "gelu_pytorch_tanh")


def _require(file: Path, name: str, value: object, supported: tuple[object, ...]) -> None:
    if value not in supported:
        known = " or ".join(repr(choice) for choice in supported)
        raise CheckpointError(f"{file}: {name} is {value!r}; supported: {known}")


def _llm_config(file: Path, values: Json) -> LlmConfig:
    _require(file, "the decoder's model_type", values["model_type"], ("llama",))
    _require(file, "the decoder's hidden_act", values["hidden_act"], ("silu",))
    _require(file, "the decoder's attention_bias", values["attention_bias"], (False,))
    _require(file, "the decoder's mlp_bias", values["mlp_bias"], (False,))
    heads = values["num_attention_heads"]
    theta, scaling = _rope(file, values)
    return LlmConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values["num_key_value_heads"] or heads,
        head_dim=values["head_dim"] or values["hidden_size"] // heads,
        max_position_embeddings=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=values["tie_word_embeddings"],
    )


def _rope(file: Path, values: Json) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or the two fields before it."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", values.get("rope_theta", ROPE_THETA)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    _require(file, "the decoder's rope type", kind, ("default", "llama3"))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    _require(file, "the decoder's partial_rotary_factor", partial, (1.0,))
    if kind == "default":
        return theta, None
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    absent = [name for name in names if name not in rope]
    if absent:
        raise CheckpointError(f"{file}: llama3 rope scaling without {', '.join(absent)}")
    return theta, RopeScaling(**{name: rope[name] for name in names})


def _vision_config(file: Path, values: Json) -> VisionConfig:
    _require(file, "the vision tower's model_type", values["model_type"], ("clip_vision_model",))
    _require(file, "the vision tower's hidden_act", values["hidden_act"], ("quick_gelu", *_GELUS))
    _require(file, "the vision tower's num_channels", values["num_channels"], (3,))
    image, patch = values["image_size"], values["patch_size"]
    if not isinstance(image, int) or not isinstance(patch, int) or image % patch:
        raise CheckpointError(
            f"{file}: image_size {image} and patch_size {patch}; supported: square images of whole "
            "patches"
        )
    fields = dataclasses.fields(VisionConfig)
    return VisionConfig(**{field.name: values[field.name] for field in fields})


def _pad_token_id(top: Json, text: Json) -> int:
    """The padding token; configs without one pad with the end token."""
    end = text.get("eos_token_id", 2)
    choices = (top.get("pad_token_id", -1), text.get("pad_token_id", -1))
    given = [choice for choice in choices if choice >= 0]  # Llama's first configs say -1
    return given[0] if given else end[0] if isinstance(end, list) else end


def write_model_config(config: ModelConfig, directory: str | Path, dtype: str = "bfloat16") -> None:
    """Writes a config.json that transformers 4.40 and later and 5 read alike.

    Args:
        config: The model.
        directory: Must exist.
        dtype: Of the weights beside it, "bfloat16" for example.
    """
    llm = dataclasses.asdict(config.llm)
    if config.llm.rope_scaling is not None:
        llm["rope_scaling"] = {"rope_type": "llama3", **llm["rope_scaling"]}
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
    }
    clip = {"model_type": "clip_vision_model", "num_channels": 3, "torch_dtype": dtype}
    clip["projection_dim"] = 768  # of a head that LLaVA does not have; loaders ask for a number
    llava = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.llm.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": {**llama, **llm},
        "vision_config": {**clip, **dataclasses.asdict(config.vision)},
    }
    text = json.dumps(llava, indent=2, sort_keys=True) + "\n"
    (Path(directory) / "config.json").write_text(text)

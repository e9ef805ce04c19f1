"""Reads a ModelConfig from a checkpoint's config.json, and writes a config.json.

Hugging Face omits fields of config.json that equal a default, and has moved and renamed fields over
the years. The defaults are copied here, so that the result does not depend on the version of
transformers. A test compares the copied defaults with transformers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from llava_jax.config import LlmConfig, ModelConfig, Parts, VisionConfig
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained import llava_directory
from llava_jax.pretrained.config_checks import check_object, check_types, require
from llava_jax.pretrained.family import MEMBERS, member_settings, read_member_fields
from llava_jax.pretrained.rope_config import read_rope, scaling_settings
from llava_jax.pretrained.safetensors import read_json
from llava_jax.pretrained.tokenizer import (
    IMAGE_TOKEN,
    PAD_TOKEN,
    VIDEO_TOKEN,
    has_tokenizer,
    load_tokenizer,
    media_tokens,
)
from llava_jax.pretrained.unsupported import supported_config

# Defaults of transformers, the same in 4.36 (Qwen2, SigLIP: 4.37; Qwen3: 4.51) and in 5.24.
LLAMA_DEFAULTS: Json = {
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
    "eos_token_id": 2,
}
MISTRAL_DEFAULTS: Json = LLAMA_DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS: Json = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "eos_token_id": None,
}
QWEN3_DEFAULTS: Json = QWEN2_DEFAULTS | {"head_dim": 128}
CLIP_DEFAULTS: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "vision_use_head": False,
}
SIGLIP_DEFAULTS: Json = CLIP_DEFAULTS | {
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}

# A config without model_type has the type of the first entry.
DECODERS = {
    "llama": LLAMA_DEFAULTS,
    "mistral": MISTRAL_DEFAULTS,
    "qwen2": QWEN2_DEFAULTS,
    "qwen3": QWEN3_DEFAULTS,
}
TOWERS = {"clip_vision_model": CLIP_DEFAULTS, "siglip_vision_model": SIGLIP_DEFAULTS}
_TWO_TOWERS = ("clip", "siglip")  # have a vision tower and a text tower

VOCABULARY_MULTIPLE = 64  # divides the size of an extended vocabulary, such as llava-hf's 32064


def read_model_config(directory: str | Path) -> ModelConfig:
    """Reads the `ModelConfig` of a Hugging Face LLaVA checkpoint from its config.json.

    Raises:
        CheckpointError: The config.json cannot be read, or the model is not supported.
    """
    file, raw = read_json_config(directory)
    kind = raw.get("model_type")
    if kind in (*DECODERS, *TOWERS, *_TWO_TOWERS):
        what = "a decoder" if kind in DECODERS else "a vision tower"
        raise CheckpointError(
            f"{file}: model_type is {kind!r:.80}, so this is only {what}; give both a decoder and "
            "a vision tower: llm=DIR,vision=DIR"
        )
    if kind not in MEMBERS:
        known = ", ".join(map(repr, MEMBERS))
        raise CheckpointError(f"{file}: model_type is {kind!r:.80}; supported: {known}")
    member, given = MEMBERS[kind], _given(raw)
    values = member.defaults | given
    values["image_token_id"] = values.get("image_token_id", values["image_token_index"])
    text = _given(check_object(file, raw, "text_config", {}))
    text.setdefault("model_type", member.text_type)
    vision = _given(check_object(file, raw, "vision_config", member.vision))
    require(file, "multimodal_projector_bias", values["multimodal_projector_bias"], (True,))
    require(file, "projector_hidden_act", values["projector_hidden_act"], _GELUS)
    strategy = values["vision_feature_select_strategy"]
    require(file, "vision_feature_select_strategy", strategy, ("default", "full"))
    require(file, "tie_word_embeddings", given.get("tie_word_embeddings", False), (False, True))
    if given.get("tie_word_embeddings"):  # one of the fields is enough, as in transformers 5
        text["tie_word_embeddings"] = True
    parts = _vision_config(file, vision), _llm_config(file, text)
    values["pad_token_id"] = _pad_token_id(file, given, text)
    if isinstance(values["vision_feature_layer"], list):
        values["vision_feature_layer"] = tuple(values["vision_feature_layer"])
    values |= read_member_fields(file, member, values, parts[0])
    return _llava_config(file, *parts, values)


def _llava_config(file: Path, vision: VisionConfig, llm: LlmConfig, values: Json) -> ModelConfig:
    check_types(file, "", ModelConfig, values)
    own = [field.name for field in dataclasses.fields(ModelConfig) if field.name in values]
    config = ModelConfig(vision, llm, **{name: values[name] for name in own})
    try:
        _ = config.used_vision_layers
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return config


def read_llm_config(directory: str | Path) -> LlmConfig:
    """Reads the `LlmConfig` of a LLaMA, Mistral, Qwen2 or Qwen3 decoder.

    Raises:
        CheckpointError: The config.json cannot be read, or the decoder is not supported.
    """
    file, raw = read_json_config(directory)
    return _llm_config(file, _given(llava_directory.decoder_settings(raw)))


def read_vision_config(directory: str | Path) -> VisionConfig:
    """Reads the `VisionConfig` of a CLIPVisionModel, CLIPModel, SiglipVisionModel or SiglipModel.

    Raises:
        CheckpointError: The config.json cannot be read, or the tower is not supported.
    """
    file, raw = read_json_config(directory)
    kind = raw.get("model_type")
    if kind in _TWO_TOWERS:
        # If a config has both objects, as OpenAI's configs do, vision_config_dict is the right one.
        once, twice = (check_object(file, raw, f"vision_config{end}", {}) for end in ("", "_dict"))
        raw = {"model_type": f"{kind}_vision_model"} | once | twice
    return _vision_config(file, _given(raw))


def read_parts_config(
    parts: Parts, image_token_id: int | None = None, pad_token_id: int | None = None
) -> ModelConfig:
    """Reads the `ModelConfig` of a LLaVA that consists of separate parts.

    Without a config.json of LLaVA's own code, the parts are those of a LLaVA-1.5.

    Args:
        parts: Directories of the parts.
        image_token_id: Id of the image token. None uses the id in the tokenizer, or the next id
            after the decoder's vocabulary if there is no tokenizer.
        pad_token_id: Id of the padding token. None uses the id in the tokenizer, or the next id
            after the decoder's vocabulary and the other new tokens if there is no tokenizer.

    Returns:
        A config whose vocabulary has the decoder's size, or is extended to contain all ids. The
        image features are all patches without the class token, unless LLaVA's own config.json has
        other settings.

    Raises:
        CheckpointError: A part cannot be read or is not supported.
    """
    llm, vision = read_llm_config(parts.llm), read_tower(parts)
    features: Json = {
        "vision_feature_select_strategy": "default" if vision.has_class_token else "full"
    }
    file, raw = llava_directory.settings_of(parts)
    names = media_tokens(raw)
    if has_tokenizer(parts):
        tokenizer = load_tokenizer(parts)
        own = {name: cast(int, tokenizer.convert_tokens_to_ids(name)) for name in names}
        own[PAD_TOKEN] = cast(int, tokenizer.pad_token_id)
    else:
        own = {name: llm.vocab_size + index for index, name in enumerate((*names, PAD_TOKEN))}
    image = own[IMAGE_TOKEN] if image_token_id is None else image_token_id
    pad = own[PAD_TOKEN] if pad_token_id is None else pad_token_id
    video = own.get(VIDEO_TOKEN, 0)  # 0 is not used, because the model reads no videos
    if "mm_projector_type" in raw:
        features = llava_directory.feature_settings(file, raw, vision, video)
    needed = max(image, pad, video) + 1
    if needed > llm.vocab_size:
        rounded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        llm = dataclasses.replace(llm, vocab_size=rounded)
    ids = {"image_token_id": image, "pad_token_id": pad}
    return _llava_config(file, vision, llm, features | ids)


def read_tower(parts: Parts) -> VisionConfig:
    """Reads the `VisionConfig` of separate parts.

    The vision tower may be in the decoder's directory, without a config.json of its own.

    Raises:
        CheckpointError: The config.json cannot be read, or the tower is not supported or unknown.
    """
    raw = read_json_config(parts.vision)[1]
    if parts.vision != parts.llm or "mm_vision_tower" not in raw:
        return read_vision_config(parts.vision)
    tower = llava_directory.known_tower(raw)
    if tower is None:
        raise CheckpointError(
            f"{parts.llm} does not describe its vision tower; give the directory of the vision "
            f"tower: llm={parts.llm},vision=DIRECTORY"
        )
    return tower


def read_json_config(directory: str | Path) -> tuple[Path, Json]:
    """Returns the path and the content of a directory's config.json.

    Raises:
        CheckpointError: There is no config.json, it cannot be read, or the model is not supported.
    """
    file = Path(directory) / "config.json"
    return file, supported_config(file, read_json(file))


def _given(raw: Json | None) -> Json:
    """Removes null fields, so that defaults apply; keeps fields where null means "no value"."""
    none = ("sliding_window", "num_key_value_heads")
    return {name: x for name, x in (raw or {}).items() if x is not None or name in none}


_GELUS = ("gelu", "gelu_pytorch_tanh")


def _complete(file: Path, part: str, given: Json, defaults: dict[str, Json]) -> Json:
    """Returns a part's config, completed with the defaults of its model_type."""
    kind = given.get("model_type", next(iter(defaults)))
    require(file, f"{part}'s model_type", kind, tuple(defaults))
    return defaults[kind] | {"model_type": kind} | given


def _llm_config(file: Path, given: Json) -> LlmConfig:
    values = _complete(file, "the decoder", given, DECODERS)
    require(file, "the decoder's hidden_act", values["hidden_act"], ("silu",))
    require(file, "the decoder's attention_bias", values["attention_bias"], (False,))
    require(file, "the decoder's mlp_bias", values["mlp_bias"], (False,))
    # Qwen2 and Qwen3 use a sliding window in some layers only, which is not supported.
    sliding = values.get("use_sliding_window", False)
    require(file, "the decoder's use_sliding_window", sliding, (False,))
    check_types(file, "the decoder's ", LlmConfig, values)
    heads = values["num_attention_heads"]
    key_heads = values["num_key_value_heads"] or heads
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    if heads % key_heads or head_dim % 2 or not head_dim:
        raise CheckpointError(
            f"{file}: the decoder has {heads} heads of size {head_dim} and {key_heads} key heads; "
            "the head size must be even, and the number of heads must be a multiple of the number "
            "of key heads"
        )
    theta, scaling = read_rope(file, values, head_dim)
    return LlmConfig(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        max_position_embeddings=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=values["tie_word_embeddings"],
        model_type=values["model_type"],
        sliding_window=values["sliding_window"] if values["model_type"] == "mistral" else None,
    )


def _vision_config(file: Path, given: Json) -> VisionConfig:
    values = _complete(file, "the vision tower", given, TOWERS)
    require(file, "the vision tower's hidden_act", values["hidden_act"], ("quick_gelu", *_GELUS))
    require(file, "the vision tower's num_channels", values["num_channels"], (3,))
    image, patch = values["image_size"], values["patch_size"]
    if not isinstance(image, int) or not isinstance(patch, int) or not 0 < patch <= image:
        raise CheckpointError(
            f"{file}: image_size is {image!r:.80} and patch_size is {patch!r:.80}; each must be "
            "one integer, the side of a square, and patch_size must not exceed image_size"
        )
    check_types(file, "the vision tower's ", VisionConfig, values)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise CheckpointError(
            f"{file}: the vision tower's hidden_size {values['hidden_size']} is not divisible by "
            f"its num_attention_heads {values['num_attention_heads']}"
        )
    fields = dataclasses.fields(VisionConfig)
    return VisionConfig(**{field.name: values[field.name] for field in fields})


def _pad_token_id(file: Path, top: Json, text: Json) -> Any:
    """Returns the id of the padding token, or of the end token if there is no padding token."""
    end = text.get("eos_token_id", DECODERS[text.get("model_type", "llama")]["eos_token_id"])
    choices = (top.get("pad_token_id"), text.get("pad_token_id"))
    choices = (*choices, end[0] if isinstance(end, list) and end else end)
    given = [choice for choice in choices if choice not in (None, -1)]  # -1: early Llama configs
    if not given:
        raise CheckpointError(f"{file} has neither pad_token_id nor the decoder's eos_token_id")
    return given[0]


def write_model_config(config: ModelConfig, directory: str | Path, dtype: str = "bfloat16") -> None:
    """Writes a config.json that transformers 4.40 (Qwen3: 4.51) and later read in the same way.

    Args:
        config: Sizes of the model.
        directory: Existing directory.
        dtype: Dtype of the weights in the directory, such as "bfloat16".
    """
    llava = {
        **member_settings(config),
        "image_token_index": config.image_token_id,
        "image_seq_length": config.image_tokens,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": config.llm.tie_word_embeddings,
        "torch_dtype": dtype,
        "text_config": text_settings(config.llm) | {"torch_dtype": dtype},
        "vision_config": tower_settings(config.vision) | {"torch_dtype": dtype},
    }
    text = json.dumps(llava, indent=2, sort_keys=True) + "\n"
    (Path(directory) / "config.json").write_text(text)


def text_settings(llm: LlmConfig) -> Json:
    """Returns the content of the config.json in a decoder's directory."""
    text = dataclasses.asdict(llm)
    text |= {"architectures": [f"{llm.model_type.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    text["rope_scaling"] = scaling_settings(llm.rope_scaling)
    if llm.model_type == "llama":
        text |= {"attention_bias": False, "mlp_bias": False}
    if llm.model_type in ("qwen2", "qwen3"):
        text["use_sliding_window"] = False
    if llm.model_type != "mistral":
        del text["sliding_window"]
    return text


def tower_settings(vision: VisionConfig) -> Json:
    """Returns the content of the config.json in a vision tower's directory."""
    tower = dataclasses.asdict(vision) | {"num_channels": 3}
    if vision.model_type == "clip_vision_model":
        del tower["vision_use_head"]
        tower["projection_dim"] = 768  # LLaVA has no projection head, but loaders need a number
    return tower


def read_config(source: Path | Parts) -> ModelConfig:
    """Calls `read_model_config` for a directory, and `read_parts_config` for separate parts."""
    if isinstance(source, Parts):
        return read_parts_config(source)
    return read_model_config(source)

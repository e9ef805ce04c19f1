"""LLaVA's own directories: a decoder's, with a projector; the vision tower is mostly elsewhere."""

from collections.abc import Callable
from pathlib import Path

from llava_jax.config import Aspect, ModelConfig, Parts, VisionConfig
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError

DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""From the `model_type` of LLaVA's code to that of the decoder in it."""

_TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "clip-vit-large-patch14": VisionConfig(image_size=224),
}
"""OpenAI's towers, for checkpoints that have one inside but only name its config."""

_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def decoder_settings(raw: Json) -> Json:
    """A config.json as its decoder's, if it is LLaVA's own."""
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str) or ("mm_vision_tower" not in raw and kind == "llava"):
        return raw
    return raw | {"model_type": DECODERS.get(kind, kind)}


def feature_settings(file: Path, raw: Json) -> Json:
    """What LLaVA's config.json says about image features, as fields of `ModelConfig`.

    Raises:
        CheckpointError: It asks for something that this package does not compute.
    """
    supported = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": tuple(_STRATEGIES),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
    }
    for name, values in supported.items():
        if name in raw and raw[name] not in values:
            raise CheckpointError(
                f"{file}: {name} is {raw[name]!r:.80}; supported: "
                + " or ".join(repr(value) for value in values if value is not None)
            )
    return {
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[raw.get("mm_vision_select_feature", "patch")],
    }


def image_aspect(raw: Json) -> Aspect | None:
    """What becomes of images that are not square by a config.json of LLaVA's; None if it is not."""
    if "mm_vision_tower" not in raw:
        return None
    return "pad" if raw.get("image_aspect_ratio") == "pad" else "crop"


def named_tower(file: Path, raw: Json) -> str | VisionConfig | None:
    """The vision tower that LLaVA's config.json names.

    Returns:
        Its directory, where that is here; else its sizes, if the name is a known one; else None.
    """
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str):
        return None
    for directory in (Path(name), file.parent / name, file.parent / Path(name).name):
        if (directory / "config.json").is_file():
            return str(directory)
    return _TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])


def official_settings(config: ModelConfig, llm: Json, tower: str, aspect: Aspect | None) -> Json:
    """The config.json that LLaVA's own code reads.

    Args:
        config: The model.
        llm: The decoder's own config.json.
        tower: Where the vision tower lies; its weights are in the checkpoint too.
        aspect: What happens to images that are not square; None pads, as LLaVA-1.5 was trained.
    """
    names = {"llama": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}
    strategies = {ours: theirs for theirs, ours in _STRATEGIES.items()}
    return llm | {
        "model_type": f"llava_{llm['model_type'].removesuffix('2')}",
        "architectures": [f"{names[llm['model_type']]}ForCausalLM"],
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": strategies[config.vision_feature_select_strategy],
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,  # the tower's weights are the checkpoint's
        "image_aspect_ratio": "square" if aspect == "crop" else "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
    }


def as_parts(
    path: Path, file: Path, raw: Json, find: Callable[[str], Path], *, has_tower: bool
) -> Parts:
    """LLaVA's own directory as separate parts, of which it may be two.

    Args:
        path: The directory.
        file: Its config.json.
        raw: What that says.
        find: Finds the directory of a path or a hub id.
        has_tower: Whether the tower's weights are in the directory.

    Raises:
        CheckpointError: Its vision tower is neither in it nor where it says.
    """
    tower, name = named_tower(file, raw), raw.get("mm_vision_tower")
    if has_tower and isinstance(tower, VisionConfig):
        return Parts(str(path), str(path))
    try:
        return Parts(str(path), str(find(tower if isinstance(tower, str) else str(name))))
    except ConfigError as error:
        lacks = "the config of its vision tower" if has_tower else "its vision tower"
        has = f"a decoder{' and a projector' if raw.get('mm_projector_type') else ''}"
        raise CheckpointError(
            f"{path} has {has}, but {lacks} ({name!r}) is not here; name the tower's directory "
            f"too: llm={path},vision=DIRECTORY ({error})"
        ) from error

"""Reads and writes the config.json of LLaVA's own code.

A directory that LLaVA's own code wrote has a decoder and, in most cases, a projector. The vision
tower is usually in another directory.
"""

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
"""Maps the `model_type` of LLaVA's own code to the `model_type` of its decoder."""

_TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "clip-vit-large-patch14": VisionConfig(image_size=224),
}
"""Sizes of OpenAI's towers, for checkpoints that have the tower's weights but not its config."""

_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def decoder_settings(raw: Json) -> Json:
    """Returns a config.json with LLaVA's own `model_type` replaced by the decoder's `model_type`.

    Any other `model_type` is kept, and a missing `model_type` becomes "llama".
    """
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str) or ("mm_vision_tower" not in raw and kind == "llava"):
        return raw
    return raw | {"model_type": DECODERS.get(kind, kind)}


def feature_settings(file: Path, raw: Json) -> Json:
    """Returns the `ModelConfig` fields for image features, from LLaVA's own config.json.

    Args:
        file: Path of the config.json, for messages.
        raw: Content of the config.json.

    Raises:
        CheckpointError: A field has a value that this package does not support.
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
    """Returns the handling of images that are not square, from LLaVA's own config.json.

    The result is None if LLaVA's own code did not write the config.json.
    """
    if "mm_vision_tower" not in raw:
        return None
    return "pad" if raw.get("image_aspect_ratio") == "pad" else "crop"


def named_tower(file: Path, raw: Json) -> str | VisionConfig | None:
    """Finds the vision tower that LLaVA's own config.json names.

    Args:
        file: Path of the config.json; the tower is also looked for in the same directory.
        raw: Content of the config.json.

    Returns:
        The tower's directory if it is on this machine; else the tower's sizes if it is one of
        OpenAI's towers; else None.
    """
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str):
        return None
    for directory in (Path(name), file.parent / name, file.parent / Path(name).name):
        if (directory / "config.json").is_file():
            return str(directory)
    return _TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1])


def official_settings(config: ModelConfig, llm: Json, tower: str, aspect: Aspect | None) -> Json:
    """Returns the content of a config.json that LLaVA's own code can read.

    Args:
        config: Sizes of the model.
        llm: Content of the decoder's config.json.
        tower: Path or hub id of the vision tower.
        aspect: Handling of images that are not square: "crop" crops them; every other value pads
            them, as in the training of LLaVA-1.5.
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
        "unfreeze_mm_vision_tower": True,  # the checkpoint has the tower's weights
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
    """Returns the directories of the decoder and the vision tower for LLaVA's own directory.

    Both directories are `path` if `path` has the tower's weights and its config.json names a known
    tower.

    Args:
        path: LLaVA's own directory.
        file: Path of the config.json in `path`.
        raw: Content of the config.json.
        find: Function that returns the directory of a path or a hub id.
        has_tower: Whether `path` has the weights of the vision tower.

    Raises:
        CheckpointError: The vision tower that config.json names is needed and cannot be found.
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
            f"{path} has {has}, but {lacks} ({name!r}) was not found; also give the directory of "
            f"the tower: llm={path},vision=DIRECTORY ({error})"
        ) from error

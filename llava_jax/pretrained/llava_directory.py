"""Reads and writes the config.json of the original code of LLaVA and LLaVA-NeXT.

A directory that this code wrote has a decoder and, in most cases, a projector. The vision tower is
in the same files or in another directory. Sources: haotian-liu/LLaVA 1.2.2 (LLaVA-1.5 and 1.6),
LLaVA-VL/LLaVA-NeXT at commit df17966 (LLaVA-NeXT and OneVision), and its branch "inference"
(LLaVA-NeXT-Video).
"""

import re
from collections.abc import Callable
from pathlib import Path

from llava_jax.config import (
    Aspect,
    ModelConfig,
    Parts,
    TilingConfig,
    VideoConfig,
    VisionConfig,
)
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.config_checks import check_types, require
from llava_jax.pretrained.family import read_pinpoints
from llava_jax.pretrained.safetensors import parse_json, read_json

DECODERS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""Maps the `model_type` of LLaVA's own code to the `model_type` of its decoder."""

_CLASSES = {"llama": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}
_BY_CLASS = {f"{theirs}ForCausalLM": ours for ours, theirs in _CLASSES.items()}

SIGLIP = "google/siglip-so400m-patch14-384"
"""Name of the only SigLIP tower that the original code has."""

_TOWERS = {
    "clip-vit-large-patch14-336": VisionConfig(),
    "clip-vit-large-patch14": VisionConfig(image_size=224),
    "siglip-so400m-patch14-384": VisionConfig(
        image_size=384,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        model_type="siglip_vision_model",
    ),
}
"""Sizes of the towers, for checkpoints that have the tower's weights but not its config.

The original code deletes the last of SigLIP's 27 layers and its pooling head.
"""

_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def decoder_settings(raw: Json) -> Json:
    """Returns a config.json with LLaVA's own `model_type` replaced by the decoder's `model_type`.

    Any other `model_type` is kept, and a missing `model_type` becomes "llama". The name of the
    class comes before `model_type`, because published models with a Qwen2 decoder have "llava".
    """
    kind = raw.get("model_type", "llama")
    if not isinstance(kind, str) or ("mm_vision_tower" not in raw and kind == "llava"):
        return raw
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    by_class = _BY_CLASS.get(name) if isinstance(name, str) else None
    return raw | {"model_type": by_class or DECODERS.get(kind, kind)}


def settings_of(parts: Parts) -> tuple[Path, Json]:
    """Returns the config.json that describes the model of separate parts, and its path.

    This is the config.json of the decoder's directory, which LLaVA's own code may have written. For
    a LoRA directory of LLaVA-NeXT on a plain decoder, it is the config.json beside the projector.
    """
    file = Path(parts.llm) / "config.json"
    raw = read_json(file) if file.is_file() else {}
    if parts.projector is not None and "mm_projector_type" not in raw:
        beside = Path(parts.projector).parent / "config.json"
        own = read_json(beside) if beside.is_file() else {}
        if is_tiled(own):
            return beside, own
    return file, raw


def is_tiled(raw: Json) -> bool:
    """Returns True if LLaVA's own config.json describes a model that cuts images into tiles."""
    merge = raw.get("mm_patch_merge_type")
    return "mm_projector_type" in raw and isinstance(merge, str) and merge.startswith("spatial")


def feature_settings(file: Path, raw: Json, vision: VisionConfig, video_token: int) -> Json:
    """Returns the `ModelConfig` fields for image features, from LLaVA's own config.json.

    Args:
        file: Path of the config.json, for messages.
        raw: Content of the config.json.
        vision: Sizes of the vision tower.
        video_token: Token id that stands for a video, if the model reads videos.

    Raises:
        CheckpointError: A field has a value that this package does not support.
    """
    supported = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": tuple(_STRATEGIES),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "mm_resampler_type": ("spatial_pool", None),
        "s2": (False, None),
    }
    for name, values in supported.items():
        if name in raw and raw[name] not in values:
            raise CheckpointError(
                f"{file}: {name} is {raw[name]!r:.80}; supported: "
                + " or ".join(repr(value) for value in values if value is not None)
            )
    settings: Json = {
        "vision_feature_layer": raw.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _STRATEGIES[raw.get("mm_vision_select_feature", "patch")],
    }
    if not vision.has_class_token:  # the code for SigLIP reads neither of these two fields
        last = -1 if vision == known_tower(raw) else -2
        settings = {"vision_feature_layer": last, "vision_feature_select_strategy": "full"}
    return settings | _tiling_settings(file, raw, vision, video_token)


def _tiling_settings(file: Path, raw: Json, vision: VisionConfig, video_token: int) -> Json:
    """Returns the fields "tiling" and "video" of a `ModelConfig`."""
    merge, aspect = raw.get("mm_patch_merge_type") or "flat", raw.get("image_aspect_ratio")
    if merge == "flat" and aspect in ("pad", "square", None):
        return {"tiling": None, "video": None}
    match = re.fullmatch(r"anyres(?:_max_([1-9][0-9]{,3}))?", str(aspect))
    if merge != "spatial_unpad" or match is None:
        raise CheckpointError(
            f"{file}: mm_patch_merge_type is {merge!r:.80} and image_aspect_ratio is "
            f"{aspect!r:.80}; supported: 'flat' with 'pad' or 'square', and 'spatial_unpad' with "
            "'anyres' or 'anyres_max_' and a number of tiles, such as 'anyres_max_9'"
        )
    if vision.has_class_token:
        select = raw.get("mm_vision_select_feature", "patch")
        require(file, "mm_vision_select_feature of a model with tiles", select, ("patch",))
    side = vision.image_size
    pinpoints = read_pinpoints(file, _listed(raw.get("image_grid_pinpoints"), side), side)
    most = None if match[1] is None else int(match[1])
    # LLaVA's own code has widths before heights.
    tiling = TilingConfig(tuple((h, w) for w, h in pinpoints), most, most is None)
    return {"tiling": tiling, "video": _video(file, raw, most, video_token)}


def _listed(pinpoints: object, side: int) -> object:
    """Returns resolutions as a list; a text such as "(1x1),...,(6x6)" counts tiles."""
    if not isinstance(pinpoints, str):
        return pinpoints
    text = pinpoints.replace(" ", "")
    match = re.fullmatch(r"\((\d{1,2})x(\d{1,2})\),\.\.\.,\((\d{1,2})x(\d{1,2})\)", text)
    if match is not None:
        first_width, first_height, width, height = map(int, match.groups())
        return [
            [side * columns, side * rows]
            for columns in range(first_width, width + 1)
            for rows in range(first_height, height + 1)
        ]
    try:
        return parse_json(text.replace("(", "[").replace(")", "]").encode(errors="replace"))
    except ValueError:
        return pinpoints


def _video(file: Path, raw: Json, max_tiles: int | None, token: int) -> VideoConfig | None:
    """Returns how videos become tokens: as in LLaVA-NeXT-Video, as in OneVision, or not at all."""
    mode, stride = raw.get("mm_spatial_pool_mode"), raw.get("mm_spatial_pool_stride")
    if raw.get("mm_resampler_type") == "spatial_pool":
        aspect = raw.get("image_aspect_ratio")
        require(file, "image_aspect_ratio of a LLaVA-NeXT-Video", aspect, ("anyres",))
        require(file, "mm_spatial_pool_mode", mode, ("average",))
        check_types(file, "mm_spatial_pool_", VideoConfig, {"stride": stride})
        return VideoConfig(token, "average", 2 if stride is None else stride)
    if max_tiles is None:
        return None
    position = raw.get("mm_newline_position") or "one_token"
    if position != "one_token":
        raise CheckpointError(
            f"{file}: mm_newline_position is {position!r:.80}, as in LLaVA-Video; newlines inside "
            "of a video, or none at all, are not supported, only 'one_token', one newline at the "
            "end of a video; if the model was only trained on images, set it to 'one_token'"
        )
    require(file, "mm_spatial_pool_mode", mode or "bilinear", ("bilinear",))
    require(file, "mm_spatial_pool_stride", 2 if stride is None else stride, (2,))
    return VideoConfig(token, "bilinear")


def image_aspect(raw: Json) -> Aspect | None:
    """Returns the handling of images that are not square, from LLaVA's own config.json.

    The result is None if LLaVA's own code did not write the config.json.
    """
    if "mm_vision_tower" not in raw:
        return None
    aspect = str(raw.get("image_aspect_ratio"))
    return "pad" if aspect == "pad" or aspect.startswith("anyres") else "crop"


def known_tower(raw: Json) -> VisionConfig | None:
    """Returns the sizes of the vision tower that LLaVA's own config.json names, if it is known."""
    name = raw.get("mm_vision_tower")
    return _TOWERS.get(name.rstrip("/").rsplit("/", 1)[-1]) if isinstance(name, str) else None


def _tower_directory(file: Path, raw: Json) -> str | None:
    """Returns the directory of the named vision tower, if it is on this machine.

    The tower is also looked for in the directory of the config.json `file`.
    """
    name = raw.get("mm_vision_tower")
    if not isinstance(name, str):
        return None
    places = (Path(name), file.parent / name, file.parent / Path(name).name)
    return next((str(place) for place in places if (place / "config.json").is_file()), None)


def official_settings(config: ModelConfig, llm: Json, tower: str, aspect: Aspect | None) -> Json:
    """Returns the content of a config.json that LLaVA's own code can read.

    Args:
        config: Sizes of the model.
        llm: Content of the decoder's config.json.
        tower: Path or hub id of the vision tower.
        aspect: Handling of images that are not square: "crop" crops them; every other value pads
            them, as in the training of LLaVA-1.5. Models that cut images into tiles pad the tiles.
    """
    strategies = {ours: theirs for theirs, ours in _STRATEGIES.items()}
    select, layer = strategies[config.vision_feature_select_strategy], config.vision_feature_layer
    if not config.vision.has_class_token:
        select, layer = "patch", -2  # the values in published configs; the code does not read them
    return llm | {
        "model_type": f"llava_{llm['model_type'].removesuffix('2')}",
        "architectures": [f"{_CLASSES[llm['model_type']]}ForCausalLM"],
        "mm_hidden_size": config.vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": select,
        "mm_vision_select_layer": layer,
        "mm_vision_tower": tower,
        "unfreeze_mm_vision_tower": True,  # the checkpoint has the tower's weights
        "image_aspect_ratio": "square" if aspect == "crop" else "pad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        **_official_tiling(config),
    }


def _official_tiling(config: ModelConfig) -> Json:
    """Returns the fields that say how images are cut into tiles and how videos become tokens."""
    if config.tiling is None:
        return {}
    tiles = config.tiling.max_tiles
    settings: Json = {
        "image_aspect_ratio": "anyres" if tiles is None else f"anyres_max_{tiles}",
        "image_grid_pinpoints": [[width, height] for height, width in config.tiling.grid_pinpoints],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": None,
    }
    if config.video is None:
        return settings
    settings |= {"mm_spatial_pool_mode": config.video.pooling}
    settings |= {"mm_spatial_pool_stride": config.video.stride}
    if config.video.pooling == "bilinear":
        return settings | {"mm_newline_position": "one_token"}
    size = config.vision.hidden_size
    return settings | {"mm_resampler_type": "spatial_pool", "mm_spatial_pool_out_channels": size}


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
    sizes, tower, name = known_tower(raw), _tower_directory(file, raw), raw.get("mm_vision_tower")
    # SigLIP's own directory has one layer more than the directory of LLaVA-NeXT.
    if has_tower and sizes is not None and (tower is None or not sizes.has_class_token):
        return Parts(str(path), str(path))
    try:
        return Parts(str(path), str(find(tower or str(name))))
    except ConfigError as error:
        lacks = "the config of its vision tower" if has_tower else "its vision tower"
        has = f"a decoder{' and a projector' if raw.get('mm_projector_type') else ''}"
        raise CheckpointError(
            f"{path} has {has}, but {lacks} ({name!r}) was not found; also give the directory of "
            f"the tower: llm={path},vision=DIRECTORY ({error})"
        ) from error

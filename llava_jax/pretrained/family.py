"""Describes the members of the LLaVA family: what their config.json and their processors contain.

Other code does not depend on the members. It works with a `ModelConfig`, which says as data how
images are cut into tiles and how videos become tokens.
"""

import dataclasses
import re
from pathlib import Path

from llava_jax.config import (
    NEXT_TILING,
    ONEVISION_TILING,
    SIGLIP,
    Aspect,
    ModelConfig,
    TilingConfig,
    VideoConfig,
    VisionConfig,
)
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.config_checks import check_types, require

# Vision towers that are used if config.json has no vision_config.
_CLIP: Json = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_SIGLIP: Json = dataclasses.asdict(SIGLIP)


def _pairs(tiling: TilingConfig) -> list[list[int]]:
    """Returns the resolutions as config.json contains them."""
    return [list(pair) for pair in tiling.grid_pinpoints]


_LLAVA_DEFAULTS: Json = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
_NEXT_DEFAULTS = _LLAVA_DEFAULTS | {"image_grid_pinpoints": _pairs(NEXT_TILING)}


@dataclasses.dataclass(frozen=True)
class Member:
    """A kind of LLaVA model, as transformers names it.

    Attributes:
        model_type: Value of the field in config.json.
        architecture: Class of the model.
        processor: Class of the processor.
        defaults: Values that transformers uses for fields that config.json lacks.
        text_type: Type of the decoder if its config has none.
        vision: Config of the vision tower if config.json has none.
        image_processor: Class of the image processor; None if it depends on how an image that is
            not square becomes square.
        video_processor: Class of the video processor; None if the model reads no videos.
        frame_aspect: How a frame of a video becomes square. With "squash", the processors name the
            height and width of images, and otherwise the length of the shorter side.
    """

    model_type: str
    architecture: str
    processor: str
    defaults: Json
    text_type: str = "llama"
    vision: Json = dataclasses.field(default_factory=lambda: _CLIP)
    image_processor: str | None = None
    video_processor: str | None = None
    frame_aspect: Aspect = "crop"


LLAVA = Member("llava", "LlavaForConditionalGeneration", "LlavaProcessor", _LLAVA_DEFAULTS)
_NEXT = Member(
    "llava_next",
    "LlavaNextForConditionalGeneration",
    "LlavaNextProcessor",
    _NEXT_DEFAULTS,
    image_processor="LlavaNextImageProcessor",
)
_NEXT_VIDEO = Member(
    "llava_next_video",
    "LlavaNextVideoForConditionalGeneration",
    "LlavaNextVideoProcessor",
    _NEXT_DEFAULTS
    | {
        "image_token_index": 32001,
        "video_token_index": 32000,
        "spatial_pool_mode": "average",
        "spatial_pool_stride": 2,
    },
    image_processor="LlavaNextImageProcessor",
    video_processor="LlavaNextVideoVideoProcessor",
)
_ONEVISION = Member(
    "llava_onevision",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionProcessor",
    _LLAVA_DEFAULTS
    | {
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": _pairs(ONEVISION_TILING),
        "vision_aspect_ratio": f"anyres_max_{ONEVISION_TILING.max_tiles}",
    },
    text_type="qwen2",
    vision=_SIGLIP,
    image_processor="LlavaOnevisionImageProcessor",
    video_processor="LlavaOnevisionVideoProcessor",
    frame_aspect="squash",
)
MEMBERS = {one.model_type: one for one in (LLAVA, _NEXT, _NEXT_VIDEO, _ONEVISION)}
"""All members by model type."""


def member_of(config: ModelConfig) -> Member:
    """Returns the member of the family that a model is."""
    if config.tiling is None:
        return LLAVA
    if config.video is None:
        return _NEXT
    return _NEXT_VIDEO if config.video.pooling == "average" else _ONEVISION


def read_member_fields(file: Path, member: Member, values: Json, vision: VisionConfig) -> Json:
    """Returns the fields "tiling" and "video" of a `ModelConfig`.

    Args:
        file: The config.json, for messages.
        member: Member of the family.
        values: Content of the config.json, completed with the member's defaults.
        vision: Sizes of the vision tower.

    Raises:
        CheckpointError: A field has a value that is not supported.
    """
    if "image_grid_pinpoints" not in member.defaults:
        return {"tiling": None, "video": None}
    grid = vision.image_size // vision.patch_size
    strategy, wanted = values["vision_feature_select_strategy"], "full"
    if vision.has_class_token:
        wanted = "default"
    if strategy != wanted:
        raise CheckpointError(
            f"{file}: vision_feature_select_strategy is {strategy!r:.80}, with which the features "
            f"are not those of {grid} x {grid} patches; set it to {wanted!r}"
        )
    pinpoints = read_pinpoints(file, values["image_grid_pinpoints"], vision.image_size)
    if member is not _ONEVISION:
        video = None if member is _NEXT else _read_average(file, values, grid)
        return {"tiling": TilingConfig(pinpoints), "video": video}
    aspect = values["vision_aspect_ratio"]
    match = re.fullmatch(r"anyres_max_([1-9][0-9]{,3})", str(aspect))
    if match is None:
        raise CheckpointError(
            f"{file}: vision_aspect_ratio is {aspect!r:.80}; it must be 'anyres_max_' and a number "
            "of tiles, such as 'anyres_max_9'"
        )
    video = VideoConfig(_read_video_token(file, values), "bilinear")
    return {"tiling": TilingConfig(pinpoints, int(match[1]), False), "video": video}


def _read_average(file: Path, values: Json, grid: int) -> VideoConfig:
    require(file, "spatial_pool_mode", values["spatial_pool_mode"], ("average",))
    stride = values["spatial_pool_stride"]
    check_types(file, "spatial_pool_", VideoConfig, {"stride": stride})
    if stride > grid:
        raise CheckpointError(
            f"{file}: spatial_pool_stride is {stride}, but a frame has only {grid} x {grid} "
            "features; use the stride of the original model"
        )
    return VideoConfig(_read_video_token(file, values), "average", stride)


def _read_video_token(file: Path, values: Json) -> int:
    token = values.get("video_token_id", values["video_token_index"])
    check_types(file, "the video's ", VideoConfig, {"token_id": token})
    return token


_MAX_PINPOINTS, _MAX_TILES = 1000, 1000


def read_pinpoints(file: Path, pinpoints: object, side: int) -> tuple[tuple[int, int], ...]:
    """Checks the resolutions that images are resized to, and returns them in the same order.

    Args:
        file: The config.json, for messages.
        pinpoints: Value of the field image_grid_pinpoints.
        side: Height and width of the images of the vision tower in pixels.

    Raises:
        CheckpointError: They are not pairs of multiples of `side`, or there are too many.
    """
    found = pinpoints if isinstance(pinpoints, list) else []
    is_length = lambda length: type(length) is int and length > 0 and length % side == 0
    is_pair = lambda pair: (
        isinstance(pair, list)
        and len(pair) == 2
        and all(map(is_length, pair))
        and pair[0] * pair[1] <= _MAX_TILES * side**2
    )
    if not 0 < len(found) <= _MAX_PINPOINTS or not all(map(is_pair, found)):
        raise CheckpointError(
            f"{file}: image_grid_pinpoints is {pinpoints!r:.80}; it must be a list of pairs of "
            f"lengths in pixels, [[{side}, {2 * side}], ...], which are multiples of the vision "
            f"tower's image_size {side}"
        )
    return tuple((pair[0], pair[1]) for pair in found)


def member_settings(config: ModelConfig) -> Json:
    """Returns the fields of config.json that say which member of the family a model is."""
    member = member_of(config)
    settings: Json = {"model_type": member.model_type, "architectures": [member.architecture]}
    if config.tiling is not None:
        settings["image_grid_pinpoints"] = _pairs(config.tiling)
    if config.video is not None:
        settings["video_token_index"] = config.video.token_id
    if member is _NEXT_VIDEO and config.video is not None:
        settings |= {"spatial_pool_mode": "average", "spatial_pool_stride": config.video.stride}
    if member is _ONEVISION and config.tiling is not None:
        settings["vision_aspect_ratio"] = f"anyres_max_{config.tiling.max_tiles}"
    return settings


def processor_settings(config: ModelConfig, image_token: str, video_token: str | None) -> Json:
    """Returns the content of processor_config.json.

    Args:
        config: Sizes of the model.
        image_token: Text of the image token.
        video_token: Text of the video token; None if the model reads no videos.
    """
    member = member_of(config)
    settings: Json = {
        "processor_class": member.processor,
        "image_token": image_token,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    if video_token is not None:
        settings["video_token"] = video_token
    if member is _ONEVISION:
        aspect = member_settings(config)["vision_aspect_ratio"]
        return settings | {"num_image_tokens": config.image_tokens, "vision_aspect_ratio": aspect}
    return settings | {
        "patch_size": config.vision.patch_size,
        # With 0 for CLIP, transformers expects one image token too few.
        "num_additional_image_tokens": int(config.vision.has_class_token),
    }

"""Reads and writes the image processor of a checkpoint, which says how images become pixels."""

import dataclasses
import json
from pathlib import Path

from llava_jax.config import Aspect, ModelConfig, Parts
from llava_jax.data.images import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, ImageTransform
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.family import member_of
from llava_jax.pretrained.model_config import read_tower
from llava_jax.pretrained.safetensors import read_json

PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
"""Files of a checkpoint; transformers 5 keeps the settings of all in the first file."""

_EXIF = "exif_orientation"  # setting of this package only
_BICUBIC = 3  # Pillow's number for bicubic resampling
_MAX_LEVEL = 1000  # larger than any mean or standard deviation
_MAX_SIDE = 2**14  # pixels; larger than any side of a model's images


def load_image_transform(
    source: str | Path | Parts, aspect: Aspect | None = None
) -> ImageTransform:
    """Reads the image processor of a checkpoint.

    Args:
        source: Directory of a LLaVA, or separate parts. With parts, the vision tower's image
            processor is read; if it does not exist, the default of CLIP or SigLIP is used.
        aspect: Handling of images that are not square; None uses the checkpoint's setting.

    Raises:
        CheckpointError: There is no image processor, or it has unsupported settings.
    """
    directory = Path(source.vision if isinstance(source, Parts) else source)
    found = _image_settings(directory)
    if found is None and isinstance(source, Parts):
        tower = read_tower(source)
        size, is_siglip = tower.image_size, tower.model_type == "siglip_vision_model"
        return ImageTransform(size, size, size, *_statistics(is_siglip), aspect=aspect or "pad")
    if found is None:
        raise CheckpointError(
            f"{directory} has no {IMAGE_PROCESSOR}; copy it from the original model"
        )
    return _transform_of(*found, aspect)


def _transform_of(file: Path, settings: Json, aspect: Aspect | None) -> ImageTransform:
    """Returns the transform that the settings of an image processor or video processor describe."""
    edge, height, width, own_aspect = _sizes(file, settings)
    steps = ("do_resize", "do_rescale", "do_normalize")
    odd = [f"{step} false" for step in steps if not settings.get(step, True)]
    resample = settings.get("resample", _BICUBIC)
    if resample != _BICUBIC:
        odd.append(f"resample {resample!r:.80}")
    if odd:
        raise CheckpointError(
            f"{file}: images must be resized (bicubic, resample 3), rescaled and normalized; found "
            f"{', '.join(odd)}"
        )
    is_siglip = str(settings.get("image_processor_type", "")).startswith("Siglip")
    mean, std = _statistics(is_siglip)
    mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    rescale = settings.get("rescale_factor", ImageTransform.rescale)
    if not (_is_numbers(mean, 3) and _is_numbers(std, 3, 1e-6) and _is_numbers([rescale], 1, 1e-6)):
        raise CheckpointError(
            f"{file}: image_mean must be 3 numbers, image_std 3 positive numbers, rescale_factor a "
            f"positive number; found {mean!r:.80}, {std!r:.80} and {rescale!r:.80}"
        )
    upright = settings.get(_EXIF, True)
    if not isinstance(upright, bool):
        raise CheckpointError(f"{file}: {_EXIF} must be true or false, found {upright!r:.80}")
    return ImageTransform(
        shortest_edge=edge,
        height=height,
        width=width,
        mean=tuple(mean),
        std=tuple(std),
        rescale=rescale,
        aspect=aspect or own_aspect,
        exif_orientation=upright,
    )


def load_fitting_transform(
    source: str | Path | Parts, config: ModelConfig, aspect: Aspect | None = None
) -> ImageTransform:
    """Calls `load_image_transform`, and checks that its images are those of the model.

    The transform cuts images into tiles if the model does.

    Raises:
        CheckpointError: `load_image_transform` fails, or the image processor has other tiles than
            the model.
        ConfigError: The image processor's image size differs from the model's, or `aspect` is not
            "pad" although the model cuts images into tiles.
    """
    transform = load_image_transform(source, aspect)
    _check_size(transform, source, config)
    if config.tiling is None:
        return transform
    if aspect not in (None, "pad"):
        raise ConfigError(
            f"data.image_aspect is {aspect!r}, but this model cuts images into tiles, which are "
            "padded; set data.image_aspect to 'pad'"
        )
    found = None if isinstance(source, Parts) else _image_settings(Path(source))
    pinpoints = None if found is None else found[1].get("image_grid_pinpoints")
    if found and pinpoints and pinpoints != [list(p) for p in config.tiling.grid_pinpoints]:
        raise CheckpointError(
            f"{found[0]}: image_grid_pinpoints differs from the one in config.json; both must say "
            "how the model was trained, so use the image processor of the same model"
        )
    return dataclasses.replace(transform, tiling=config.tiling)


def load_frame_transform(source: str | Path | Parts, config: ModelConfig) -> ImageTransform | None:
    """Reads the video processor of a checkpoint, which says how frames become pixels.

    Args:
        source: Directory or parts of the checkpoint.
        config: Sizes of the model.

    Returns:
        The transform of a frame; None if the model reads no videos. Without a video processor,
        frames are normalized as images are.

    Raises:
        CheckpointError: The video processor or the image processor has unsupported settings.
        ConfigError: The size of the frames differs from the model's image size.
    """
    if config.video is None:
        return None
    found = None if isinstance(source, Parts) else _settings(Path(source), _VIDEO_FILES)
    if found is None:
        transform = load_image_transform(source, member_of(config).frame_aspect)
    else:
        transform = _transform_of(*found, None)
    _check_size(transform, source, config)
    return transform


def _check_size(transform: ImageTransform, source: str | Path | Parts, config: ModelConfig) -> None:
    if not transform.height == transform.width == config.vision.image_size:
        raise ConfigError(
            f"{source}: the image processor makes images of {transform.height} x {transform.width} "
            f"pixels, but the vision tower takes {config.vision.image_size} x "
            f"{config.vision.image_size}; use the image processor of the same model"
        )


def _is_numbers(values: object, count: int, least: float = -_MAX_LEVEL) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(type(value) in (int, float) and least <= value <= _MAX_LEVEL for value in values)
    )


def _statistics(is_siglip: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Returns the default mean and standard deviation of each channel."""
    return (SIGLIP_MEAN, SIGLIP_STD) if is_siglip else (CLIP_MEAN, CLIP_STD)


def _sizes(file: Path, settings: Json) -> tuple[int, int, int, Aspect]:
    """Returns an image processor's shortest edge, height and width in pixels, and its aspect."""
    size, crop = settings.get("size", 224), settings.get("crop_size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    is_side = lambda side: type(side) is int and 0 < side <= _MAX_SIDE
    if not all(
        isinstance(sides, dict) and all(map(is_side, sides.values())) for sides in (size, crop)
    ):
        raise CheckpointError(
            f"{file}: size is {size!r:.80} and crop_size is {crop!r:.80}; all their values must be "
            f"integers from 1 to {_MAX_SIDE} (pixels)"
        )
    is_exact = {"height", "width"} <= size.keys()
    crops = settings.get("do_center_crop", not is_exact or "crop_size" in settings)
    if is_exact and not crops:
        crop = size
    is_known = crop == size if is_exact else crops and "shortest_edge" in size
    if not is_known or not {"height", "width"} <= crop.keys():
        raise CheckpointError(
            f"{file}: size is {size}, do_center_crop {str(bool(crops)).lower()}, crop_size {crop}; "
            "size must be a shortest_edge with a crop, or a height and width without a crop; a "
            "crop_size must be a height and width"
        )
    height, width = crop["height"], crop["width"]
    aspect = "pad" if settings.get("do_pad") else "squash" if is_exact else "crop"
    return size.get("shortest_edge", max(height, width)), height, width, aspect


# Files with the settings, and the field in which transformers 5 nests them.
_IMAGE_FILES = ((PROCESSOR, "image_processor"), (IMAGE_PROCESSOR, None))
_VIDEO_FILES = ((PROCESSOR, "video_processor"), (VIDEO_PROCESSOR, None))


def _image_settings(directory: Path) -> tuple[Path, Json] | None:
    """Returns the file and settings of a directory's image processor, or None if it has none."""
    return _settings(directory, _IMAGE_FILES)


def _settings(
    directory: Path, files: tuple[tuple[str, str | None], ...]
) -> tuple[Path, Json] | None:
    """Returns the first file that has settings, and the settings; None if no file has any."""
    for name, inner in files:
        file = directory / name
        if not file.exists():
            continue
        settings = read_json(file)
        found = settings if inner is None else settings.get(inner)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise CheckpointError(f"{file}: {inner} is {found!r:.80}; it must be an object")
        return file, {key: value for key, value in found.items() if value is not None}
    return None


def has_image_processor(directory: Path) -> bool:
    """Returns True if a directory has the settings of an image processor."""
    return _image_settings(directory) is not None


def save_image_processor(
    transform: ImageTransform, directory: Path, config: ModelConfig | None = None
) -> None:
    """Writes a transform as the settings of an image processor.

    Args:
        transform: Transform of the images.
        directory: Existing directory.
        config: Sizes of the model; None for a vision tower without a decoder.

    Raises:
        OSError: The file cannot be written.
    """
    settings = _image_processor(transform)
    if config is not None and config.tiling is not None:
        member, aspect = member_of(config), member_of(config).frame_aspect
        settings = _image_processor(dataclasses.replace(transform, aspect=aspect)) | {
            "image_processor_type": member.image_processor,
            "processor_class": member.processor,
            "do_pad": True,
            "image_grid_pinpoints": [list(pair) for pair in config.tiling.grid_pinpoints],
        }
    write_json(directory / IMAGE_PROCESSOR, settings)


def save_video_processor(transform: ImageTransform, directory: Path, config: ModelConfig) -> None:
    """Writes the transform of video frames as the settings of a video processor.

    Args:
        transform: Transform of a frame.
        directory: Existing directory.
        config: Sizes of the model, which reads videos.

    Raises:
        OSError: The file cannot be written.
    """
    member, settings = member_of(config), _image_processor(transform)
    del settings["image_processor_type"]
    own = {"video_processor_type": member.video_processor, "processor_class": member.processor}
    write_json(directory / VIDEO_PROCESSOR, settings | own)


def write_image_processor(source: str | Path | Parts, directory: Path) -> None:
    """Writes the image processor into the directory of a vision tower.

    Args:
        source: Checkpoint that the image processor is read from. If it has no image processor, the
            default for the tower is written.
        directory: Directory of the tower, with its config.json.

    Raises:
        CheckpointError: The image processor cannot be read or is not supported.
    """
    if not isinstance(source, Parts) and _image_settings(Path(source)) is None:
        source = Parts(str(directory), str(directory))
    save_image_processor(load_image_transform(source), directory)


_PROCESSORS: dict[Aspect, str] = {
    "pad": "LlavaImageProcessor",
    "crop": "CLIPImageProcessor",
    "squash": "SiglipImageProcessor",
}


def _image_processor(transform: ImageTransform) -> Json:
    sides = {"height": transform.height, "width": transform.width}
    sizes = {"size": {"shortest_edge": transform.shortest_edge}, "crop_size": sides}
    return {
        "image_processor_type": _PROCESSORS[transform.aspect],
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if transform.aspect == "pad" else {}),
        **({"size": sides} if transform.aspect == "squash" else sizes | {"do_center_crop": True}),
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": transform.rescale,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        _EXIF: transform.exif_orientation,  # transformers ignores this setting
    }


def write_json(file: Path, settings: Json) -> None:
    """Writes a settings file in the format of transformers."""
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

"""Reads and writes the image processor and the generation settings of a checkpoint."""

import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from llava_jax.config import Aspect, ModelConfig, Parts, format_source
from llava_jax.data.conversation import end_token
from llava_jax.data.images import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN, SIGLIP_STD, ImageTransform
from llava_jax.data.templates import Template
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.chat_templates import chat_template, own_templates, write_chat_templates
from llava_jax.pretrained.model_config import read_vision_config
from llava_jax.pretrained.safetensors import read_json
from llava_jax.pretrained.tokenizer import has_tokenizer, load_tokenizer

_BICUBIC = 3  # Pillow's number for bicubic resampling
_MAX_LEVEL = 1000  # larger than any mean or standard deviation
_MAX_SIDE = 2**14  # pixels; larger than any side of a model's images
_PROCESSOR, _IMAGES = "processor_config.json", "preprocessor_config.json"


def has_processor(directory: Path) -> bool:
    """Returns True if a directory has both a tokenizer and an image processor."""
    return has_tokenizer(directory) and _image_settings(directory) is not None


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
        tower = read_vision_config(directory)
        size, is_siglip = tower.image_size, tower.model_type == "siglip_vision_model"
        return ImageTransform(size, size, size, *_statistics(is_siglip), aspect=aspect or "pad")
    if found is None:
        raise CheckpointError(f"{directory} has no {_IMAGES}; copy it from the original model")
    file, settings = found
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
    return ImageTransform(
        shortest_edge=edge,
        height=height,
        width=width,
        mean=tuple(mean),
        std=tuple(std),
        rescale=rescale,
        aspect=aspect or own_aspect,
    )


def load_fitting_transform(
    source: str | Path | Parts, config: ModelConfig, aspect: Aspect | None = None
) -> ImageTransform:
    """Calls `load_image_transform`, and checks that its image size equals the model's image size.

    Raises:
        CheckpointError: `load_image_transform` fails.
        ConfigError: The image processor's image size differs from the model's.
    """
    transform = load_image_transform(source, aspect)
    if not transform.height == transform.width == config.vision.image_size:
        raise ConfigError(
            f"{source}: the image processor makes images of {transform.height} x {transform.width} "
            f"pixels, but the vision tower takes {config.vision.image_size} x "
            f"{config.vision.image_size}; use the image processor of the same model"
        )
    return transform


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


def _image_settings(directory: Path) -> tuple[Path, Json] | None:
    """Returns the file and settings of a directory's image processor, or None if it has none."""
    # transformers 5 nests the settings in processor_config.json.
    for name, inner in ((_PROCESSOR, "image_processor"), (_IMAGES, None)):
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


def save_processor(
    source: str | Path | Parts,
    directory: str | Path,
    config: ModelConfig,
    *,
    template: Template | None = None,
    aspect: Aspect | None = None,
) -> None:
    """Writes the tokenizer, image processor, chat template and generation settings of a model.

    `AutoProcessor.from_pretrained` then makes the same prompts and pixels as in training.

    Args:
        source: Checkpoint whose tokenizer and image processor are written.
        directory: Existing directory.
        config: Sizes of the model.
        template: Template of the conversations; None keeps the source's own chat template.
        aspect: Handling of images that are not square; None keeps the source's setting.

    Raises:
        CheckpointError: `source` cannot be read, or its tokenizer lacks the model's image token.
        ConfigError: The tokenizer lacks the token that ends the template's answers.
        OSError: A file cannot be written.
    """
    directory = Path(directory)
    tokenizer = load_tokenizer(source)
    transform = load_image_transform(source, aspect)
    image_token = cast("str | None", tokenizer.convert_ids_to_tokens(config.image_token_id))
    if not image_token or tokenizer.encode(image_token, add_special_tokens=False) != [
        config.image_token_id
    ]:
        raise CheckpointError(
            f"{format_source(source)}: the tokenizer has no token with the id "
            f"{config.image_token_id}, the image token of the model; use the model's own tokenizer"
        )
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises no OSError for a failed write
        raise OSError(f"{directory}: the tokenizer cannot be written: {error}") from error
    write_json(directory / "tokenizer_config.json", _tokenizer_settings(directory))
    write_json(directory / _IMAGES, _image_processor(transform))
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": config.vision.patch_size,
        # With 0 for CLIP, transformers expects one image token too few.
        "num_additional_image_tokens": int(config.vision.has_class_token),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(directory / _PROCESSOR, processor)
    generation = generation_settings(source, tokenizer, config, template)
    write_json(directory / "generation_config.json", generation)
    if template is not None:
        templates = {"default": chat_template(template, tokenizer, image_token)}
    else:
        templates = {} if isinstance(source, Parts) else own_templates(source, tokenizer)
    write_chat_templates(directory, templates)


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
    write_json(directory / _IMAGES, _image_processor(load_image_transform(source)))


def write_json(file: Path, settings: Json) -> None:
    """Writes a settings file in the format of transformers."""
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _tokenizer_settings(directory: Path) -> Json:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for own in ("backend", "local_files_only"):  # these tell how the tokenizer was loaded
        settings.pop(own, None)
    # In all versions of transformers, this class uses tokenizer.json unchanged.
    return settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
    }


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
    }


def generation_settings(
    source: str | Path | Parts,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    template: Template | None,
) -> Json:
    """Returns settings for greedy decoding, with the end tokens of the source and the template.

    Other settings of the source are not kept, because with some of them (such as Vicuna's
    temperature without sampling) transformers refuses to save the model again.

    Raises:
        CheckpointError: The source's generation_config.json cannot be used.
        ConfigError: The tokenizer lacks the token that ends the template's answers.
    """
    ends = _given_ends(source, cast("int | None", tokenizer.eos_token_id))
    known = _as_list(ends)
    end = None if template is None else end_token(template, tokenizer)
    settings = {
        "do_sample": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if end is None or end in known else [*known, end],
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in settings.items() if value is not None}


def end_tokens(source: str | Path | Parts) -> frozenset[int]:
    """Returns the ids of the tokens that end a generated text, as read from a checkpoint."""
    found = _given_ends(source, None)
    if found is None and has_tokenizer(source):
        found = cast("int | None", load_tokenizer(source).eos_token_id)
    return frozenset(_as_list(found))


def _given_ends(source: str | Path | Parts, default: int | None) -> int | list[int] | None:
    file = Path(source.llm if isinstance(source, Parts) else source) / "generation_config.json"
    found: Any = (read_json(file) if file.exists() else {}).get("eos_token_id", default)
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(end) is not int for end in ends):
        raise CheckpointError(f"{file}: eos_token_id is {found!r:.80}, not an id or a list of ids")
    return found


def _as_list(ends: int | list[int] | None) -> list[int]:
    return ends if isinstance(ends, list) else [] if ends is None else [ends]

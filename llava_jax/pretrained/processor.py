"""Writes the files of a checkpoint's processor, and reads its end tokens."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from llava_jax.config import Aspect, ModelConfig, Parts
from llava_jax.data.conversation import end_token
from llava_jax.data.templates import Template
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.chat_templates import chat_template, own_templates, write_chat_templates
from llava_jax.pretrained.family import member_of, processor_settings
from llava_jax.pretrained.image_processor import (
    PROCESSOR,
    has_image_processor,
    load_frame_transform,
    load_image_transform,
    save_image_processor,
    save_video_processor,
    write_json,
)
from llava_jax.pretrained.safetensors import read_json
from llava_jax.pretrained.tokenizer import (
    has_tokenizer,
    image_token_of,
    load_tokenizer,
    video_token_of,
)


def has_processor(directory: Path) -> bool:
    """Returns True if a directory has both a tokenizer and an image processor."""
    return has_tokenizer(directory) and has_image_processor(directory)


def save_processor(
    source: str | Path | Parts,
    directory: str | Path,
    config: ModelConfig,
    *,
    template: Template | None = None,
    aspect: Aspect | None = None,
    exif_orientation: bool | None = None,
) -> None:
    """Writes the tokenizer, image processor, chat template and generation settings of a model.

    `AutoProcessor.from_pretrained` then makes the same prompts and pixels as in training.

    Args:
        source: Checkpoint whose tokenizer and image processor are written.
        directory: Existing directory.
        config: Sizes of the model.
        template: Template of the conversations; None keeps the source's own chat template.
        aspect: Handling of images that are not square; None keeps the source's setting.
        exif_orientation: Whether images are turned upright as their Exif orientation says; None
            keeps the source's setting.

    Raises:
        CheckpointError: `source` cannot be read, or its tokenizer lacks the model's image token.
        ConfigError: The tokenizer lacks the token that ends the template's answers.
        OSError: A file cannot be written.
    """
    directory = Path(directory)
    tokenizer = load_tokenizer(source)
    transform = load_image_transform(source, aspect)
    image_token = image_token_of(tokenizer, config, source)
    try:
        tokenizer.save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises no OSError for a failed write
        raise OSError(f"{directory}: the tokenizer cannot be written: {error}") from error
    write_json(directory / "tokenizer_config.json", _tokenizer_settings(directory, config))
    if exif_orientation is not None:
        transform = dataclasses.replace(transform, exif_orientation=exif_orientation)
    save_image_processor(transform, directory, config)
    frames = load_frame_transform(source, config)
    if frames is not None:
        save_video_processor(frames, directory, config)
    video_token = video_token_of(tokenizer, config, source)
    write_json(directory / PROCESSOR, processor_settings(config, image_token, video_token))
    generation = generation_settings(source, tokenizer, config, template)
    write_json(directory / "generation_config.json", generation)
    if template is not None:
        templates = {"default": chat_template(template, tokenizer, image_token, video_token)}
    else:
        templates = {} if isinstance(source, Parts) else own_templates(source, tokenizer)
    write_chat_templates(directory, templates)


def _tokenizer_settings(directory: Path, config: ModelConfig) -> Json:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for own in ("backend", "local_files_only"):  # these tell how the tokenizer was loaded
        settings.pop(own, None)
    # In all versions of transformers, this class uses tokenizer.json unchanged.
    return settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": member_of(config).processor,
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

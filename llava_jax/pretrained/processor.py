"""Writes the files of a checkpoint's processor, and reads its chat template and end tokens."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from llava_jax.config import Aspect, ModelConfig, Parts
from llava_jax.data.conversation import adds_bos, end_token
from llava_jax.data.templates import SYSTEM_SLOT, TEMPLATES, Template
from llava_jax.disk import Json, copy_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.image_processor import (
    PROCESSOR,
    has_image_processor,
    load_image_transform,
    save_image_processor,
    write_json,
)
from llava_jax.pretrained.safetensors import read_json
from llava_jax.pretrained.tokenizer import has_tokenizer, image_token_of, load_tokenizer


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
    write_json(directory / "tokenizer_config.json", _tokenizer_settings(directory))
    if exif_orientation is not None:
        transform = dataclasses.replace(transform, exif_orientation=exif_orientation)
    save_image_processor(transform, directory)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": config.vision.patch_size,
        # With 0 for CLIP, transformers expects one image token too few.
        "num_additional_image_tokens": int(config.vision.has_class_token),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(directory / PROCESSOR, processor)
    generation = generation_settings(source, tokenizer, config, template)
    write_json(directory / "generation_config.json", generation)
    if template is not None:
        text = chat_template(template, tokenizer, image_token)
        (directory / "chat_template.jinja").write_text(text)
    elif not isinstance(source, Parts) and not directory.samefile(source):
        for file in Path(source).glob("chat_template.j*"):  # .jinja, or .json as in older versions
            copy_regular(file, directory / file.name)


def _tokenizer_settings(directory: Path) -> Json:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for own in ("backend", "local_files_only"):  # these tell how the tokenizer was loaded
        settings.pop(own, None)
    # In all versions of transformers, this class uses tokenizer.json unchanged.
    return settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
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


# Renders the same text as `data.conversation`. `chat_template` defines the variables.
_JINJA = """\
{%- if messages[0]["role"] == "system" -%}
  {%- set parts = messages[0]["content"] -%}
  {%- set system = parts if parts is string else parts | map(attribute="text") | join("") -%}
{%- endif -%}
{%- set system = system_prefix + system + system_suffix if system else "" -%}
{%- set asked = namespace(before=false) -%}
{%- for message in messages if message["role"] != "system" -%}
  {%- set content = message["content"] -%}
  {%- set parts = [{"type": "text", "text": content}] if content is string else content -%}
  {%- set images = parts | selectattr("type", "equalto", "image") | list | length -%}
  {%- set texts = parts | selectattr("type", "equalto", "text") | map(attribute="text") -%}
  {%- set text = texts | join("") -%}
  {%- if message["role"] == "user" -%}
    {%- set text = (text | trim if images else text) if keeps_questions else "" -%}
    {%- set suffix = image_suffix if text else "" -%}
    {{ human_prefix if asked.before else first_prefix | replace("{system}", system) }}
    {{- (image_token + suffix) * images + text }}
    {%- set asked.before = true -%}
  {%- else -%}
    {{ answer_prefix + text + answer_suffix + separator }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ answer_prefix.rstrip(" ") }}{%- endif -%}
"""


# Tokens, or texts in a chat template, that show which template a decoder was trained with.
_MARKS = {
    "<|start_header_id|>": "llama_3",
    "<|im_start|>": "chatml",
    "<<SYS>>": "llama_2",
    "[INST]": "mistral_instruct",
}


def choose_template(source: str | Path | Parts, *, is_xtuner: bool = False) -> str | None:
    """Chooses the template of a decoder by its tokenizer; the default is Vicuna's template.

    Args:
        source: Directory or parts with the tokenizer.
        is_xtuner: Whether XTuner trained the model. XTuner and LLaVA have different Vicuna prompts.

    Returns:
        Name of the template; None if the tokenizer's own chat template supports images.
    """
    tokenizer = load_tokenizer(source)
    own = str(tokenizer.chat_template or "")  # a text model's template ignores images
    if "image" in own and not is_xtuner:
        return None
    words = tokenizer.get_vocab()
    known = (name for mark, name in _MARKS.items() if mark in words or mark in own)
    return next(known, "vicuna_xtuner" if is_xtuner else "vicuna_v1")


def read_chat_template(
    source: str | Path | Parts, tokenizer: PreTrainedTokenizerBase, image_token: str
) -> tuple[str, Template | None]:
    """Returns a checkpoint's own chat template, or a new template if its own ignores images.

    Args:
        source: Directory of a LLaVA, or separate parts.
        tokenizer: Tokenizer of `source`.
        image_token: Text of the image token.

    Returns:
        Jinja source, and the template that it was made from; for the checkpoint's own chat
        template, the second value is None.
    """
    directory = Path(source.llm if isinstance(source, Parts) else source)
    newer, older = directory / "chat_template.jinja", directory / "chat_template.json"
    own = tokenizer.chat_template or ""  # from chat_template.jinja, if there is one
    if older.exists() and not newer.exists():
        own = read_json(older).get("chat_template", "")
    if isinstance(own, dict):  # several templates by name
        own = own.get("default", "")
    if not isinstance(own, str):
        raise CheckpointError(f"{directory}: the chat template is {own!r:.80}; it must be a text")
    if "image" in own:
        return own, None
    template = TEMPLATES[choose_template(source) or "vicuna_v1"]
    return chat_template(template, tokenizer, image_token), template


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """Returns a conversation template as Jinja source for `apply_chat_template`.

    A message has the role user or assistant. The first message may have the role system; its text
    replaces the system text of the template. The content of a message is a text, or a list of texts
    and images.
    """
    bos, eos = (cast("str | None", t) or "" for t in (tokenizer.bos_token, tokenizer.eos_token))
    named = {"{bos}": bos, "{eos}": eos, "{bos?}": ""}

    def text(part: str) -> str:
        for name, token in named.items():
            part = part.replace(name, token)
        # Other names in braces are control tokens, which are written without the braces.
        return re.sub(r"\{([^{}]+)\}", lambda m: m[0] if m[0] == SYSTEM_SLOT else m[1], part)

    first_prefix = text(template.begin + template.human_prefix)
    if bos and adds_bos(tokenizer):
        first_prefix = first_prefix.removeprefix(bos)
    values = {
        "system": template.system,
        "system_prefix": text(template.system_prefix),
        "system_suffix": text(template.system_suffix),
        "first_prefix": first_prefix,
        "human_prefix": text(template.human_prefix.replace(SYSTEM_SLOT, "")),
        "answer_prefix": text(template.answer_prefix),
        "answer_suffix": text(template.answer_suffix),
        "separator": text(template.separator),
        "image_token": image_token,
        "image_suffix": text(template.image_suffix),
        "keeps_questions": template.keeps_questions,
    }
    # These JSON literals are also Jinja literals.
    lines = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()]
    return "\n".join([*lines, _JINJA])

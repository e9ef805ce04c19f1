"""What turns text and images into a model's inputs: read from checkpoints, written beside them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from llava_jax.config import ModelConfig, Parts
from llava_jax.data.conversation import SYSTEM_PLACE, Template, adds_bos
from llava_jax.data.images import ImageTransform
from llava_jax.hf.model_config import read_vision_config
from llava_jax.hf.tensorfile import CheckpointError
from llava_jax.hf.tokenizer import load_tokenizer

_BICUBIC = 3  # Pillow's number
_PROCESSOR, _IMAGES = "processor_config.json", "preprocessor_config.json"

Aspect = Literal["pad", "crop"]


def load_image_transform(place: str | Path | Parts, aspect: Aspect | None = None) -> ImageTransform:
    """How a checkpoint's images become pixels.

    Args:
        place: A LLaVA's directory, or separate parts: then the vision tower's. A tower without an
            image processor gets CLIP's own, at its image size.
        aspect: What happens to images that are not square; None is what the checkpoint says.

    Raises:
        CheckpointError: There is no image processor, or one that does something else.
    """
    directory = Path(place.vision if isinstance(place, Parts) else place)
    found = _image_settings(directory)
    if found is None and isinstance(place, Parts):
        size = read_vision_config(directory).image_size
        return ImageTransform(size, size, size, aspect=aspect or "pad")
    if found is None:
        raise CheckpointError(f"{directory} has no {_IMAGES}")
    file, settings = found
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    skipped = [step for step in steps if not settings.get(step, True)]
    if skipped or settings.get("resample", _BICUBIC) != _BICUBIC:
        raise CheckpointError(
            f"{file}: images must be resized (bicubic, resample 3), cropped, rescaled and "
            f"normalised; found {', '.join(f'{step} false' for step in skipped) or 'resample'} "
            f"{settings.get('resample', _BICUBIC)}"
        )
    size, crop = settings.get("size", 224), settings.get("crop_size", 224)
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    if edge is None or not {"height", "width"} <= crop.keys():
        raise CheckpointError(
            f"{file}: size {size} and crop_size {crop}; supported: a shortest_edge, and a height "
            "and width"
        )
    default = ImageTransform()
    return ImageTransform(
        shortest_edge=edge,
        crop_height=crop["height"],
        crop_width=crop["width"],
        mean=tuple(settings.get("image_mean", default.mean)),
        std=tuple(settings.get("image_std", default.std)),
        rescale=settings.get("rescale_factor", default.rescale),
        aspect=aspect or ("pad" if settings.get("do_pad") else "crop"),
    )


def _image_settings(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The image processor's settings and their file; transformers 5 nests them in another."""
    for name, inner in ((_PROCESSOR, "image_processor"), (_IMAGES, None)):
        file = directory / name
        if not file.is_file():
            continue
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file} is not JSON: {error}") from error
        if inner is None:
            return file, settings
        if inner in settings:
            return file, settings[inner]
    return None


def save_processor(
    source: str | Path | Parts,
    directory: str | Path,
    config: ModelConfig,
    *,
    template: Template | None = None,
    aspect: Aspect | None = None,
) -> None:
    """Writes tokenizer, image processor, chat template and generation settings for transformers.

    `AutoProcessor.from_pretrained` then makes the prompts and pixels that the model was trained on.

    Args:
        source: The checkpoint to take the tokenizer and the image processor from.
        directory: Must exist.
        config: Of the model.
        template: What conversations look like; None keeps the source's own chat template.
        aspect: What happens to images that are not square; None keeps what the source says.

    Raises:
        CheckpointError: `source` cannot be read, or its tokenizer is not the model's.
    """
    directory = Path(directory)
    tokenizer = load_tokenizer(source)
    transform = load_image_transform(source, aspect)
    image_token = cast("str | None", tokenizer.convert_ids_to_tokens(config.image_token_id))
    if not image_token or tokenizer.encode(image_token, add_special_tokens=False) != [
        config.image_token_id
    ]:
        raise CheckpointError(
            f"{source}: the tokenizer has no token {config.image_token_id}, which the model takes "
            "for an image; they belong to different models"
        )
    tokenizer.save_pretrained(directory)
    _write(directory / "tokenizer_config.json", _tokenizer_settings(directory))
    _write(directory / _IMAGES, _clip_settings(transform))
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": config.vision.patch_size,
        # The class token; with 0 here transformers expects one image token too few.
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    _write(directory / _PROCESSOR, processor)
    _write(directory / "generation_config.json", _generation_settings(source, tokenizer, config))
    if template is not None:
        text = chat_template(template, tokenizer, image_token)
        (directory / "chat_template.jinja").write_text(text)
    elif not isinstance(source, Parts) and not directory.samefile(source):
        for file in Path(source).glob("chat_template.j*"):  # .jinja, and .json before it
            shutil.copy(file, directory)


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _tokenizer_settings(directory: Path) -> dict[str, Any]:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    for own in ("backend", "local_files_only"):  # how it was opened here, not what it is
        settings.pop(own, None)
    # The name that all versions of transformers have for "as tokenizer.json says".
    return settings | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
    }


def _clip_settings(transform: ImageTransform) -> dict[str, Any]:
    pads = transform.aspect == "pad"
    return {
        "image_processor_type": "LlavaImageProcessor" if pads else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        **({"do_pad": True} if pads else {}),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": transform.shortest_edge},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": transform.crop_height, "width": transform.crop_width},
        "do_rescale": True,
        "rescale_factor": transform.rescale,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
    }


def _generation_settings(
    source: str | Path | Parts, tokenizer: PreTrainedTokenizerBase, config: ModelConfig
) -> dict[str, Any]:
    """Greedy decoding, and which tokens end it.

    Nothing else of the source's settings is kept: some (Vicuna's temperature without sampling) make
    transformers refuse to save the model again.
    """
    file = Path(source.llm if isinstance(source, Parts) else source) / "generation_config.json"
    given = json.loads(file.read_text()) if file.is_file() else {}
    ends = given.get("eos_token_id", tokenizer.eos_token_id)
    settings = {
        "do_sample": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in settings.items() if value is not None}


# What `data.conversation` renders, in Jinja. The names in it are set by `chat_template`.
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


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str:
    """A conversation template for `apply_chat_template`.

    Messages have the role user or assistant, the first perhaps system: it takes the place of the
    template's own. Contents are texts, or lists of text and image parts.
    """
    bos, eos = (cast("str | None", t) or "" for t in (tokenizer.bos_token, tokenizer.eos_token))
    named = {"{bos}": bos, "{eos}": eos, "{bos?}": ""}

    def text(part: str) -> str:
        for name, token in named.items():
            part = part.replace(name, token)
        # Other control tokens stand for themselves.
        return re.sub(r"\{([^{}]+)\}", lambda m: m[0] if m[0] == SYSTEM_PLACE else m[1], part)

    first_prefix = text(template.begin + template.human_prefix)
    if bos and adds_bos(tokenizer):
        first_prefix = first_prefix.removeprefix(bos)
    values = {
        "system": template.system,
        "system_prefix": text(template.system_prefix),
        "system_suffix": text(template.system_suffix),
        "first_prefix": first_prefix,
        "human_prefix": text(template.human_prefix.replace(SYSTEM_PLACE, "")),
        "answer_prefix": text(template.answer_prefix),
        "answer_suffix": text(template.answer_suffix),
        "separator": text(template.separator),
        "image_token": image_token,
        "image_suffix": text(template.image_suffix),
        "keeps_questions": template.keeps_questions,
    }
    # Jinja's literals are JSON's.
    lines = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()]
    return "\n".join([*lines, _JINJA])

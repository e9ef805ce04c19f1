"""Reads, chooses and writes chat templates, the programs that turn conversations into prompts."""

import json
import re
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from llava_jax.config import Parts, format_source
from llava_jax.data.conversation import adds_bos
from llava_jax.data.templates import SYSTEM_SLOT, TEMPLATES, Template
from llava_jax.disk import read_regular, replace_text
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.rendering import ChatTemplate
from llava_jax.pretrained.safetensors import MAX_JSON_BYTES, read_json
from llava_jax.pretrained.tokenizer import load_tokenizer

_JINJA_FILE, _JSON_FILE = "chat_template.jinja", "chat_template.json"
_FURTHER = "additional_chat_templates"
_DEFAULT = "default"


def own_templates(source: Path | str, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns the chat templates in a checkpoint's directory by name, as transformers 5 finds them.

    The first of these that exists is used: the field `chat_template` of processor_config.json,
    chat_template.json, the file chat_template.jinja (whose template has the name "default") with
    the files in additional_chat_templates, and the templates of the tokenizer.

    Args:
        source: Directory of the checkpoint.
        tokenizer: Tokenizer of the checkpoint.

    Raises:
        CheckpointError: A file cannot be read, a template is not a text, or files contradict each
            other.
    """
    directory = Path(source)
    further = sorted(directory.glob(f"{_FURTHER}/*.jinja"))
    for name in ("processor_config.json", _JSON_FILE):
        file = directory / name
        found = read_json(file).get("chat_template") if file.exists() else None
        if found is None:
            continue
        if name == _JSON_FILE and further:
            raise CheckpointError(
                f"{directory} has both {_JSON_FILE} and {_FURTHER}, which transformers refuses; "
                f"write the template of {_JSON_FILE} to {_JINJA_FILE} and delete {_JSON_FILE}"
            )
        return _by_name(found, str(file))
    named = {file.stem: file for file in further}
    if (directory / _JINJA_FILE).exists():
        named[_DEFAULT] = directory / _JINJA_FILE
    if named:
        return {name: _read_text(file) for name, file in named.items()}
    return _by_name(tokenizer.chat_template, f"{directory}: the tokenizer")


def _by_name(found: object, where: str) -> dict[str, str]:
    """Returns templates by name: from one template, or from a list or an object of templates."""
    if found is None:
        return {}
    if isinstance(found, str):
        return {_DEFAULT: found}
    if isinstance(found, list) and all(isinstance(one, dict) for one in found):
        found = {one.get("name"): one.get("template") for one in found}
    if not isinstance(found, dict) or not all(
        isinstance(text, str) for pair in found.items() for text in pair
    ):
        raise CheckpointError(
            f"{where}: the chat template is {found!r:.80}; it must be a text, or a list of objects "
            'with "name" and "template"'
        )
    return cast("dict[str, str]", found)


def _read_text(file: Path) -> str:
    try:
        return read_regular(file, MAX_JSON_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def write_chat_templates(directory: Path, templates: dict[str, str]) -> None:
    """Writes chat templates in the form of transformers 5, over those in the directory.

    Args:
        directory: Existing directory.
        templates: Jinja source of each template by name; nothing is written if it is empty.

    Raises:
        CheckpointError: The name of a template is not the name of a file.
        OSError: A file cannot be written.
    """
    for name, text in templates.items():
        if name == _DEFAULT:
            replace_text(directory / _JINJA_FILE, text)
            continue
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise CheckpointError(
                f"a chat template has the name {name!r:.80}, which cannot be the name of a file"
            )
        (directory / _FURTHER).mkdir(exist_ok=True)
        replace_text(directory / _FURTHER / f"{name}.jinja", text)


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
    source: str | Path | Parts,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    name: str | None = None,
) -> ChatTemplate:
    """Returns the chat template of a checkpoint, or a new one if its own has no images.

    A template of separate parts belongs to the decoder alone, so it is used only if it mentions
    images.

    Args:
        source: Directory of a LLaVA, or separate parts.
        tokenizer: Tokenizer of `source`.
        image_token: Text of the image token.
        name: Name of one of the checkpoint's templates, name of a template in `TEMPLATES`, or path
            of a Jinja file; None takes the checkpoint's default template.

    Raises:
        CheckpointError: The chat templates of the checkpoint cannot be read, or there are several
            templates and none of them has the name "default".
        ConfigError: There is no template with this name.
    """
    own = own_templates(Path(source.llm if isinstance(source, Parts) else source), tokenizer)
    if name is not None:
        return _find_template(name, own, tokenizer, image_token)
    if own and _DEFAULT not in own:
        raise CheckpointError(
            f"{format_source(source)} has several chat templates, and none of them has the name "
            f"{_DEFAULT!r}; choose one with --template: {', '.join(own)}"
        )
    if text := own.get(_DEFAULT):
        found = ChatTemplate(text, tokenizer, image_token)
        if "image" in text or (not isinstance(source, Parts) and found.takes_images):
            return found
    return _make(choose_template(source) or "vicuna_v1", tokenizer, image_token)


def _find_template(
    name: str, own: dict[str, str], tokenizer: PreTrainedTokenizerBase, image_token: str
) -> ChatTemplate:
    if name in own:
        return ChatTemplate(own[name], tokenizer, image_token)
    if name in TEMPLATES:
        return _make(name, tokenizer, image_token)
    if Path(name).exists():
        return ChatTemplate(_read_text(Path(name)), tokenizer, image_token)
    raise ConfigError(
        f"there is no chat template {name!r:.200}: it is not a file; the checkpoint has the "
        f"templates {', '.join(own) or '(none)'}; llava_jax has {', '.join(TEMPLATES)}"
    )


def _make(name: str, tokenizer: PreTrainedTokenizerBase, image_token: str) -> ChatTemplate:
    template = TEMPLATES[name]
    return ChatTemplate(
        chat_template(template, tokenizer, image_token), tokenizer, image_token, template
    )


def chat_template(
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    video_token: str | None = None,
) -> str:
    """Returns a conversation template as Jinja source for `apply_chat_template`.

    The text renders the same prompts as `data.conversation`. The content of a message is a text, or
    a list of texts, images and, if there is a video token, videos, which count as images. System
    messages are joined with a blank line and replace the system text of the template; they must
    come before the first user message. Several images of a message stay in their places if there is
    a text before the last of them; other images are written before the text.
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
        "media": {"image": image_token} | ({"video": video_token} if video_token else {}),
        "image_suffix": text(template.image_suffix),
        "keeps_questions": template.keeps_questions,
    }
    # These JSON literals are also Jinja literals.
    lines = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()]
    return "\n".join([*lines, _JINJA])


# Renders the same text as `data.conversation`. `chat_template` defines the variables.
_JINJA = """\
{%- set state = namespace(system=system, has_system=false, asked=false) -%}
{%- for message in messages -%}
  {%- set content = message["content"] -%}
  {%- set parts = [{"type": "text", "text": content}] if content is string else content -%}
  {%- set shown = parts | selectattr("type", "in", media) | map(attribute="type") | list -%}
  {%- set images = shown | length -%}
  {%- set texts = parts | selectattr("type", "equalto", "text") | map(attribute="text") -%}
  {%- set text = texts | join("") -%}
  {%- if message["role"] == "system" -%}
    {%- if state.asked -%}
      {{ raise_exception("a system message must come before the first user message") }}
    {%- endif -%}
    {%- set state.system = state.system + "\\n\\n" + text if state.has_system else text -%}
    {%- set state.has_system = true -%}
  {%- elif message["role"] == "user" -%}
    {%- set system = system_prefix + state.system + system_suffix if state.system else "" -%}
    {{ human_prefix if state.asked else first_prefix | replace("{system}", system) }}
    {%- set state.asked = true -%}
    {%- set found = namespace(images=0, in_place=false) -%}
    {%- for part in parts -%}
      {%- if part["type"] in media -%}
        {%- set found.images = found.images + 1 -%}
      {%- elif found.images < images and part["text"] | trim -%}
        {%- set found.in_place = true -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if not keeps_questions -%}
      {%- for kind in shown -%}{{ media[kind] }}{%- endfor -%}
      {{ image_token * text.count(image_token) }}
    {%- elif images > 1 and found.in_place -%}
      {%- for part in parts -%}
        {{ media[part["type"]] if part["type"] in media else part["text"] }}
      {%- endfor -%}
    {%- else -%}
      {%- set text = text | trim if images else text -%}
      {%- for kind in shown -%}{{ media[kind] + (image_suffix if text else "") }}{%- endfor -%}
      {{ text }}
    {%- endif -%}
  {%- elif state.asked -%}
    {{ answer_prefix + text + answer_suffix + separator }}
  {%- else -%}
    {{ raise_exception("the first message after the system message must be from the user") }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ answer_prefix.rstrip(" ") }}{%- endif -%}
"""

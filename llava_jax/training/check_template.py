"""Warns if a run has another chat template than the checkpoint that it starts from."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llava_jax.config import Parts
from llava_jax.data.templates import TEMPLATES
from llava_jax.pretrained.chat_templates import own_templates
from llava_jax.pretrained.limited_process import ProgramError
from llava_jax.pretrained.rendering import ChatTemplate, Message


def template_warning(
    name: str, source: Path | Parts, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Returns a line of text if the checkpoint's chat template begins answers differently.

    Args:
        name: Value of `data.template`.
        source: Checkpoint of the model, or its parts.
        tokenizer: Tokenizer of the checkpoint.

    Returns:
        The warning; None if the checkpoint has no chat template, or if no template of llava_jax
        begins answers like it.

    Raises:
        CheckpointError: The chat templates of the checkpoint cannot be read.
    """
    directory = source.llm if isinstance(source, Parts) else source
    text = own_templates(directory, tokenizer).get("default")
    wanted = _answer_mark(name)
    if text is None or not wanted:
        return None
    try:
        prompt = ChatTemplate(text, tokenizer, "<image>").render([Message("user", ["?"])])
    except ProgramError:
        return None
    found = [other for other in TEMPLATES if (mark := _answer_mark(other)) and mark in prompt]
    if not found or wanted in prompt:
        return None
    return (
        f"warning: data.template is {name!r}, which writes {wanted!r} before an answer, but the "
        f"chat template of {directory} writes {_answer_mark(found[0])!r}. The model was probably "
        f"trained with one of {', '.join(found)}; set --data.template"
    )


def _answer_mark(name: str) -> str:
    """Returns the last word of the text that a template writes before an answer, without braces."""
    template = TEMPLATES[name]
    words = template.answer_prefix.split()
    mark = words[-1].removeprefix(template.answer_suffix) if words else ""
    return re.sub("[{}]", "", mark)

"""A run that starts from a checkpoint with another chat template says so."""

from pathlib import Path

import pytest

from llava_jax.config import Parts
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.data.templates import TEMPLATES
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.tokenizer import load_tokenizer
from llava_jax.training.check_template import template_warning

# As in the checkpoints of OneVision: no system text, and no line end after a turn.
ONEVISION = (
    "{% for message in messages %}<|im_start|>{{ message.role }} "
    "{% for part in message.content %}{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def warning(name: str, text: str, tmp_path: Path) -> str | None:
    (tmp_path / "chat_template.jinja").write_text(text)
    source = Parts(llm=str(tmp_path), vision="tower")
    tokenizer = load_tokenizer(TINY_LLAVA)
    found = template_warning(name, tmp_path, tokenizer)
    assert found == template_warning(name, source, tokenizer)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_of_the_checkpoint_is_accepted(name: str, tmp_path: Path):
    written = chat_template(TEMPLATES[name], load_tokenizer(TINY_LLAVA), "<image>")
    assert warning(name, written, tmp_path) is None
    assert warning("plain", written, tmp_path) is None  # stage 1 has no roles


@pytest.mark.parametrize(
    ("name", "written", "mark", "others"),
    [
        ("vicuna_v1", "chatml", "<|im_start|>assistant", "chatml, chatml_direct"),
        ("chatml", "vicuna_v1", "ASSISTANT:", "vicuna_v1, vicuna_xtuner"),
        ("llama_3", "llama_2", "[/INST]", "llama_2, mistral_instruct"),
        ("mistral_instruct", "llama_3", "assistant<|end_header_id|>", "llama_3, llava_llama_3"),
    ],
)
def test_another_template_is_named(name: str, written: str, mark: str, others: str, tmp_path: Path):
    text = chat_template(TEMPLATES[written], load_tokenizer(TINY_LLAVA), "<image>")
    found = warning(name, text, tmp_path)
    assert found is not None
    assert f"data.template is {name!r}" in found
    assert mark in found
    assert f"one of {others};" in found


def test_variants_of_a_template_are_accepted(tmp_path: Path):
    assert warning("chatml", ONEVISION, tmp_path) is None
    assert "chatml" in (warning("llama_3", ONEVISION, tmp_path) or "")


@pytest.mark.parametrize("text", ["{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_templates_without_known_answers_are_accepted(text: str, tmp_path: Path):
    assert warning("vicuna_v1", text, tmp_path) is None

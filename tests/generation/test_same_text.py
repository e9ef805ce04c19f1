"""A conversation has the same tokens in training, in chat, on the server and in transformers."""

import itertools
import json
from functools import cache

import numpy as np
import pytest
from PIL import Image

from llava_jax.config.presets import TINY_LLAVA
from llava_jax.data.conversation import encode
from llava_jax.data.forms import parse
from llava_jax.data.templates import TEMPLATES
from llava_jax.generation.messages import to_prompt
from llava_jax.generation.prompts import Prompt, PromptReader
from llava_jax.pretrained.chat_templates import chat_template
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.tokenizer import load_tokenizer
from llava_jax.serving import conversation
from llava_jax.serving.limits import Limits
from llava_jax.serving.schema import parse_request

CONFIG = read_model_config(TINY_LLAVA)
TOKENIZER = load_tokenizer(TINY_LLAVA)
PICTURE = Image.new("RGB", (4, 4))
# The tokenizer of the tiny model has the control tokens of these templates.
NAMES = ("vicuna_v1", "llama_2", "mistral_instruct", "plain")


@cache
def reader(template: str) -> PromptReader:
    return PromptReader.open(TINY_LLAVA, CONFIG, template)


def collapse(ids: np.ndarray) -> list[int]:
    """One token for each image, in the place of its many tokens."""
    image, count = CONFIG.image_token_id, CONFIG.image_tokens
    found, rest = [], ids.tolist()
    while rest:
        found.append(rest[0])
        rest = rest[count if rest[0] == image else 1 :]
    return found


def train(content: object, images: int, template: str) -> list[int]:
    """Ids of the text before the answer."""
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    parsed = parse({"messages": turns, "images": ["a.png"] * images})
    found = encode(parsed.turns, TEMPLATES[template], TOKENIZER, CONFIG.image_token_id)
    return found.input_ids[: int(np.argmax(found.loss_mask))].tolist()


def chat(content: object, images: int, template: str) -> list[int]:
    prompt = to_prompt([{"role": "user", "content": content}], [PICTURE] * images)
    return collapse(reader(template)(prompt)[0])


def serve(content: list[dict], images: int, template: str) -> list[int]:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    parts = [url if part["type"] == "image" else part for part in content]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    request = parse_request(json.dumps(body).encode())
    prompt = conversation.to_prompt(request.messages, Limits(images=9), max_length=2048)
    return collapse(reader(template)(Prompt(prompt.turns, (PICTURE,) * images))[0])


def export(content: object, template: str) -> list[int]:
    """What transformers makes of the chat template that an exported checkpoint has."""
    source = chat_template(TEMPLATES[template], TOKENIZER, "<image>")
    turns = [{"role": "user", "content": content}]
    text = TOKENIZER.apply_chat_template(
        turns, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    return TOKENIZER(text, add_special_tokens=not text.startswith("<s>")).input_ids


PIECES = [None, None, "", " ", "what? \n", "\n\nwhich", "a <b>"]
ORDERS = {
    order
    for count in range(1, 5)
    for order in itertools.permutations(PIECES, count)
    if None in order or "what? \n" in order
}


@pytest.mark.parametrize("template", NAMES)
def test_parts_in_every_order(template):
    wrong = []
    most = 4 if template == "vicuna_v1" else 3
    for order in sorted((order for order in ORDERS if len(order) <= most), key=repr):
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in order]
        images = order.count(None)
        found = [f(parts, images, template) for f in (train, chat, serve)]
        found.append(export(parts, template))
        if found.count(found[0]) < 4:
            wrong.append((order, *map(TOKENIZER.decode, found)))
    assert wrong == []


TEXTS = ("what?", "<image>what? ", "what <image> ", "<image><image>what?", "<image>\n<image>",
         "<image>\n<image>\n what?\n", "a <image> b <image> ", " <image> <image> x")  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", NAMES)
def test_texts_with_placeholders(text, template):
    images = text.count("<image>")
    assert train(text, images, template) == chat(text, images, template)
    if not images:
        for count in (1, 2):
            assert train(text, count, template) == chat(text, count, template)


def test_images_before_the_text_are_the_same_in_all_forms():
    forms = [
        "<image><image>what?",
        "<image>\n<image>\nwhat?",
        [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what?"}],
        "what?",
    ]
    found = [train(form, 2, "vicuna_v1") for form in forms]
    assert found == [found[0]] * 4
    assert "<image>\n<image>\nwhat?" in TOKENIZER.decode(found[0]).replace("> \n", ">\n")

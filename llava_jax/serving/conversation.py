"""Converts the messages of a request into a prompt."""

from typing import Literal

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.generation.prompts import Prompt
from llava_jax.serving.limits import Limits, RequestError
from llava_jax.serving.schema import ImagePart, Message

_ROLES: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "gpt",
}

MAX_CHARACTERS = 64
"""Largest number of characters for each allowed token. A conversation with more characters is
refused before it is tokenized."""


def to_prompt(messages: list[Message], limits: Limits, *, max_length: int) -> Prompt:
    """Converts messages into a prompt whose images are URLs.

    In each turn, the images come before the text.

    Args:
        messages: Messages of the request.
        limits: Limits of the server.
        max_length: Largest number of tokens of prompt and answer together.

    Raises:
        RequestError: There are too many images or too much text, or a message with another role
            than "user" contains an image.
    """
    turns, urls = [], []
    for number, message in enumerate(messages):
        found = [part.url for part in message.parts if isinstance(part, ImagePart)]
        if found and message.role != "user":
            where = f"messages.{number}"
            text = f"{where}: this message has an image, but only user messages may have images"
            raise RequestError(text, param=where)
        texts = [part.text for part in message.parts if not isinstance(part, ImagePart)]
        # Some clients also write LLaVA's image placeholder into the text, where it is not needed.
        text = "\n".join(texts).replace(IMAGE_PLACEHOLDER, " ")
        if found:
            text = "\n".join([*[IMAGE_PLACEHOLDER] * len(found), text.strip()])
        turns.append(Turn(_ROLES[message.role], text))
        urls += found
    if len(urls) > limits.images:
        raise RequestError(
            f"the conversation has {len(urls)} images; at most {limits.images} are allowed",
            param="messages",
            code="too_many_images",
        )
    characters = sum(len(turn.text) for turn in turns)
    if max(characters / MAX_CHARACTERS, len(messages)) > max_length:
        raise RequestError(
            f"the conversation has {len(messages):,} messages with {characters:,} characters, "
            f"which is too long: prompt and answer together may have at most {max_length:,} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    return Prompt(tuple(turns), tuple(urls))

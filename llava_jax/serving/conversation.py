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
"""Largest average number of characters per token that is assumed. A conversation with too many
characters is refused without counting its tokens."""


def to_prompt(messages: list[Message], limits: Limits, *, max_length: int) -> Prompt:
    """Converts messages into a prompt whose images are URLs.

    In each turn, the images come before the text.

    Args:
        messages: Messages of the request.
        limits: Limits of the server.
        max_length: Largest number of tokens of prompt and answer together.

    Raises:
        RequestError: There are too many images or too much text, or a message that is not the
            user's has an image.
    """
    turns, urls = [], []
    for number, message in enumerate(messages):
        found = [part.url for part in message.parts if isinstance(part, ImagePart)]
        if found and message.role != "user":
            where = f"messages.{number}"
            raise RequestError(f"{where}: only user messages may have images", param=where)
        texts = [part.text for part in message.parts if not isinstance(part, ImagePart)]
        # Some clients also write LLaVA's placeholder into the text; the image part is enough.
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
            f"{len(messages):,} messages of {characters:,} characters are more than the "
            f"{max_length:,} tokens that prompt and answer together may have",
            param="messages",
            code="context_length_exceeded",
        )
    return Prompt(tuple(turns), tuple(urls))

"""From the messages of a request to a prompt."""

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
"""Of a token, on average: what has more has too many tokens, and is not read to count them."""


def to_prompt(messages: list[Message], limits: Limits, *, max_length: int) -> Prompt:
    """The conversation, with the URLs of its images. In a turn, they come before the text.

    Args:
        messages: Messages of the request.
        limits: Limits of the server.
        max_length: Longest conversation in tokens.

    Raises:
        RequestError: It cannot be used.
    """
    turns, urls = [], []
    for number, message in enumerate(messages):
        found = [part.url for part in message.parts if isinstance(part, ImagePart)]
        if found and message.role != "user":
            where = f"messages.{number}"
            raise RequestError(f"{where}: only user messages have images", param=where)
        texts = [part.text for part in message.parts if not isinstance(part, ImagePart)]
        # Clients of LLaVA's habit write the placeholder themselves, beside the image.
        text = "\n".join(texts).replace(IMAGE_PLACEHOLDER, " ")
        if found:
            text = "\n".join([*[IMAGE_PLACEHOLDER] * len(found), text.strip()])
        turns.append(Turn(_ROLES[message.role], text))
        urls += found
    if len(urls) > limits.images:
        raise RequestError(
            f"the conversation has {len(urls)} images, of at most {limits.images}",
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

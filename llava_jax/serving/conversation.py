"""Converts the messages of a request into a prompt."""

from llava_jax.data.content_parts import Media, join_pieces
from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.data.forms import ROLES
from llava_jax.generation.prompts import Prompt
from llava_jax.serving.limits import Limits, RequestError
from llava_jax.serving.schema import ImagePart, Message

MAX_CHARACTERS = 64
"""Largest number of characters for each allowed token. A conversation with more characters is
refused before it is tokenized."""


def to_prompt(
    messages: list[Message], limits: Limits, *, max_length: int, continues: bool = False
) -> Prompt:
    """Converts messages into a prompt whose images are URLs.

    Args:
        messages: Messages of the request.
        limits: Limits of the server.
        max_length: Largest number of tokens of prompt and answer together.
        continues: Whether the model continues the last message.

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
        # Clients that write LLaVA's placeholder into their texts send the image beside it.
        pieces = [
            Media.IMAGE
            if isinstance(part, ImagePart)
            else part.text.replace(IMAGE_PLACEHOLDER, " ")
            for part in message.parts
        ]
        turns.append(Turn(ROLES[message.role], join_pieces(pieces)))
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
    return Prompt(tuple(turns), tuple(urls), continues)

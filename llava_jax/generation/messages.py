"""Turns messages, in the forms of chat APIs, into prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from llava_jax.data.content_parts import put_missing_media
from llava_jax.data.conversation import count_placeholders
from llava_jax.data.forms import read_messages
from llava_jax.data.image_paths import find_local_image
from llava_jax.errors import SampleError
from llava_jax.generation.prompts import Prompt

ImageSource = Image.Image | str | Path | bytes
"""An image: a PIL image, the path of an image file, a data URL, or the content of an image file."""
Messages = Sequence[Mapping[str, object]]
"""A conversation in the format of Hugging Face's chat templates."""


def to_prompt(messages: str | Messages, images: ImageSource | Sequence[ImageSource] = ()) -> Prompt:
    """Turns a question or a conversation into a prompt.

    Args:
        messages: Question, or messages as in the data files of a training; `forms` describes them.
            The content of a message is a text, or a list of parts {"type": "text", "text": ...} and
            {"type": "image"}. Either all image parts contain their images, for example as "image",
            "path" or "url", or none does.
        images: One image, or the images of the image parts and of each `<image>` in the texts of
            user messages, in order. If there is neither, the images are placed before the text of
            the first user message.

    Raises:
        SampleError: A message has another form, or the images do not match the messages.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    beside = [images] if isinstance(images, ImageSource) else [*images]
    if not all(isinstance(message, Mapping) for message in messages):
        raise SampleError(f"expected messages with role and content, found {messages!r:.80}")
    found, turns = read_messages([_plain(message) for message in messages], beside)[:2]
    put_missing_media(turns, len(found))
    placeholders = count_placeholders(turns)
    if placeholders != len(found):
        raise SampleError(
            f"the number of images or <image> in the messages is {placeholders}, but the number of "
            f"given images is {len(found)}",
            "number of images",
        )
    return Prompt(tuple(turns), tuple(map(_locate, found)))


def _plain(message: Mapping[str, object]) -> dict[str, object]:
    """Returns a message as a dict, and its parts as a list of dicts."""
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return dict(message)
    parts = [dict(part) if isinstance(part, Mapping) else part for part in content]
    return {**message, "content": parts}


def _locate(image: object) -> Image.Image | str | bytes:
    if isinstance(image, Image.Image):
        return image
    return find_local_image(str(image) if isinstance(image, Path) else image)

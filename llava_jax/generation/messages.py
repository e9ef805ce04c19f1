"""Turns messages, in the forms of chat APIs, into prompts."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.errors import SampleError
from llava_jax.generation.prompts import Prompt

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "gpt",
}

ImageSource = Image.Image | str | Path | bytes
"""An image: a PIL image, the path of an image file, or the content of an image file."""
Messages = Sequence[Mapping[str, object]]
"""A conversation in the format of Hugging Face's chat templates."""


def make_turn(role: str, pieces: Sequence[str | None]) -> Turn:
    """Returns the turn of a message.

    Args:
        role: Role of the message, a key of `ROLES`.
        pieces: Texts of the message in order; None stands for an image. Clients that write LLaVA's
            placeholder into their texts send the image beside it, so the placeholder is removed.
    """
    images, pieces = pieces.count(None), [*pieces]
    leads = not any(pieces[:images])  # LLaVA's form has such images on lines before the text
    image = f"{IMAGE_PLACEHOLDER}\n" if leads else IMAGE_PLACEHOLDER
    texts = (image if p is None else p.replace(IMAGE_PLACEHOLDER, " ") for p in pieces)
    return Turn(ROLES[role], "".join(texts))


def to_prompt(messages: str | Messages, images: Sequence[ImageSource] = ()) -> Prompt:
    """Turns a question or a conversation into a prompt.

    Args:
        messages: Question, or messages with the keys "role" and "content". The content is a text,
            or a list of parts {"type": "text", "text": ...} and {"type": "image"}. An image part
            may contain its image as "image", "path" or "url".
        images: Images of the image parts that contain none, and of each `<image>` in the texts of
            user messages, in order. If there is neither, the images are placed before the text of
            the first user message.

    Raises:
        SampleError: A message has another form, or the images do not match the messages.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    beside = iter(images)
    used: list[ImageSource] = []
    turns = [_read_message(index, one, beside, used) for index, one in enumerate(messages)]
    rest = [*beside]
    first = next((n for n, turn in enumerate(turns) if turn.role == "human"), None)
    if rest and not used and first is not None:
        lead = f"{IMAGE_PLACEHOLDER}\n" * len(rest)
        turns[first] = turns[first]._replace(text=lead + turns[first].text)
        used, rest = [_check_image(first, image) for image in rest], []
    if rest:
        raise SampleError(
            f"the messages contain {len(used)} images or <image>, but {len(images)} images are "
            "given beside them",
            "number of images",
        )
    return Prompt(tuple(turns), tuple(str(x) if isinstance(x, Path) else x for x in used))


def _read_message(
    index: int,
    message: Mapping[str, object],
    beside: Iterator[ImageSource],
    used: list[ImageSource],
) -> Turn:
    """Returns the turn of a message, and appends its images to `used`."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise SampleError(
            f"message {index}: the role is {role!r:.80}; it must be one of {', '.join(ROLES)}"
        )
    is_user = ROLES[role] == "human"
    if isinstance(content, str):
        texts = content.split(IMAGE_PLACEHOLDER) if is_user else [content]
        used += [_next_image(index, beside) for _ in texts[1:]]
        return Turn(ROLES[role], content)
    if not isinstance(content, Sequence):
        raise SampleError(f"message {index}: the content is {content!r:.80}, not a text or parts")
    pieces: list[str | None] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind in ("image", "image_url") and is_user:
            pieces.append(None)
            own = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            own = own.get("url") if isinstance(own, Mapping) else own
            used.append(_next_image(index, beside) if own is None else _check_image(index, own))
        else:
            raise SampleError(
                f'message {index}: found {part!r:.80}; a part must be {{"type": "text", "text": '
                '...}} or, in a user message, {"type": "image"}; videos are not supported'
            )
    return make_turn(role, pieces)


_IMAGE_KEYS = ("image", "path", "url", "image_url")


def _next_image(index: int, beside: Iterator[ImageSource]) -> ImageSource:
    if (image := next(beside, None)) is None:
        raise SampleError(
            f"message {index} contains more images or <image> than images are given",
            "number of images",
        )
    return _check_image(index, image)


def _check_image(index: int, image: object) -> ImageSource:
    is_address = isinstance(image, str) and "://" in image[:16]
    if is_address or not isinstance(image, Image.Image | str | Path | bytes):
        raise SampleError(
            f"message {index}: an image is {image!r:.80}; it must be a PIL image, the path of a "
            "file, or the content of a file",
            "image path",
        )
    return image

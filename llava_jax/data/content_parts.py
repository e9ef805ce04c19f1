"""Reads the content of messages: texts, and images that are in it or beside the messages."""

from typing import TypeGuard, TypeVar

from llava_jax.data.conversation import IMAGE_PLACEHOLDER
from llava_jax.disk import Json
from llava_jax.errors import SampleError

MAX_PARTS = 2000
"""Maximum number of content parts in a turn."""

_SOURCES = ("image", "path", "url", "base64", "image_url")
"""Fields of an image part that may contain the image."""

_Item = TypeVar("_Item")


def is_list_of(value: object, kind: type[_Item]) -> TypeGuard[list[_Item]]:
    """Returns True if a value is a list whose items all have a type."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def limit(what: str, found: int, most: int, kind: str = "record size") -> None:
    """Raises SampleError if a record has more than `most` of something.

    Args:
        what: Name of what is counted.
        found: Number that the record has.
        most: Largest number that is allowed.
        kind: Kind of the problem; see `SampleError`.
    """
    if found > most:
        raise SampleError(f"the record has {found:,} {what}; at most {most:,} are allowed", kind)


def join_parts(content: list[Json], role: str, turn: int) -> tuple[str, list[Json]]:
    """Joins the parts of a turn's content.

    Args:
        content: Parts of the content.
        role: Role of the turn; only human turns may have images.
        turn: Index of the turn, for messages.

    Returns:
        Text with a placeholder for each image, and the image parts.

    Raises:
        SampleError: There are too many parts, or a part is neither a text nor an image.
    """
    limit("parts in one turn", len(content), MAX_PARTS)
    texts: list[str] = []
    images: list[Json] = []
    first = 0  # number of images before all texts
    for part in content:
        kind = part.get("type") or next((k for k in ("text", *_SOURCES) if part.get(k)), None)
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _SOURCES and role == "human":
            images.append(part)
            if texts:
                texts.append(IMAGE_PLACEHOLDER)
            else:
                first += 1
        else:
            raise SampleError(
                f'turn {turn}: expected parts {{"type": "text", "text": text}} or, in a user '
                f'turn, {{"type": "image"}}, found {part!r:.80}; LLaVA-1.5 reads only text and '
                "images"
            )
    return put_images_first(first, "".join(texts)), images


def put_images_first(images: int, text: str) -> str:
    """Returns a text after placeholders of images, each on a line of its own as in LLaVA's data.

    Args:
        images: Number of images.
        text: Text of a question.
    """
    lines = [IMAGE_PLACEHOLDER] * images
    return "\n".join([*lines, text.removeprefix("\n")] if text else lines) if images else text


def images_beside(raw: Json) -> list[object]:
    """Returns the images in the field "image" or "images" of a record.

    Raises:
        SampleError: The record has both fields, or a value is not an image.
    """
    named = {name: raw[name] for name in ("image", "images") if raw.get(name)}
    if len(named) > 1:
        raise SampleError('the record has both "image" and "images"; remove one of these fields')
    for name, value in named.items():
        images = value if isinstance(value, list) else [value]
        if not all(map(_is_image, images)):
            raise SampleError(
                f'"{name}" must be a path, an object with "bytes" or "path", or a list of such '
                f"values, found {value!r:.60}"
            )
        return images
    return []


def _image_in(part: Json) -> object:
    """Returns the image that an image part contains; None if there is none."""
    for name in _SOURCES:
        value = part.get(name)
        if name == "image_url" and isinstance(value, dict):
            value = value.get("url")
        if value is not None:
            is_base64 = name == "base64" and isinstance(value, str)
            return f"data:;base64,{value}" if is_base64 else value
    return None


def images_of_parts(parts: list[Json], beside: list[object]) -> list[object]:
    """Returns the images that the image parts contain or refer to; `beside` if there are none.

    Args:
        parts: Image parts of all turns of a record.
        beside: Images in the fields of the record.

    Raises:
        SampleError: The parts have different forms, or refer to images that do not exist.
    """
    images = [_image_in(part) for part in parts]
    indices = [
        part.get("index") if image is None else None
        for part, image in zip(parts, images, strict=True)
    ]
    if not any(value is not None for value in (*images, *indices)):
        return beside
    of_record = None not in indices
    if not of_record and (None in images or beside):
        raise SampleError(
            "all image parts must have the same form: either all contain an image, and the record "
            'has no "image" or "images"; or all contain the "index" of an image of the record; '
            f"found {parts!r:.80}"
        )
    if of_record:
        known = [i for i in indices if isinstance(i, int) and 0 <= i < len(beside)]
        if len(known) < len(indices):
            raise SampleError(
                f"image parts have indices {indices!r:.80}, but the record has {len(beside)} images"
            )
        return [beside[index] for index in known]
    if not all(map(_is_image, images)):
        raise SampleError(
            'an image part must have a path or an object with "bytes" or "path", found '
            f"{images!r:.80}"
        )
    return images


def _is_image(value: object) -> bool:
    known = isinstance(value, dict) and not value.keys().isdisjoint({"bytes", "path"})
    return known or isinstance(value, str | bytes)

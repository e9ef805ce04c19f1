"""Reads the content of messages: texts, and images that are in it or beside the messages."""

import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeGuard, TypeVar

from PIL import Image

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn, count_placeholders
from llava_jax.disk import Json
from llava_jax.errors import SampleError

MAX_PARTS = 2000
"""Maximum number of content parts in a turn."""

_SOURCES = ("image", "path", "url", "base64", "image_url")
"""Fields of an image part that may contain the image."""

IMAGE_FIELDS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url"),
    *("image_urls", "image_filename", "image_file_name", "img", "imgs", "img_path", "picture"),
    "pictures",
)
"""Fields of a record that may contain its images; "image" and "images" come before all others."""

IMAGE_LIKE = re.compile("image|img|picture", re.IGNORECASE)
"""Start of the name of a field that may contain an image."""

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


def read_parts(content: list[Json], role: str, turn: int) -> tuple[str, list[Json]]:
    """Reads the parts of a turn's content.

    Args:
        content: Parts of the content.
        role: Role of the turn; only human turns may have images.
        turn: Index of the turn, for messages.

    Returns:
        Text with a placeholder for each image, as in `join_pieces`, and the image parts.

    Raises:
        SampleError: There are too many parts, or a part is neither a text nor an image.
    """
    limit("parts in one turn", len(content), MAX_PARTS)
    pieces: list[str | None] = []
    images: list[Json] = []
    for part in content:
        found = [name for name in ("text", *_SOURCES) if not is_empty(part.get(name))]
        kind = part.get("type") or next(iter(found), None)
        if kind == "text" and isinstance(part.get("text"), str) and found in ([], ["text"]):
            pieces.append(part["text"])
            refuse_images(part, f"turn {turn}: a part with a text")
        elif kind in _SOURCES and role == "human" and "text" not in found:
            pieces.append(None)
            images.append(part)
            refuse_images(part, f"turn {turn}: an image part", known=_SOURCES)
        else:
            raise SampleError(
                f'turn {turn}: expected parts {{"type": "text", "text": text}} or, in a user '
                f'turn, {{"type": "image"}}, found {part!r:.80}; LLaVA-1.5 reads only text and '
                "images"
            )
    return join_pieces(pieces), images


def join_pieces(pieces: Sequence[str | None]) -> str:
    """Returns the text of a turn, with a placeholder for each image.

    Training, chat and the server use the same rule: images before all texts are on lines of their
    own, as in LLaVA's data; other images stay where they are.

    Args:
        pieces: Texts of the turn in order; None stands for an image.
    """
    pieces = [piece for piece in pieces if piece != ""]
    images = pieces.count(None)
    if any(pieces[:images]):
        return "".join(IMAGE_PLACEHOLDER if piece is None else piece for piece in pieces)
    text = "".join(filter(None, pieces))
    lines = [IMAGE_PLACEHOLDER] * images
    return "\n".join([*lines, text.removeprefix("\n")] if text else lines) if images else text


def put_missing_images(turns: list[Turn], count: int) -> bool:
    """Puts placeholders before the first question if no question has a placeholder.

    Args:
        turns: Turns of a conversation, which are changed.
        count: Number of images of the conversation.

    Returns:
        Whether there were images without placeholders, and a question to put them into.
    """
    asks = next((index for index, turn in enumerate(turns) if turn.role == "human"), None)
    if not count or asks is None or count_placeholders(turns):
        return False
    turns[asks] = turns[asks]._replace(text=join_pieces([None] * count + [turns[asks].text]))
    return True


def is_empty(value: object) -> bool:
    """Returns True for None, 0, and an empty text, list or object, which mean a missing field."""
    can_be_empty = isinstance(value, str | bytes | list | tuple | dict | int | float)
    return value is None or (can_be_empty and not value)


@functools.lru_cache(1024)
def _is_image_like(name: str) -> bool:
    """Returns True if a field with this name may contain an image."""
    return IMAGE_LIKE.match(name) is not None


def refuse_images(fields: Json, where: str, known: Collection[str] = ()) -> None:
    """Raises SampleError if an object may have an image in a field that is not read.

    Args:
        fields: Object of a record.
        where: Name of the object, for messages.
        known: Names of fields that are read.
    """
    for name, value in fields.items():
        if name not in known and _is_image_like(name) and not is_empty(value):
            raise SampleError(
                f'{where} has the field "{name}", which is not read; if it is an image, write it '
                'into the field "image" or "images" of the record, or into a part of its own; '
                "otherwise, rename or remove the field"
            )


def images_beside(raw: Json) -> list[object]:
    """Returns the images in the fields of a record; see `IMAGE_FIELDS`.

    Raises:
        SampleError: Several fields may contain the images, or a value is not an image.
    """
    present = [name for name in IMAGE_FIELDS if name in raw]
    given = {name: raw[name] for name in present if not is_empty(raw[name])}
    named = {name: given[name] for name in IMAGE_FIELDS[:2] if name in given} or given
    if len(named) > 1:
        names = " and ".join(f'"{name}"' for name in named)
        raise SampleError(f"the record has both {names}; remove one of these fields")
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


def images_of_parts(parts: list[Json], beside: Sequence[object]) -> list[object]:
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
        return [*beside]
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
    return known or isinstance(value, str | bytes | Path | Image.Image)

"""Reads the content of messages: texts, images and videos, in it or beside the messages."""

import enum
import functools
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeGuard, TypeVar

from PIL import Image

from llava_jax.data.conversation import (
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Turn,
    count_placeholders,
)
from llava_jax.data.image_paths import an
from llava_jax.disk import Json
from llava_jax.errors import SampleError

MAX_PARTS = 2000
"""Maximum number of content parts in a turn."""


class Media(enum.Enum):
    """A piece of a turn that is not a text. The value is its placeholder in the text."""

    IMAGE = IMAGE_PLACEHOLDER
    VIDEO = VIDEO_PLACEHOLDER

    @property
    def word(self) -> str:
        """Returns "image" or "video"."""
        return self.name.lower()


_SOURCES = {
    medium: (medium.word, "path", "url", "base64", f"{medium.word}_url") for medium in Media
}
"""Fields of an image part or of a video part that may contain the image or the video."""

IMAGE_FIELDS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files", "image_url"),
    *("image_urls", "image_filename", "image_file_name", "img", "imgs", "img_path", "picture"),
    "pictures",
)
"""Fields of a record that may contain its images; "image" and "images" come before all others."""

VIDEO_FIELDS = ("video", "videos")
"""Fields of a record that may contain its videos."""

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


def read_parts(
    content: list[Json], role: str, turn: int, *, reads_videos: bool = False
) -> tuple[str, dict[Media, list[Json]]]:
    """Reads the parts of a turn's content.

    Args:
        content: Parts of the content.
        role: Role of the turn; only human turns may have images and videos.
        turn: Index of the turn, for messages.
        reads_videos: Whether video parts are read, and not refused.

    Returns:
        Text with a placeholder for each image and video, as in `join_pieces`, and the image parts
        and the video parts.

    Raises:
        SampleError: There are too many parts, or a part is none of a text, an image and a video.
    """
    limit("parts in one turn", len(content), MAX_PARTS)
    pieces: list[str | Media] = []
    media: dict[Media, list[Json]] = {medium: [] for medium in Media}
    names = dict.fromkeys(("text", *_SOURCES[Media.IMAGE], *_SOURCES[Media.VIDEO]))
    for part in content:
        found = [name for name in names if not is_empty(part.get(name))]
        kind = part.get("type") or next(iter(found), None)
        medium = Media.VIDEO if kind in ("video", "video_url") else Media.IMAGE
        other = {"text", "image", "image_url", "video", "video_url"}.difference(_SOURCES[medium])
        if kind == "text" and isinstance(part.get("text"), str) and found in ([], ["text"]):
            pieces.append(part["text"])
            refuse_images(part, f"turn {turn}: a part with a text")
        elif (
            kind in _SOURCES[medium]
            and role == "human"
            and other.isdisjoint(found)
            and (medium == Media.IMAGE or reads_videos)
        ):
            pieces.append(medium)
            media[medium].append(part)
            where = f"turn {turn}: {an(medium.word)} part"
            refuse_images(part, where, known=_SOURCES[medium])
        else:
            known = (
                '{"type": "image"} or {"type": "video"}' if reads_videos else '{"type": "image"}'
            )
            raise SampleError(
                f'turn {turn}: expected parts {{"type": "text", "text": text}} or, in a user '
                f"turn, {known}, found {part!r:.80}; only text"
                f"{', images and videos' if reads_videos else ' and images'} can be read"
            )
    return join_pieces(pieces), media


def join_pieces(pieces: Sequence[str | Media]) -> str:
    """Returns the text of a turn, with a placeholder for each image and each video.

    Training, chat and the server use the same rule: images before all texts are on lines of their
    own, as in LLaVA's data; other images stay where they are. Videos count as images.

    Args:
        pieces: Texts, images and videos of the turn in order.
    """
    pieces = [piece for piece in pieces if piece != ""]
    marks = [piece.value for piece in pieces if isinstance(piece, Media)]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if any(isinstance(piece, str) for piece in pieces[: len(marks)]):
        return "".join(piece.value if isinstance(piece, Media) else piece for piece in pieces)
    text = "".join(texts)
    return "\n".join([*marks, text.removeprefix("\n")] if text else marks) if marks else text


def name_videos(turns: list[Turn]) -> None:
    """Replaces `<image>` by `<video>` if there is no `<video>` yet.

    LLaVA-NeXT's data files write `<image>` for a video too.

    Args:
        turns: Turns of a conversation with videos but without images, which are changed.
    """
    if not count_placeholders(turns, VIDEO_PLACEHOLDER):
        for index, turn in enumerate(turns):
            if turn.role == "human":
                text = turn.text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
                turns[index] = turn._replace(text=text)


def put_missing_media(turns: list[Turn], count: int, medium: Media = Media.IMAGE) -> bool:
    """Puts placeholders before the first question if no question has a placeholder.

    Args:
        turns: Turns of a conversation, which are changed.
        count: Number of images, or of videos, of the conversation.
        medium: What is counted.

    Returns:
        Whether there were images without placeholders, and a question to put them into.
    """
    asks = next((index for index, turn in enumerate(turns) if turn.role == "human"), None)
    if not count or asks is None or count_placeholders(turns, medium.value):
        return False
    turns[asks] = turns[asks]._replace(text=join_pieces([medium] * count + [turns[asks].text]))
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
    """Raises SampleError if an object may have an image or video in a field that is not read.

    Args:
        fields: Object of a record.
        where: Name of the object, for messages.
        known: Names of fields that are read.
    """
    for name, value in fields.items():
        is_media = name in VIDEO_FIELDS or _is_image_like(name)
        if is_media and name not in known and not is_empty(value):
            word = "video" if name in VIDEO_FIELDS else "image"
            raise SampleError(
                f'{where} has the field "{name}", which is not read; if it is {an(word)}, write it '
                f'into the field "{word}" or "{word}s" of the record, or into a part of its own; '
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


def videos_beside(raw: Json) -> list[object]:
    """Returns the videos in the fields of a record. A list in "video" has the frames of a video.

    Raises:
        SampleError: Both fields may contain the videos, or a value is not a video.
    """
    given = {name: raw[name] for name in VIDEO_FIELDS if not is_empty(raw.get(name))}
    if len(given) > 1:
        raise SampleError('the record has both "video" and "videos"; remove one of these fields')
    for name, value in given.items():
        videos = value if name == "videos" and isinstance(value, list) else [value]
        if not all(map(_is_video, videos)):
            raise SampleError(
                f'"{name}" must be {"a list of videos" if name == "videos" else "a video"}, which '
                'is a path, an object with "bytes" or "path", or a list of frames, found '
                f"{value!r:.60}"
            )
        return videos
    return []


def _source_in(part: Json, medium: Media) -> object:
    """Returns the image or video that a part contains; None if there is none."""
    for name in _SOURCES[medium]:
        value = part.get(name)
        if name == f"{medium.word}_url" and isinstance(value, dict):
            value = value.get("url")
        if value is not None:
            is_base64 = name == "base64" and isinstance(value, str)
            return f"data:;base64,{value}" if is_base64 else value
    return None


def media_of_parts(
    parts: list[Json], beside: Sequence[object], medium: Media = Media.IMAGE
) -> list[object]:
    """Returns the images that the image parts contain or refer to; `beside` if there are none.

    Args:
        parts: Image parts, or video parts, of all turns of a record.
        beside: Images, or videos, in the fields of the record.
        medium: What the parts contain.

    Raises:
        SampleError: The parts have different forms, or refer to images that do not exist.
    """
    word, media = medium.word, [_source_in(part, medium) for part in parts]
    indices = [
        part.get("index") if source is None else None
        for part, source in zip(parts, media, strict=True)
    ]
    if not any(value is not None for value in (*media, *indices)):
        return [*beside]
    of_record = None not in indices
    if not of_record and (None in media or beside):
        raise SampleError(
            f"all {word} parts must have the same form: either all contain {an(word)}, and the "
            f'record has no "{word}" or "{word}s"; or all contain the "index" of {an(word)} of the '
            f"record; found {parts!r:.80}"
        )
    if of_record:
        known = [i for i in indices if isinstance(i, int) and 0 <= i < len(beside)]
        if len(known) < len(indices):
            raise SampleError(
                f"{word} parts have indices {indices!r:.80}, but the record has {len(beside)} "
                f"{word}s"
            )
        return [beside[index] for index in known]
    if not all(map(_is_image if medium == Media.IMAGE else _is_video, media)):
        raise SampleError(
            f'{an(word)} part must have a path or an object with "bytes" or "path", found '
            f"{media!r:.80}"
        )
    return media


def _is_image(value: object) -> bool:
    known = isinstance(value, dict) and not value.keys().isdisjoint({"bytes", "path"})
    return known or isinstance(value, str | bytes | Path | Image.Image)


def _is_video(value: object) -> bool:
    frames = value if isinstance(value, list) else [value]
    return bool(frames) and all(map(_is_image, frames))

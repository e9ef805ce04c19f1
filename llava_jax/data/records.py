"""Parses the records of data files. A record is a sample before it is encoded.

There are two forms, which may be mixed. LLaVA's form has `image` and `conversations`, a list of
turns with `from` and `value`. The form of chat templates has `images` and `messages`, a list of
turns with `role` and `content`; the content is a text or a list of text and image parts.
"""

import array
import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int32

from llava_jax.data.conversation import IMAGE_PLACEHOLDER, Turn
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, SampleError

FIELDS = ("id", "image", "images", "conversations", "messages", "category")
"""Fields of a record that are read; all other fields are ignored."""

CONVERSATIONS = ("conversations", "messages")
"""Fields that may contain the conversation."""

# Limits, so that no record delays a run for long or fills its memory.
MAX_RECORD_BYTES = 2**22
"""Maximum number of bytes of a record as JSON, and of its texts in a Parquet file."""
MAX_IMAGES = 256
"""Maximum number of images in a record."""
MAX_TURNS = 2000
"""Maximum number of turns in a record, and of parts in a turn."""
MAX_PATH = 4096
"""Maximum number of characters in the path of an image."""
MAX_CHARACTERS = 2**20
"""Maximum number of characters in all turns of a record together."""
MAX_BAD = 2**18
"""Number of records without a known form that a file may have even if they are more than half of
its records."""
MAX_DEPTH = 64
"""Deepest nesting of lists and objects. Python's own limit is not used, because it depends on
the code that reads a record."""

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """A sample before it is encoded.

    Attributes:
        id: Name of the sample in the data.
        images: Path or content of each image file.
        turns: Turns of the conversation.
        category: Group of the sample in the results of an evaluation; None for no group.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    category: str | None = None


def read_record(raw: Any, number: int, image_root: str, *, follow_links: bool = False) -> Record:
    """Converts a record of a data file to a `Record`.

    Args:
        raw: A dict. It has the conversation, as "conversations" or "messages", and optionally
            "image" or "images" (one image or a list of images), "id" and "category". An image is a
            path, bytes, or {"bytes", "path"} of which one may be None. A turn is {"from", "value"}
            or {"role", "content"}. The names of the roles are "human" or "user", "gpt" or
            "assistant", and "system". A content is a text, or a list of {"type": "text", "text"}
            and {"type": "image"} parts. An image part may contain its own image, as "image" or
            "path", or the position of an image in the record, as "index".
        number: Index of the record, which replaces a missing id.
        image_root: Directory that relative image paths start from.
        follow_links: Whether symbolic links may lead to images outside of image_root.

    Raises:
        SampleError: The record has another form, an image path leads out of image_root, or an image
            has neither bytes nor a path.
    """
    images, turns = _parse(raw)
    name = raw.get("id")
    return Record(
        id=str(number if name is None else name),
        images=tuple(locate_image(image, image_root, follow_links) for image in images),
        turns=tuple(turns),
        category=raw.get("category"),
    )


class Sizes(NamedTuple):
    """Numbers of images and words in N records.

    Attributes:
        images: int32 [N]. Number of images in each record; -1 if the record has no known form.
        words: int32 [N]. Number of words in all turns of each record.
    """

    images: Int32[np.ndarray, " N"]
    words: Int32[np.ndarray, " N"]

    @property
    def most_images(self) -> int:
        """Returns the largest number of images in a record."""
        return int(self.images.max(initial=0))


SAMPLED_IMAGES = 1024
"""Number of image files, evenly spread over a data set, that identify the data set. Up to twice
as many are kept."""


class Survey(NamedTuple):
    """Results of reading all records of a file once.

    Attributes:
        sizes: Sizes of the records.
        digest: SHA-256, in hexadecimal, of everything that is learned from the records, in their
            order.
        images: Paths of some image files, evenly spread over the records.
    """

    sizes: Sizes
    digest: str
    images: list[str]


def survey(records: Iterable[Any], path: str, sampled_images: int = SAMPLED_IMAGES) -> Survey:
    """Reads all records of a data file once; the bytes of images may be left out.

    Args:
        records: Records as the file has them; None for a damaged record.
        path: Path of the file, for messages.
        sampled_images: Minimum number of image paths to return, if the records have so many.

    Raises:
        ConfigError: Too many records have no known form.
    """
    sizes, bad = array.array("i"), 0
    digest = hashlib.sha256()
    paths: list[str] = []
    count, stride = 0, 1
    for number, raw in enumerate(records, 1):
        try:
            images, turns = _parse(raw)
        except (SampleError, RecursionError):
            sizes.extend((-1, 0))
            digest.update(b"no known form")
            bad += 1
            if bad > MAX_BAD and 2 * bad > number:
                raise ConfigError(
                    f"data file {path}: of its first {number:,} records, {bad:,} cannot be used; "
                    "is it a file of samples?"
                ) from None
            continue
        digest.update(_bytes_of(images, turns, raw.get("category")))
        sizes.extend((len(images), sum(len(turn.text.split()) for turn in turns)))
        for image in images:
            name = image.get("path") if isinstance(image, dict) else image
            if count % stride == 0 and isinstance(name, str):
                paths.append(name)
            count += 1
        if len(paths) > 2 * sampled_images:
            paths, stride = paths[::2], 2 * stride
    found = Sizes(*np.array(sizes, np.int32).reshape(-1, 2).T)
    return Survey(found, digest.hexdigest(), paths)


def _bytes_of(images: list[object], turns: list[Turn], category: object) -> bytes:
    """Returns everything that is learned from a record, as bytes to compute a digest of."""
    parts = [repr((images, category)), *(f"{turn.role}:{turn.text}" for turn in turns), ""]
    return "\0".join(parts).encode(errors="surrogatepass")


def _parse(raw: Any) -> tuple[list[object], list[Turn]]:
    """Returns the images of a record, as the file has them, and its turns."""
    if not isinstance(raw, dict):
        raise SampleError(f"expected an object, found {raw!r:.60}")
    if not isinstance(raw.get("category"), str | None):
        raise SampleError(f'"category" must be text, found {raw["category"]!r:.60}')
    found = raw.get("conversations") or raw.get("messages")
    if not found or not _is_list_of(found, dict):
        raise SampleError(
            f'"conversations" or "messages" must be a list of turns, found {found!r:.60}'
        )
    _limit("turns", len(found), MAX_TURNS)
    turns: list[Turn] = []
    parts: list[Json] = []
    for index, turn in enumerate(found):
        name, said = turn.get("from") or turn.get("role"), turn.get("value")
        if said is None:  # in Parquet, a missing field is None
            said = turn.get("content")
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None or not (isinstance(said, str) or _is_list_of(said, dict)):
            raise SampleError(
                f'turn {index}: expected {{"from": "human" or "gpt", "value": text}} or '
                f'{{"role": "user" or "assistant", "content": text or parts}}, found {turn!r:.80}'
            )
        if not isinstance(said, str):
            _limit("parts in a turn", len(said), MAX_TURNS)
            said, images = _join_parts(said, role, index)
            parts += images
        turns.append(Turn(role, said))
    _limit("characters", sum(len(turn.text) for turn in turns), MAX_CHARACTERS)
    images = _images_of_parts(parts, _images_beside(raw))
    _limit("images", len(images), MAX_IMAGES, "number of images")
    return images, turns


def _limit(what: str, found: int, most: int, kind: str = "record size") -> None:
    if found > most:
        raise SampleError(f"it has {found:,} {what}, and a record may have {most:,}", kind)


def _join_parts(content: list[Json], role: str, turn: int) -> tuple[str, list[Json]]:
    """Returns the text of a content that has parts, and its image parts."""
    texts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image" and role == "human":
            texts.append(IMAGE_PLACEHOLDER)
            images.append(part)
        else:
            raise SampleError(
                f'turn {turn}: expected parts {{"type": "text", "text": text}} or, in a user '
                f'turn, {{"type": "image"}}, found {part!r:.80}'
            )
    return "".join(texts), images


def _images_beside(raw: Json) -> list[object]:
    """Returns the images in the fields "image" or "images" of a record."""
    named = {name: raw[name] for name in ("image", "images") if raw.get(name)}
    if len(named) > 1:
        raise SampleError('there are both "image" and "images"; keep one of them')
    for name, value in named.items():
        images = value if isinstance(value, list) else [value]
        if not all(map(_is_image, images)):
            raise SampleError(
                f'"{name}" must be a path, {{"bytes", "path"}}, or a list of these, found '
                f"{value!r:.60}"
            )
        return images
    return []


def _images_of_parts(parts: list[Json], beside: list[object]) -> list[object]:
    """Returns the images in the order of the parts, if the parts say which images they show."""
    if not parts:
        return beside
    keys = [
        next((key for key in ("image", "path", "index") if part.get(key) is not None), None)
        for part in parts
    ]
    if not any(keys):
        return beside
    of_record = all(key == "index" for key in keys)
    if not all(keys) or (not of_record and ("index" in keys or beside)):
        raise SampleError(
            f"all image parts must have their own image, or all must have the index of an image "
            f"of the record; found {parts!r:.80}"
        )
    images = [part[key] for part, key in zip(parts, keys, strict=True) if key]
    if of_record:
        if not all(isinstance(index, int) and 0 <= index < len(beside) for index in images):
            raise SampleError(
                f"image parts have indices {images!r:.80}, but the record has {len(beside)} images"
            )
        return [beside[index] for index in images]
    if not all(map(_is_image, images)):
        raise SampleError(
            f'an image part must have a path or {{"bytes", "path"}}, found {images!r:.80}'
        )
    return images


def _is_image(value: object) -> bool:
    known = isinstance(value, dict) and not value.keys().isdisjoint({"bytes", "path"})
    return known or isinstance(value, str | bytes)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def locate_image(image: object, root: str, follow_links: bool) -> str | bytes:
    """Returns the full path of an image file in a directory, or its content if it is embedded.

    Args:
        image: Path, bytes, or {"bytes", "path"} of which one may be None.
        root: Directory that relative paths start from.
        follow_links: Whether symbolic links may lead to images outside of the directory.

    Raises:
        SampleError: The image is neither embedded nor a path, or its path is not valid or leads out
            of the directory.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise SampleError(f"an image is neither embedded nor a path, but {image!r:.60}")
    if len(image) > MAX_PATH:
        raise SampleError(f"an image path has {len(image):,} characters", "image path")
    try:
        os.fsencode(image)
    except UnicodeEncodeError as error:
        raise SampleError(f"image path {image!r} is not text: {error}", "image path") from None
    path = PurePosixPath(image)
    is_address = "://" in image or ("://" in root and "::" in image)  # or a chain of fsspec URLs
    if is_address or path.is_absolute() or ".." in path.parts or "\0" in image:
        raise SampleError(
            f"image path {image!r} leads out of data.image_root; make it relative to that folder",
            "image path",
        )
    located = os.path.join(root, image)
    if not follow_links and "://" not in root and not _is_inside(located, root):
        raise SampleError(
            f"image {image!r} leads out of data.image_root by a link; set data.follow_links to "
            "allow this",
            "image path",
        )
    return located


def _is_inside(path: str, root: str) -> bool:
    """Returns True if the path is in the directory `root` after all links are resolved."""
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root

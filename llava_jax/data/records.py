"""Parses the records of data files. A record is a sample before it is encoded.

A record has one of two formats, and a file may contain both. In LLaVA's format, a record has
`image` and `conversations`, a list of turns with `from` and `value`. In the format of Hugging
Face's chat templates, a record has `images` and `messages`, a list of turns with `role` and
`content`. The content is a text or a list of text parts and image parts.
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

# These limits prevent a single record from delaying a run for long or filling its memory.
MAX_RECORD_BYTES = 2**22
"""Maximum size in bytes of a record in a JSON file, and of the texts of a record in a Parquet
file."""
MAX_IMAGES = 256
"""Maximum number of images in a record."""
MAX_TURNS = 2000
"""Maximum number of turns in a record, and of content parts in a turn."""
MAX_PATH = 4096
"""Maximum number of characters in the path of an image."""
MAX_CHARACTERS = 2**20
"""Maximum number of characters in all turns of a record together."""
MAX_BAD = 2**18
"""A file is refused if more than this number of its records, and more than half of its records,
have an unknown format."""
MAX_DEPTH = 64
"""Maximum depth of nested lists and objects in a record. Python's recursion limit is not used,
because the depth that it allows depends on the functions that are running."""

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
        category: Category for which an evaluation computes separate scores; None if the sample has
            no category.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    category: str | None = None


def read_record(raw: Any, number: int, image_root: str, *, follow_links: bool = False) -> Record:
    """Converts a record of a data file to a `Record`.

    Args:
        raw: Dict with the conversation in the field "conversations" or "messages". Optional fields
            are "image" or "images" (one image or a list of images), "id" and "category". An image
            is a path, bytes, or a dict with the keys "bytes" and "path", one of which may be None.
            A turn is a dict with the keys "from" and "value", or "role" and "content". A role is
            "human" or "user", "gpt" or "assistant", or "system". The content is a text or a list of
            parts: {"type": "text", "text": text} or {"type": "image"}. An image part may contain
            an image as "image" or "path", or the index of an image of the record as "index".
        number: Index of the record, used as its id if the record has no id.
        image_root: Directory that relative image paths start from.
        follow_links: Whether symbolic links may point to images outside of image_root.

    Raises:
        SampleError: The record has an unknown format, an image path is outside of image_root, or an
            image has neither bytes nor a path.
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
        images: int32 [N]. Number of images in each record; -1 for a record of an unknown format.
        words: int32 [N]. Number of words in all turns of each record.
    """

    images: Int32[np.ndarray, " N"]
    words: Int32[np.ndarray, " N"]

    @property
    def most_images(self) -> int:
        """Returns the largest number of images that a single record has."""
        return int(self.images.max(initial=0))


SAMPLED_IMAGES = 1024
"""Number of image files whose checksums help to identify a data set. They are evenly spread over
the data set, and up to twice as many may be used."""


class Survey(NamedTuple):
    """Results of reading all records of a file once.

    Attributes:
        sizes: Sizes of the records.
        digest: SHA-256, in hexadecimal, of the turns, images and categories of all records, in
            order.
        images: Paths of some image files, evenly spread over the records.
    """

    sizes: Sizes
    digest: str
    images: list[str]


def survey(records: Iterable[Any], path: str, sampled_images: int = SAMPLED_IMAGES) -> Survey:
    """Reads all records of a data file once, and returns their sizes, digest and image paths.

    Args:
        records: Records as they are in the file; None for a damaged record. The bytes of their
            images may be missing.
        path: Path of the file, for error messages.
        sampled_images: Minimum number of image paths to return; all paths are returned if there are
            fewer.

    Raises:
        ConfigError: Too many records have an unknown format.
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
                    f"data file {path}: {bad:,} of the first {number:,} records have an unknown "
                    "format; check that the file contains training samples"
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
    """Returns the images, turns and category of a record as bytes, to compute a digest."""
    parts = [repr((images, category)), *(f"{turn.role}:{turn.text}" for turn in turns), ""]
    return "\0".join(parts).encode(errors="surrogatepass")


def _parse(raw: Any) -> tuple[list[object], list[Turn]]:
    """Returns the images of a record, unchanged, and its turns as `Turn` objects."""
    if not isinstance(raw, dict):
        raise SampleError(f"expected an object, found {raw!r:.60}")
    if not isinstance(raw.get("category"), str | None):
        raise SampleError(f'"category" must be a text, found {raw["category"]!r:.60}')
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
            _limit("parts in one turn", len(said), MAX_TURNS)
            said, images = _join_parts(said, role, index)
            parts += images
        turns.append(Turn(role, said))
    _limit("characters", sum(len(turn.text) for turn in turns), MAX_CHARACTERS)
    images = _images_of_parts(parts, _images_beside(raw))
    _limit("images", len(images), MAX_IMAGES, "number of images")
    return images, turns


def _limit(what: str, found: int, most: int, kind: str = "record size") -> None:
    if found > most:
        raise SampleError(f"the record has {found:,} {what}; at most {most:,} are allowed", kind)


def _join_parts(content: list[Json], role: str, turn: int) -> tuple[str, list[Json]]:
    """Joins the parts of a turn's content; returns their text and the image parts."""
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
    """Returns the images in the field "image" or "images" of a record."""
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


def _images_of_parts(parts: list[Json], beside: list[object]) -> list[object]:
    """Returns the images that the image parts contain or refer to; `beside` if there are none."""
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
            "all image parts must have the same form: either all contain an image, and the record "
            'has no "image" or "images"; or all contain the "index" of an image of the record; '
            f"found {parts!r:.80}"
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
            'an image part must have a path or an object with "bytes" or "path", found '
            f"{images!r:.80}"
        )
    return images


def _is_image(value: object) -> bool:
    known = isinstance(value, dict) and not value.keys().isdisjoint({"bytes", "path"})
    return known or isinstance(value, str | bytes)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def locate_image(image: object, root: str, follow_links: bool) -> str | bytes:
    """Returns the full path of an image file, or the content of an embedded image.

    Args:
        image: Path, bytes, or a dict with the keys "bytes" and "path", one of which may be None.
        root: Directory that relative paths start from.
        follow_links: Whether symbolic links may point to images outside of the directory.

    Raises:
        SampleError: The image is neither embedded nor a path, or its path is not valid or is
            outside of the directory.
    """
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise SampleError(f"an image must be a path or embedded bytes, found {image!r:.60}")
    if len(image) > MAX_PATH:
        raise SampleError(
            f"an image path has {len(image):,} characters; at most {MAX_PATH:,} are allowed",
            "image path",
        )
    try:
        os.fsencode(image)
    except UnicodeEncodeError as error:
        raise SampleError(
            f"image path {image!r} is not a valid file name: {error}", "image path"
        ) from None
    path = PurePosixPath(image)
    is_address = "://" in image or ("://" in root and "::" in image)  # fsspec chains URLs with ::
    if is_address or path.is_absolute() or ".." in path.parts or "\0" in image:
        raise SampleError(
            f"image path {image!r} is outside data.image_root or is not valid; write the path "
            'relative to that directory, without ".."',
            "image path",
        )
    located = os.path.join(root, image)
    if not follow_links and "://" not in root and not _is_inside(located, root):
        raise SampleError(
            f"image {image!r} is outside data.image_root because of a symbolic link; set "
            "data.follow_links to true to allow this",
            "image path",
        )
    return located


def _is_inside(path: str, root: str) -> bool:
    """Returns True if a path is in the directory `root` after resolving symbolic links."""
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root

"""Records: samples before they are encoded, and the forms in which data files write them.

Two forms are known, and may be mixed. LLaVA's: `conversations` of `{"from", "value"}`, and `image`.
And that of chat templates: `messages` of `{"role", "content"}`, whose content may be a list of text
and image parts, and `images`.
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
"""What is read of a record; all else in it is passed over."""

CONVERSATIONS = ("conversations", "messages")

# What one record may have, so that no record keeps a run waiting or fills its memory.
MAX_RECORD_BYTES = 2**22
MAX_IMAGES = 256
MAX_TURNS = 2000
"""Or parts of turns."""
MAX_PATH = 4096
MAX_CHARACTERS = 2**20
"""Of all turns."""
MAX_BAD = 2**18
"""Records of a file that have no known form, if most have none."""
MAX_DEPTH = 64
"""Of lists in lists. Python's own limit depends on who reads a record."""

ROLES: dict[str, Literal["system", "human", "gpt"]] = {
    "system": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample before it is encoded.

    Attributes:
        id: The data's own name for it.
        images: Its image files: their paths, or what is in them.
        turns: The conversation.
        category: Groups the results of an evaluation; None outside any group.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    category: str | None = None


def read_record(raw: Any, number: int, image_root: str, *, follow_links: bool = False) -> Record:
    """Makes a record of what a data file holds.

    Args:
        raw: {"image" or "images" (optional; an image or a list of them), "conversations" or
            "messages", "id" and "category" (optional)}. An image is a path, or {"bytes", "path"}
            of which one may be None. A turn is {"from", "value"} or {"role", "content"}; the names
            of who speaks are human or user, gpt or assistant, and system. Contents are texts, or
            lists of {"type": "text", "text"} and {"type": "image"} parts; an image part may bring
            its own image (as "image" or "path"), or say which of the record's it is ("index").
        number: Names it, if it has no id.
        image_root: Folder that image paths are relative to.
        follow_links: Whether links may lead out of it.

    Raises:
        SampleError: It has another form, an image path leads out of image_root, or there is neither
            image nor path.
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
    """How large records are, as far as their text tells.

    Attributes:
        images: Images of each; -1 where it has no known form.
        words: Words of each, in all its turns.
    """

    images: Int32[np.ndarray, " N"]
    words: Int32[np.ndarray, " N"]

    @property
    def most_images(self) -> int:
        """Of one record."""
        return int(self.images.max(initial=0))


SAMPLED_IMAGES = 1024
"""Image files of a data set, evenly spread, by which it is known again; up to twice as many."""


class Survey(NamedTuple):
    """What one pass through records finds.

    Attributes:
        sizes: Sizes of the records.
        digest: SHA-256 of what is learned from them, in their order.
        images: Paths of some of their image files, evenly spread.
    """

    sizes: Sizes
    digest: str
    images: list[str]


def survey(records: Iterable[Any], path: str, sampled_images: int = SAMPLED_IMAGES) -> Survey:
    """Looks at records of a data file; the bytes of their images need not be there.

    Raises:
        ConfigError: Most of a great many have no known form.
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
    """What is learned from a record; of an image that is embedded, what is there of it."""
    parts = [repr((images, category)), *(f"{turn.role}:{turn.text}" for turn in turns), ""]
    return "\0".join(parts).encode(errors="surrogatepass")


def _parse(raw: Any) -> tuple[list[object], list[Turn]]:
    """The images of a record, as it has them, and its turns."""
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
        if said is None:  # a table has all its columns, even where they are empty
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
    """The text of a content in parts, and the image parts."""
    texts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image" and role == "human":
            texts.append(IMAGE_PLACEHOLDER)
            images.append(part)
        else:
            raise SampleError(
                f'turn {turn}: expected parts {{"type": "text", "text": text}} or, where the user '
                f'speaks, {{"type": "image"}}, found {part!r:.80}'
            )
    return "".join(texts), images


def _images_beside(raw: Json) -> list[object]:
    named = {name: raw[name] for name in ("image", "images") if raw.get(name)}
    if len(named) > 1:
        raise SampleError('there are both "image" and "images"; keep one of them')
    for name, value in named.items():
        images = value if isinstance(value, list) else [value]
        if not all(map(_is_image, images)):
            raise SampleError(
                f'"{name}" must be a path, {{"bytes", "path"}}, or a list of them, found '
                f"{value!r:.60}"
            )
        return images
    return []


def _images_of_parts(parts: list[Json], beside: list[object]) -> list[object]:
    """The images in the order of the parts that show them, if these say which they show."""
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
            f"all image parts must bring their own image, or all show one of the "
            f"record's; found {parts!r:.80}"
        )
    images = [part[key] for part, key in zip(parts, keys, strict=True) if key]
    if of_record:
        if not all(isinstance(index, int) and 0 <= index < len(beside) for index in images):
            raise SampleError(f"parts show images {images!r:.80}, and it has {len(beside)}")
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
    """The path of an image below a folder, or what is in its file.

    Args:
        image: A path, its bytes, or {"bytes", "path"} of which one may be None.
        root: The folder.
        follow_links: Whether links may lead out of it.

    Raises:
        SampleError: It is not an image, a path or a URL, or its path leads out of the folder.
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
        raise SampleError(f"image path {image!r} is no text: {error}", "image path") from None
    path = PurePosixPath(image)
    is_address = "://" in image or ("://" in root and "::" in image)  # fsspec's chains of them
    if is_address or path.is_absolute() or ".." in path.parts or "\0" in image:
        raise SampleError(
            f"image path {image!r} leads out of data.image_root; make it relative to that folder",
            "image path",
        )
    located = os.path.join(root, image)
    if not follow_links and "://" not in root and not _is_inside(located, root):
        raise SampleError(
            f"image {image!r} is, by a link, outside of data.image_root; set data.follow_links if "
            "that is meant",
            "image path",
        )
    return located


def _is_inside(path: str, root: str) -> bool:
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root

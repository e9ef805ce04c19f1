"""Samples before they are encoded, and the files of LLaVA's JSON form that they come from."""

import copy
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, overload

import numpy as np

from llava_jax.config import ConfigError
from llava_jax.data.conversation import SampleError, Turn


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample before it is encoded.

    Attributes:
        id: The data's own name for it.
        images: Paths of its image files.
        turns: The conversation.
        category: Groups the results of an evaluation; None outside any group.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    category: str | None = None


class LlavaJson(Sequence[Record]):
    """The records of a LLaVA JSON file, read from disk one by one.

    Only the place of each record in the file is kept, so that hundreds of thousands of records
    cost a few megabytes and reach worker processes at once.

    Attributes:
        max_images: Most images in one record of the file.
    """

    def __init__(self, path: str, image_root: str):
        """Reads through the file once.

        Args:
            path: A JSON list of {"id", "image" (optional; a path or a list of paths),
                "conversations": [{"from": "human" | "gpt", "value": text}], "category" (optional)}.
            image_root: Folder that the image paths are relative to.

        Raises:
            ConfigError: No such file, or its structure is another; names the file and the record.
        """
        self.path = path
        self.image_root = image_root
        self._spans, self.max_images = _scan(path)
        self._size = os.path.getsize(path)

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "LlavaJson": ...
    def __getitem__(self, index: int | slice) -> "Record | LlavaJson":
        """Reads a record, or selects some without reading them.

        Raises:
            SampleError: An image path leads out of image_root.
            ConfigError: The file changed since it was opened.
        """
        if isinstance(index, slice):
            part = copy.copy(self)
            part._spans = self._spans[index]
            return part
        start, stop = self._spans[index].tolist()
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size != self._size:
                raise ConfigError(f"{self.path} changed while it was in use; start again")
            file.seek(start)
            raw = json.loads(file.read(stop - start))
        return Record(
            id=str(raw.get("id", index)),
            images=tuple(_image_path(self.image_root, image) for image in _images(raw)),
            turns=tuple(Turn(turn["from"], turn["value"]) for turn in raw["conversations"]),
            category=raw.get("category"),
        )


def max_images(records: Sequence[Record]) -> int:
    """Counts the images of the record that has most."""
    if isinstance(records, LlavaJson):
        return records.max_images
    return max((len(record.images) for record in records), default=0)


def _scan(path: str) -> tuple[np.ndarray, int]:
    """Returns where each record lies, int64 [N, 2] in bytes, and the most images in one."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"data file {path}: {error.strerror}; check data.path (or eval_path)"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} is not UTF-8: byte {error.start}") from None
    start = _skip_space(text, 0)
    if text[start : start + 1] != "[":
        raise ConfigError(f"data file {path} is not a JSON list: it starts with {text[:20]!r}")
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    most = 0
    position = _skip_space(text, start + 1)
    while text[position : position + 1] != "]" or (spans and text[position - 1] == ","):
        where = f"data file {path}, record {len(spans)}"
        try:
            raw, stop = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{where}: not JSON, {error.msg} at line {error.lineno} column {error.colno}"
            ) from None
        _check(raw, where)
        most = max(most, len(_images(raw)))
        spans.append((position, stop))
        position = _skip_space(text, stop)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ConfigError(f"{where}: expected ',' or ']' after it; is the file cut off?")
    if not spans:
        raise ConfigError(f"data file {path} has no records")
    return _byte_spans(text, np.array(spans, np.int64)), most


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _byte_spans(text: str, spans: np.ndarray) -> np.ndarray:
    """Turns places counted in characters into places counted in bytes."""
    if text.isascii():
        return spans
    places = spans.reshape(-1)
    gaps = np.diff(places, prepend=0).tolist()
    sizes = [
        len(text[place - gap : place].encode("utf-8"))
        for place, gap in zip(places.tolist(), gaps, strict=True)
    ]
    return np.cumsum(np.array(sizes, np.int64)).reshape(spans.shape)


def _check(raw: Any, where: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected an object, found {raw!r:.60}")
    images = raw.get("image", [])
    if not isinstance(images, str) and not _is_list_of(images, str) and images is not None:
        raise ConfigError(
            f'{where}: "image" must be a path or a list of them, found {images!r:.60}'
        )
    turns = raw.get("conversations")
    if not turns or not _is_list_of(turns, dict):
        raise ConfigError(f'{where}: "conversations" must be a list of turns, found {turns!r:.60}')
    for index, turn in enumerate(turns):
        if turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            raise ConfigError(
                f'{where}, turn {index}: expected {{"from": "human" or "gpt", "value": text}}, '
                f"found {turn!r:.80}"
            )
    if not isinstance(raw.get("category"), str | None):
        raise ConfigError(f'{where}: "category" must be text, found {raw["category"]!r:.60}')


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _images(raw: dict[str, Any]) -> list[str]:
    images = raw.get("image") or []
    return [images] if isinstance(images, str) else images


def _image_path(root: str, image: str) -> str:
    # By the letters alone: folders inside the root may well be links to elsewhere.
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(
            f"image path {image!r} leads out of data.image_root; make it relative to that folder"
        )
    return os.path.join(root, image)

"""Records of a JSON file: a list of them, or one on each line."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import ConfigError
from llava_jax.data.records import count_images


class JsonFile:
    """A JSON file's records, read from disk one by one.

    Only the place of each record in the file is kept, so that hundreds of thousands of records
    cost a few megabytes and reach worker processes at once.

    Attributes:
        path: The file.
        size: Its bytes.
        max_images: Most images in one record of it.
    """

    def __init__(self, path: str, *, lines: bool):
        """Reads through the file once.

        Args:
            path: UTF-8.
            lines: Whether each line is a record; else the file is a list of them.

        Raises:
            ConfigError: Its structure is another; names the file and the record or line.
        """
        self.path = path
        self.size = os.path.getsize(path)
        self._spans, self.max_images = (_scan_lines if lines else _scan_list)(path)

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, number: int) -> dict[str, Any]:
        """Reads a record, as it is in the file."""
        start, stop = self._spans[number].tolist()
        with open(self.path, "rb") as file:
            file.seek(start)
            return json.loads(file.read(stop - start))


def _scan_lines(path: str) -> tuple[np.ndarray, int]:
    """Returns where each record lies, int64 [N, 2] in bytes, and the most images in one."""
    spans: list[tuple[int, int]] = []
    most = stop = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, stop = stop, stop + len(line)
            if not line.strip():
                continue
            where = f"data file {path}, line {number}"
            try:
                raw = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where}: not UTF-8, byte {start + error.start}") from None
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{where}: not JSON, {error.msg} at column {error.colno}; a file that begins "
                    "with { must have a whole record on each line"
                ) from None
            most = max(most, count_images(raw, where))
            spans.append((start, stop))
    return np.array(spans, np.int64).reshape(-1, 2), most


def _scan_list(path: str) -> tuple[np.ndarray, int]:
    """Returns where each record lies, int64 [N, 2] in bytes, and the most images in one."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data file {path} is not UTF-8: byte {error.start}") from None
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    most = 0
    position = _skip_space(text, text.index("[") + 1)
    while text[position : position + 1] != "]" or (spans and text[position - 1] == ","):
        where = f"data file {path}, record {len(spans)}"
        try:
            raw, stop = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{where}: not JSON, {error.msg} at line {error.lineno} column {error.colno}"
            ) from None
        most = max(most, count_images(raw, where))
        spans.append((position, stop))
        position = _skip_space(text, stop)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ConfigError(f"{where}: expected ',' or ']' after it; is the file cut off?")
    return _byte_spans(text, np.array(spans, np.int64).reshape(-1, 2)), most


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

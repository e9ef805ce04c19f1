"""Records of a JSON file: a list of them, or one on each line."""

import json
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from llava_jax.config import ConfigError
from llava_jax.data.conversation import SampleError
from llava_jax.data.files import file_size, open_file
from llava_jax.data.records import CONVERSATIONS, Sizes, measure_all

_CHUNK_BYTES = 2**24


class JsonFile:
    """A JSON file's records, read from disk one by one.

    Only the place of each record in the file is kept, so that hundreds of thousands of records
    cost a few megabytes and reach worker processes at once. A record that is no JSON has a place
    too: reading it says what is wrong.

    Attributes:
        path: The file.
        size: Its bytes.
        sizes: Of its records.
    """

    def __init__(self, path: str, *, lines: bool):
        """Reads through the file once.

        Args:
            path: UTF-8.
            lines: Whether each line is a record; else the file is a list of them.

        Raises:
            ConfigError: It is a list that does not end; names the file and the record.
        """
        self.path = path
        self.size = file_size(path)
        self._unit = "line" if lines else "record"
        spans: list[tuple[int, int, int]] = []

        def scan() -> Iterator[Any]:
            for number, start, stop, raw in (_scan_lines if lines else _scan_list)(path):
                spans.append((number, start, stop))
                yield raw

        self.sizes: Sizes = measure_all(scan())
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, number: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.path}, {self._unit} {self._spans[number, 0]}"

    def read(self, number: int) -> Any:
        """Reads a record, as it is in the file.

        Raises:
            SampleError: It is no JSON.
        """
        _, start, stop = self._spans[number].tolist()
        with open_file(self.path) as file:
            file.seek(start)
            text = file.read(stop - start)
        try:
            raw = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            message = f"not UTF-8, byte {start + error.start} of the file"
            raise SampleError(message, "not JSON") from None
        except (ValueError, RecursionError) as error:
            whole = ", which must hold a whole record" if self._unit == "line" else ""
            message = f"not JSON: {error}, of this {self._unit}{whole}"
            raise SampleError(message, "not JSON") from None
        if b"\\ud" in text.lower():
            _check_text(raw)
        return raw


def _check_text(raw: Any) -> None:
    try:
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SampleError(f"not Unicode: {half!r} is half of a character", "not JSON") from None


Scanned = tuple[int, int, int, Any]
"""Number of a line or record, the bytes where it starts and stops, and itself; None if damaged."""


def _scan_lines(path: str) -> Iterator[Scanned]:
    stop = 0
    with open_file(path) as file:
        for number, line in enumerate(file, 1):
            start, stop = stop, stop + len(line)
            if line.strip():
                try:
                    yield number, start, stop, json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError):
                    yield number, start, stop, None


def _scan_list(path: str) -> Iterator[Scanned]:
    """Goes through a list. What cannot be read is one damaged record, up to the next whole one."""
    with open_file(path) as file:
        text = _Window(file)
        text.skip("[")
        number = 0
        while not text.skip("]"):
            if text.at_end:
                raise ConfigError(
                    f"data file {path}, record {number}: the list does not end; is the file cut "
                    "off?"
                )
            start = text.place
            raw = text.read_record()
            yield number, start, text.place, raw
            text.skip(",")
            number += 1
        if not text.at_end:
            raise ConfigError(
                f"data file {path}: there is more behind the list, at byte {text.place}; two lists "
                "in one file?"
            )


class _Window:
    """A JSON file, of which a part at a time is in memory: as text of a character a byte.

    Attributes:
        text: The part.
        position: What is read next in it.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._start = 0
        self.text = ""
        self.position = 0

    @property
    def place(self) -> int:
        """The byte that is read next."""
        return self._start + self.position

    @property
    def at_end(self) -> bool:
        return self.position == len(self.text) and not self._grow()

    def skip(self, mark: str) -> bool:
        """Goes over a mark with the space around it, if it comes next."""
        self._skip_space()
        found = self.text.startswith(mark, self.position)
        self.position += found
        self._skip_space()
        return found

    def read_record(self) -> Any:
        """Goes over one value and returns it; over a damaged one, and returns None."""
        if self.position > _CHUNK_BYTES:
            self._start += self.position
            self.text, self.position = self.text[self.position :], 0
        try:
            raw, stop = self._decode(self.position)
            span = self.text[self.position : stop]
            if not span.isascii():
                raw = json.loads(span.encode("latin-1").decode("utf-8"))
        except (ValueError, RecursionError):
            raw, stop = None, None
        start, self.position = self.position, stop or self.position
        self._skip_space()
        if stop is None or not self.text.startswith((",", "]"), self.position):
            self.position = self._next_record(start)
            return None
        self.position = stop
        return raw

    def _skip_space(self) -> None:
        while True:
            self.position = _SPACE.match(self.text, self.position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.position < len(self.text) or not self._grow():
                return

    def _grow(self) -> bool:
        more = self._file.read(_CHUNK_BYTES).decode("latin-1")
        self.text += more
        return bool(more)

    def _decode(self, start: int) -> tuple[Any, int]:
        """The value at a position, and where it stops."""
        while True:
            try:
                return _DECODER.raw_decode(self.text, start)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.text) - _NEAR or error.msg.startswith("Unterminated")
                if not is_cut or not self._grow():
                    raise

    def _next_record(self, start: int) -> int:
        """Where a damaged record stops: before the next whole one, or the list's end."""
        at = start + 1
        while True:
            comma = _BETWEEN.search(self.text, at)
            if comma is not None:
                at = comma.end()
                if self._is_record(at):
                    return comma.start()
            elif self._grow():
                at = max(at, len(self.text) - _CHUNK_BYTES - _NEAR)
            else:
                rest = self.text.rstrip()
                return len(rest) - rest.endswith("]")

    def _is_record(self, at: int) -> bool:
        try:
            raw, _ = self._decode(at)
        except (ValueError, RecursionError):
            return False
        return isinstance(raw, dict) and not raw.keys().isdisjoint(CONVERSATIONS)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r",\s*(?=\{)")
_NEAR = 64
"""Bytes: what is wrong so near to the end of a window may be right when there is more of it."""

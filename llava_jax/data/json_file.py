"""Records of a JSON file: a list of them, or one on each line."""

import array
import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from llava_jax.data.files import file_size, open_file
from llava_jax.data.records import (
    CONVERSATIONS,
    MAX_DEPTH,
    MAX_RECORD_BYTES,
    SAMPLED_IMAGES,
    survey,
)
from llava_jax.disk import is_deeper
from llava_jax.errors import ConfigError, SampleError

_CHUNK_BYTES = 2**24


class JsonFile:
    """A JSON file's records, read from disk one by one.

    Only the place of each record in the file is kept, so that hundreds of thousands of records
    cost a few megabytes and reach worker processes at once. A record that is no JSON has a place
    too: reading it says what is wrong.

    Attributes:
        path: The file.
        size: Its bytes.
        sizes, digest, images: As `records.Survey` has them.
    """

    def __init__(self, path: str, *, lines: bool, sampled_images: int = SAMPLED_IMAGES):
        """Reads through the file once.

        Args:
            path: UTF-8.
            lines: Whether each line is a record; else the file is a list of them.
            sampled_images: Image files to remember, at least where there are as many.

        Raises:
            ConfigError: It is a list that does not end, or too damaged to find its records; names
                the file and the record.
        """
        self.path = path
        self.size = file_size(path)
        self._unit = "line" if lines else "record"
        spans = array.array("q")

        def scan() -> Iterator[object]:
            for number, start, stop, raw in (_scan_lines if lines else _scan_list)(path):
                spans.extend((number, start, stop))
                yield raw

        self.sizes, self.digest, self.images = survey(scan(), path, sampled_images)
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
        if stop - start > MAX_RECORD_BYTES:
            raise SampleError(
                f"this {self._unit} has {stop - start:,} bytes, of at most {MAX_RECORD_BYTES:,}",
                "record size",
            )
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
        if is_deeper(raw, MAX_DEPTH):
            raise SampleError(f"it has more than {MAX_DEPTH} lists or objects in each other")
        if b"\\ud" in text.lower():
            _check_text(raw)
        return raw


def _check_text(raw: object) -> None:
    try:
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SampleError(f"not Unicode: {half!r} is half of a character", "not JSON") from None


Scanned = tuple[int, int, int, object]
"""Number of a line or record, the bytes where it starts and stops, and itself; None if damaged."""


def _scan_lines(path: str) -> Iterator[Scanned]:
    stop = 0
    with open_file(path) as opened:
        file = io.BufferedReader(opened)  # what reads remote files reads only whole lines
        for number in itertools.count(1):
            start, line = stop, file.readline(MAX_RECORD_BYTES)
            if not line:
                return
            stop, rest = stop + len(line), line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_CHUNK_BYTES)
                stop += len(rest)
            if line.strip():
                raw = None
                with contextlib.suppress(ValueError, RecursionError):
                    raw = json.loads(line.decode("utf-8"))
                yield number, start, stop, raw


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
            start = text.offset
            raw, stop = text.read_record()
            if text.is_lost:
                raise ConfigError(
                    f"data file {path}: from record {number} on, at byte {start}, it is too "
                    "damaged to find the next whole one; write it anew, as JSON lines"
                )
            yield number, start, stop, raw
            text.skip(",")
            number += 1
        if not text.at_end:
            raise ConfigError(
                f"data file {path}: there is more behind the list, at byte {text.offset}; two "
                "lists in one file?"
            )


class _Window:
    """A JSON file, of which a part at a time is in memory: as text of a character a byte.

    Attributes:
        is_lost: Whether looking for whole records between damaged ones has taken too long.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._text = ""
        self._position = 0  # of what is read next, in the text
        self._start = 0  # of the text, in the file
        self._tried = 0  # characters that were looked at for nothing
        self.is_lost = False

    @property
    def offset(self) -> int:
        """The byte that is read next."""
        return self._start + self._position

    @property
    def at_end(self) -> bool:
        return not self._has(1)

    def skip(self, mark: str) -> bool:
        """Goes over a mark with the space around it, if it comes next."""
        self._skip_space()
        found = self._text.startswith(mark, self._position)
        self._position += found
        self._skip_space()
        return found

    def read_record(self) -> tuple[object, int]:
        """Goes over one value; returns it and the byte where it stops. None is a damaged one."""
        raw, length = self._decode(0, _SIZES[1:])
        self._position += length
        stop = self.offset
        self._skip_space()
        if length and self._text.startswith((",", "]"), self._position):
            return raw, stop
        self._go_to_next()
        return None, self.offset

    def _has(self, size: int) -> bool:
        """Whether so many characters come next; reads on for them."""
        while len(self._text) - self._position < size:
            more = self._file.read(_CHUNK_BYTES).decode("latin-1")
            if not more:
                return False
            self._start += self._position
            self._text, self._position = self._text[self._position :] + more, 0
        return True

    def _skip_space(self) -> None:
        if self._text[self._position : self._position + 1] > " ":
            return
        while True:
            self._position = _SPACE.match(self._text, self._position).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._position < len(self._text) or not self._has(1):
                return

    def _decode(self, ahead: int, sizes: tuple[int, ...]) -> tuple[object, int]:
        """The value so far behind what comes next, and its length, which is 0 if there is none."""
        for size in sizes:
            if self._position + ahead + size > len(self._text):
                self._has(ahead + size)
            start = self._position + ahead
            # A part, for an error of the decoder's costs as much as there is before it.
            text = self._text[start : start + size]
            self._tried += len(text)
            is_all = len(text) < size
            try:
                raw, length = _DECODER.raw_decode(text)
                if is_all or length < size:
                    self._tried -= len(text)
                    span = text[:length]
                    if not span.isascii():
                        raw = json.loads(span.encode("latin-1").decode("utf-8"))
                    return raw, length
            except json.JSONDecodeError as error:
                is_cut = error.pos > size - _NEAR or error.msg.startswith("Unterminated")
                if is_all or not is_cut:
                    return None, 0
            except (ValueError, RecursionError):
                return None, 0
        return None, 0

    def _go_to_next(self) -> None:
        """Goes from a damaged record to the next whole one, or to the list's end."""
        self._position += self._has(1)
        while True:
            comma = _BETWEEN.search(self._text, self._position)
            if comma is not None:
                self._position = comma.start()
                if self._is_record(len(comma[0])):
                    return
                self._position += 1
                self._tried += _TRY
                if self._tried > _MOST_TRIED + self.offset * _TRIED_PER_BYTE:
                    self.is_lost = True
                    return
            else:
                self._position = max(self._position, len(self._text) - _MOST_SPACE)
                if not self._has(_MOST_SPACE + 1):
                    rest = self._text.rstrip()
                    self._position = max(self._position, len(rest) - rest.endswith("]"))
                    return

    def _is_record(self, ahead: int) -> bool:
        raw, _ = self._decode(ahead, _SIZES)
        return isinstance(raw, dict) and not raw.keys().isdisjoint(CONVERSATIONS)


_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r",\s*(?=\{)")
_MOST_SPACE = 2**16
"""Between a comma and a record behind a damaged one."""
_SIZES = (2**11, 2**14, 2**17, MAX_RECORD_BYTES)
"""Of parts that are decoded, one after the other until a record is whole. The first is for what may
be none."""
_NEAR = 64
"""Bytes: what is wrong so near to the end of a part may be right when there is more of it."""
_TRY, _MOST_TRIED, _TRIED_PER_BYTE = 2**11, 2**30, 200
"""What a try in vain costs at least, and what all of them may, in characters."""

"""Reads the records of a JSON file: a list of records, or one record per line."""

import array
import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data.content_parts import IMAGE_FIELDS
from llava_jax.data.files import Encoding, check_size, detect_encoding, file_size, open_file
from llava_jax.data.forms import ANSWERS, CONVERSATIONS, QUESTIONS, is_record
from llava_jax.data.records import MAX_DEPTH, MAX_RECORD_BYTES, SAMPLED_IMAGES, survey
from llava_jax.disk import Json, is_deeper
from llava_jax.errors import ConfigError, SampleError

_CHUNK_BYTES = 2**24
"""Number of bytes that are read from a file at a time."""


class JsonFile:
    """The records of a JSON file, which are read from disk one by one.

    Only the number and the byte range of each record are kept in memory. Hundreds of thousands of
    records therefore take only a few megabytes, which can be sent to worker processes quickly. A
    record that is not valid JSON also has a byte range; reading the record raises SampleError.

    Attributes:
        path: Path of the file.
        size: Size of the file in bytes when it was opened.
        sizes: Sizes of the records; see `records.Survey`.
        digest: Digest of the records; see `records.Survey`.
        images: Paths of some image files; see `records.Survey`.
        image_keys: Keys of all images; see `records.Survey`.
    """

    def __init__(
        self, path: str, *, lines: bool, image_root: str = "", sampled_images: int = SAMPLED_IMAGES
    ):
        """Reads the whole file once to find its records.

        Args:
            path: Path of a file in UTF-8 or UTF-16.
            lines: Whether each line is a record; otherwise the file is a list of records, or an
                object that contains such a list.
            image_root: Directory of the images, for their keys.
            sampled_images: Minimum number of image paths to keep; all paths are kept if there are
                fewer.

        Raises:
            ConfigError: The list does not end, the file is too damaged to find its records, or too
                many records have an unknown format.
        """
        self.path = path
        self.size = file_size(path)
        self._unit = "line" if lines else "record"
        with open_file(path) as file:
            self._encoding = detect_encoding(file.read(4))
        spans = array.array("q")

        def scan() -> Iterator[object]:
            scanned = (_scan_lines if lines else _scan_list)(path, self._encoding)
            for number, start, stop, raw in scanned:
                spans.extend((number, start, stop))
                yield raw

        found = survey(scan(), path, image_root, sampled_images)
        self.sizes, self.digest, self.images, self.image_keys = found
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, number: int) -> str:
        """Returns the location of a record for messages: the file, and the line or record."""
        return f"{self.path}, {self._unit} {self._spans[number, 0]}"

    def read(self, number: int) -> Any:
        """Returns a record as it is in the file.

        Args:
            number: Index of the record.

        Raises:
            SampleError: The record is not valid JSON, is too large or is nested too deeply.
            ConfigError: The file changed after it was opened.
        """
        check_size(self.path, self.size)
        _, start, stop = self._spans[number].tolist()
        if stop - start > MAX_RECORD_BYTES:
            raise SampleError(
                f"this {self._unit} has {stop - start:,} bytes; at most {MAX_RECORD_BYTES:,} are "
                "allowed, including images in base64",
                "record size",
            )
        with open_file(self.path) as file:
            file.seek(start)
            data = file.read(stop - start)
        try:
            text = data.decode(self._encoding.name)
            raw = _loads(text)
        except UnicodeDecodeError as error:
            name = self._encoding.name[:6].rstrip("-").upper()
            message = f"the text is not valid {name} at byte {start + error.start} of the file"
            raise SampleError(message, "not JSON") from None
        except (ValueError, RecursionError) as error:
            whole = "; each line must be a complete record" if self._unit == "line" else ""
            message = f"not JSON: {error}, counted from the start of this {self._unit}{whole}"
            raise SampleError(message, "not JSON") from None
        if is_deeper(raw, MAX_DEPTH):
            raise SampleError(f"lists and objects are nested more than {MAX_DEPTH} levels deep")
        if "\\ud" in text or "\\uD" in text:
            _check_text(raw)
        return raw


def _loads(text: str) -> Any:
    """Parses JSON; a byte order mark may come first, for example where files were joined."""
    return json.loads(text.removeprefix("\ufeff"))


def _check_text(raw: object) -> None:
    """Raises SampleError if a text has half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        json.dumps(raw, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise SampleError(
            f"not Unicode: {half!r} is half of a surrogate pair", "not JSON"
        ) from None


Scanned = tuple[int, int, int, object]
"""Number of a line or record, offset of its first byte, offset of the byte after its last byte,
and its value, which is None for a damaged record."""


def _scan_lines(path: str, encoding: Encoding) -> Iterator[Scanned]:
    """Yields the lines that are not blank.

    Raises:
        ConfigError: The file ends in the middle of a code unit of UTF-16.
    """
    stop = encoding.start
    # Bytes that are not text become surrogates, so that each line can be measured in bytes.
    errors = "surrogateescape" if encoding.unit == 1 else "surrogatepass"
    with open_file(path) as opened:
        opened.seek(stop)
        buffered = io.BufferedReader(opened)  # readline of fsspec's files has no size limit
        file = io.TextIOWrapper(buffered, encoding.name, errors, newline="\n")
        try:
            for number in itertools.count(1):
                start, line = stop, file.readline(MAX_RECORD_BYTES)
                if not line:
                    return
                stop, rest = stop + len(line.encode(encoding.name, errors)), line
                while rest and not rest.endswith("\n"):
                    rest = file.readline(_CHUNK_BYTES)
                    stop += len(rest.encode(encoding.name, errors))
                if line.strip(" \t\r\n\v\f"):
                    raw = None
                    with contextlib.suppress(ValueError, RecursionError):
                        line.encode(encoding.name)  # raises an error if the line is not valid text
                        raw = _loads(line)
                    yield number, start, stop, raw
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"data file {path} is not valid UTF-16: {error.reason}; write the file again"
            ) from None


def has_list(path: str) -> bool:
    """Returns True if a JSON file is an object with a list of records, for example in "data".

    An object with fields of a record is not such an object, even if it also contains a list.

    Args:
        path: Path of the file, which begins with an object.

    Raises:
        ConfigError: The file contains a single record that takes several lines.
    """
    with open_file(path) as opened:
        file = io.BufferedReader(opened)
        text = _Window(file, detect_encoding(file.read(4)))
        whole, span = text.read_object()
        if whole is None:  # larger than a record may be
            return text.skip("{") and text.go_to_list()
        if not text.at_end:
            return False
        is_single = not _RECORD_FIELDS.isdisjoint(whole)
        if is_single and "\n" in span and is_record(whole):
            raise ConfigError(
                f"data file {path} contains a single record that takes several lines; write [ "
                "before the record and ] after it, or write the record in one line"
            )
    lists = (value for value in whole.values() if isinstance(value, list))
    return not is_single and any(_is_listed(item) for value in lists for item in value[:1])


def _scan_list(path: str, encoding: Encoding) -> Iterator[Scanned]:
    """Yields the elements of a list, which may be in an object.

    Text that is not valid JSON counts as one damaged element, which ends before the next complete
    record.
    """
    with open_file(path) as opened:
        text = _Window(io.BufferedReader(opened), encoding)
        is_inside = text.skip("{") and text.go_to_list()
        if not is_inside:
            text.skip("[")
        number = 0
        while not text.skip("]"):
            if text.at_end:
                raise ConfigError(
                    f"data file {path}, record {number}: the list does not end; the file seems to "
                    "be truncated, so copy or write it again"
                )
            start = text.offset
            raw, stop = text.read_record()
            if text.is_lost:
                raise ConfigError(
                    f"data file {path}: record {number}, at byte {start}, is damaged, and the next "
                    "complete record was not found; write the file again as JSON lines"
                )
            yield number, start, stop, raw
            text.skip(",")
            number += 1
        if is_inside and text.skip(",") and text.go_to_list():
            raise ConfigError(
                f"data file {path}: the object has several lists of records, the second one at "
                f"byte {text.offset}; write each list to a file of its own"
            )
        if (is_inside and not text.skip("}")) or not text.at_end:
            raise ConfigError(
                f"data file {path}: there is more text after the end of the list, at byte "
                f"{text.offset}; the file must contain a single list"
            )


class _Window:
    """Reads JSON values from a file, and keeps only a part of the file in memory.

    Each code unit of the encoding, which is a byte of UTF-8, is decoded as one character, so that
    positions in the text are offsets in the file.

    Attributes:
        is_lost: True if the search for the next complete record was stopped because it took too
            long.
    """

    def __init__(self, file: io.BufferedReader, encoding: Encoding):
        self._file, self._encoding = file, encoding
        file.seek(encoding.start)
        self._text = ""
        self._position = 0  # index in the text of the next character to read
        self._start = 0  # offset of the text in the file
        self._tried = 0  # number of characters that were decoded without success
        self.is_lost = False

    @property
    def offset(self) -> int:
        """Returns the offset of the next byte in the file."""
        return self._encoding.start + self._encoding.unit * (self._start + self._position)

    @property
    def at_end(self) -> bool:
        """Returns True if no text is left."""
        return not self._has(1)

    def skip(self, mark: str) -> bool:
        """Skips a mark and the white space around it; returns False if another text comes next."""
        self._skip_space()
        found = self._text.startswith(mark, self._position)
        self._position += found
        self._skip_space()
        return found

    def read_object(self) -> tuple[Json | None, str]:
        """Returns an object of at most the size of a record, or None, and its JSON text."""
        self._skip_space()
        raw, length = self._decode(0, _SIZES)
        span = self._text[self._position : self._position + length]
        self._position += length
        self._skip_space()
        return raw if isinstance(raw, dict) else None, span

    def read_record(self) -> tuple[object, int]:
        """Reads one value; returns the value and the offset of the byte after it.

        For a damaged value, returns None and skips to the next complete record.
        """
        raw, length = self._decode(0, _SIZES[1:])
        self._position += length
        stop = self.offset
        self._skip_space()
        if length and self._text.startswith((",", "]"), self._position):
            return raw, stop
        self._go_to_next()
        return None, self.offset

    def _has(self, size: int) -> bool:
        """Returns True if at least `size` characters are left, after reading more if needed."""
        while len(self._text) - self._position < size:
            more = _code_units(self._file.read(_CHUNK_BYTES * self._encoding.unit), self._encoding)
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
        """Decodes the value that begins `ahead` characters after the current position.

        Args:
            ahead: Distance of the value from the current position.
            sizes: Numbers of characters to decode. They are tried one after the other until the
                value is complete.

        Returns:
            The value and its length in characters; (None, 0) if there is no valid value.
        """
        for size in sizes:
            if self._position + ahead + size > len(self._text):
                self._has(ahead + size)
            start = self._position + ahead
            # Only a part of the text is decoded, because the decoder of an invalid text counts all
            # lines before the error.
            text = self._text[start : start + size]
            self._tried += len(text)
            is_all = len(text) < size
            try:
                raw, length = _DECODER.raw_decode(text)
                if is_all or length < size:
                    self._tried -= len(text)
                    span = text[:length]
                    if not span.isascii():
                        raw = json.loads(_join_units(span, self._encoding))
                    return raw, length
            except json.JSONDecodeError as error:
                is_cut = error.pos > size - _NEAR or error.msg.startswith("Unterminated")
                if is_all or not is_cut:
                    return None, 0
            except (ValueError, RecursionError):
                return None, 0
        return None, 0

    def go_to_list(self) -> bool:
        """Moves into the next member of an object that is a list of records.

        Returns:
            False if there is no such member. The position is then after the last member that could
            be read.
        """
        while True:
            name, length = self._decode(0, _SIZES[1:])
            if not isinstance(name, str) or name in _RECORD_FIELDS:
                return False  # the object itself is a record
            self._position += length
            if not self.skip(":"):
                return False
            self._has(_SIZES[0])
            bracket = _OPENING.match(self._text, self._position)
            if bracket is not None and self._is_record(len(bracket[0])):
                self._position = bracket.end()
                return True
            _, length = self._decode(0, _SIZES)
            self._position += length
            if not length or not self.skip(","):
                return False

    def _go_to_next(self) -> None:
        """Moves from a damaged record to the next complete record, or to the end of the list."""
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
                # No record follows in this part of the file. The end of the part is kept, because
                # the white space after a comma may continue in the next part.
                self._position = max(self._position, len(self._text) - _MOST_SPACE)
                if not self._has(_MOST_SPACE + 1):
                    rest = self._text.rstrip()
                    self._position = max(self._position, len(rest) - rest.endswith("]"))
                    return

    def _is_record(self, ahead: int) -> bool:
        """Returns True if a record begins `ahead` characters after the current position."""
        raw, _ = self._decode(ahead, _SIZES)
        return _is_listed(raw)


def _is_listed(raw: object) -> bool:
    """Returns True if an item of a list is a record, and not a round of another record."""
    return isinstance(raw, dict) and is_record(raw, in_list=True)


def _code_units(data: bytes, encoding: Encoding) -> str:
    """Returns a text with one character for each code unit."""
    if encoding.unit == 1:
        return data.decode("latin-1")
    units = np.frombuffer(data, ">u2" if encoding.name == "utf-16-be" else "<u2", len(data) // 2)
    return units.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _join_units(text: str, encoding: Encoding) -> str:
    """Returns the text whose code units are the characters of `text`."""
    if encoding.unit == 1:
        return text.encode("latin-1").decode("utf-8")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


_RECORD_FIELDS = frozenset((*CONVERSATIONS, *QUESTIONS, *ANSWERS, *IMAGE_FIELDS))
"""Fields that show that an object is a record, and not an object with a list of records."""
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_OPENING = re.compile(r"\[\s*(?=\{)")
_BETWEEN = re.compile(r",\s*(?=\{)")
_MOST_SPACE = 2**16
"""Maximum number of white space characters between a comma and the next record, after a damaged
record."""
_SIZES = (2**11, 2**14, 2**17, MAX_RECORD_BYTES)
"""Numbers of characters to decode, which are tried one after the other until a record is complete.
The first number is only used for text that may not be a record."""
_NEAR = 64
"""If decoding fails within this number of bytes from the end of the decoded text, the reason may be
that the text is cut off."""
_TRY, _MOST_TRIED, _TRIED_PER_BYTE = 2**11, 2**30, 200
"""Limits for failed attempts to decode a record, in characters: the minimum cost of one attempt,
and the maximum cost of all attempts, which is a constant plus a number per byte read so far."""

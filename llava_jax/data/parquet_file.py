"""Reads the records of Parquet files, in the format that Hugging Face's `datasets` writes."""

import bisect
import collections
import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data import forms
from llava_jax.data.files import check_size, file_size, open_file
from llava_jax.data.records import MAX_RECORD_BYTES, SAMPLED_IMAGES, survey
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, SampleError

logger = logging.getLogger(__name__)

Table = Metadata = Any
"""Types of a pyarrow batch, row or array, and of file metadata; pyarrow has no type hints."""

MAX_GROUP_BYTES = 256 * 2**20
"""Size in bytes of a row group above which a warning is logged, because reading a row also reads
all rows before it in the row group."""

_BATCH_ROWS, _BATCH_BYTES = 64, 2**28
"""Number of rows that are read at a time. Fewer rows are read if a batch could otherwise exceed
`_BATCH_BYTES`, assuming that each value is as large as the largest column of a row group."""

_KEPT_BYTES = 2**26
"""Maximum number of bytes of decoded values of a row group that stay in memory. Decoded values may
take far more bytes than the file."""

# A Parquet file of a few kilobytes can contain billions of compressed values. Each limit is a
# constant plus a number per byte of the file. Usual data files are far below the limits.
_ROWS, _ROWS_PER_BYTE = 10_000, 0.25
_VALUES, _VALUES_PER_BYTE = 2**16, 16.0
_UNPACKED, _UNPACKED_PER_BYTE = 2**24, 50.0


class ParquetFile:
    """The records of a Parquet file, which are read from disk one by one.

    A row group is read from its start, a few rows at a time, because it may not fit into memory.
    The last 64 MiB of values that were read stay in memory. A row group of at most this size is
    therefore read only once, unless another row group of the file is read in between. In a larger
    row group, reading a random record reads half of the row group on average.

    Attributes:
        path: Path of the file.
        size: Size of the file in bytes when it was opened.
        sizes: Sizes of the records; see `records.Survey`.
        images: Paths of some image files; see `records.Survey`.
        image_keys: Keys of all images; see `records.Survey`.
        digest: Digest of the records and of the sizes in bytes of all columns.
    """

    def __init__(self, path: str, *, image_root: str = "", sampled_images: int = SAMPLED_IMAGES):
        """Reads the whole file once, except for the bytes of its images.

        Args:
            path: Path of the file.
            image_root: Directory of the images, for their keys.
            sampled_images: Minimum number of image paths to keep; all paths are kept if there are
                fewer.

        Raises:
            ConfigError: pyarrow is not installed, the file is not Parquet, the file has no column
                of conversations, too many records have an unknown format, or the values take far
                more memory than the size of the file suggests.
        """
        self.path = path
        self.size = file_size(path)
        with _open(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            names = file.schema_arrow.names
            if not forms.is_record(names):
                raise ConfigError(forms.no_conversation(f"data file {path}", names))
            read = forms.columns(names)
            self._columns = [leaf for leaf in leaves if leaf.split(".")[0] in read]
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            taken = [(c.total_compressed_size, c.total_uncompressed_size) for c in columns]
            self._metadata = file.metadata
            self._ends, largest = _measure_groups(path, self.size, file.metadata, self._columns)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
        found = survey(self._scan(), path, image_root, sampled_images)
        self.sizes, records, self.images, self.image_keys = found
        # Images are not read here, but a replaced image changes the number of bytes in its column.
        self.digest = hashlib.sha256(repr((records, taken)).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, number: int) -> Json:
        """Returns a record as it is in the file.

        Args:
            number: Index of the record.

        Raises:
            SampleError: The row group cannot be read, or the record is too large.
            ConfigError: The file changed after it was opened.
        """
        check_size(self.path, self.size)
        group = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[group - 1]) if group else 0)
        with _lock:
            cursor = _cursors.pop(self, None)
            try:
                if cursor is None or cursor.group != group or row < cursor.start:
                    cursor = _Cursor(group, self._read_group(group, self._columns))
                batch, row = cursor.go_to(row)
            except ConfigError as error:
                raise SampleError(str(error), "not Parquet") from error
            except StopIteration:
                text = f"row group {group} has fewer rows than the metadata of the file says"
                raise SampleError(text, "not Parquet") from None
            _cursors[self] = cursor
            if len(_cursors) > _MAX_CURSORS:
                _cursors.popitem(last=False)
        return read_row(batch, row)

    def where(self, number: int) -> str:
        """Returns the location of a record for messages: the file and the row."""
        return f"{self.path}, row {number}"

    def _read_group(self, group: int, columns: list[str]) -> Iterator[Table]:
        """Yields the rows of a row group as batches of a few rows."""
        texts = [column for column in columns if not column.endswith(".bytes")]
        options = {"row_groups": [group], "columns": columns, "use_threads": False}
        opened = _open(self.path, texts, self._metadata)
        with opened as file, _named(self.path, f"row group {group}"):
            yield from file.iter_batches(self._batch_rows, **options)

    def _scan(self) -> Iterator[Table]:
        """Yields all rows, without the bytes of images that also have a path."""
        paths = {c.removesuffix(".path") for c in self._columns if c.endswith(".path")}
        light = [c for c in self._columns if c.removesuffix(".bytes") not in paths]
        for group in np.flatnonzero(np.diff(self._ends, prepend=0)).tolist():
            for batch in self._read_group(group, light):
                if _weight(batch) <= MAX_RECORD_BYTES:
                    with contextlib.suppress(UnicodeDecodeError):
                        yield from batch.to_pylist()
                        continue
                yield from read_rows(batch)


class _Cursor:
    """The position up to which a row group has been read, and the batches that were read last.

    Attributes:
        group: Index of the row group.
        start: Index in the row group of the first row that is still in memory.
    """

    def __init__(self, group: int, batches: Iterator[Table]):
        self.group, self.start, self._batches = group, 0, batches
        self._kept: list[Table] = []
        self._ends: list[int] = []
        self._bytes = 0

    def go_to(self, row: int) -> tuple[Table, int]:
        """Returns the batch that contains a row (>= `start`), and the row's index in the batch."""
        while not self._ends or row >= self._ends[-1]:
            batch = next(self._batches)
            self._kept.append(batch)
            self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)
            self._bytes += batch.nbytes
            while self._bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._bytes -= self._kept.pop(0).nbytes
                self.start = self._ends.pop(0)
        at = bisect.bisect_right(self._ends, row)
        return self._kept[at], row - (self._ends[at - 1] if at else self.start)


_cursors: collections.OrderedDict[ParquetFile, _Cursor] = collections.OrderedDict()
"""Cursors of the files that were read last. Each cursor keeps its file open."""
_MAX_CURSORS = 8
_lock = threading.Lock()


def _measure_groups(
    path: str, size: int, metadata: Metadata, columns: list[str]
) -> tuple[np.ndarray, int]:
    """Returns the row number at which each row group ends, and the size of the largest column.

    Raises:
        ConfigError: The row groups have more rows or values than a file of this size may have.
    """
    largest = most = 0

    def limit(what: str, found: int, most: float) -> None:
        if found > most:
            raise ConfigError(
                f"data file {path} has {size:,} bytes, but contains {found:,} {what}; at most "
                f"{int(most):,} are allowed for this size; the file is damaged, or was "
                "made on purpose to fill the memory"
            )

    limit("rows", metadata.num_rows, _ROWS + _ROWS_PER_BYTE * size)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
    limit("rows", int(ends[-1]) if groups else 0, _ROWS + _ROWS_PER_BYTE * size)
    for group in groups:
        parts = [group.column(i) for i in range(group.num_columns)]
        for part in parts:
            if part.path_in_schema in columns:
                limit("values", part.num_values, _VALUES + _VALUES_PER_BYTE * size)
                unpacked = _UNPACKED + _UNPACKED_PER_BYTE * min(size, part.total_compressed_size)
                limit("bytes of values", part.total_uncompressed_size, unpacked)
                largest = max(largest, part.total_uncompressed_size)
        most = max(most, group.total_byte_size)
    if most > MAX_GROUP_BYTES:
        logger.warning(
            "data file %s has row groups of up to %d MiB; reading one sample reads half of a row "
            "group on average; to read samples faster, write the file with row_group_size=100",
            path,
            most // 2**20,
        )
    return ends, largest


def read_row(table: Table, number: int) -> Json:
    """Returns a row of a pyarrow batch as a dict.

    Raises:
        SampleError: The row is too large, or a text is not valid UTF-8.
    """
    row = table.slice(number, 1)
    weight = _weight(row)
    if weight > MAX_RECORD_BYTES:
        raise SampleError(
            f"the record has {weight:,} bytes of text; at most {MAX_RECORD_BYTES:,} are allowed",
            "record size",
        )
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise SampleError(f"a text is not valid UTF-8: {error}", "not Parquet") from None


def read_rows(table: Table) -> Iterator[Json | None]:
    """Yields the rows of a pyarrow batch as dicts; None for a row that cannot be read."""
    for number in range(table.num_rows):
        try:
            yield read_row(table, number)
        except SampleError:
            yield None


def _weight(data: Table) -> int:
    """Returns the number of bytes that the texts of a batch or array take as Python objects."""
    arrow = _import_pyarrow("")
    if isinstance(data, arrow.RecordBatch):
        return sum(map(_weight, data.columns))
    if isinstance(data, arrow.DictionaryArray):
        lengths = arrow.compute.binary_length(data.dictionary).take(data.indices)
        return arrow.compute.sum(lengths).as_py() or 0
    if arrow.types.is_string(data.type) or arrow.types.is_large_string(data.type):
        return 8 * len(data) + (arrow.compute.sum(arrow.compute.binary_length(data)).as_py() or 0)
    if isinstance(data, arrow.StructArray):
        return sum(map(_weight, data.flatten()))
    if isinstance(data, arrow.ListArray | arrow.LargeListArray):
        return 8 * len(data) + _weight(data.flatten())
    return 0 if data.type in (arrow.binary(), arrow.large_binary()) else 8 * len(data)


@contextlib.contextmanager
def _open(
    path: str, texts: list[str] | None = None, metadata: Metadata | None = None
) -> Iterator[Table]:
    """Opens a Parquet file. In the columns `texts`, equal texts are kept in memory only once."""
    arrow = _import_pyarrow(path)
    with contextlib.ExitStack() as opened:
        with _named(path, "the file"):
            source = opened.enter_context(open_file(path))
            file = arrow.parquet.ParquetFile(
                source, metadata=metadata, read_dictionary=texts, buffer_size=2**20
            )
        yield file


@contextlib.contextmanager
def _named(path: str, part: str) -> Iterator[None]:
    """Converts errors of pyarrow to a ConfigError that names the file and the part of the file."""
    arrow = _import_pyarrow(path)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise ConfigError(f"data file {path}: {part} cannot be read as Parquet: {error}") from error


def _import_pyarrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"data file {path} is Parquet, but pyarrow is not installed: "
            "pip install 'llava_jax[parquet]'"
        ) from error
    return pyarrow

"""Records of a Parquet file, as Hugging Face's `datasets` writes them, with images embedded."""

import bisect
import collections
import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.data.files import file_size, open_file
from llava_jax.data.records import (
    CONVERSATIONS,
    FIELDS,
    MAX_RECORD_BYTES,
    SAMPLED_IMAGES,
    survey,
)
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, SampleError

logger = logging.getLogger(__name__)

Table = Metadata = Any
"""A batch, row or array of pyarrow, and a file's metadata; pyarrow has no types."""

MAX_GROUP_BYTES = 256 * 2**20
"""A row group is read up to the row that is asked for; beyond this, that is worth a warning."""

_BATCH_ROWS, _BATCH_BYTES = 64, 2**28
"""Rows that are read at a time: fewer, if one value of each could be larger together."""

_KEPT_BYTES = 2**26
"""Of a row group that was read, as values; they may be far more than the file's bytes."""

# A few kilobytes of Parquet can stand for billions of values; files of samples are far below these.
_ROWS, _ROWS_PER_BYTE = 10_000, 0.25
_VALUES, _VALUES_PER_BYTE = 2**16, 16.0
_UNPACKED, _UNPACKED_PER_BYTE = 2**24, 50.0


class ParquetFile:
    """A Parquet file's records, read from disk one by one.

    A row group is read from its start, some rows at a time, so that it need not fit the memory.
    Its last 64 MiB that were read are kept: of a group that is no larger, nothing is read twice
    until another group is read. Of larger ones, half is read for each record unless in order.

    Attributes:
        path: The file.
        size: Its bytes.
        sizes, images: As `records.Survey` has them.
        digest: Digest of its records and of the number of bytes that their columns take.
    """

    def __init__(self, path: str, *, sampled_images: int = SAMPLED_IMAGES):
        """Reads through the file once, without the bytes of its images.

        Args:
            path: The file.
            sampled_images: Image files to remember, at least where there are as many.

        Raises:
            ConfigError: pyarrow is not installed, or the file is no such table, or stands for far
                more than its size.
        """
        self.path = path
        self.size = file_size(path)
        with _open(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            self._columns = [leaf for leaf in leaves if leaf.split(".")[0] in FIELDS]
            known = {leaf.split(".")[0] for leaf in self._columns}
            if known.isdisjoint(CONVERSATIONS):
                names = ", ".join(file.schema_arrow.names)
                raise ConfigError(
                    f'data file {path} has no column "conversations" or "messages"; it has '
                    f"{names:.500}"
                )
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            taken = [(c.total_compressed_size, c.total_uncompressed_size) for c in columns]
            self._metadata = file.metadata
            self._ends, largest = _measure_groups(path, self.size, file.metadata, self._columns)
        self._batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, largest)))
        self.sizes, records, self.images = survey(self._scan(), path, sampled_images)
        # Images are not read here, but one that was replaced by another takes another size.
        self.digest = hashlib.sha256(repr((records, taken)).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, number: int) -> Json:
        """Reads a record, as it is in the file.

        Raises:
            SampleError: Its part of the file cannot be read, or it is too large.
        """
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
                text = f"row group {group} has fewer rows than the file says"
                raise SampleError(text, "not Parquet") from None
            _cursors[self] = cursor
            if len(_cursors) > _MAX_CURSORS:
                _cursors.popitem(last=False)
        return _row(batch, row)

    def where(self, number: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.path}, row {number}"

    def _read_group(self, group: int, columns: list[str]) -> Iterator[Table]:
        """Reads a row group as batches of some rows."""
        texts = [column for column in columns if not column.endswith(".bytes")]
        options = {"row_groups": [group], "columns": columns, "use_threads": False}
        opened = _open(self.path, texts, self._metadata)
        with opened as file, _named(self.path, f"row group {group}"):
            yield from file.iter_batches(self._batch_rows, **options)

    def _scan(self) -> Iterator[Table]:
        """The rows, without images that have a path beside their bytes."""
        paths = {c.removesuffix(".path") for c in self._columns if c.endswith(".path")}
        light = [c for c in self._columns if c.removesuffix(".bytes") not in paths]
        for group in np.flatnonzero(np.diff(self._ends, prepend=0)).tolist():
            for batch in self._read_group(group, light):
                if _weight(batch) <= MAX_RECORD_BYTES:
                    with contextlib.suppress(UnicodeDecodeError):
                        yield from batch.to_pylist()
                        continue
                yield from (_row_or_none(batch, row) for row in range(batch.num_rows))


class _Cursor:
    """How far a row group has been read, and the batches that were read last."""

    def __init__(self, group: int, batches: Iterator[Table]):
        self.group, self.start, self._batches = group, 0, batches
        self._kept: list[Table] = []
        self._ends: list[int] = []
        self._bytes = 0

    def go_to(self, row: int) -> tuple[Table, int]:
        """The batch with a row from `start` on, and the row's place in it."""
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
"""Those of the files that were read last, each of which is an open file."""
_MAX_CURSORS = 8
_lock = threading.Lock()


def _measure_groups(
    path: str, size: int, metadata: Metadata, columns: list[str]
) -> tuple[np.ndarray, int]:
    """Where row groups end, and the bytes of the largest column in one.

    Raises:
        ConfigError: They stand for more than files of samples do.
    """
    largest = most = 0

    def limit(what: str, found: int, most: float) -> None:
        if found > most:
            raise ConfigError(
                f"data file {path}: its {size:,} bytes stand for {found:,} {what}, of at most "
                f"{int(most):,}; such a file is damaged, or made to fill the memory"
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
            "%s has row groups of %d MiB, and half of one is read for each sample; write it with "
            "row_group_size=100 to have it read faster",
            path,
            most // 2**20,
        )
    return ends, largest


def _row(table: Table, number: int) -> Json:
    row = table.slice(number, 1)
    weight = _weight(row)
    if weight > MAX_RECORD_BYTES:
        raise SampleError(
            f"it has {weight:,} bytes of text, of at most {MAX_RECORD_BYTES:,}", "record size"
        )
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8: {error}", "not Parquet") from None


def _row_or_none(table: Table, number: int) -> Json | None:
    try:
        return _row(table, number)
    except SampleError:
        return None


def _weight(data: Table) -> int:
    """Bytes of all texts in a batch or an array, as objects of Python would have them."""
    arrow = _import_pyarrow("")
    if isinstance(data, arrow.RecordBatch):
        return sum(map(_weight, data.columns))
    if isinstance(data, arrow.DictionaryArray):
        lengths = arrow.compute.binary_length(data.dictionary).take(data.indices)
        return arrow.compute.sum(lengths).as_py() or 0
    if isinstance(data, arrow.StructArray):
        return sum(map(_weight, data.flatten()))
    if isinstance(data, arrow.ListArray | arrow.LargeListArray):
        return 8 * len(data) + _weight(data.flatten())
    return 0 if data.type in (arrow.binary(), arrow.large_binary()) else 8 * len(data)


@contextlib.contextmanager
def _open(
    path: str, texts: list[str] | None = None, metadata: Metadata | None = None
) -> Iterator[Table]:
    """Opens a file whose texts, of these columns, are then kept once each."""
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
    """Says in which file what cannot be read is."""
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
            f"data file {path} is Parquet, and pyarrow is not installed; "
            "pip install 'llava_jax[parquet]'"
        ) from error
    return pyarrow

"""Records of a Parquet file, as Hugging Face's `datasets` writes them, with images embedded."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from llava_jax.config import ConfigError
from llava_jax.data.conversation import SampleError
from llava_jax.data.files import file_size, is_remote, open_file
from llava_jax.data.records import CONVERSATIONS, FIELDS, Sizes, measure_all

logger = logging.getLogger(__name__)

MOST_GROUP_BYTES = 256 * 2**20
"""A row group is read for each record of it; beyond this, that is worth a warning."""


class ParquetFile:
    """A Parquet file's records, read from disk one by one.

    A Parquet file is read by row groups. The last one is kept, so that reading in order is quick;
    reading in any other order takes a row group a record.

    Attributes:
        path: The file.
        size: Its bytes.
        sizes: Of its records.
    """

    def __init__(self, path: str):
        """Reads through the file once, without the bytes of its images.

        Raises:
            ConfigError: pyarrow is not installed, or the file is no such table.
        """
        self.path = path
        self.size = file_size(path)
        self._held: tuple[int, Any] | None = None
        file = _open(path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        self._columns = [leaf for leaf in leaves if leaf.split(".")[0] in FIELDS]
        known = {leaf.split(".")[0] for leaf in self._columns}
        if known.isdisjoint(CONVERSATIONS):
            names = ", ".join(file.schema_arrow.names)
            raise ConfigError(
                f'data file {path} has no column "conversations" or "messages"; it has {names}'
            )
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MOST_GROUP_BYTES:
            logger.warning(
                "%s has row groups of %d MiB, and one is read for each sample; write it with "
                "row_group_size=100 to have it read faster",
                path,
                largest // 2**20,
            )
        self.sizes: Sizes = measure_all(self._scan())

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}

    def read(self, number: int) -> dict[str, Any]:
        """Reads a record, as it is in the file.

        Raises:
            SampleError: Its part of the file cannot be read.
        """
        group = int(np.searchsorted(self._ends, number, side="right"))
        held = self._held
        if held is None or held[0] != group:
            try:
                held = self._held = group, _read_group(self.path, group, self._columns)
            except ConfigError as error:
                raise SampleError(str(error), "not Parquet") from error
        table = held[1]
        return _row(table, number - (int(self._ends[group]) - table.num_rows))

    def where(self, number: int) -> str:
        """Where a record stands, for messages."""
        return f"{self.path}, row {number}"

    def _scan(self) -> Iterator[Any]:
        """The rows, without images that have a path beside their bytes."""
        paths = {c.removesuffix(".path") for c in self._columns if c.endswith(".path")}
        light = [c for c in self._columns if c.removesuffix(".bytes") not in paths]
        for group in range(len(self._ends)):
            table = _read_group(self.path, group, light)
            try:
                yield from table.to_pylist()
            except UnicodeDecodeError:
                yield from (_row_or_none(table, row) for row in range(table.num_rows))


def _row(table: Any, number: int) -> dict[str, Any]:
    try:
        return table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8: {error}", "not Parquet") from None


def _row_or_none(table: Any, number: int) -> dict[str, Any] | None:
    try:
        return _row(table, number)
    except SampleError:
        return None


def _open(path: str) -> Any:
    with _named(path, "the file"):
        source = open_file(path) if is_remote(path) else path
        return _import_pyarrow(path).parquet.ParquetFile(source, memory_map=True)


def _read_group(path: str, group: int, columns: list[str]) -> Any:
    """Reads a row group as a table."""
    with _open(path) as file, _named(path, f"row group {group}"):
        return file.read_row_group(group, columns=columns, use_threads=False)


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
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"data file {path} is Parquet, and pyarrow is not installed; "
            "pip install 'llava_jax[parquet]'"
        ) from error
    return pyarrow

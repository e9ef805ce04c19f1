"""Opens data files, whose format is detected from their content, and data sets of libraries."""

import copy
import functools
import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, SupportsIndex, TypeVar, overload

import numpy as np
from jaxtyping import Int64

from llava_jax.config.data import DEMO_DATA
from llava_jax.data import easy_vqa
from llava_jax.data.files import (
    detect_encoding,
    find_files,
    is_folder,
    is_remote,
    list_folder,
    open_file,
)
from llava_jax.data.holdout import image_key, video_key
from llava_jax.data.hub_dataset import PREFIX, SAVED_TO_DISK, HubDataset
from llava_jax.data.image_paths import locate_image
from llava_jax.data.json_file import JsonFile, has_list
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.records import SAMPLED_IMAGES, Record, Sizes, read_record
from llava_jax.errors import ConfigError, SampleError

SHARDS = (".parquet", ".jsonl")
"""Extensions of the files that are read from a directory."""


def load_records(
    path: str, image_root: str, *, follow_links: bool = False
) -> "ListRecords | FileRecords":
    """Opens a source of records.

    Args:
        path: Data file, directory of data files, or pattern such as "data/train-*.parquet". A file
            is a JSON list, JSON lines or Parquet, with records in a format that
            `records.read_record` accepts. "easy_vqa:SPLIT[:OPTION...]" is the easy-VQA data set;
            see `easy_vqa.parse_source`. "hf:NAME[[:CONFIG]:SPLIT]" is a data set that Hugging
            Face's library `datasets` reads; see `hub_dataset.HubDataset`.
        image_root: Directory that relative image paths start from; not used for easy-VQA.
        follow_links: Whether symbolic links may point to images outside of image_root.

    Returns:
        The records. A record of a data file is read when it is accessed.

    Raises:
        ConfigError: The source does not exist, has no records, or has only records of unknown
            formats.
    """
    if path.startswith(DEMO_DATA):
        return ListRecords(easy_vqa.parse_source(path))
    if path.startswith(PREFIX) and not is_remote(path):
        files: list[DataFile] = [HubDataset(path, image_root)]
    else:
        try:
            paths = _find_files(path)
        except OSError as error:
            raise ConfigError(
                f"data file {path}: {error}; check data.path, data.mixture or data.eval_path, and "
                "the network"
            ) from error
        sampled = -(-SAMPLED_IMAGES // len(paths))
        files = [_open_file(file, image_root, sampled) for file in paths]
    records = FileRecords(files, image_root, follow_links=follow_links)
    if not records:
        raise ConfigError(f"{path} has no records; check data.path, data.mixture or data.eval_path")
    if (records.sizes.images < 0).all():
        try:
            records[0]
        except SampleError as error:
            raise ConfigError(
                f"no record of {path} can be used; the first record, in data file "
                f"{records.where(0)}: {error}"
            ) from error
    return records


DataFile = JsonFile | ParquetFile | HubDataset
"""A sequence of records as they are in a file, with the results of `records.survey`."""


class ListRecords(list[Record]):
    """Records that are already in memory."""

    @property
    def image_keys(self) -> Int64[np.ndarray, " K"]:
        """Returns the keys of all images and videos; see `records.Survey`."""
        keys: list[int] = []
        for record in self:
            keys += map(image_key, record.images)
            keys += (video_key(video.source) for video in record.videos)
        return np.array(keys, np.int64)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Returns the numbers of images, words and videos in each record."""
        words = lambda record: sum(len(turn.text.split()) for turn in record.turns)
        rows = [(len(record.images), words(record), 0, len(record.videos)) for record in self]
        return Sizes(*np.array(rows, np.int32).reshape(-1, 4).T)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "ListRecords": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Record | ListRecords":
        """Returns the record at an index, or the records in a slice."""
        if isinstance(index, slice):
            return ListRecords(super().__getitem__(index))
        return super().__getitem__(index)

    def select(self, numbers: Int64[np.ndarray, " M"]) -> "ListRecords":
        """Returns the records with these indices."""
        return ListRecords(self[number] for number in numbers.tolist())

    def where(self, index: int) -> str:
        """Returns the location of a record as text, for messages."""
        return f"sample {index}"


_Kind = TypeVar("_Kind", bound="_Selectable")


# The base class is not Sequence[Record], because a runtime type checker would then read records,
# and reading a bad record raises an error.
class _Selectable(Sequence[object]):
    """Records that are read when they are accessed, and a selection of them. Can be pickled.

    Attributes:
        sizes: Sizes of the selected records.
    """

    sizes: Sizes
    _numbers: np.ndarray | range
    """Indices of the selected records among all records."""

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, number: int) -> Record:
        """Reads one of all records."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self: _Kind, index: slice) -> _Kind: ...
    def __getitem__(self: _Kind, index: int | slice) -> Record | _Kind:
        """Reads the record at an index, or selects the records in a slice without reading them.

        Raises:
            SampleError: The record cannot be read, has an unknown format, or contains an image path
                outside of image_root.
            ConfigError: The file changed after it was opened.
        """
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return self._read(int(self._numbers[index]))

    def select(self: _Kind, numbers: Int64[np.ndarray, " M"]) -> _Kind:
        """Returns the records with these indices, without reading them."""
        part = copy.copy(self)
        part._numbers = np.asarray(self._numbers)[numbers]
        part.sizes = Sizes(*(column[numbers] for column in self.sizes))
        return part


class FileRecords(_Selectable):
    """The records of several data files, one file after the other. Can be pickled.

    Attributes:
        sizes: Sizes of the records.
        files: Data files, in order.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        image_root: str,
        *,
        follow_links: bool = False,
    ):
        """Joins data files.

        Args:
            files: Data files; at least one.
            image_root: Directory that relative image paths start from.
            follow_links: Whether symbolic links may point to images outside of image_root.
        """
        self.sizes = _join([file.sizes for file in files])
        self.files = files
        self._image_root = image_root
        self._follow_links = follow_links
        self._ends = np.cumsum([len(file) for file in files])
        self._numbers = range(int(self._ends[-1]))

    @property
    def image_keys(self) -> Int64[np.ndarray, " K"]:
        """Returns the keys of the images of all records, not only of the selected records."""
        return np.concatenate([file.image_keys for file in self.files])

    def _read(self, number: int) -> Record:
        file, within = self._find(number)
        return read_record(
            file.read(within), number, self._image_root, follow_links=self._follow_links
        )

    def read_raw(self, index: int) -> Any:
        """Returns a record as it is in its file.

        Args:
            index: Index of the record.

        Raises:
            SampleError: The record cannot be read.
            ConfigError: The file changed after it was opened.
        """
        file, within = self._find(int(self._numbers[index]))
        return file.read(within)

    def locate_image(self, path: str) -> str:
        """Returns the full path of a file of an image or video.

        Args:
            path: Path as it is in the record.

        Raises:
            SampleError: The path is outside of image_root.
        """
        located = locate_image(path, self._image_root, self._follow_links)
        assert isinstance(located, str)
        return located

    def where(self, index: int) -> str:
        """Returns the location of a record for messages: the file, and the line, record or row."""
        file, within = self._find(int(self._numbers[index]))
        return file.where(within)

    def _find(self, number: int) -> tuple[DataFile, int]:
        """Returns the file of a record, and the index of the record in the file."""
        position = int(np.searchsorted(self._ends, number, side="right"))
        file = self.files[position]
        return file, number - int(self._ends[position]) + len(file)


class JoinedRecords(_Selectable):
    """The records of several sources, one source after the other. Can be pickled.

    Attributes:
        sizes: Sizes of the records.
        parts: Sources, in order.
    """

    def __init__(self, parts: Sequence[ListRecords | FileRecords]):
        """Joins sources.

        Args:
            parts: Sources of records; at least one.
        """
        self.sizes = _join([part.sizes for part in parts])
        self.parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self._numbers = range(int(self._starts[-1]))

    @property
    def image_keys(self) -> Int64[np.ndarray, " K"]:
        """Returns the keys of the images of all records, not only of the selected records."""
        return np.concatenate([part.image_keys for part in self.parts])

    def _read(self, number: int) -> Record:
        part, within = self._find(number)
        return part[within]

    def where(self, index: int) -> str:
        """Returns the location of a record as text, for messages."""
        part, within = self._find(int(self._numbers[index]))
        return part.where(within)

    def _find(self, number: int) -> tuple[ListRecords | FileRecords, int]:
        """Returns the source of a record, and the index of the record in the source."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self.parts[part], number - int(self._starts[part])


Records = ListRecords | FileRecords | JoinedRecords
"""A sequence of records, with their sizes and locations. Reading a record may raise SampleError."""


def _join(parts: Sequence[Sizes]) -> Sizes:
    return Sizes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _open_file(path: str, image_root: str, sampled_images: int) -> JsonFile | ParquetFile:
    """Opens a data file after detecting its format from its first bytes."""
    try:
        with open_file(path) as file:
            start = file.read(4096)
    except OSError as error:
        raise ConfigError(
            f"data file {path}: {error.strerror or error}; check data.path, data.mixture or "
            "data.eval_path"
        ) from None
    if start.startswith(b"PAR1"):
        return ParquetFile(path, image_root=image_root, sampled_images=sampled_images)
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise ConfigError(_saved_to_disk(os.path.dirname(path) or "."))
    encoding = detect_encoding(start)
    text = start[encoding.start :].decode(encoding.name, "replace").lstrip()
    if not text.startswith(("[", "{")):
        raise ConfigError(
            f"data file {path} is not a JSON list, JSON lines or Parquet: the file starts with "
            f"{start[:20]!r}; convert the file to one of these formats, or, for example for CSV, "
            f"give its directory as {PREFIX}DIRECTORY"
        )
    lines = text.startswith("{") and not has_list(path)
    return JsonFile(path, lines=lines, image_root=image_root, sampled_images=sampled_images)


def _find_files(path: str) -> list[str]:
    """Returns the paths of the data files that a path, directory or pattern refers to."""
    if is_folder(path):
        return _find_shards(path)
    if not re.search(r"[*?\[]", path) or (not is_remote(path) and os.path.exists(path)):
        return [path]
    found = find_files(path)
    if not found:
        raise ConfigError(
            f"data file {path}: no file matches this pattern; check data.path, data.mixture or "
            "data.eval_path"
        )
    return found


def _find_shards(folder: str) -> list[str]:
    """Returns the paths of the data files in a directory; the files must belong to one split."""
    names = {PurePosixPath(path).name: path for path in list_folder(folder)}
    if not names.keys().isdisjoint(SAVED_TO_DISK):
        raise ConfigError(_saved_to_disk(folder))
    shards = sorted(name for name in names if PurePosixPath(name).suffix in SHARDS)
    if not shards:
        raise ConfigError(
            f"directory {folder} has no {' or '.join(SHARDS)} files; check data.path, data.mixture "
            "or data.eval_path"
        )
    # Hugging Face names shards by their split: train-00000-of-00003.parquet.
    splits = {re.sub(r"(-\d+-of-\d+.*)?$", "", name) for name in shards if "-of-" in name}
    if len(splits) > 1:
        suffix = PurePosixPath(shards[0]).suffix
        raise ConfigError(
            f"{folder} contains several splits ({', '.join(sorted(splits))}); choose one split, "
            f"for example {folder}/{min(splits)}-*{suffix}"
        )
    return [names[name] for name in shards]


def _saved_to_disk(folder: str) -> str:
    """Returns the error message for a data set that was saved in Arrow's format."""
    return (
        f"{folder} is a data set that save_to_disk wrote in Arrow's format; to read it, write "
        f"{PREFIX}{folder}, or, if it has several splits, {PREFIX}{folder}:SPLIT"
    )

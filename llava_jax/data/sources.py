"""Where samples come from: data files, told apart by what is in them, and easy-VQA by its name."""

import copy
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from llava_jax.config import ConfigError
from llava_jax.data import easy_vqa
from llava_jax.data.json_file import JsonFile
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.records import Record, read_record

SHARDS = (".parquet", ".jsonl")
"""Endings of the files that are read of a folder."""


def load_records(path: str, image_root: str) -> Sequence[Record]:
    """Opens a source of records.

    Args:
        path: A data file, a folder of them or a pattern such as "data/train-*.parquet"; files are
            JSON lists, JSON lines or Parquet, of records in the forms of `records.read_record`.
            Or "easy_vqa:SPLIT[:FORM...]" (see `easy_vqa.parse_source`).
        image_root: Folder that image paths are relative to; easy-VQA has its own.

    Raises:
        ConfigError: The source is missing or malformed.
    """
    if path.startswith("easy_vqa:"):
        return easy_vqa.parse_source(path)
    records = FileRecords([_open_file(file) for file in _find_files(path)], image_root)
    if not records:
        raise ConfigError(f"{path} has no records; check data.path (or eval_path)")
    return records


def max_images(records: Sequence[Record]) -> int:
    """Counts the images of the record that has most."""
    if isinstance(records, FileRecords):
        return records.max_images
    return max((len(record.images) for record in records), default=0)


class FileRecords(Sequence[Record]):
    """The records of data files, one file after the other. Can be pickled.

    Attributes:
        max_images: Most images in one record of the files.
    """

    def __init__(self, files: Sequence[JsonFile | ParquetFile], image_root: str):
        """Puts files together.

        Args:
            files: At least one.
            image_root: Folder that image paths are relative to.
        """
        self.max_images = max(file.max_images for file in files)
        self._files = files
        self._image_root = image_root
        self._ends = np.cumsum([len(file) for file in files])
        self._numbers = range(int(self._ends[-1]))

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "FileRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | FileRecords":
        """Reads a record, or selects some without reading them.

        Raises:
            SampleError: An image path leads out of image_root.
            ConfigError: The file changed since it was opened.
        """
        if isinstance(index, slice):
            part = copy.copy(self)
            part._numbers = self._numbers[index]
            return part
        number = self._numbers[index]
        position = int(np.searchsorted(self._ends, number, side="right"))
        file = self._files[position]
        if os.path.getsize(file.path) != file.size:
            raise ConfigError(f"{file.path} changed while it was in use; start again")
        within = number - int(self._ends[position]) + len(file)
        where = f"data file {file.path}, record {within}"
        return read_record(file.read(within), number, where, self._image_root)


def _open_file(path: str) -> JsonFile | ParquetFile:
    try:
        with open(path, "rb") as file:
            start = file.read(4096).lstrip(b" \t\r\n")
    except OSError as error:
        raise ConfigError(
            f"data file {path}: {error.strerror}; check data.path (or eval_path)"
        ) from None
    if start.startswith(b"PAR1"):
        return ParquetFile(path)
    if start.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise ConfigError(_saved_to_disk(path))
    if not start.startswith((b"[", b"{")):
        raise ConfigError(
            f"data file {path} is not a JSON list, JSON lines or Parquet: it starts with "
            f"{start[:20]!r}"
        )
    return JsonFile(path, lines=start.startswith(b"{"))


def _find_files(path: str) -> list[str]:
    if os.path.isdir(path):
        return _find_shards(Path(path))
    if os.path.exists(path) or not re.search(r"[*?\[]", path):
        return [path]
    found = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if not found:
        raise ConfigError(f"data file {path}: no file has such a name; check data.path")
    return found


def _find_shards(folder: Path) -> list[str]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ConfigError(_saved_to_disk(str(folder)))
    files = sorted(file for file in folder.iterdir() if file.suffix in SHARDS)
    if not files:
        raise ConfigError(
            f"{folder} has no {' or '.join(SHARDS)} files; check data.path (or eval_path)"
        )
    # As Hugging Face names them: train-00000-of-00003.parquet.
    splits = {re.sub(r"(-\d+-of-\d+.*)?$", "", file.stem) for file in files if "-of-" in file.stem}
    if len(splits) > 1:
        raise ConfigError(
            f"{folder} holds several splits ({', '.join(sorted(splits))}); choose one, as "
            f"{folder / min(splits)}-*{files[0].suffix}"
        )
    return [str(file) for file in files]


def _saved_to_disk(path: str) -> str:
    return (
        f"{path} is of a dataset written by save_to_disk, in Arrow's format, which is not read; "
        "write Parquet instead, in Python: datasets.load_from_disk(FOLDER).to_parquet(FILE), for "
        "each split if there are several"
    )

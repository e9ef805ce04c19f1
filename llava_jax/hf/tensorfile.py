"""The safetensors format: a length, a JSON table, raw bytes.

Read and written one tensor at a time with plain file calls: bfloat16 comes as it is, every offset
is checked before it is used, and no file is mapped into memory (mapped pages would count as used).
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # what transformers and the Hub call 5 GB

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_BYTES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _BUFFER_BYTES
_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit
_SAMPLE_BYTES = 64


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or is not what its config says; the text tells where."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not read yet. `start` and `size` are in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self, rows: int | None = None) -> np.ndarray:
        """Its values in the file's dtype.

        Args:
            rows: Length of the result's first axis, for room after the tensor's own rows.

        Raises:
            CheckpointError: It has a dtype that no weight has, or the file is cut short.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name} has dtype {self.dtype}; weights are {', '.join(DTYPES)}"
            )
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        values = np.empty(shape, DTYPES[self.dtype])
        buffer = values.reshape(-1).view(np.uint8).data[: self.size]
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            while buffer:  # one read call stops at 2 GiB
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{self.file} ends inside {self.name}")
                buffer = buffer[count:]
        return values

    def sample(self) -> bytes:
        """A few bytes from its start, middle and end."""
        starts = (0, self.size // 2, max(0, self.size - _SAMPLE_BYTES))
        with open(self.file, "rb", buffering=0) as file:
            read = lambda at: os.pread(
                file.fileno(), min(_SAMPLE_BYTES, self.size - at), self.start + at
            )
            return b"".join(read(at) for at in starts)


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a directory with one or with an index of several.

    Raises:
        CheckpointError: Nothing there to read, or a file is malformed.
    """
    path = Path(path)
    if path.is_file():
        return _read_table(path)
    if (path / INDEX).is_file():
        return _open_sharded(path)
    if (path / SINGLE).is_file():
        return _read_table(path / SINGLE)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise CheckpointError(
        f"{path} has neither {SINGLE} nor {INDEX} (found: {found}). Pickles (.bin, .pth) are not "
        "read here; save the checkpoint as safetensors first"
    )


def _open_sharded(directory: Path) -> dict[str, Tensor]:
    index = directory / INDEX
    try:
        placed = json.loads(index.read_text())["weight_map"]
        files = sorted(set(placed.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index with a weight_map: {error!r}") from error
    absent = [name for name in files if Path(name).name != name or not (directory / name).is_file()]
    if absent:
        raise CheckpointError(f"{index} names files that are not beside it: {', '.join(absent)}")
    tables = {name: _read_table(directory / name) for name in files}
    absent = [name for name, file in placed.items() if name not in tables[file]]
    if absent:
        raise CheckpointError(f"{index} names tensors its files lack: {', '.join(absent)}")
    return {name: tables[file][name] for name, file in placed.items()}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's JSON table, and where its data begin."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a .safetensors file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: no table of tensors")
    return header, 8 + length


def _read_table(path: Path) -> dict[str, Tensor]:
    header, data = _read_header(path)
    end = path.stat().st_size - data
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
            first, last = (int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} has a damaged entry: {entry}") from error
        if not 0 <= first <= last <= end or min(shape, default=0) < 0:
            raise CheckpointError(
                f"{path}: {name} lies outside the file (bytes {first} to {last} of {end}); "
                "the file is damaged or cut short"
            )
        if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != last - first:
            raise CheckpointError(
                f"{path}: {name} is {dtype} {list(shape)} but has {last - first} bytes"
            )
        tensors[name] = Tensor(name, path, dtype, shape, data + first, last - first)
    return tensors


Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of tensors by name."""


def write_tensors(path: Path, specs: Specs, values: Callable[[str], np.ndarray]) -> None:
    """Writes a safetensors file, asking for the tensors' values one after the other, in order.

    The file has its name only when it is complete.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in specs.items():
        start, end = end, end + _size(specs[name])
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    table = json.dumps(header, separators=(",", ":")).encode()
    table += b" " * (-len(table) % 8)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(table).to_bytes(8, "little") + table)
            for name, spec in specs.items():
                _write_array(file, values(name), *spec)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_array(
    file: BinaryIO, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype
) -> None:
    assert (array.shape, array.dtype) == (shape, dtype), (array.shape, array.dtype, shape, dtype)
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _size(spec: tuple[tuple[int, ...], np.dtype]) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize


def write_sharded(
    directory: Path,
    specs: Specs,
    values: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or shards of at most `shard_bytes` with their index.

    All shards are complete before any takes its place; then files of an earlier save that do not
    belong to this one are removed.
    """
    groups = _group(specs, shard_bytes)
    count = len(groups)
    names = (
        [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if count > 1
        else [SINGLE]
    )
    staging = directory / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        for file_name, group in zip(names, groups, strict=True):
            write_tensors(staging / file_name, {name: specs[name] for name in group}, values)
        if count > 1:
            placed = {n: file for file, group in zip(names, groups, strict=True) for n in group}
            total = sum(_size(spec) for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": placed}
            (staging / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            names.append(INDEX)
        for name in names:
            (staging / name).replace(directory / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in [*directory.glob("model*.safetensors"), directory / INDEX]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def _group(specs: Specs, limit: int) -> list[list[str]]:
    """Names in order, in as few groups of at most `limit` bytes as their order allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + _size(spec) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += _size(spec)
    return groups


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

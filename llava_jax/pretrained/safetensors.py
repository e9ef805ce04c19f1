"""Reads and writes safetensors files, which have a length, a JSON table and raw bytes.

Tensors are read and written one at a time with plain file calls. The library `safetensors` is not
used, for two reasons: it maps whole files into memory, so that their pages count as used memory;
and it does not tell where a tensor is in its file, which is needed to read a part of the tensor.
Every offset is checked before it is used.
"""

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llava_jax.disk import Json, is_deeper, open_regular, read_regular
from llava_jax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # 5 GB, as in transformers

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BUFFER_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | _BUFFER_BYTES
MAX_JSON_BYTES = 2**24  # the JSON files of a checkpoint have a few MB at most
_MAX_JSON_DEPTH = 64
_MAX_JSON_PARTS = 10**6
_MAX_DIMENSIONS = 64  # the limit of NumPy
_MAX_ITEMS = 2**59  # so that an array of 8-byte items has less than 2**63 bytes
_SAMPLE_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file. Its values are not read yet. `start` and `size` are in bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """Returns the dtype of the array that `read` returns.

        Raises:
            CheckpointError: The tensor has a dtype that is not supported for weights.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.file}: {self.name} has dtype {self.dtype}; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[self.dtype]

    def read(self, rows: int | None = None) -> np.ndarray:
        """Reads the values, in the dtype of the file.

        Args:
            rows: Number of rows of the result; None means the tensor's number of rows. Additional
                rows are not initialized.

        Raises:
            CheckpointError: The dtype is not supported for weights, the file is too short, or a
                value is NaN or infinite.
        """
        shape = self.shape if rows is None else (rows, *self.shape[1:])
        values = np.empty(shape, self.numpy_dtype)
        own = values.reshape(-1)[: math.prod(self.shape)]
        self._read_into(own)
        if not is_finite(own):
            raise CheckpointError(f"{self.file}: {self.name} has values that are NaN or infinite")
        return values

    def _read_into(self, values: np.ndarray) -> None:
        """Fills a flat array with the values."""
        self._read_bytes(self.start, values)

    def _read_bytes(self, start: int, values: np.ndarray) -> None:
        buffer = values.view(np.uint8).data
        with open_regular(self.file) as file:
            file.seek(start)
            while buffer:  # one call reads at most 2 GiB
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{self.file} is cut short: it ends inside {self.name}")
                buffer = buffer[count:]

    def sample(self) -> bytes:
        """Returns bytes from start, middle and end of the values, equal for all file formats."""
        starts = (0, self.size // 2, max(0, self.size - _SAMPLE_BYTES))
        return b"".join(self.stretch(at, min(_SAMPLE_BYTES, self.size - at)) for at in starts)

    def stretch(self, at: int, count: int) -> bytes:
        """Returns `count` bytes of the values in row-major order, starting at byte `at`."""
        with open_regular(self.file) as file:
            return os.pread(file.fileno(), count, self.start + at)


@dataclasses.dataclass(frozen=True)
class Strided(Tensor):
    """A tensor whose values are not contiguous in the file. `stride` is in items."""

    stride: tuple[int, ...] = ()

    def _read_into(self, values: np.ndarray) -> None:
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        stretch = np.empty(last + 1 if values.size else 0, values.dtype)
        self._read_bytes(self.start, stretch)
        steps = [step * values.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(stretch, self.shape, steps)
        values.reshape(self.shape)[...] = view

    def stretch(self, at: int, count: int) -> bytes:
        size = ITEM_BYTES[self.dtype]
        first, last = at // size, -(-(at + count) // size)
        positions = [self._position(index) for index in range(first, last)]
        items = [Tensor.stretch(self, size * position, size) for position in positions]
        return b"".join(items)[at - first * size :][:count]

    def _position(self, index: int) -> int:
        """Returns the offset of an item in the tensor's data, given its row-major index."""
        position = 0
        for size, step in zip(self.shape[::-1], self.stride[::-1], strict=True):
            index, along = divmod(index, size)
            position += along * step
        return position


def is_shape(shape: Sequence[Any]) -> bool:
    """Returns True if NumPy can create an array of this shape, also if the array has no items."""
    return (
        len(shape) <= _MAX_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(size or 1 for size in shape) < _MAX_ITEMS
    )


def is_finite(values: np.ndarray) -> bool:
    """Returns True if a flat float array has no NaN and no infinity. Tests the bits for speed."""
    size = values.dtype.itemsize
    infinity = np.array(np.inf, values.dtype).view(f"u{size}")
    bits = values.view(f"u{size}")
    step = 2**16  # items that fit into the CPU's cache
    parts = (bits[start : start + step] for start in range(0, bits.size, step))
    return all(((part & infinity) != infinity).all() for part in parts)


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """Opens a safetensors file, or a directory with such a file or with shards and their index.

    The result contains the tensors by name; their values are not read.

    Raises:
        CheckpointError: There is no safetensors file or index, or a file is malformed.
    """
    path = Path(path)
    if path.is_file():
        return _read_table(path)
    if (path / INDEX).is_file():
        return open_indexed(path / INDEX, open_tensors)
    if (path / SINGLE).is_file():
        return _read_table(path / SINGLE)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    found = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise CheckpointError(f"{path} has neither {SINGLE} nor {INDEX} (found: {found}){_ADVICE}")


_ADVICE = (
    ". Only `llava-jax convert` reads pickles (.bin, .pth). Run `llava-jax convert SOURCE "
    "DESTINATION --to hf` for a model or for parts with a projector, or `llava-jax convert SOURCE "
    "DESTINATION --to peft --base MODEL` for an adapter"
)


def read_json(file: Path) -> Json:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: The file cannot be read, or does not have a JSON object within the limits.
    """
    try:
        value = parse_json(read_regular(file, MAX_JSON_BYTES))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def parse_json(text: bytes) -> Any:
    """Parses a JSON value.

    Raises:
        ValueError: The text is not JSON, has too many or too deeply nested lists and objects, or
            has a key twice. Python would use the last value of such a key, other readers the first.
    """
    if text.count(b"[") + text.count(b"{") > _MAX_JSON_PARTS:  # in memory, each takes 20 times more
        raise ValueError(f"it has more than {_MAX_JSON_PARTS:,} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep") from error
    if is_deeper(value, _MAX_JSON_DEPTH):
        raise ValueError(f"it is nested more than {_MAX_JSON_DEPTH} levels deep")
    return value


def _distinct(pairs: list[tuple[str, object]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"it has the key {commonest(key for key, _ in pairs)!r:.200} twice")
    return values


def commonest(names: Iterable[str]) -> str:
    """Returns the name that occurs most often."""
    return Counter(names).most_common(1)[0][0]


def open_indexed(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Opens the files of an index with `read`, and returns their tensors by name.

    Raises:
        CheckpointError: The index is malformed, or does not match the files and their tensors.
    """
    try:
        file_of = parse_json(read_regular(index, MAX_JSON_BYTES))["weight_map"]
        files = sorted(set(file_of.values()))
        absent = [
            name for name in files if Path(name).name != name or not (index.parent / name).is_file()
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = f"{error!r:.200}"
        raise CheckpointError(f"{index} is not an index with a weight_map: {said}") from error
    if absent:
        raise CheckpointError(f"{index} names files not in its directory: {', '.join(absent)}")
    tables = {name: read(index.parent / name) for name in files}
    absent = [f"{name} in {file}" for name, file in file_of.items() if name not in tables[file]]
    if absent:
        raise CheckpointError(f"{index} names tensors not in its files: {', '.join(absent)}")
    left_over = [
        f"{name} in {file}" for file in files for name in tables[file] if file_of.get(name) != file
    ]
    if left_over:
        raise CheckpointError(
            f"{index} does not list tensors that are in its files: {', '.join(left_over)}"
        )
    return {name: tables[file][name] for name, file in file_of.items()}


_FORMATS = ("pt", "tf", "flax", "mlx", "np")  # transformers accepts these formats


def _read_header(path: Path) -> tuple[Json, int]:
    """Returns a file's JSON table, and the byte offset of its data."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= os.fstat(file.fileno()).st_size - 8:
            raise CheckpointError(f"{path} is not a safetensors file, or is cut short{_ADVICE}")
        if length > MAX_JSON_BYTES:
            raise CheckpointError(
                f"{path} has a header of {length:,} bytes; at most {MAX_JSON_BYTES:,} are allowed"
            )
        try:
            header = parse_json(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a damaged header: it is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and (
        not isinstance(metadata, dict) or metadata.get("format") not in _FORMATS
    ):
        raise CheckpointError(
            f"{path} has a damaged header: __metadata__ is {metadata!r:.80}; its format must be "
            f"one of {', '.join(_FORMATS)}"
        )
    return header, 8 + length


def _read_table(path: Path) -> dict[str, Tensor]:
    header, data = _read_header(path)
    end = path.stat().st_size - data
    tensors = {name: _read_entry(path, name, header[name], data, end) for name in header}
    reached = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != data + reached:
            raise CheckpointError(
                f"{path}: {tensor.name} begins at byte {tensor.start - data} of the data, but the "
                f"tensors before it end at byte {reached}; the header is damaged"
            )
        reached += tensor.size
    if reached != end:
        raise CheckpointError(f"{path} is damaged: {end - reached} bytes follow its last tensor")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, data: int, end: int) -> Tensor:
    """Checks an entry of the header against the size of the file, and returns its tensor."""
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        numbers = first, last, *shape
        if (
            len(entry) != 3
            or type(dtype) is not str
            or not all(type(number) is int and number < 2**63 for number in numbers)
        ):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {name:.200} has a damaged entry in the header: {entry!r:.200}"
        ) from error
    if not is_shape(shape):
        raise CheckpointError(f"{path}: {name:.200} has an invalid shape: {shape!r:.200}")
    if not 0 <= first <= last <= end:
        raise CheckpointError(
            f"{path}: {name} lies outside the file (bytes {first} to {last} of {end}); "
            "the file is damaged or cut short"
        )
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r:.40}")
    if math.prod(shape) * ITEM_BYTES[dtype] != last - first:
        raise CheckpointError(
            f"{path}: {name} has {last - first} bytes, but its dtype {dtype} and shape "
            f"{list(shape)} need {math.prod(shape) * ITEM_BYTES[dtype]}; the header is damaged"
        )
    return Tensor(name, path, dtype, shape, data + first, last - first)


Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of each tensor, by the name of the tensor."""


def write_tensors(path: Path, specs: Specs, values: Callable[[str], np.ndarray]) -> None:
    """Writes a safetensors file, and calls `values` for one tensor at a time, in order.

    The file gets its final name only when it is complete.
    """
    header: Json = {"__metadata__": {"format": "pt"}}
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
    """Writes model.safetensors, or shards of at most `shard_bytes` bytes and their index.

    All shards are complete before the first shard gets its final name. At the end, the other files
    of an earlier save are removed. Only a shard with a single tensor may exceed `shard_bytes`.
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
            file_of = {n: file for file, group in zip(names, groups, strict=True) for n in group}
            total = sum(_size(spec) for spec in specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
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
    """Splits the names, in order, into as few groups of at most `limit` bytes as possible."""
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
    """Returns a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

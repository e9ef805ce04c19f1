"""Opens files of torch.save without torch: finds the position of each tensor's bytes in the file.

`safe_unpickler.py` interprets the pickle in a file. This module reads the two kinds of files that
torch.save has written: zip archives and, before torch 1.6, pickles followed by the storages. It
finds the storages, and makes a `safetensors.Tensor` of each tensor that the pickle describes. Each
tensor is checked against the size of the file. `torch.load` is not used, because it needs torch and
reads everything into memory.

Only conversion reads pickles; training reads safetensors.
"""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_jax.conversion.safe_unpickler import PickleMachine, Placeholder, View, type_name
from llava_jax.disk import open_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import ITEM_BYTES, Strided, Tensor, is_shape

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file before torch 1.6

# A pickle of torch.save has a few hundred bytes per tensor; the tensors' values are outside it.
_MAX_PICKLE_BYTES = 2**26
_MAX_DIRECTORY_BYTES = 2**24  # an archive's member list has about 100 bytes per member
_MAX_DEPTH = 100  # levels of nested containers
_MAX_SHARING = 16  # largest ratio of tensor bytes to file bytes; tied weights count twice


def open_pickle(path: Path) -> Any:
    """Returns the object in a file of torch.save, with a `safetensors.Tensor` for each tensor.

    The values of tensors are not read, and no code in the file is run. Dicts, lists, tuples, text
    and numbers are returned as they are, but ordered dicts become dicts and sets become lists.
    Every other object becomes a `Placeholder`.

    Raises:
        CheckpointError: torch.save did not write the file, or the file is damaged.
    """
    try:
        with open_regular(path) as file:
            root, starts = (_read_zip if zipfile.is_zipfile(file) else _read_legacy)(path, file)
        return _TensorFinder(path, starts).replace_views(root, "")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way, but it runs nothing
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{path} is damaged, or torch.save did not write it: {said:.500}"
        ) from error


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[object, dict[str, int]]:
    """Returns the object in a zip archive, and the position of each storage's bytes by its key."""
    machine = PickleMachine()
    if (size := _directory_size(file)) > _MAX_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{path}: the member list of the zip archive has {size:,} bytes; at most "
            f"{_MAX_DIRECTORY_BYTES:,} are allowed"
        )
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise CheckpointError(f"{path} has two members with the same name")
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED:  # torch.save never compresses
                raise CheckpointError(f"{path}: {name} is compressed, which is not supported")
        if sum(info.file_size for info in members.values()) > _size_of(file):
            raise CheckpointError(f"{path} has members that overlap")
        if "data.pkl" not in members:
            raise CheckpointError(f"{path} is a zip archive, but torch.save did not write it")
    order = members.get("byteorder")
    if order is not None and _read_member(path, file, order) != b"little":
        raise CheckpointError(f"{path} has big-endian values, which are not supported")
    root = machine.load(io.BytesIO(_read_member(path, file, members["data.pkl"])))
    starts = {}
    for key, storage in machine.storages.items():
        info = members.get(f"data/{key}")
        if info is None or info.file_size != storage.numel * ITEM_BYTES[storage.dtype]:
            continue  # `_tensor` reports each tensor that needs this storage
        starts[key] = _start_of(path, file, info)
    return root, starts


def _directory_size(file: io.BufferedReader) -> int:
    """Returns the size of a zip archive's member list in bytes, from the record at its end.

    `zipfile` reads the whole list into memory, so the size of the list is checked first. If the
    archive ends with a comment, which torch.save does not write, the result is 2**64.
    """
    # The last 98 bytes are the zip64 record (56), its locator (20) and the end record (22).
    file.seek(max(0, _size_of(file) - 98))
    tail = file.read(98).rjust(98, b"\0")
    large, locator, end = tail[:56], tail[56:76], tail[76:]
    if not end.startswith(b"PK\x05\x06"):
        return 2**64
    part = large[40:48] if locator.startswith(b"PK\x06\x07") else end[12:16]
    return int.from_bytes(part, "little")


def _start_of(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Returns the position of the first byte of a member in a zip archive."""
    file.seek(info.header_offset)
    mark, name_size, extra_size = struct.unpack("<4s22x2H", file.read(30))
    own = file.read(name_size) == info.orig_filename.encode()
    start = info.header_offset + 30 + name_size + extra_size
    file.seek(start + info.file_size)
    # The next header must begin directly after the member's bytes. So a wrong length in this header
    # is found here, before wrong bytes are read as weights.
    if mark != b"PK\x03\x04" or not own or file.read(2) != b"PK":
        raise CheckpointError(f"{path}: {info.filename} has a damaged header")
    return start


def _read_member(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
    """Reads a member of a zip archive. Tests its checksum, unless the stored checksum is 0."""
    if info.file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{path}: {info.filename} has {info.file_size:,} bytes; at most "
            f"{_MAX_PICKLE_BYTES:,} are allowed"
        )
    file.seek(_start_of(path, file, info))
    content = file.read(info.file_size)
    if len(content) != info.file_size or info.CRC not in (0, zlib.crc32(content)):
        raise CheckpointError(f"{path}: {info.filename} is damaged: its checksum is wrong")
    return content


def _read_legacy(path: Path, file: io.BufferedReader) -> tuple[object, dict[str, int]]:
    """Returns the object in a file from before torch 1.6, and the position of each storage's bytes.

    Such a file consists of several pickles and then the storages, one after the other.
    """
    machine = PickleMachine()
    file.seek(0)
    pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    if machine.load(pickles) != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is a pickle, but torch.save did not write it")
    _protocol, system = machine.load(pickles), machine.load(pickles)
    if not system["little_endian"]:
        raise CheckpointError(f"{path} has big-endian values, which are not supported")
    root, keys = machine.load(pickles), machine.load(pickles)
    file.seek(pickles.tell())
    starts = {}
    for key in keys:
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: the key of a storage is a {type_name(key)}, not a text")
        storage = machine.storages.get(key)
        # The dtype of a storage is only known from a tensor that uses the storage. Without the
        # dtype, the start of the next storage is unknown.
        if storage is None:
            raise CheckpointError(
                f"{path}: no tensor uses the storage {key:.80}, so its size is unknown"
            )
        if int.from_bytes(file.read(8), "little") == storage.numel:
            starts[key] = file.tell()
        file.seek(storage.numel * ITEM_BYTES[storage.dtype], 1)
    if file.tell() < _size_of(file):
        raise CheckpointError(f"{path} is damaged: bytes follow its last storage")
    return root, starts


def _size_of(file: io.BufferedReader) -> int:
    """Returns the size of an open file in bytes."""
    return os.fstat(file.fileno()).st_size


class _TensorFinder:
    """Replaces each view in an object by a tensor, whose name is the view's key in a dict.

    Args:
        path: Path of the file.
        starts: Position of each storage's bytes in the file, by key.
    """

    def __init__(self, path: Path, starts: dict[str, int]):
        self._path, self._starts, self._end = path, starts, path.stat().st_size
        # A view may repeat one item any number of times, and many views may share a storage.
        # Without a limit, the tensors of a small file could fill the memory.
        self._bytes_left = _MAX_SHARING * max(self._end, 2**16)
        self._done: dict[int, object] = {}  # results by `id`; a container may be in others

    def replace_views(self, value: object, name: str, depth: int = 0) -> object:
        """Returns an object with a tensor in place of each view.

        Args:
            value: Object of a pickle.
            name: Key of the object in the dict around it.
            depth: Number of containers around the object.

        Raises:
            CheckpointError: A view does not fit the file, or containers are nested too deeply.
        """
        if isinstance(value, View):
            return self._tensor(value, name)
        if not isinstance(value, dict | list | tuple):
            return value
        if depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{self._path}: {name:.80} is nested more than {_MAX_DEPTH} levels deep"
            )
        if id(value) not in self._done:
            self._done[id(value)] = (
                {key: self.replace_views(item, _key(key), depth + 1) for key, item in value.items()}
                if isinstance(value, dict)
                else type(value)(self.replace_views(item, name, depth + 1) for item in value)
            )
        return self._done[id(value)]

    def _tensor(self, view: View, name: str) -> Tensor:
        """Returns the tensor of a view, after checking the view against the file."""
        storage, item, path = view.storage, ITEM_BYTES[view.storage.dtype], self._path
        if fault := _fault(view):
            raise CheckpointError(f"{path}: {name:.200} {fault}")
        if storage.key not in self._starts:
            raise CheckpointError(
                f"{path}: {name:.200} needs the storage {storage.key:.80} with {storage.numel} "
                f"items ({storage.numel * item} bytes), but the file lacks this storage or has it "
                "with another size"
            )
        start = self._starts[storage.key]
        if start + storage.numel * item > self._end:
            raise CheckpointError(f"{path} is cut short: it ends inside {name:.200}")
        first, size = start + view.offset * item, math.prod(view.shape) * item
        self._bytes_left -= max(size, _span(view) * item)
        if self._bytes_left < 0:
            raise CheckpointError(
                f"{path}: the tensors up to {name:.200} have more than {_MAX_SHARING} times as "
                f"many bytes as the file ({self._end} bytes)"
            )
        fields = name, path, storage.dtype, view.shape, first, size
        axes = zip(view.stride[::-1], view.shape[::-1], strict=True)
        return Tensor(*fields) if _is_dense(axes) else Strided(*fields, view.stride)


def _key(key: str | int | Placeholder) -> str:
    """Returns a key of a dict as text."""
    return str(key) if isinstance(key, str | int) else key.origin


def _span(view: View) -> int:
    """Returns the number of items in the storage from a view's first item to its last item."""
    if not math.prod(view.shape):
        return 0
    return 1 + sum((size - 1) * step for step, size in zip(view.stride, view.shape, strict=True))


def _fault(view: View) -> str | None:
    """Returns the end of an error message about an invalid view, or None if the view is valid."""
    shape, stride, numel = view.shape, view.stride, view.storage.numel
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        return "has a shape and a stride that do not fit together"
    if not is_shape(shape):
        return "has an invalid shape"
    if any(type(number) is not int or number < 0 for number in (view.offset, *stride)):
        return "has an invalid offset or stride"
    said = f"(offset {view.offset}, shape {shape}, stride {stride})"[:300]
    if math.prod(shape) and view.offset + _span(view) > numel:
        return f"extends beyond the {numel} items of its storage {said}"
    axes = sorted(zip(stride, shape, strict=True))
    if math.prod(shape) == numel and not _is_dense(axis for axis in axes if axis[1] != 1):
        return f"repeats some of the {numel} items of its storage and omits others {said}"
    return None


def _is_dense(axes: Iterable[tuple[int, int]]) -> bool:
    """Returns True if axes (stride, size), in rising order of stride, cover items without gaps."""
    expected = 1
    for step, size in axes:
        if size != 1 and step != expected:
            return False
        expected *= size
    return True

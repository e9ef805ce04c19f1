"""Tensors in the pickles of torch.save, found without torch and without running the pickle.

A pickle is a program. This one's every global is either one of the few that build tensors and
plain containers, for which functions of our own stand in, or becomes an inert placeholder that is
never executed. What comes out are `tensorfile.Tensor`s: where a tensor's bytes lie in the file.

Only tools/convert.py reads pickles; training reads safetensors.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.hf.tensorfile import (
    ITEM_BYTES,
    CheckpointError,
    Strided,
    Tensor,
)

_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how torch.save began before 1.6


class Placeholder:
    """What stands for an object of a class that is not built: takes everything, does nothing."""

    origin = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _Known:
    """A function that a pickle may call, and can do nothing else with."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., Any]):
        object.__setattr__(self, "call", call)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a function")


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _View(NamedTuple):
    """A tensor as a pickle has it: a view of a storage; offset and stride in items."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _View:
    numbers = offset, *shape, *stride
    whole = all(type(number) is int and number >= 0 for number in numbers)
    if not isinstance(storage, _Storage) or not whole or len(shape) != len(stride):
        raise pickle.UnpicklingError(f"a tensor of storage {storage!r:.80}, {shape}, {stride}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise pickle.UnpicklingError(f"a tensor outside its storage {storage.key}")
    return _View(storage, offset, tuple(shape), tuple(stride))


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): _Known(lambda sizes=(): tuple(sizes)),
    ("torch._utils", "_rebuild_tensor"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Known(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): _Known(lambda rebuild, _, args, __: rebuild(*args)),
} | {("torch", name): dtype for name, dtype in _STORAGES.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError(f"a reference {pid!r:.80}, which is no storage")
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, str):
            raise pickle.UnpicklingError(f"a storage of {getattr(dtype, 'origin', dtype)}")
        if type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError(f"a storage of {numel!r:.80} items")
        return _Storage(str(key), dtype, numel)


def open_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with `tensorfile.Tensor`s for tensors.

    Dicts, lists, tuples, texts and numbers are as they were; other objects are `Placeholder`s.

    Raises:
        CheckpointError: Not such a file, or it is damaged.
    """
    try:
        if zipfile.is_zipfile(path):
            root, places = _read_zip(path)
        else:
            root, places = _read_legacy(path)
        return _place(root, "", path, places)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; it runs nothing
        raise CheckpointError(f"{path} is not a whole file of torch.save: {error!r}") from error


def _read_zip(path: Path) -> tuple[Any, dict[str, int]]:
    """The pickle of a zip archive, and where each storage begins."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members:
            raise CheckpointError(f"{path} is a zip archive, but no file of torch.save")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise CheckpointError(f"{path} was written by a big-endian machine")
        with archive.open(members["data.pkl"]) as data:
            root = _Unpickler(data).load()
        places = {}
        for name, info in members.items():
            if name.startswith("data/") and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                header = struct.unpack("<4s22x2H", file.read(30))
                if header[0] != b"PK\x03\x04":
                    raise CheckpointError(f"{path}: {name} has a damaged header")
                places[name.removeprefix("data/")] = info.header_offset + 30 + sum(header[1:])
    return root, places


def _read_legacy(path: Path) -> tuple[Any, dict[str, int]]:
    """As `_read_zip`, for files written before torch 1.6: pickles, then storages one by one."""
    with open(path, "rb") as file:
        load = lambda: _Unpickler(file).load()
        if load() != _LEGACY_MAGIC:
            raise CheckpointError(f"{path} is not a file of torch.save")
        _protocol, system = load(), load()
        if not system.get("little_endian"):
            raise CheckpointError(f"{path} was written by a big-endian machine")
        root = load()
        keys = load()
        items = {view.storage.key: view.storage.dtype for view in _views(root)}
        places = {}
        for key in keys:
            numel = int.from_bytes(file.read(8), "little")
            places[key] = file.tell()
            # Of a storage that nothing refers to, the size of an item is not known.
            if key not in items:
                raise CheckpointError(f"{path} has a storage {key} that no tensor uses")
            file.seek(numel * ITEM_BYTES[items[key]], 1)
    return root, places


def _views(value: Any) -> Iterator[_View]:
    if isinstance(value, _View):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _views(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _views(item)


def _place(value: Any, name: str, path: Path, places: Mapping[str, int]) -> Any:
    """Puts tensors in the place of views; each is named by its key."""
    if isinstance(value, _View):
        return _tensor(value, name, path, places)
    if isinstance(value, dict):
        return {key: _place(item, str(key), path, places) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, _Storage):
        return type(value)(_place(item, name, path, places) for item in value)
    return value


def _tensor(view: _View, name: str, path: Path, places: Mapping[str, int]) -> Tensor:
    storage, item = view.storage, ITEM_BYTES[view.storage.dtype]
    if storage.key not in places:
        raise CheckpointError(
            f"{path}: {name} lacks its storage {storage.key}, or it is compressed"
        )
    start = places[storage.key]
    if start + storage.numel * item > path.stat().st_size:
        raise CheckpointError(f"{path} ends inside {name}; it is cut short")
    size = math.prod(view.shape) * item
    fields = name, path, storage.dtype, view.shape, start + view.offset * item, size
    return Tensor(*fields) if _is_dense(view) else Strided(*fields, view.stride)


def _is_dense(view: _View) -> bool:
    expected = 1
    for size, step in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True

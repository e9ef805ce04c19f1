"""Tensors in the pickles of torch.save, found without torch and without running the pickle.

A pickle is a program. The machine here knows its opcodes, plain containers and the few functions
that describe tensors; every other global, and what is made of it, is an inert `Placeholder`. What
comes out are `tensorfile.Tensor`s: where a tensor's bytes lie in the file.

Only tools/convert.py reads pickles; training reads safetensors.
"""

import dataclasses
import io
import math
import pickletools
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_jax.hf.tensorfile import (
    ITEM_BYTES,
    CheckpointError,
    Strided,
    Tensor,
)

_STORAGES = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how torch.save began before 1.6
_LAST_PROTOCOL = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Placeholder:
    """What stands for a global, and for every object that is made of it."""

    origin: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True)
class _View:
    """A tensor as a pickle has it, not checked yet; offset and stride in items."""

    storage: _Storage
    offset: Any
    shape: Any
    stride: Any


class _Damage(Exception):
    """A pickle that torch.save does not write."""


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _requires_grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> _View | Placeholder:
    if isinstance(storage, Placeholder):
        return storage
    if metadata:  # negated or conjugated
        return Placeholder("torch._utils.set_tensor_metadata")
    if not isinstance(storage, _Storage):
        raise _Damage(f"a tensor of storage {reprlib.repr(storage)}")
    return _View(storage, offset, shape, stride)


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda items=(): _filled({}, [x for pair in items for x in pair]),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, _, args, __: _call(rebuild, args),
}


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Placeholder):
        raise _Damage(f"a call of {reprlib.repr(function)}")
    if function.origin in _KNOWN:
        return _KNOWN[function.origin](*arguments)
    return function


def _filled(container: Any, items: list[Any]) -> Any:
    """Puts keys and values into a dict; a key is a text or a number, or stands for itself alone."""
    if isinstance(container, Placeholder):
        return container
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Of a tuple's hash the depth would be that of the stack.
        container[key if isinstance(key, str | int) else Placeholder(type(key).__name__)] = value
    return container


def _extend(container: Any, items: list[Any]) -> None:
    if not isinstance(container, Placeholder):
        container.extend(items)


_MARK = object()
_CONSTANTS = {
    **{"NONE": None, "NEWTRUE": True, "NEWFALSE": False},
    **{"EMPTY_TUPLE": (), "MARK": _MARK},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class _Machine:
    """Runs pickles, each on an empty stack.

    Attributes:
        storages: Those that the pickles refer to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, _Storage] = {}

    def load(self, file: io.BufferedIOBase) -> Any:
        """The object of the pickle that begins here; `file` stands behind it then.

        Raises:
            Exception: Of any kind, when it is damaged.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, file)):
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        else:
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "LIST" | "FROZENSET":
                stack.append(self._above_mark())
            case "DICT":
                stack.append(_filled({}, self._above_mark()))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._above_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _filled(stack[-1], [key, value])
            case "SETITEMS":
                items = self._above_mark()
                _filled(stack[-1], items)
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "DUP":
                stack.append(stack[-1])
            case "POP" | "BUILD":  # an object's state has no tensors of a state dict
                stack.pop()
            case "POP_MARK":
                self._above_mark()
            case "GLOBAL":
                stack.append(Placeholder(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(Placeholder(f"{module}.{attribute}"))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = stack.pop(), stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "INST":
                stack.append(_call(Placeholder(argument.replace(" ", ".")), self._above_mark()))
            case "OBJ":
                function, *arguments = self._above_mark()
                stack.append(_call(function, arguments))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "PROTO" if argument <= _LAST_PROTOCOL:
                pass
            case "FRAME" | "STOP":
                pass
            case _:
                raise _Damage(f"the opcode {name} {reprlib.repr(argument)}")

    def _above_mark(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _storage(self, reference: Any) -> _Storage | Placeholder:
        match reference:
            case ("storage", Placeholder(origin=origin), str(key), _, int(numel), *view):
                if numel < 0 or isinstance(numel, bool) or any(x is not None for x in view):
                    raise _Damage(f"a storage {reprlib.repr(reference)}")
                if origin not in _STORAGES:
                    return Placeholder(origin)
                storage = _Storage(key, _STORAGES[origin], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise _Damage(f"two storages {key}")
                return storage
        raise _Damage(f"a reference {reprlib.repr(reference)}, which is no storage")


def open_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with `tensorfile.Tensor`s for tensors.

    Dicts, lists, tuples, texts and numbers are as they were, but ordered dicts are dicts and sets
    are lists; other objects are `Placeholder`s.

    Raises:
        CheckpointError: Not such a file, or it is damaged.
    """
    try:
        with open(path, "rb") as file:
            root, places = (_read_zip if zipfile.is_zipfile(file) else _read_legacy)(path, file)
        return _place(root, "", path, places, {})
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; it runs nothing
        raise CheckpointError(f"{path} is not a whole file of torch.save: {error!r}") from error


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, int]]:
    """The pickle of a zip archive, and where each storage begins."""
    machine = _Machine()
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise CheckpointError(f"{path} has two members of one name")
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED:  # torch.save never does
                raise CheckpointError(f"{path}: {name} is compressed")
        if "data.pkl" not in members:
            raise CheckpointError(f"{path} is a zip archive, but no file of torch.save")
    order = members.get("byteorder")
    if order is not None and _read_member(path, file, order) != b"little":
        raise CheckpointError(f"{path} was written by a big-endian machine")
    root = machine.load(io.BytesIO(_read_member(path, file, members["data.pkl"])))
    places = {}
    for key, storage in machine.storages.items():
        info = members.get(f"data/{key}")
        if info is None or info.file_size != storage.numel * ITEM_BYTES[storage.dtype]:
            continue  # `_tensor` names those that lack it
        places[key] = _start_of(path, file, info)
    return root, places


def _start_of(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a zip archive's member begin."""
    file.seek(info.header_offset)
    mark, name_size, extra_size = struct.unpack("<4s22x2H", file.read(30))
    own = file.read(name_size) == info.orig_filename.encode()
    start = info.header_offset + 30 + name_size + extra_size
    file.seek(start + info.file_size)
    # Behind its bytes the next header begins; a wrong length of what is before them shows there.
    if mark != b"PK\x03\x04" or not own or file.read(2) != b"PK":
        raise CheckpointError(f"{path}: {info.filename} has a damaged header")
    return start


def _read_member(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> bytes:
    """A member of a zip archive, held against its checksum; 0 is that of who writes none."""
    file.seek(_start_of(path, file, info))
    content = file.read(info.file_size)
    if len(content) != info.file_size or info.CRC not in (0, zlib.crc32(content)):
        raise CheckpointError(f"{path}: {info.filename} is damaged: its checksum is another")
    return content


def _read_legacy(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, int]]:
    """As `_read_zip`, for files written before torch 1.6: pickles, then storages one by one."""
    machine = _Machine()
    file.seek(0)
    if machine.load(file) != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is not a file of torch.save")
    _protocol, system = machine.load(file), machine.load(file)
    if not system["little_endian"]:
        raise CheckpointError(f"{path} was written by a big-endian machine")
    root, keys = machine.load(file), machine.load(file)
    places = {}
    for key in keys:
        storage = machine.storages.get(key)
        # Of a storage that nothing refers to, the size of an item is not known.
        if storage is None:
            raise CheckpointError(f"{path} has a storage {key} that no tensor uses")
        if int.from_bytes(file.read(8), "little") == storage.numel:
            places[key] = file.tell()
        file.seek(storage.numel * ITEM_BYTES[storage.dtype], 1)
    if file.tell() < path.stat().st_size:
        raise CheckpointError(f"{path} has bytes after its last storage")
    return root, places


def _place(
    value: Any, name: str, path: Path, places: Mapping[str, int], done: dict[int, Any]
) -> Any:
    """Puts tensors in the place of views; each is named by its key.

    Args:
        value: Of a pickle.
        name: The key that it has.
        path: For messages.
        places: Where each storage begins.
        done: Containers that are finished, by `id`: a pickle may refer to one many times.
    """
    if isinstance(value, _View):
        return _tensor(value, name, path, places)
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) not in done:
        placed = lambda item, key: _place(item, key, path, places, done)
        done[id(value)] = (
            {key: placed(item, str(key)) for key, item in value.items()}
            if isinstance(value, dict)
            else type(value)(placed(item, name) for item in value)
        )
    return done[id(value)]


def _tensor(view: _View, name: str, path: Path, places: Mapping[str, int]) -> Tensor:
    storage, item = view.storage, ITEM_BYTES[view.storage.dtype]
    if fault := _fault(view):
        said = ", ".join(map(reprlib.repr, (view.offset, view.shape, view.stride)))
        raise CheckpointError(f"{path}: {name} {fault} (offset, shape and stride {said})")
    if storage.key not in places:
        raise CheckpointError(
            f"{path}: {name} lacks its storage {storage.key} of {storage.numel} items "
            f"({storage.numel * item} bytes); the file has none, or one of another size"
        )
    start = places[storage.key]
    if start + storage.numel * item > path.stat().st_size:
        raise CheckpointError(f"{path} ends inside {name}; it is cut short")
    first, size = start + view.offset * item, math.prod(view.shape) * item
    fields = name, path, storage.dtype, view.shape, first, size
    axes = zip(view.stride[::-1], view.shape[::-1], strict=True)
    return Tensor(*fields) if _is_dense(axes) else Strided(*fields, view.stride)


def _fault(view: _View) -> str | None:
    """What is wrong with a view."""
    shape, stride, numel = view.shape, view.stride, view.storage.numel
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        return "is no tensor"
    if any(type(number) is not int or number < 0 for number in (view.offset, *shape, *stride)):
        return "is no tensor"
    axes = sorted(zip(stride, shape, strict=True))
    last = view.offset + sum((size - 1) * step for step, size in axes)
    if math.prod(shape) and last >= numel:
        return f"is outside its storage of {numel} items"
    if math.prod(shape) == numel and not _is_dense(axis for axis in axes if axis[1] != 1):
        return f"has items of its storage of {numel} twice, and others not at all"
    return None


def _is_dense(axes: Iterable[tuple[int, int]]) -> bool:
    """Whether axes, each a stride and a size, the fastest first, leave nothing out."""
    expected = 1
    for step, size in axes:
        if size != 1 and step != expected:
            return False
        expected *= size
    return True

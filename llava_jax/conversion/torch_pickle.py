"""Tensors in the pickles of torch.save, found without torch and without running the pickle.

A pickle is a program. The machine here knows its opcodes, plain containers and the few functions
that describe tensors; every other global, and what is made of it, is an inert `Placeholder`. What
comes out are `tensorfile.Tensor`s: where a tensor's bytes lie in the file.

A few bytes of pickle can describe a value that takes exponential time to hash, compare or print: a
list of twice the same list of twice the same list, and so on. So nothing from a pickle is hashed,
compared or printed unless it is a text or a number, and reading has a budget.

Only `llava-jax convert` reads pickles; training reads safetensors.
"""

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_jax.disk import open_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import ITEM_BYTES, Strided, Tensor, is_shape

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

# Without tensors; a pickle of torch.save has a few hundred bytes for each.
_MAX_PICKLE_BYTES = 2**26
_MAX_OPCODES = 2**21
_MAX_DIRECTORY_BYTES = 2**24  # of the list of an archive's members, 100 bytes for each
_MAX_NAME = 1000  # characters of a global
_MAX_INTEGER_BITS = 1024
_MAX_DEPTH = 100  # containers in containers
_MAX_SHARING = 16  # bytes of all tensors for each byte of the file; tied weights are there twice


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Placeholder:
    """What stands for a global, and for every object that is made of it."""

    origin: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        raise _Damage(f"a tensor whose storage is a {_kind(storage)}")
    return _View(storage, offset, shape, stride)


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in items
    ):
        raise _Damage("an OrderedDict of something else than pairs")
    return _filled({}, [x for pair in items for x in pair])


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if not isinstance(sizes, list | tuple):
        raise _Damage(f"a Size of a {_kind(sizes)}")
    return tuple(sizes)


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
_REBUILD_OF_TYPE = "torch._tensor._rebuild_from_type_v2"  # calls another, with its arguments


def _kind(value: Any) -> str:
    return value.origin if isinstance(value, Placeholder) else type(value).__name__


def _name(*parts: Any) -> str:
    """The name of a global."""
    if not all(isinstance(part, str) and len(part) <= _MAX_NAME for part in parts):
        raise _Damage("a global whose name is no text, or too long")
    return ".".join(parts)


def _filled(container: Any, items: list[Any]) -> Any:
    """Puts keys and values into a dict.

    A key is a text or a number of 60 bits; any other stands for itself alone. A tuple's hash may
    take for ever, and as many larger numbers as one likes have the same.
    """
    if isinstance(container, Placeholder):
        return container
    for key, value in zip(items[::2], items[1::2], strict=True):
        is_plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**60)
        container[key if is_plain else Placeholder(_kind(key))] = value
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
        self._opcodes = self._copied = 0

    def load(self, file: io.BytesIO) -> Any:
        """The object of the pickle that begins here; `file` stands behind it then.

        Raises:
            Exception: Of any kind, when it is damaged.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, file)):
            self._opcodes += 1
            if self._opcodes > _MAX_OPCODES:
                raise _Damage(f"more than {_MAX_OPCODES:,} opcodes")
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                raise _Damage(f"an integer of {argument.bit_length()} bits")
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
                stack.append(Placeholder(_name(*argument.split(" ", 1))))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(Placeholder(_name(module, attribute)))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = stack.pop(), stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case "INST":
                function = Placeholder(_name(*argument.split(" ", 1)))
                stack.append(self._call(function, self._above_mark()))
            case "OBJ":
                function, *arguments = self._above_mark()
                stack.append(self._call(function, arguments))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "PROTO" if argument <= _LAST_PROTOCOL:
                pass
            case "FRAME" | "STOP":
                pass
            case _:
                raise _Damage(f"the opcode {name}")

    def _above_mark(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _call(self, function: Any, arguments: Any) -> Any:
        """What a call gives: a `Placeholder` of what is not known."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, list | tuple):
            raise _Damage(f"a call of a {_kind(function)} with a {_kind(arguments)}")
        self._copied += len(arguments) + sum(
            len(x) for x in arguments if isinstance(x, list | tuple)
        )
        # What a real call copies was put on the stack by as many opcodes.
        if self._copied > 4 * self._opcodes + 1000:
            raise _Damage("calls with the same long lists again and again")
        if function.origin == _REBUILD_OF_TYPE:
            rebuild, _, inner, _ = arguments
            return self._call(rebuild, inner)
        known = _KNOWN.get(function.origin)
        return function if known is None else known(*arguments)

    def _storage(self, reference: Any) -> _Storage | Placeholder:
        match reference:
            case ("storage", Placeholder(origin=origin), str(key), _, int(numel), *view):
                if numel < 0 or isinstance(numel, bool) or any(x is not None for x in view):
                    raise _Damage(f"a storage {key!r:.80} of {numel} items, or a view of one")
                if origin not in _STORAGES:
                    return Placeholder(origin)
                storage = _Storage(key, _STORAGES[origin], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise _Damage(f"two storages {key}")
                return storage
        raise _Damage("a reference to something else than a storage")


def open_pickle(path: Path) -> Any:
    """What `torch.save` wrote, with `tensorfile.Tensor`s for tensors.

    Dicts, lists, tuples, texts and numbers are as they were, but ordered dicts are dicts and sets
    are lists; other objects are `Placeholder`s.

    Raises:
        CheckpointError: Not such a file, or it is damaged.
    """
    try:
        with open_regular(path) as file:
            root, starts = (_read_zip if zipfile.is_zipfile(file) else _read_legacy)(path, file)
        return _Placing(path, starts).place(root, "")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; it runs nothing
        said = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not a whole file of torch.save: {said:.500}") from error


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, int]]:
    """The pickle of a zip archive, and where each storage begins."""
    machine = _Machine()
    if (size := _directory_size(file)) > _MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"{path} has a list of members of {size:,} bytes, too many")
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise CheckpointError(f"{path} has two members of one name")
        for name, info in members.items():
            if info.compress_type != zipfile.ZIP_STORED:  # torch.save never does
                raise CheckpointError(f"{path}: {name} is compressed")
        if sum(info.file_size for info in members.values()) > _size_of(file):
            raise CheckpointError(f"{path} has members that overlap")
        if "data.pkl" not in members:
            raise CheckpointError(f"{path} is a zip archive, but no file of torch.save")
    order = members.get("byteorder")
    if order is not None and _read_member(path, file, order) != b"little":
        raise CheckpointError(f"{path} was written by a big-endian machine")
    root = machine.load(io.BytesIO(_read_member(path, file, members["data.pkl"])))
    starts = {}
    for key, storage in machine.storages.items():
        info = members.get(f"data/{key}")
        if info is None or info.file_size != storage.numel * ITEM_BYTES[storage.dtype]:
            continue  # `_tensor` names those that lack it
        starts[key] = _start_of(path, file, info)
    return root, starts


def _directory_size(file: io.BufferedReader) -> int:
    """Bytes of a zip archive's list of members, as its end tells; `zipfile` reads all of it.

    An end with a comment, which torch.save does not write, tells nothing, and is as bad.
    """
    file.seek(max(0, _size_of(file) - 98))
    tail = file.read(98).rjust(98, b"\0")
    large, locator, end = tail[:56], tail[56:76], tail[76:]
    if not end.startswith(b"PK\x05\x06"):
        return 2**64
    part = large[40:48] if locator.startswith(b"PK\x06\x07") else end[12:16]
    return int.from_bytes(part, "little")


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
    if info.file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"{path}: {info.filename} has {info.file_size:,} bytes, too many")
    file.seek(_start_of(path, file, info))
    content = file.read(info.file_size)
    if len(content) != info.file_size or info.CRC not in (0, zlib.crc32(content)):
        raise CheckpointError(f"{path}: {info.filename} is damaged: its checksum is another")
    return content


def _read_legacy(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, int]]:
    """As `_read_zip`, for files written before torch 1.6: pickles, then storages one by one."""
    machine = _Machine()
    file.seek(0)
    pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    if machine.load(pickles) != _LEGACY_MAGIC:
        raise CheckpointError(f"{path} is not a file of torch.save")
    _protocol, system = machine.load(pickles), machine.load(pickles)
    if not system["little_endian"]:
        raise CheckpointError(f"{path} was written by a big-endian machine")
    root, keys = machine.load(pickles), machine.load(pickles)
    file.seek(pickles.tell())
    starts = {}
    for key in keys:
        if not isinstance(key, str):
            raise CheckpointError(f"{path} names a storage by a {_kind(key)}")
        storage = machine.storages.get(key)
        # Of a storage that nothing refers to, the size of an item is not known.
        if storage is None:
            raise CheckpointError(f"{path} has a storage {key:.80} that no tensor uses")
        if int.from_bytes(file.read(8), "little") == storage.numel:
            starts[key] = file.tell()
        file.seek(storage.numel * ITEM_BYTES[storage.dtype], 1)
    if file.tell() < _size_of(file):
        raise CheckpointError(f"{path} has bytes after its last storage")
    return root, starts


def _size_of(file: io.BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


class _Placing:
    """Puts tensors in the place of views; each is named by its key.

    Args:
        path: The file.
        starts: Where each storage begins.
    """

    def __init__(self, path: Path, starts: dict[str, int]):
        self._path, self._starts, self._end = path, starts, path.stat().st_size
        # A view may repeat one item without end, and many views may share a storage.
        self._bytes_left = _MAX_SHARING * max(self._end, 2**16)
        self._done: dict[int, Any] = {}  # by `id`: a pickle may refer to a container many times

    def place(self, value: Any, name: str, depth: int = 0) -> Any:
        if isinstance(value, _View):
            return self._tensor(value, name)
        if not isinstance(value, dict | list | tuple):
            return value
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"{self._path}: {name:.80} is nested more than {_MAX_DEPTH} deep")
        if id(value) not in self._done:
            self._done[id(value)] = (
                {key: self.place(item, _key(key), depth + 1) for key, item in value.items()}
                if isinstance(value, dict)
                else type(value)(self.place(item, name, depth + 1) for item in value)
            )
        return self._done[id(value)]

    def _tensor(self, view: _View, name: str) -> Tensor:
        storage, item, path = view.storage, ITEM_BYTES[view.storage.dtype], self._path
        if fault := _fault(view):
            raise CheckpointError(f"{path}: {name:.200} {fault}")
        if storage.key not in self._starts:
            raise CheckpointError(
                f"{path}: {name:.200} lacks its storage {storage.key:.80} of {storage.numel} items "
                f"({storage.numel * item} bytes); the file has none, or one of another size"
            )
        start = self._starts[storage.key]
        if start + storage.numel * item > self._end:
            raise CheckpointError(f"{path} ends inside {name:.200}; it is cut short")
        first, size = start + view.offset * item, math.prod(view.shape) * item
        self._bytes_left -= max(size, _span(view) * item)
        if self._bytes_left < 0:
            raise CheckpointError(
                f"{path}: its tensors up to {name:.200} have more than {_MAX_SHARING} times the "
                f"bytes of the file ({self._end})"
            )
        fields = name, path, storage.dtype, view.shape, first, size
        axes = zip(view.stride[::-1], view.shape[::-1], strict=True)
        return Tensor(*fields) if _is_dense(axes) else Strided(*fields, view.stride)


def _key(key: Any) -> str:
    return str(key) if isinstance(key, str | int) else key.origin


def _span(view: _View) -> int:
    """Items of its storage from a view's first to its last."""
    if not math.prod(view.shape):
        return 0
    return 1 + sum((size - 1) * step for step, size in zip(view.stride, view.shape, strict=True))


def _fault(view: _View) -> str | None:
    """What is wrong with a view."""
    shape, stride, numel = view.shape, view.stride, view.storage.numel
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        return "has a shape and a stride that do not go together"
    if not is_shape(shape):
        return "has a shape that no array has"
    if any(type(number) is not int or number < 0 for number in (view.offset, *stride)):
        return "has an offset or a stride that no array has"
    said = f"(offset {view.offset}, shape {shape}, stride {stride})"[:300]
    if math.prod(shape) and view.offset + _span(view) > numel:
        return f"is outside its storage of {numel} items {said}"
    axes = sorted(zip(stride, shape, strict=True))
    if math.prod(shape) == numel and not _is_dense(axis for axis in axes if axis[1] != 1):
        return f"has items of its storage of {numel} twice, and others not at all {said}"
    return None


def _is_dense(axes: Iterable[tuple[int, int]]) -> bool:
    """Whether axes, each a stride and a size, the fastest first, leave nothing out."""
    expected = 1
    for step, size in axes:
        if size != 1 and step != expected:
            return False
        expected *= size
    return True

"""Interprets pickles of torch.save, without torch and without calling functions in them.

A pickle is a program. The interpreter here knows the opcodes, plain containers and the few
functions that describe tensors. Every other global (a class or a function that a pickle names), and
every object that is made with such a global, becomes an inert `Placeholder`. The standard library's
`pickle` is not used, because it calls the functions that a file names. `torch.load` is not used,
because it needs torch, reads tensors into memory, and limits neither time nor size.

A few bytes of pickle can describe a value that takes exponential time to hash, compare or print,
for example a list that contains another list twice, which contains a third list twice, and so on.
So a value from a pickle is hashed, compared or printed only if it is text or a number, and the
number of opcodes is limited.
"""

import dataclasses
import io
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, cast

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
_LAST_PROTOCOL = 5

_MAX_OPCODES = 2**21
_MAX_NAME = 1000  # characters of a global's name
_MAX_INTEGER_BITS = 1024


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Placeholder:
    """Stands for a global, or for an object that is made with a global.

    Attributes:
        origin: Full name of the global, for example "torch.device".
    """

    origin: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A one-dimensional array in the file. Tensors are views of such arrays.

    Attributes:
        key: Name of the storage in the file.
        dtype: Dtype of the items, by its name in safetensors files, for example "F32".
        numel: Number of items.
    """

    key: str
    dtype: str
    numel: int


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class View:
    """A tensor as a pickle describes it. The description is not checked yet.

    Attributes:
        storage: Storage that contains the values.
        offset: Index of the first value in the storage, in items.
        shape: Shape of the tensor.
        stride: Distance between neighboring values along each axis, in items.
    """

    storage: Storage
    offset: Any
    shape: Any
    stride: Any


class Damage(Exception):
    """Raised if a pickle has something that torch.save does not write."""


def type_name(value: object) -> str:
    """Returns the name of a value's type, or of the global that a placeholder stands for."""
    return value.origin if isinstance(value, Placeholder) else type(value).__name__


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    _requires_grad: object = False,
    _hooks: object = None,
    metadata: object = None,
) -> View | Placeholder:
    """Returns the view that a call of torch._utils._rebuild_tensor (or _v2) describes."""
    if isinstance(storage, Placeholder):
        return storage
    if metadata:  # the tensor is negated or conjugated
        return Placeholder("torch._utils.set_tensor_metadata")
    if not isinstance(storage, Storage):
        raise Damage(f"a tensor has a {type_name(storage)} instead of a storage")
    return View(storage, offset, shape, stride)


def _ordered_dict(items: object = ()) -> object:
    """Returns the dict that a call of collections.OrderedDict describes."""
    if not isinstance(items, list | tuple) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in items
    ):
        raise Damage("an OrderedDict is made from items that are not pairs")
    return _fill({}, [x for pair in items for x in pair])


def _size(sizes: object = ()) -> tuple[object, ...]:
    """Returns the tuple that a call of torch.Size describes."""
    if not isinstance(sizes, list | tuple):
        raise Damage(f"a torch.Size is made from a {type_name(sizes)}, not from a list or tuple")
    return tuple(sizes)


_KNOWN: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
_REBUILD_OF_TYPE = "torch._tensor._rebuild_from_type_v2"  # calls its first argument, a function


def _global(*parts: object) -> Placeholder:
    """Returns the placeholder for the global whose name consists of these parts."""
    names = [part for part in parts if isinstance(part, str) and len(part) <= _MAX_NAME]
    if len(names) < len(parts):
        raise Damage(f"the name of a global is not a text of at most {_MAX_NAME} characters")
    return Placeholder(".".join(names))


def _fill(container: Any, items: list[object]) -> object:
    """Adds keys and values, which alternate in `items`, to a dict; returns the dict.

    A key is text or an integer of at most 60 bits. Any other key is replaced by a placeholder that
    equals only itself, because the hash of a tuple may take exponential time, and a file may have
    any number of larger integers with the same hash. If `container` is a placeholder, it is
    returned unchanged.
    """
    if isinstance(container, Placeholder):
        return container
    for key, value in zip(items[::2], items[1::2], strict=True):
        is_plain = isinstance(key, str) or (isinstance(key, int) and abs(key) < 2**60)
        container[key if is_plain else Placeholder(type_name(key))] = value
    return container


def _extend(container: Any, items: list[object]) -> None:
    """Appends items to a list; does nothing to a placeholder."""
    if not isinstance(container, Placeholder):
        container.extend(items)


_MARK = object()
_CONSTANTS = {
    **{"NONE": None, "NEWTRUE": True, "NEWFALSE": False},
    **{"EMPTY_TUPLE": (), "MARK": _MARK},
}
# Sets become lists, because items of a set are hashed.
_EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": dict,
}
_FROM_MARK: dict[str, Callable[[list[object]], object]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": list,
    "DICT": lambda items: _fill({}, items),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"FRAME", "STOP"}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}


class PickleMachine:
    """Interprets the pickles of one file, each on an empty stack.

    The limit on the number of opcodes applies to all pickles together.

    Attributes:
        storages: The storages that the pickles refer to, by key.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._opcodes = self._copied = 0

    def load(self, file: io.BytesIO) -> Any:
        """Reads the pickle at the current position of `file`, and returns its object.

        Afterwards, the position of `file` is the first byte after the pickle.

        Raises:
            Exception: The pickle is damaged. The exception may have any class.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, object] = {}
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, file)):
            self._opcodes += 1
            if self._opcodes > _MAX_OPCODES:
                raise Damage(f"the file has more than {_MAX_OPCODES:,} opcodes")
            self._step(opcode.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        """Runs an opcode that pushes, combines or stores values; passes others to `_collect`."""
        stack, memo = self._stack, self._memo
        if name in _VALUES:
            if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
                raise Damage(f"an integer has more than {_MAX_INTEGER_BITS} bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in _FROM_MARK:
            stack.append(_FROM_MARK[name](self._above_mark()))
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        elif name not in _NOTHING:
            self._collect(name, argument)

    def _collect(self, name: str, argument: Any) -> None:
        """Runs an opcode that changes a container or the stack; passes others to `_refer`."""
        stack = self._stack
        match name:
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self._above_mark()
                _extend(stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            case "SETITEMS":
                items = self._above_mark()
                _fill(stack[-1], items)
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "DUP":
                stack.append(stack[-1])
            case "POP" | "BUILD":  # BUILD sets an object's state, which is not needed
                stack.pop()
            case "POP_MARK":
                self._above_mark()
            case _:
                self._refer(name, argument)

    def _refer(self, name: str, argument: Any) -> None:
        """Runs an opcode that names a global, calls a global, or refers to a storage."""
        stack = self._stack
        match name:
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_global(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = stack.pop(), stack.pop()
                stack.append(self._call(stack.pop(), arguments))
            case "INST":
                stack.append(self._call(_global(*argument.split(" ", 1)), self._above_mark()))
            case "OBJ":
                function, *arguments = self._above_mark()
                stack.append(self._call(function, arguments))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "PROTO" if argument <= _LAST_PROTOCOL:
                pass
            case _:
                raise Damage(f"the opcode {name} or its argument is not supported")

    def _above_mark(self) -> list[object]:
        """Removes the last mark and the values above it from the stack; returns the values."""
        items = []
        while (item := self._stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _call(self, function: object, arguments: object) -> object:
        """Returns the result of a known function, or the placeholder of an unknown function."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, list | tuple):
            raise Damage(
                f"a {type_name(function)} is called with a {type_name(arguments)}; only a global "
                "may be called, with a list or tuple"
            )
        self._copied += len(arguments) + sum(
            len(x) for x in arguments if isinstance(x, list | tuple)
        )
        # A file of torch.save has one opcode for each item that a call copies. A file with far
        # fewer opcodes passes one long list to many calls, and their results would fill the memory.
        if self._copied > 4 * self._opcodes + 1000:
            raise Damage("the pickle passes the same long lists to many function calls")
        if function.origin == _REBUILD_OF_TYPE:
            rebuild, _, inner, _ = arguments
            return self._call(rebuild, inner)
        known = _KNOWN.get(function.origin)
        return function if known is None else known(*arguments)

    def _storage(self, reference: object) -> Storage | Placeholder:
        """Returns the storage that a persistent id names; a placeholder for an unknown dtype."""
        match reference:
            case ("storage", Placeholder(origin=origin), str(key), _, int(numel), *view):
                if numel < 0 or isinstance(numel, bool) or any(x is not None for x in view):
                    raise Damage(
                        f"the storage {key!r:.80} has an invalid number of items ({numel}), or is "
                        "a view of another storage"
                    )
                if origin not in _STORAGES:
                    return Placeholder(origin)
                storage = Storage(key, _STORAGES[origin], numel)
                if self.storages.setdefault(key, storage) != storage:
                    raise Damage(f"two different storages have the key {key}")
                return storage
        raise Damage("a persistent id does not name a storage")

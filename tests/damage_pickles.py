"""Damaged and hostile pickles; see damage.py."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import FIXTURES, Named, a_file, a_name, damage, flip
from safetensors.numpy import load_file


class Storage:
    """A storage in a pickle that is made here."""

    def __init__(self, key: str, numel: Any, kind: Any = torch.FloatStorage):
        self.reference = "storage", kind, key, "cpu", numel


class View:
    """A tensor of any description."""

    def __init__(self, *description: Any, build: Any = torch._utils._rebuild_tensor_v2):
        self.description, self.build = description, build

    def __reduce__(self) -> Any:
        return self.build, (*self.description, False, OrderedDict())


class Call:
    """What a pickle calls."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> Any:
        return self.function, self.arguments, self.state


class Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, Storage) else None


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    Writer(file, protocol=2).dump(value)
    return file.getvalue()


def members_of(file: Path) -> tuple[str, dict[str, bytes]]:
    """A zip archive's root folder and members."""
    with zipfile.ZipFile(file) as archive:
        folder = archive.namelist()[0].split("/")[0]
        names = [name.removeprefix(f"{folder}/") for name in archive.namelist()]
        return folder, {name: archive.read(f"{folder}/{name}") for name in names}


def write_members(
    file: Path, folder: str, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED
) -> None:
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(f"{folder}/{name}", content)


def state_of(place: Path) -> dict[str, Any]:
    """The state dict of a file of layout A, as this module writes pickles."""
    tensors = load_file(FIXTURES / "hf_4_37" / "model.safetensors")
    strides = lambda x: tuple(step // x.itemsize for step in x.strides)
    return OrderedDict(
        (name, View(Storage(str(i), x.size), 0, x.shape, strides(x)))
        for i, (name, x) in enumerate(tensors.items())
    )


def replace_pickle(place: Path, data: bytes) -> None:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    write_members(file, folder, {**members, "data.pkl": data})


def edit_state(rng: np.random.Generator, place: Path, odd: Any) -> Named:
    """Puts something in a tensor's place."""
    state = state_of(place)
    name = a_name(rng, state)
    state[name] = odd(state[name]) if callable(odd) and not isinstance(odd, type) else odd
    replace_pickle(place, pickled(state))
    return "pytorch_model.bin", name


BAD_VIEWS: list[Callable[[Any, int, tuple, tuple], tuple]] = [
    lambda s, o, n, t: (s, -1, n, t),
    lambda s, o, n, t: (s, 1, n, t),
    lambda s, o, n, t: (s, 2**62, n, t),
    lambda s, o, n, t: (s, True, n, t),
    lambda s, o, n, t: (s, "0", n, t),
    lambda s, o, n, t: (s, None, n, t),
    lambda s, o, n, t: (s, 0.0, n, t),
    lambda s, o, n, t: (s, o, n, tuple(-x for x in t)),
    lambda s, o, n, t: (s, o, n, tuple(2 * x for x in t)),
    lambda s, o, n, t: (s, o, n, tuple(0 for _ in t)),
    lambda s, o, n, t: (s, o, n, (*t, 1)),
    lambda s, o, n, t: (s, o, n, list(t)),
    lambda s, o, n, t: (s, o, n, None),
    lambda s, o, n, t: (s, o, n, (True,) * len(n)),
    lambda s, o, n, t: (s, o, (-1, *n[1:]), t),
    lambda s, o, n, t: (s, o, (2**62, *n[1:]), t),
    lambda s, o, n, t: (s, o, (2**40,), (0,)),
    lambda s, o, n, t: (s, o, "ab", t),
    lambda s, o, n, t: (s, o, (n,), (t,)),
]


@damage("bin")
def tensor_outside_its_storage(rng: np.random.Generator, place: Path) -> Named:
    change = BAD_VIEWS[rng.integers(len(BAD_VIEWS))]
    return edit_state(rng, place, lambda view: View(*change(*view.description)))


BAD_STORAGES: list[Callable[[Storage], Any]] = [
    lambda s: Storage("none", s.reference[4]),
    lambda s: Storage("../0", s.reference[4]),
    lambda s: Storage(s.reference[2], s.reference[4], torch.DoubleStorage),
    lambda s: Storage(s.reference[2], s.reference[4] + 1),
    lambda s: Storage(s.reference[2], 2**40),
    lambda s: Storage(s.reference[2], s.reference[4], torch.QInt8Storage),
    lambda s: Storage(s.reference[2], s.reference[4], OrderedDict),
]
WORSE_STORAGES: list[Callable[[Storage], Any]] = [
    lambda s: Storage(s.reference[2], -1),
    lambda s: Storage(s.reference[2], True),
    lambda s: Storage(s.reference[2], "9"),
    lambda s: Storage(s.reference[2], None),
    lambda s: Storage(3, s.reference[4]),  # type: ignore[arg-type]
    lambda s: Storage(s.reference[2], s.reference[4], "FloatStorage"),
    lambda s: None,
    lambda s: "storage",
    lambda s: (s,),
]


@damage("bin")
def storage_that_is_not_there(rng: np.random.Generator, place: Path) -> Named:
    change = BAD_STORAGES[rng.integers(len(BAD_STORAGES))]
    return edit_state(
        rng, place, lambda view: View(change(view.description[0]), *view.description[1:])
    )


@damage("bin")
def storage_that_is_none(rng: np.random.Generator, place: Path) -> Named:
    change = WORSE_STORAGES[rng.integers(len(WORSE_STORAGES))]
    file, _ = edit_state(
        rng, place, lambda view: View(change(view.description[0]), *view.description[1:])
    )
    return (file,)


@damage("bin")
def foreign_objects(rng: np.random.Generator, place: Path) -> Named:
    odd = [
        np.zeros(3),
        np.float32(1),
        Path("x"),
        type,
        None,
        1,
        "x",
        [],
        torch.device("cpu"),
        print,
    ]
    value = odd[rng.integers(len(odd))]
    return edit_state(rng, place, lambda _: value)


def canary(place: Path) -> str:
    """What a program in a pickle would leave."""
    return str(place.parent / "canary")


def programs(place: Path) -> list[Any]:
    """Each leaves a file if it is run."""
    file = canary(place)
    touch = f"__import__('pathlib').Path({file!r}).touch()"
    run = Call(eval, touch)
    foreign = [
        run,
        Call(exec, touch),
        Call(os.system, f"touch {file}"),
        Call(Path(file).touch),
        Call(getattr, Call(__import__, "builtins"), "eval"),
        Call(map, eval, [touch]),
        Call(pickle.loads, pickle.dumps(run)),
        Call(OrderedDict, [("x", run)]),
        Call(OrderedDict, state={"__setstate__": run}),
        Call(OrderedDict, state=(None, {"update": eval})),
        Call(torch.Size, [run]),
        Call(torch.Size, (1, 2), state={"__class__": run}),
        Call(torch._utils._rebuild_parameter, run, True, OrderedDict()),
        Call(torch._tensor._rebuild_from_type_v2, eval, torch.Tensor, (touch,), None),
        Call(torch._tensor._rebuild_from_type_v2, os.system, type, (f"touch {file}",), None),
    ]
    assert len(foreign) == FOREIGN
    return [*foreign, Call(OrderedDict, run), Call(torch.Size, run)]


FOREIGN = 15
"""So many of them only make things; the rest have what they call in the place of containers."""


@damage("bin")
def program_in_a_tensors_place(rng: np.random.Generator, place: Path) -> Named:
    number = rng.integers(len(programs(place)))
    file, name = edit_state(rng, place, lambda _: programs(place)[number])
    return (file, name) if number < FOREIGN else (file,)


OPCODES = {
    "setattr of a stand-in": b"ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
    "setattr of a class": b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    "build of a placeholder": b"cos\nsystem\n(X\x01\x00\x00\x00aK\x01db.",
    "inst": b"(S'touch CANARY'\nios\nsystem\n.",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR"
    b"(S'touch CANARY'\ntR.",
    "obj": b"(cos\nsystem\nS'touch CANARY'\no.",
    "newobj": b"cos\nsystem\nS'touch CANARY'\n\x85\x81.",
    "newobj_ex": b"cos\nsystem\nS'touch CANARY'\n\x85}\x92.",
    "stack global": b"\x8c\x02os\x8c\x06system\x93S'touch CANARY'\n\x85R.",
    "nested attributes": b"\x8c\x08builtins\x8c\x0dopen.__call__\x93S'CANARY'\nS'w'\n\x86R.",
    "extension": b"\x82\x01.",
    "persistent text": b"Pstorage\n.",
    "a list in itself": b"]q\x00h\x00a.",
    "a dict in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    "a tuple in itself": b"](h\x00a.",
    "a call of itself": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00(h\x00N](h\x00NNNtNtR.",
    "a huge memo index": b"Nr\xff\xff\xff\xff0N.",
    "a huge memo index as text": b"Np99999999999999999999\n.",
    "an unknown memo index": b"h\x09.",
    "an unknown protocol": b"\x80\x09N.",
    "an unknown opcode": b"\xfeN.",
    "no end": b"]q\x00",
    "nothing": b"",
    "only an end": b".",
    "no mark": b"t.",
    "a mark alone": b"(.",
    "a huge text": b"X\xff\xff\xff\x7fabc.",
    "huge bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
    "a huge byte array": b"\x96\x00\x00\x00\x00\x10\x00\x00\x00a.",
    "a huge frame": b"\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "a huge number": b"I" + b"9" * 10_000 + b"\n.",
    "an out of band buffer": b"\x97.",
    "deep lists": b"]" * 5_000 + b"a" * 4_999 + b".",
    "deep tuples": b")" + b"\x85" * 5_000 + b".",
    "deep tuples as a key": b"}q\x00)" + b"\x85" * 200_000 + b"Ns.",
    "deep dicts": b"}" + b"X\x01\x00\x00\x00a}" * 5_000 + b"s" * 5_000 + b".",
    "many in few": b"]" + b"".join(b"q%c]h%c" % (i, i) + b"ah%ca" % i for i in range(200)) + b".",
    "an unhashable key": b"}]Ns.",
    "a key without a value": b"}(Nu.",
    "items of a tuple": b")Na.",
    "items of a number": b"K\x01(Nu.",
    "a call of a number": b"K\x01)R.",
    "arguments that are none": b"ctorch\nSize\nK\x01R.",
    "too many arguments": b"ctorch\nSize\n(NNNtR.",
    "a name that is none": b"NN\x93.",
    "surrogates": b"cos\n\xed\xa0\x80\n.",
}


@damage("bin", "legacy")
def opcodes(rng: np.random.Generator, place: Path) -> Named:
    data = list(OPCODES.values())[rng.integers(len(OPCODES))]
    replace_root(place, data.replace(b"CANARY", canary(place).encode()))
    return ("pytorch_model.bin",)


def replace_root(place: Path, data: bytes) -> None:
    """Puts a pickle in the place of the state dict's."""
    file = place / "pytorch_model.bin"
    if zipfile.is_zipfile(file):
        return replace_pickle(place, data)
    raw = file.read_bytes()
    ends = io.BytesIO(raw)
    for _ in range(3):  # the magic number, a protocol, what machine it was
        pickle.Unpickler(ends).load()
    file.write_bytes(raw[: ends.tell()] + data + pickle.dumps([], protocol=2))
    return None


@damage("bin")
def flipped_pickle(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        info = archive.infolist()[0]
    assert info.filename.endswith("data.pkl")
    start = info.header_offset + 30 + len(info.filename)
    start += struct.unpack("<H", file.read_bytes()[info.header_offset + 28 :][:2])[0]
    flip(rng, file, start, start + info.file_size)
    return (file.name, "data.pkl")


@damage("bin", "pth", "zero")
def flipped_directory(rng: np.random.Generator, place: Path) -> Named:
    """A bit of the list of members, which ends a zip archive."""
    file = a_file(rng, place)
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
    flip(rng, file, start, file.stat().st_size)
    return ()


@damage("bin", "pth", "zero")
def flipped_member_header(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    info = infos[rng.integers(len(infos))]
    flip(rng, file, info.header_offset, info.header_offset + 30 + len(info.filename))
    return ()


@damage("legacy")
def flipped_legacy(rng: np.random.Generator, place: Path) -> Named:
    """A bit of the pickles, or of the first storage's length."""
    file = place / "pytorch_model.bin"
    with open(file, "rb") as stream:
        for _ in range(5):
            pickle_ends(stream)
        end = stream.tell() + 8
    flip(rng, file, 0, end)
    return ()


def pickle_ends(stream: Any) -> None:
    for _ in pickletools.genops(stream):
        pass


@damage("bin")
def cut_storage(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    key = str(rng.choice(sorted(name for name in members if name.startswith("data/"))))
    members[key] = members[key][: rng.integers(len(members[key]))]
    write_members(file, folder, members)
    return (file.name, "needs the storage " + key.removeprefix("data/"))


@damage("bin")
def long_storage(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    key = str(rng.choice(sorted(name for name in members if name.startswith("data/"))))
    members[key] += rng.bytes(rng.integers(1, 64))
    write_members(file, folder, members)
    return (file.name, "needs the storage " + key.removeprefix("data/"), "with another size")


@damage("legacy")
def other_storage_length(rng: np.random.Generator, place: Path) -> Named:
    """The first storage's, which stands before its bytes and in the pickle."""
    file = place / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    with open(file, "rb") as stream:
        for _ in range(5):
            pickle_ends(stream)
        start = stream.tell()
    length = int.from_bytes(raw[start : start + 8], "little")
    raw[start : start + 8] = int(rng.choice([0, length - 1, length + 1, 2**40])).to_bytes(
        8, "little"
    )
    file.write_bytes(raw)
    return (file.name, "with another size")


@damage("bin")
def missing_storage(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    key = str(rng.choice(sorted(name for name in members if name.startswith("data/"))))
    del members[key]
    write_members(file, folder, members)
    return (file.name, "needs the storage " + key.removeprefix("data/"))


@damage("bin")
def compressed(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    kinds = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    write_members(file, *members_of(file), kinds[rng.integers(3)])
    return (file.name, "is compressed")


@damage("bin")
def odd_members(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    old = str(rng.choice(["data.pkl", "data/0"]))
    new = str(rng.choice(["../data.pkl", "/data.pkl", "data.pkl/", "DATA.PKL", "data/../data/0"]))
    members[new] = members.pop(old)
    write_members(file, folder, members)
    return (file.name,)


@damage("bin")
def member_twice(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    write_members(file, folder, members)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"other/{rng.choice(sorted(members))}", b"x")
    return (file.name, "two members with the same name")


@damage("bin")
def root_is_no_dict(rng: np.random.Generator, place: Path) -> Named:
    roots = [[], (), 1, None, "x", {}, {"model": {}}, {"state_dict": {}}, {"a": {"b": 1}}, {1: 2}]
    replace_pickle(place, pickled(roots[rng.integers(len(roots))]))
    return ()


@damage("zero")
def missing_rank(rng: np.random.Generator, place: Path) -> Named:
    Path(rng.choice(sorted(map(str, place.glob("*.pt"))))).unlink()
    return ()


@damage("zero")
def zero_of_other_things(rng: np.random.Generator, place: Path) -> Named:
    states = [1, [], {}, {"optimizer_state_dict": 1}, {"optimizer_state_dict": {}}]
    keys = ("partition_count", "single_partition_of_fp32_groups")
    states += [
        {"optimizer_state_dict": dict.fromkeys(keys, x)} for x in (0, 3, [], [[]], "x", None)
    ]
    states += [{"optimizer_state_dict": {keys[0]: 3, keys[1]: [torch.ones(2)[0]]}}]
    states += [{"optimizer_state_dict": {keys[0]: 3, keys[1]: [torch.ones(99).half()]}}]
    models = [{}, {"param_shapes": 1}, {"param_shapes": [{}]}, {"param_shapes": [{"a": "b"}]},
              {"param_shapes": [{"a": (-1,)}]}, {"param_shapes": [{"a": (2**50,)}]},
              {"param_shapes": [{1: (0,)}]}, {"param_shapes": []}]  # fmt: skip
    if rng.integers(2):
        torch.save(models[rng.integers(len(models))], place / "mp_rank_00_model_states.pt")
    else:
        for file in place.glob("*_optim_states.pt"):
            torch.save(states[rng.integers(len(states))], file)
    return ()


# Pickles of a few bytes that ask for much time or memory.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def doubled(opened: bytes = b"(", closed: bytes = b"t", times: int = 60) -> bytes:
    """A tuple (or list) of twice a tuple of twice a tuple, and so on: 2 ** times paths into it."""
    grow = b"".join(
        b"r%s0%sj%sj%s%s" % (n, opened, n, n, closed)
        for n in (struct.pack("<I", 1000 + i) for i in range(times))
    )
    return b")" + grow


STORAGE = (
    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"M\x64\x00tQ"
)
BUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def view(offset: bytes, shape: bytes, stride: bytes, storage: bytes = STORAGE) -> bytes:
    """A tensor "w", of a storage of 100 items."""
    tensor = BUILD + b"(" + storage + offset + shape + stride + b"\x89}tR"
    return b"}" + text("w") + tensor + b"s."


def numbers(*values: int) -> bytes:
    longs = (b"\x8a" + bytes([len(x)]) + x for x in map(pickle.encode_long, values))
    return b"(" + b"".join(longs) + b"t"


NESTED, LISTS = doubled(), doubled(b"(", b"l")
MANY = b"(" + text("k") + b"N\x86q\x01" + b"h\x01" * 3000 + b"lq\x02"  # 3000 times the same pair
BOMBS = {
    "a root": NESTED + b".",
    "lists as a root": LISTS + b".",
    "a global's name": text("os") + NESTED + b"\x93.",
    "lists as a global's name": LISTS + text("path") + b"\x93.",
    "a key": b"}" + NESTED + b"Ns.",
    "a key of a state dict": b"}(" + NESTED + STORAGE + b"u.",
    "a call": NESTED + b")R.",
    "a call's arguments": b"ctorch\nSize\n" + NESTED + b"R.",
    "a Size": b"ctorch\nSize\n(" + NESTED + b"tR.",
    "an OrderedDict": b"ccollections\nOrderedDict\n(" + LISTS + b"tR.",
    "a storage": view(b"K\x00", b")", b")", NESTED),
    "a storage's reference": b"(" + text("storage") + NESTED + b"tQ.",
    "a storage's key": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + NESTED + b"NK\x01tQ.",
    "a storage's view": STORAGE[:-2] + NESTED + b"tQ.",
    "an offset": view(NESTED, b"K\x01\x85", b"K\x01\x85"),
    "a shape": view(b"K\x00", NESTED, b"K\x01\x85"),
    "a stride": view(b"K\x00", b"K\x01\x85", LISTS + b"\x85"),
    "a tensor in a shape": view(b"K\x00", BUILD + b"(" + STORAGE + NESTED + b"))tR\x85", b")"),
    "65 dimensions": view(b"K\x00", numbers(*[1] * 65), numbers(*[1] * 65)),
    "10000 dimensions": view(b"K\x00", numbers(*[2**62] * 10_000), numbers(*[0] * 10_000)),
    "no items, 2 ** 62 of them": view(b"K\x00", numbers(0, 2**62), numbers(1, 1)),
    "no items, 2 ** 900 of them": view(b"K\x00", numbers(2**900, 0), numbers(1, 1)),
    "a stride of 0": view(b"K\x00", numbers(2**30), numbers(0)),
    "a negative stride": view(b"K\x05", numbers(3), numbers(-1)),
    "a negative offset": view(b"J\xff\xff\xff\xff", numbers(3), numbers(1)),
    "a stride of 2 ** 1000": view(b"K\x00", numbers(2), numbers(2**1000)),
    "an offset of 2 ** 1000": view(numbers(2**1000)[1:-1], numbers(2), numbers(1)),
    "many OrderedDicts of one list": MANY
    + b"ccollections\nOrderedDict\nq\x03"
    + b"h\x03h\x02\x85R" * 3000
    + b"l.",
    "many Sizes of one list": MANY + b"ctorch\nSize\nq\x03" + b"h\x03h\x02\x85R" * 20_000 + b"l.",
    "many calls with many arguments": MANY + b"0ctorch\nnn\nq\x03" + b"h\x03h\x02R" * 30_000 + b".",
    "many calls of calls": b"ctorch._tensor\n_rebuild_from_type_v2\nq\x01(h\x01N)Ntq\x02"
    + b"(h\x01Nh\x02Ntq\x02" * 900
    + b"h\x01h\x02R0" * 3000
    + b".",
    "many globals of one long name": text("x" * 10**6)
    + b"q\x01"
    + b"h\x01h\x01\x93" * 10_000
    + b".",
    "keys of one hash": b"}("
    + b"".join(
        b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(1, 60_000)
    )
    + b"u.",
    "a huge number as keys": b"\x8b"
    + struct.pack("<i", 10**6)
    + b"\x7f" * 10**6
    + b"q\x01}("
    + b"h\x01N" * 10_000
    + b"u.",
    "many tensors of one storage": b"}("
    + BUILD
    + b"("
    + STORAGE
    + b"K\x00K\x64\x85K\x01\x85\x89}tRq\x010"
    + b"".join(text(str(i)) + b"h\x01" for i in range(20_000))
    + b"u.",
}
LONG_BOMBS = {"many opcodes": b"N0" * 1_100_000 + b"N.", "many objects": b"]" * 2_200_000 + b"."}


def write_bomb(file: Path, bomb: bytes, *, as_zip: bool) -> None:
    """A file of torch.save with a storage "0" of 100 float32 items, and a bomb as its root."""
    storage = bytes(400)
    if as_zip:
        write_members(
            file, "archive", {"data.pkl": bomb, "byteorder": b"little", "data/0": storage}
        )
        return
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    pickles = b"".join(pickle.dumps(value, protocol=2) for value in before)
    keys = pickle.dumps(["0"], protocol=2)
    file.write_bytes(pickles + bomb + keys + struct.pack("<Q", 100) + storage)

"""Mutated checkpoints, read in this process: what each ends in, how long it takes and how much.

    python tests/conversion/fuzz_checkpoints.py KIND FIRST COUNT FOLDER

A kind is tables (safetensors and their index), pickles, directories, or several with commas.

The folder is made, and must not exist.

Mutations change structure (entries of tables, opcodes, fields, members) more than bytes. A case is
a kind and a number. Prints a JSON object for each case that failed, and one about all.
"""

import contextlib
import itertools
import json
import os
import pickletools
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from damage import FIXTURES, INDEX, KINDS, a_file, header_of, make, write_header
from damage_pickles import BOMBS, members_of, replace_root
from test_malformed import WAYS

MAX_SECONDS = 10
TINY = FIXTURES.parents[2] / "assets" / "tiny-llava"
BRANCHING = "".join(f"{{% for a{i} in range(9999) %}}" for i in range(3)) + "{% endfor %}" * 3
TEMPLATES = [
    *(
        "{{ 1 / 0 }}",
        "{{ 10.0 ** 999 }}",
        "{{ 'image' * 10 ** 9 }}",
        "{{ messages",
        "{{ range(10**12) }}",
    ),
    *("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }} image", "image" + BRANCHING, "", "image"),
    *("{{ messages[9].image }}", "{% for m in messages %}{{ m.image.text + 1 }}{% endfor %}"),
]


def pick(rng: np.random.Generator, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


def hostile(rng: np.random.Generator) -> Any:
    """A JSON value that nobody expects."""
    deep: Any = 0
    for _ in range(rng.integers(1, 60)):
        deep = pick(
            rng, ([deep], {"a": deep}, [deep, deep], {"type": "Sequence", "decoders": [deep]})
        )
        deep = deep if len(str(deep)) < 10**4 else 0
    return pick(
        rng,
        [
            *(
                None,
                True,
                False,
                -1,
                0,
                1,
                1.5,
                65,
                2**31,
                2**62,
                2**64,
                10**30,
                -(10**30),
                10**4000,
            ),
            *(
                float("nan"),
                float("inf"),
                1e308,
                "",
                "x",
                "x" * 5000,
                "a\0b",
                "\ud800",
                "²",
                "/dev/zero",
            ),
            *("..", "../..", "{{ 1/0 }}", "(a+)+$", [], {}, [[]], [0] * 1000, [None], {"": ""}),
            *([2**62] * 70, [0, 2**62], {"a": {"b": "c"}}, deep),
        ],
    )


def paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where everything in a JSON value is; of long lists and objects, some."""
    found = [before]
    if isinstance(value, dict):
        for key in list(value)[:300]:
            found += paths(value[key], (*before, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 5)):
            found += paths(value[index], (*before, index))
    return found


def mutate_json(rng: np.random.Generator, value: Any) -> Any:
    """Replaces, removes, renames, swaps or adds something somewhere."""
    path = pick(rng, paths(value)[1:] or [()])
    if not path:
        return hostile(rng)
    parent = value
    for step in path[:-1]:
        parent = parent[step]
    step, kind = path[-1], rng.integers(6)
    if kind == 0:
        del parent[step]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(hostile(rng))[:6000]] = parent.pop(step)
    elif kind == 2:
        other = pick(rng, range(len(parent)) if isinstance(parent, list) else parent)
        parent[step], parent[other] = parent[other], parent[step]
    elif kind == 3 and isinstance(parent[step], int | float):
        parent[step] = pick(rng, [parent[step] + 1, -parent[step], parent[step] * 10**9, 0])
    elif kind == 4 and isinstance(parent[step], list):
        parent[step] = parent[step] * int(rng.integers(2, 70))
    else:
        parent[step] = hostile(rng)
    return value


def edit(rng: np.random.Generator, file: Path) -> None:
    """Mutates a JSON file, if it still is one."""
    with contextlib.suppress(ValueError):
        value = json.loads(file.read_bytes())
        for _ in range(rng.integers(1, 4)):
            value = mutate_json(rng, value)
        file.write_text(json.dumps(value))


def mutated_table(rng: np.random.Generator, place: Path) -> None:
    """A safetensors file: its table changed, now and then its bytes and lengths."""
    file = a_file(rng, place)
    header, data = header_of(file)
    for _ in range(rng.integers(1, 4)):
        header = mutate_json(rng, header)
    if not rng.integers(4):
        data = pick(rng, [data[: rng.integers(len(data))], data * 2, b"", rng.bytes(99)])
    write_header(file, header if isinstance(header, dict) else json.dumps(header), data)
    if not rng.integers(8):
        raw = file.read_bytes()
        length = pick(rng, [0, 1, 2, 2**24 + 1, 2**31, 2**62, 2**64 - 1, len(raw), len(raw) - 8])
        file.write_bytes(int(length).to_bytes(8, "little") + raw[8:])


def mutated_index(rng: np.random.Generator, place: Path) -> None:
    if not rng.integers(3):
        return odd_member(rng, place / pick(rng, sorted(os.listdir(place))))
    return edit(rng, place / INDEX)


def pieces_of(data: bytes) -> list[bytes]:
    """A pickle's opcodes with their arguments."""
    starts = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    return [data[first:last] for first, last in itertools.pairwise(starts)]


def mutated_opcodes(rng: np.random.Generator, place: Path) -> None:
    """A pickle: opcodes removed, repeated, moved, replaced, with other numbers; or a bomb in it."""
    _, members = members_of(place / "pytorch_model.bin")
    pieces = pieces_of(members["data.pkl"])
    bombs = [bomb for bomb in BOMBS.values() if len(bomb) < 10**5]
    for _ in range(rng.integers(1, 6)):
        at, other = rng.integers(len(pieces), size=2)
        match rng.integers(7):
            case 0:
                del pieces[at]
            case 1:
                pieces[at:at] = pieces[other : other + rng.integers(1, 20)]
            case 2:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 3:
                pieces[at] = pick(rng, pieces_of(pick(rng, bombs)))
            case 4:
                pieces[at:at] = pieces_of(pick(rng, bombs))[:-1]
            case 5:
                pieces[at] = pieces[at][:1] + rng.bytes(len(pieces[at]) - 1)
            case _:
                pieces[at] = pick(
                    rng, [b"K\xff", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x88", b"N"]
                )
        if len(pieces) < 2:
            break
    replace_root(place, b"".join(pieces))


def odd_member(rng: np.random.Generator, file: Path) -> None:
    """Something else in a file's place."""
    file.unlink()
    match rng.integers(9):
        case 0:
            os.mkfifo(file)
        case 1:
            file.symlink_to("/dev/zero")
        case 2:
            file.mkdir()
        case 3:
            file.symlink_to(file.name)
        case 4:
            file.write_bytes(pick(rng, [b"[" * 10**6, b'{"a":' * 10**5, b"[]" * 9, b"{}", b"null"]))
        case 5:
            file.write_bytes(rng.bytes(500))
        case 6:
            with file.open("wb") as opened:
                opened.truncate(2**36)
        case 7:
            file.write_bytes(b'{"a": "' + b"x" * 10**7 + b'"}')
        case _:
            pass


def mutated_directory(rng: np.random.Generator, place: Path) -> None:
    """Settings, tokenizer, template, processor, index: one or two of the files changed."""
    for _ in range(rng.integers(1, 3)):
        files = [
            f for f in sorted(place.iterdir()) if f.is_file() and f.suffix in (".json", ".jinja")
        ]
        file = pick(rng, files)
        if not rng.integers(4):
            odd_member(rng, file)
        elif file.suffix == ".jinja":
            file.write_text(pick(rng, TEMPLATES))
        else:
            edit(rng, file)


def chat_reads(place: Path) -> None:
    """Loads a model, and reads a prompt with an image as its files say."""
    from PIL import Image

    from llava_jax.data.conversation import Turn
    from llava_jax.generation.prompts import Prompt, PromptReader
    from llava_jax.pretrained.model import LlavaModel
    from llava_jax.pretrained.processor import has_processor
    from llava_jax.pretrained.resolve import resolve

    model = LlavaModel.from_pretrained(str(place))
    found = resolve(str(place))
    inputs = found.adapter if found.adapter and has_processor(found.adapter) else found.base
    question = Turn("human", "<image>\nwhat is in it? " + "a" * 50)
    PromptReader.open(inputs, model.config)(Prompt((question,), (Image.new("RGB", (40, 30)),)))


def damaged(rng: np.random.Generator, source: str, place: Path) -> None:
    KINDS[pick(rng, [kind for kind, (_, sources) in KINDS.items() if source in sources])][0](
        rng, place
    )


Mutation = Callable[[np.random.Generator, Path], object]
TABLES: list[tuple[str, Mutation]] = [
    *((source, mutated_table) for source in ("single", "sharded", "adapter")),
    ("sharded", mutated_index),
    *(
        (source, lambda rng, place, source=source: damaged(rng, source, place))
        for source in ("single", "sharded", "adapter")
    ),
]
PICKLES: list[tuple[str, Mutation]] = [
    *((source, mutated_opcodes) for source in ("bin",) * 3),
    *(
        (source, lambda rng, place, source=source: damaged(rng, source, place))
        for source in ("bin", "legacy", "pth", "zero")
    ),
]


def prepare(kind: str, rng: np.random.Generator, folder: Path) -> tuple[Path, list[Callable]]:
    """A mutated checkpoint, and what is to read it."""
    if kind == "directories":
        place = folder / "source"
        folder.mkdir(parents=True)
        shutil.copytree(FIXTURES / "peft_4_48" if not rng.integers(4) else TINY, place)
        if (place / "adapter_config.json").is_file():
            for file in TINY.glob("*token*.json"):
                shutil.copy(file, place)
        mutated_directory(rng, place)
        return place, [chat_reads, WAYS["tool"]]
    source, mutation = pick(rng, TABLES if kind == "tables" else PICKLES)
    place = make(source, folder)
    mutation(rng, place)
    return place, [WAYS["tool"]] if kind == "pickles" else [pick(rng, WAYS.values())]


class Hang(BaseException):
    """Not an `Exception`, which what is tested might take for its own."""


def stopped(number: int, frame: object) -> None:
    raise Hang("no end in 60 s")


def main(kinds: str, first: int, count: int, folder: Path) -> None:
    from llava_jax.data.conversation import SampleError
    from llava_jax.errors import CheckpointError, ConfigError

    os.chdir(FIXTURES)  # an adapter's base is named from there
    signal.signal(signal.SIGALRM, stopped)
    shutil.copytree(TINY, folder)
    chat_reads(folder)  # so that what is compiled once is no case's
    with contextlib.suppress(CheckpointError):  # its base has no tokenizer
        chat_reads(Path("peft_4_48"))
    ends, slowest = Counter(), 0.0
    for kind, number in itertools.product(kinds.split(","), range(first, first + count)):
        rng = np.random.default_rng([number, *kind.encode()])
        shutil.rmtree(folder, ignore_errors=True)
        place, readers = prepare(kind, rng, folder)
        for read in readers:
            start, said = time.process_time(), ""
            signal.alarm(60)
            try:
                read(place)
                ends["read"] += 1
            except (CheckpointError, ConfigError, SampleError, OSError) as error:
                ends[type(error).__name__] += 1
                said = "" if len(str(error)) < 10**5 else f"{len(str(error))} characters"
            except BaseException as error:
                ends["traceback"] += 1
                said = f"{type(error).__name__}: {error}"[:500]
            signal.alarm(0)
            took = time.process_time() - start  # another's work on this machine is not counted
            slowest = max(slowest, took)
            if said or took > MAX_SECONDS:
                print(json.dumps({"case": [kind, number], "said": said, "seconds": took}))
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    print(json.dumps({"ends": ends, "slowest": slowest, "mebibytes": int(peak) // 1024}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

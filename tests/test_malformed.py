"""Damaged checkpoints: each is refused with a message that names the file and the tensor.

None may be loaded, run a line of its own, or end in another exception. A damage that leaves the
meaning as it was (of a comment, say) may load, bit-equal to the undamaged one.

Every case is a kind of damage and a seed. `-m slow` runs many more seeds.
"""

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llava_jax import pretrained
from llava_jax.config import ConfigError, ModelConfig, parse_source
from llava_jax.convert import convert, open_source
from llava_jax.hf.resolve import resolve
from llava_jax.hf.tensorfile import CheckpointError, write_tensors
from llava_jax.hf.trained import open_trained
from llava_jax.lora import LLM, VISION

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
BASE = "llm=base/llm,vision=base/clip"
INDEX = "model.safetensors.index.json"

Named = tuple[str, ...]
"""What the message must hold; empty where damage may be without a meaning."""


@pytest.fixture(autouse=True)
def beside_fixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the fixtures are relative to their folder."""
    monkeypatch.chdir(FIXTURES)


# What reads a checkpoint: training's way, and the tool's.


@cache
def abstract_of(config: ModelConfig) -> Any:
    return pretrained.build(config, {}, dtype="float32")[1]


def train_reads(place: Path) -> dict[str, np.ndarray]:
    found = resolve(str(place))
    config = pretrained.read_config(found.base)
    abstract = abstract_of(config)
    params = pretrained.load(found.base, config, abstract, seed=0)
    if found.adapter is not None:
        params |= open_trained(found.adapter, config, abstract).load()
    return jax.tree.map(np.asarray, params)


def tool_reads(place: Path) -> dict[str, np.ndarray]:
    base = BASE if place.suffix == ".pth" else None
    out = place.parent / "out"
    before = sorted(out.parent.iterdir())
    quiet = lambda _: None
    try:
        opened = open_source(
            str(place),
            parse_source(base) if base else None,
            alphas={LLM: 8.0, VISION: 4.0},
            say=quiet,
        )
        convert(opened, out, "hf", merge=bool(opened.adapters), say=quiet)
    except BaseException:
        assert sorted(out.parent.iterdir()) == before  # nothing, not even hidden, is left
        raise
    return load_file(out / "model.safetensors")


WAYS = {"train": train_reads, "tool": tool_reads}


# Undamaged checkpoints, from which copies are made.


def as_bin(directory: Path, *, as_zip: bool) -> None:
    """Layout A as one pytorch_model.bin."""
    tensors = load_file(FIXTURES / "hf_4_37" / "model.safetensors")
    state = OrderedDict((name, torch.from_numpy(x)) for name, x in tensors.items())
    directory.mkdir()
    shutil.copy(FIXTURES / "hf_4_37" / "config.json", directory)
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=as_zip)


SOURCES: dict[str, Callable[[Path], object]] = {
    "single": lambda to: shutil.copytree(FIXTURES / "hf_4_37", to),
    "sharded": lambda to: shutil.copytree(FIXTURES / "hf_4_48", to),
    "adapter": lambda to: shutil.copytree(FIXTURES / "peft_4_48", to),
    "bin": lambda to: as_bin(to, as_zip=True),
    "legacy": lambda to: as_bin(to, as_zip=False),
    "pth": lambda to: shutil.copy(FIXTURES / "xtuner_pth" / "lora" / "iter_2.pth", to),
    "zero": lambda to: shutil.copytree(FIXTURES / "xtuner_pth" / "zero2" / "iter_2.pth", to),
}
PICKLED = ("bin", "legacy", "pth", "zero")


def make(source: str, parent: Path) -> Path:
    parent.mkdir(exist_ok=True)
    place = parent / ("source.pth" if source in ("pth", "zero") else "source")
    SOURCES[source](place)
    return place


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """The undamaged source's parameters, by one of the ways."""

    @cache
    def read(source: str, way: str) -> dict[str, np.ndarray]:
        return WAYS[way](make(source, tmp_path_factory.mktemp(f"{source}-{way}") / "in"))

    return read


def assert_refused(place: Path, way: str, named: Named) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as error:
        WAYS[way](place)
    for part in (str(place), *named):
        assert part in str(error.value), (part, str(error.value))


def assert_refused_or_equal(place: Path, way: str, expected: dict[str, np.ndarray]) -> bool:
    message, found = None, {}
    try:
        found = WAYS[way](place)
    except (CheckpointError, ConfigError) as error:
        message = str(error)
    if message is not None:
        assert str(place) in message
        return True
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
    return False


# Damage. A function takes a generator and a copy; it gives what the message must hold.

Damage = Callable[[np.random.Generator, Path], Named]
KINDS: dict[str, tuple[Damage, tuple[str, ...]]] = {}


def damage(*sources: str) -> Callable[[Damage], Damage]:
    def register(function: Damage) -> Damage:
        KINDS[function.__name__] = function, sources
        return function

    return register


def a_file(rng: np.random.Generator, place: Path) -> Path:
    """A file of tensors."""
    if place.is_file():
        return place
    endings = ("*.safetensors", "*.bin", "*optim_states.pt")
    return Path(rng.choice(sorted(str(f) for end in endings for f in place.glob(end))))


def flip(rng: np.random.Generator, file: Path, start: int, stop: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[rng.integers(start, stop)] ^= 1 << rng.integers(8)
    file.write_bytes(raw)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def write_header(file: Path, header: dict[str, Any] | str, data: bytes) -> None:
    table = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(table).to_bytes(8, "little") + table + data)


def names_in(header: dict[str, Any]) -> list[str]:
    return sorted(header.keys() - {"__metadata__"})


def edit(file: Path, change: Callable[[dict[str, Any]], str]) -> Named:
    """Changes a table of tensors; `change` gives the tensor that it was."""
    header, data = header_of(file)
    name = change(header)
    write_header(file, header, data)
    return file.name, name


SAFETENSORS = ("single", "sharded", "adapter")


@damage(*SAFETENSORS)
def flipped_length(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    flip(rng, file, 0, 8)
    return (file.name,)


@damage(*SAFETENSORS)
def flipped_header(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    flip(rng, file, 8, 8 + int.from_bytes(file.read_bytes()[:8], "little"))
    return ()


@damage(*SAFETENSORS)
def garbled_header(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    raw = bytearray(file.read_bytes())
    at = rng.integers(8, int.from_bytes(raw[:8], "little") - 32)
    raw[at : at + 32] = rng.bytes(32)
    file.write_bytes(raw)
    return (file.name,)


@damage(*SAFETENSORS, *PICKLED)
def cut(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    file.write_bytes(file.read_bytes()[: rng.integers(file.stat().st_size)])
    return (file.name,)


@damage("single", "sharded", "adapter", "legacy")
def too_long(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    file.write_bytes(file.read_bytes() + rng.bytes(rng.integers(1, 64)))
    return (file.name,)


@damage(*SAFETENSORS, *PICKLED)
def of_another_kind(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    page = b"<!DOCTYPE html><html><body>404: not found</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    content = [b"", b"\0" * 200, page, pointer, rng.bytes(300), pickle.dumps({"a": 1}), b"PK\3\4"]
    file.write_bytes(content[rng.integers(len(content))])
    return (file.name,)


@damage("single", "sharded", "adapter")
def swapped_shape(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)

    def change(header: dict[str, Any]) -> str:
        shapes = {name: header[name]["shape"] for name in names_in(header)}
        name = rng.choice([n for n, s in shapes.items() if len(s) > 1 and s != s[::-1]])
        header[name]["shape"] = shapes[name][::-1]
        return plain(str(name))

    return edit(file, change)


@damage(*SAFETENSORS)
def other_dtype(rng: np.random.Generator, place: Path) -> Named:
    dtype = str(rng.choice(["I32", "F16", "BF16", "F64", "U8", "BOOL", "F33", "f32", ""]))

    def change(header: dict[str, Any]) -> str:
        name = str(rng.choice(names_in(header)))
        header[name]["dtype"] = dtype
        return name

    return edit(a_file(rng, place), change)


BAD_ENTRIES: list[dict[str, Any]] = [
    {"shape": "all"},
    {"shape": None},
    {"shape": [-1, -1]},
    {"shape": [2.0]},
    {"shape": [True]},
    {"shape": [10**30]},
    {"shape": [[2]]},
    {"shape": {"0": 1}},
    {"data_offsets": [0]},
    {"data_offsets": [0, 10**30]},
    {"data_offsets": ["0", "4"]},
    {"data_offsets": [-4, 0]},
    {"data_offsets": [8, 4]},
    {"data_offsets": None},
    {"dtype": ["F32"]},
    {"dtype": {}},
    {"dtype": None},
    {"extra": 1},
]


@damage(*SAFETENSORS)
def bad_entry(rng: np.random.Generator, place: Path) -> Named:
    entry = BAD_ENTRIES[rng.integers(len(BAD_ENTRIES))]

    def change(header: dict[str, Any]) -> str:
        name = str(rng.choice(names_in(header)))
        header[name] |= entry
        return name

    return edit(a_file(rng, place), change)


@damage(*SAFETENSORS)
def no_entry(rng: np.random.Generator, place: Path) -> Named:
    entry = [None, [], "x", 1, {}, {"dtype": "F32", "shape": []}][rng.integers(6)]

    def change(header: dict[str, Any]) -> str:
        name = str(rng.choice(names_in(header)))
        header[name] = entry
        return name

    return edit(a_file(rng, place), change)


@damage(*SAFETENSORS)
def shifted_offsets(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)

    def change(header: dict[str, Any]) -> str:
        name = str(rng.choice(names_in(header)))
        shift = int(rng.choice([-4, -1, 1, 4]))
        header[name]["data_offsets"] = [x + shift for x in header[name]["data_offsets"]]
        return ""  # it or its neighbour

    return edit(file, change)


@damage(*SAFETENSORS)
def swapped_offsets(rng: np.random.Generator, place: Path) -> Named:
    def change(header: dict[str, Any]) -> str:
        size = lambda name: np.subtract(*header[name]["data_offsets"])
        first = str(rng.choice(names_in(header)))
        second = str(rng.choice([n for n in names_in(header) if size(n) != size(first)]))
        x, y = header[first], header[second]
        x["data_offsets"], y["data_offsets"] = y["data_offsets"], x["data_offsets"]
        return next(name for name in header if name in (first, second))

    return edit(a_file(rng, place), change)


@damage(*SAFETENSORS)
def overlapping(rng: np.random.Generator, place: Path) -> Named:
    def change(header: dict[str, Any]) -> str:
        key = lambda name: str(header[name]["shape"])
        twins = [
            (a, b)
            for a in names_in(header)
            for b in names_in(header)
            if a != b and key(a) == key(b)
        ]
        first, second = twins[rng.integers(len(twins))]
        header[first]["data_offsets"] = header[second]["data_offsets"]
        return ""

    return edit(a_file(rng, place), change)


@damage(*SAFETENSORS)
def key_twice(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    header, data = header_of(file)
    name = str(rng.choice(names_in(header)))
    other = str(rng.choice(names_in(header)))
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
    write_header(file, text, data)
    return file.name, name


@damage(*SAFETENSORS)
def bad_metadata(rng: np.random.Generator, place: Path) -> Named:
    bad = ["pt", {}, {"format": "mlx2"}, {"format": 3}, [], 1][rng.integers(6)]
    file = a_file(rng, place)
    header, data = header_of(file)
    write_header(file, {**header, "__metadata__": bad}, data)
    return file.name, "__metadata__"


def rewrite(
    rng: np.random.Generator, place: Path, change: Callable[[dict[str, np.ndarray]], None]
) -> Path:
    """Writes a file's tensors changed, correct in itself; keeps a shard's index right."""
    file = a_file(rng, place)
    tensors = load_file(file)
    before = tensors.keys() | set()
    change(tensors)
    write_tensors(file, {n: (x.shape, x.dtype) for n, x in tensors.items()}, lambda n: tensors[n])
    if (index := place / INDEX).is_file():
        table = json.loads(index.read_text())
        placed = table["weight_map"]
        for name in before - tensors.keys():
            del placed[name]
        placed |= dict.fromkeys(tensors, file.name)
        index.write_text(json.dumps(table))
    return file


def a_name(rng: np.random.Generator, tensors: dict[str, Any]) -> str:
    return str(rng.choice(sorted(tensors)))


@damage(*SAFETENSORS)
def missing_tensor(rng: np.random.Generator, place: Path) -> Named:
    gone: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        gone.append(a_name(rng, tensors))
        del tensors[gone[0]]

    rewrite(rng, place, change)
    return ("missing", plain(gone[0]))


def plain(name: str) -> str:
    """What messages have of a tensor's name: adapters are named without PEFT's frame."""
    return (
        name.replace("base_model.model.", "", 1).split(".lora_")[0].replace(".modules_to_save", "")
    )


@damage(*SAFETENSORS)
def foreign_tensor(rng: np.random.Generator, place: Path) -> Named:
    decoder = "language_model.model."
    odd = str(
        rng.choice(
            [
                "extra.weight",
                f"{decoder}layers.99.mlp.up_proj.weight",
                f"{decoder}layers.01.mlp.up_proj.weight",
                f"{decoder}lm_head.weight",
                "vision_tower.x",
                "é\0.",
            ]
        )
    )

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[odd] = np.zeros((2, 3), np.float32)

    file = rewrite(rng, place, change)
    return ("left over", odd, file.name)


@damage(*SAFETENSORS)
def renamed_tensor(rng: np.random.Generator, place: Path) -> Named:
    said: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = a_name(rng, tensors)
        at = rng.integers(len(name) // 2, len(name))
        odd = name[:at] + "z" + name[at + 1 :]
        tensors[odd] = tensors.pop(name)
        said.append(plain(name))

    rewrite(rng, place, change)
    return tuple(said)


@damage(*SAFETENSORS)
def other_shape(rng: np.random.Generator, place: Path) -> Named:
    said: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = a_name(rng, tensors)
        x = tensors[name]
        tensors[name] = [x[:-1], x[None], np.concatenate([x, x]), x[..., :0]][rng.integers(4)]
        said.append(plain(name))

    file = rewrite(rng, place, change)
    return ("of the wrong shape", file.name, *said)


@damage(*SAFETENSORS)
def swapped_names(rng: np.random.Generator, place: Path) -> Named:
    said: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        first = a_name(rng, tensors)
        second = a_name(rng, {n: x for n, x in tensors.items() if x.shape != tensors[first].shape})
        tensors[first], tensors[second] = tensors[second], tensors[first]
        said.extend([plain(first), plain(second)])

    rewrite(rng, place, change)
    return ("of the wrong shape", *said)


@damage(*SAFETENSORS)
def no_numbers(rng: np.random.Generator, place: Path) -> Named:
    dtype = [np.float32, np.float16, ml_dtypes.bfloat16][rng.integers(3)]
    said: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = a_name(rng, tensors)
        value = tensors[name].astype(dtype)
        value.reshape(-1)[rng.integers(value.size)] = rng.choice([np.nan, np.inf, -np.inf])
        tensors[name] = value
        said.append(plain(name))

    file = rewrite(rng, place, change)
    return (file.name, *said, "NaN or infinite")


# Shards and their index.


def edit_index(place: Path, change: Callable[[dict[str, str]], str]) -> Named:
    index = json.loads((place / INDEX).read_text())
    name = change(index["weight_map"])
    (place / INDEX).write_text(json.dumps(index))
    return INDEX, name


@damage("sharded")
def index_lacks_a_tensor(rng: np.random.Generator, place: Path) -> Named:
    def change(placed: dict[str, str]) -> str:
        name = a_name(rng, placed)
        del placed[name]
        return name

    return edit_index(place, change)


@damage("sharded")
def index_lacks_a_file(rng: np.random.Generator, place: Path) -> Named:
    index = json.loads((place / INDEX).read_text())
    placed = index["weight_map"]
    file = rng.choice(sorted(set(placed.values())))
    index["weight_map"] = {name: f for name, f in placed.items() if f != file}
    (place / INDEX).write_text(json.dumps(index))
    return ("missing", next(name for name, f in placed.items() if f == file))


@damage("sharded")
def index_names_what_is_not_there(rng: np.random.Generator, place: Path) -> Named:
    odd = ["gone.safetensors", "../source/" + INDEX, "/etc/passwd", "", ".", "a\0b", "x" * 999]

    def change(placed: dict[str, str]) -> str:
        placed[a_name(rng, placed)] = odd[rng.integers(len(odd))]
        return ""

    return edit_index(place, change)


@damage("sharded")
def index_of_wrong_types(rng: np.random.Generator, place: Path) -> Named:
    def change(placed: dict[str, Any]) -> str:
        placed[a_name(rng, placed)] = [None, 1, ["x"], {}, True][rng.integers(5)]
        return ""

    return edit_index(place, change)


@damage("sharded")
def index_names_another_shard(rng: np.random.Generator, place: Path) -> Named:
    def change(placed: dict[str, str]) -> str:
        name = a_name(rng, placed)
        placed[name] = str(rng.choice(sorted(set(placed.values()) - {placed[name]})))
        return name

    return edit_index(place, change)


@damage("sharded")
def index_names_what_no_file_has(rng: np.random.Generator, place: Path) -> Named:
    def change(placed: dict[str, str]) -> str:
        name = a_name(rng, placed) + "_"
        placed[name] = next(iter(placed.values()))
        return name

    return edit_index(place, change)


@damage("sharded")
def index_is_none(rng: np.random.Generator, place: Path) -> Named:
    odd = [b"", b"{", b"[]", b"null", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"\xff"]
    (place / INDEX).write_bytes([*odd, b"[" * 10**5, b'{"a": 1, "a": 2}'][rng.integers(10)])
    return ()  # an empty one is the place's that has no tensors


@damage("sharded")
def flipped_index(rng: np.random.Generator, place: Path) -> Named:
    flip(rng, place / INDEX, 0, (place / INDEX).stat().st_size)
    return ()


@damage("sharded")
def swapped_shards(rng: np.random.Generator, place: Path) -> Named:
    first, second = rng.choice(sorted(map(str, place.glob("*.safetensors"))), 2, replace=False)
    shutil.move(first, place / "other")
    shutil.move(second, first)
    shutil.move(place / "other", second)
    return (INDEX,)


@damage("sharded")
def one_shard_twice(rng: np.random.Generator, place: Path) -> Named:
    first, second = rng.choice(sorted(map(str, place.glob("*.safetensors"))), 2, replace=False)
    shutil.copy(first, second)
    return INDEX, Path(second).name


@damage("sharded")
def missing_shard(rng: np.random.Generator, place: Path) -> Named:
    file = a_file(rng, place)
    file.unlink()
    return INDEX, file.name


# config.json and adapter_config.json.

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS = [
    *[
        ("text_config", field)
        for field in (*SIZES, "vocab_size", "num_key_value_heads", "head_dim")
    ],
    *[("vision_config", field) for field in (*SIZES, "image_size", "patch_size")],
]
NO_SIZES = ["32", "", -1, -(10**20), 0, 1.5, 32.0, [], [32], {}, True, 10**9, 10**30, 1e400, "é"]


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


@damage("single")
def config_of_wrong_sizes(rng: np.random.Generator, place: Path) -> Named:
    part, field = FIELDS[rng.integers(len(FIELDS))]
    value = NO_SIZES[rng.integers(len(NO_SIZES))]
    zero_means_default = value == 0 and field in ("num_key_value_heads", "head_dim")
    value = -2 if zero_means_default and value is not False else value

    def change(config: dict[str, Any]) -> None:
        config[part][field] = value

    edit_json(place / "config.json", change)
    return "config.json", field


@damage("single")
def config_of_other_sizes(rng: np.random.Generator, place: Path) -> Named:
    """Sizes that models have, but this one has not."""
    part, field = FIELDS[rng.integers(len(FIELDS))]
    if field in ("num_attention_heads", "num_key_value_heads", "head_dim", "image_size"):
        field = "hidden_size"

    def change(config: dict[str, Any]) -> None:
        config[part][field] = int(rng.choice([2, 4, 512, 900]))

    edit_json(place / "config.json", change)
    return ()


OTHER_FIELDS: list[tuple[str, Any]] = [
    ("model_type", None),
    ("model_type", ["llava"]),
    ("text_config", []),
    ("text_config", "llama"),
    ("text_config", {"model_type": ["llama"]}),
    ("text_config", {"model_type": {}}),
    ("vision_config", 3),
    ("vision_config", {"model_type": 3}),
    ("image_token_index", "60"),
    ("image_token_index", -60),
    ("image_token_index", 1e3),
    ("image_token_index", True),
    ("pad_token_id", "61"),
    ("pad_token_id", [61]),
    ("pad_token_id", -2),
    ("pad_token_id", 2.5),
    ("vision_feature_layer", "-2"),
    ("vision_feature_layer", 0),
    ("vision_feature_layer", True),
    ("vision_feature_layer", -2.0),
    ("vision_feature_layer", 10**30),
    ("vision_feature_layer", []),
    ("vision_feature_select_strategy", 1),
    ("vision_feature_select_strategy", ["default"]),
    ("projector_hidden_act", []),
    ("multimodal_projector_bias", "yes"),
    ("tie_word_embeddings", "false"),
]
TEXT_FIELDS: list[tuple[str, Any]] = [
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", 0),
    ("rope_theta", "1e4"),
    ("rope_theta", [1e4]),
    ("rope_theta", float("inf")),
    ("rope_theta", -1.0),
    ("rope_scaling", "linear"),
    ("rope_scaling", [1]),
    ("rope_scaling", {"rope_type": ["llama3"]}),
    ("rope_scaling", {"rope_type": "llama3"}),
    ("rope_parameters", "x"),
    ("rope_parameters", {"rope_theta": {}}),
    ("max_position_embeddings", "many"),
    ("max_position_embeddings", 0),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 2),
    ("hidden_act", 3),
    ("num_attention_heads", 3),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("attention_bias", "no"),
]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
TEXT_FIELDS.append(("rope_scaling", LLAMA3 | {"rope_type": "llama3", "factor": "8"}))


@damage("single")
def config_of_wrong_types(rng: np.random.Generator, place: Path) -> Named:
    choices = [(None, *x) for x in OTHER_FIELDS] + [("text_config", *x) for x in TEXT_FIELDS]
    part, field, value = choices[rng.integers(len(choices))]

    def change(config: dict[str, Any]) -> None:
        (config if part is None else config[part])[field] = value

    edit_json(place / "config.json", change)
    return ("config.json",)


NO_JSON = [
    *(b"", b"{", b"[]", b"null", b"3", b"\xff\xfe\0", b"\0" * 99, b"{'a': 1}", b"9" * 5000),
    *(b"[" * 10**5, b'{"a":' * 10**5, b'{"model_type": "llava", "model_type": "llava"}'),
]


@damage("single")
def config_is_none(rng: np.random.Generator, place: Path) -> Named:
    (place / "config.json").write_bytes(NO_JSON[rng.integers(len(NO_JSON))])
    return ("config.json",)


@damage("single")
def no_config(rng: np.random.Generator, place: Path) -> Named:
    (place / "config.json").unlink()
    return ("config.json",)


NO_NUMBERS = ["4", "", [], [4], {}, True, -1, 0, None, float("nan"), 1e400]
ADAPTER_FIELDS = [
    *[("r", value) for value in [*NO_NUMBERS, 4.5, 5, 2**40]],
    *[("lora_alpha", value) for value in NO_NUMBERS],
    *[("lora_dropout", value) for value in ("0", [], -1, 1, 7, float("nan"))],
    *[("rank_pattern", value) for value in ("4", [4], {"q_proj": 2}, {"q_proj": "4"}, {"(": 4})],
    *[("alpha_pattern", value) for value in (3, [], {"q_proj": [8]}, {"*": 8}, {"up_proj": 1})],
    *[("peft_type", value) for value in (None, "IA3", ["LORA"], 1)],
    *[("base_model_name_or_path", value) for value in (3, ["hf_4_48"], {}, "x" * 5000, "a\0b")],
    *[("base_model_name_or_path", value) for value in (None, "", "llm=hf_4_48", "/nowhere", "..")],
    *[("base_model_name_or_path", value) for value in ("peft_4_48", "hf_4_48/config.json")],
    *[("bias", value) for value in ("all", 1, [])],
    *[("use_rslora", value) for value in ("no", 1, [1])],
    *[("use_dora", True), ("fan_in_fan_out", True)],
]


@damage("adapter")
def adapter_settings(rng: np.random.Generator, place: Path) -> Named:
    field, value = ADAPTER_FIELDS[rng.integers(len(ADAPTER_FIELDS))]
    edit_json(place / "adapter_config.json", lambda settings: settings.update({field: value}))
    return ("source",)


@damage("adapter")
def adapter_settings_gone(rng: np.random.Generator, place: Path) -> Named:
    field = str(rng.choice(["r", "lora_alpha", "peft_type"]))
    edit_json(place / "adapter_config.json", lambda settings: settings.pop(field))
    return "adapter_config.json", field


@damage("adapter")
def adapter_settings_are_none(rng: np.random.Generator, place: Path) -> Named:
    (place / "adapter_config.json").write_bytes(NO_JSON[rng.integers(len(NO_JSON))])
    return ("adapter_config.json",)


@damage("adapter")
def adapter_of_itself(rng: np.random.Generator, place: Path) -> Named:
    own = lambda settings: settings.update(base_model_name_or_path=str(place))
    edit_json(place / "adapter_config.json", own)
    return ("itself something trained",)


# Pickles.


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
    return (file.name, "lacks its storage " + key.removeprefix("data/"))


@damage("bin")
def missing_storage(rng: np.random.Generator, place: Path) -> Named:
    file = place / "pytorch_model.bin"
    folder, members = members_of(file)
    key = str(rng.choice(sorted(name for name in members if name.startswith("data/"))))
    del members[key]
    write_members(file, folder, members)
    return (file.name, "lacks its storage " + key.removeprefix("data/"))


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
    return (file.name, "two members of one name")


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


# The cases.

# Sources that stay what they were, and are no longer places, are named alike.
MAY_BE_EQUAL = {"flipped_header", "flipped_index", "flipped_directory", "flipped_member_header",
                "flipped_legacy"}  # fmt: skip


def cases(first: int, seeds: int) -> list[tuple[str, str, str, int]]:
    """Every kind of damage on every source by every way that reads it, `seeds` times."""
    return [
        (kind, source, way, first + seed)
        for kind, (_, sources) in KINDS.items()
        for source in sources
        for way in (("tool",) if source in PICKLED else WAYS)
        for seed in range(seeds)
    ]


def check(case: tuple[str, str, str, int], whole: Any, parent: Path) -> None:
    kind, source, way, seed = case
    place = make(source, parent / "in")
    rng = np.random.default_rng([seed, *kind.encode()])
    named = KINDS[kind][0](rng, place)
    if kind in MAY_BE_EQUAL:
        assert_refused_or_equal(place, way, whole(source, way))
    else:
        assert_refused(place, way, named)
    assert not Path(canary(place)).exists()


@pytest.mark.parametrize("case", cases(0, 1), ids=lambda case: "-".join(map(str, case)))
def test_damage_is_refused(case, whole, tmp_path):
    check(case, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(1, 12), ids=lambda case: "-".join(map(str, case)))
def test_much_damage_is_refused(case, whole, tmp_path):
    check(case, whole, tmp_path)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_whole_is_read(source, whole):
    ways = ("tool",) if source in PICKLED else WAYS
    assert all(whole(source, way) for way in ways)


@pytest.mark.parametrize("source", ["bin", "legacy"])
def test_training_reads_no_pickle(source, tmp_path):
    place = make(source, tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*tools/convert\.py"):
        train_reads(place)


@pytest.mark.parametrize("name", OPCODES)
def test_pickles_that_do_more(name, tmp_path):
    place = make("bin", tmp_path / "in")
    replace_root(place, OPCODES[name].replace(b"CANARY", canary(place).encode()))
    assert_refused(place, "tool", ("pytorch_model.bin",))
    assert not Path(canary(place)).exists()


def test_programs_run_if_python_unpickles_them(tmp_path):
    """So the tests above can fail."""
    place = make("bin", tmp_path / "in")
    for opcodes in (OPCODES["inst"], OPCODES["getattr"], pickled(programs(place)[0])):
        pickle.loads(opcodes.replace(b"CANARY", canary(place).encode()))
        Path(canary(place)).unlink()


def test_programs_beside_tensors_are_passed_over(tmp_path, whole):
    """As XTuner's objects are, which nobody needs."""
    place = make("bin", tmp_path / "in")
    state = {
        "message_hub": programs(place)[:FOREIGN],
        "state_dict": state_of(place),
        "meta": [Call(print)],
    }
    folder, members = members_of(place / "pytorch_model.bin")
    write_members(place / "pytorch_model.bin", folder, {**members, "data.pkl": pickled(state)})
    assert not assert_refused_or_equal(place, "tool", whole("bin", "tool"))
    assert not Path(canary(place)).exists()

"""Checkpoints, and ways in which they get damaged; test_malformed.py has what must follow.

A kind of damage is a function of a generator and a copy of a checkpoint. It gives what the message
about it must hold.
"""

import json
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import load_file

from llava_jax.pretrained.safetensors import write_tensors

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
INDEX = "model.safetensors.index.json"

Named = tuple[str, ...]
Damage = Callable[[np.random.Generator, Path], Named]

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
    return ("do not belong to the model", odd, file.name)


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
    return ("with the wrong shape", file.name, *said)


@damage(*SAFETENSORS)
def swapped_names(rng: np.random.Generator, place: Path) -> Named:
    said: list[str] = []

    def change(tensors: dict[str, np.ndarray]) -> None:
        first = a_name(rng, tensors)
        second = a_name(rng, {n: x for n, x in tensors.items() if x.shape != tensors[first].shape})
        tensors[first], tensors[second] = tensors[second], tensors[first]
        said.extend([plain(first), plain(second)])

    rewrite(rng, place, change)
    return ("with the wrong shape", *said)


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
    ("rope_scaling", {"rope_type": "yarn", "factor": float("nan")}),
    ("rope_scaling", {"type": "dynamic", "factor": -2.0}),
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
    return ("itself an adapter or a trained part",)

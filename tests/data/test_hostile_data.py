"""Data files that cost far more than their size, or are no files: named, in seconds."""

import functools
import io
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bad_data
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llava_jax.data.images import open_image
from llava_jax.data.sources import load_records
from llava_jax.errors import ConfigError, SampleError
from llava_jax.evals.questions import read_json, read_lines

CONFIG = str(Path(__file__).parents[2] / "configs" / "tiny_lora.py")
SECONDS, MEBIBYTES = 10, 1024
MANY = 10**6
TALK = bad_data.WHOLE["conversations"]


# Without the tests' own type checks, which cost more than what is measured.
APART = """
import json, resource, sys, time, traceback
from pathlib import Path
from typing import Any
from llava_jax.config import parse_config
from llava_jax.errors import ConfigError
from llava_jax.data import json_file
from llava_jax.data.check import check
from llava_jax.data.sources import load_records
from llava_jax.training.inputs import find_model, open_inputs

arguments, root, tried, paths = json.load(sys.stdin)
config = parse_config(arguments)
encoder = open_inputs(config, *find_model(config, Path(str(config.init_from)))).encoder
json_file._MOST_TRIED //= tried
for path in paths:
    found = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        problems = check(load_records(path, root), encoder).problems
        found["bad"] = [[p.sample, p.kind, p.reason[:1000]] for p in problems[:100]]
    except ConfigError as error:
        found["error"] = str(error)
    except BaseException:
        found["traceback"] = traceback.format_exc()[-2000:]
    found["seconds"] = time.process_time() - start
    found["mebibytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(json.dumps(found), flush=True)
"""


def check_apart(paths: list[Path], root: Path, *, tried: int = 10) -> list[dict[str, Any]]:
    """What `llava-jax check-data` finds in files: "bad" samples, or an "error" that names the file.

    Args:
        paths: The files.
        root: The images' folder.
        tried: Looking for whole records between damaged ones takes a tenth, for the tests' sake.
    """
    whole = root.parent / "whole.json"
    whole.write_text(json.dumps([bad_data.WHOLE]))
    data = ["--data.path", str(whole), "--data.image-root", str(root), "--data.eval-path", "None"]
    arguments = ["--config", CONFIG, *data, "--data.buckets", *bad_data.OPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", APART],
        input=json.dumps([arguments, str(root), tried, [str(path) for path in paths]]),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths), (paths[len(found)], done.stderr[-2000:])
    for path, one in zip(paths, found, strict=True):
        assert "traceback" not in one, (path, one)
        assert one["seconds"] < SECONDS, (path, one)
        assert one["mebibytes"] < MEBIBYTES, (path, one)
        assert path.name in one.get("error", path.name)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    bad_data.make_images(folder)
    return folder / "images"


def messages(*content: object) -> dict:
    answer = {"role": "assistant", "content": "that"}
    return {"messages": [{"role": "user", "content": content[0]}, answer]}


def nested(depth: int) -> list:
    return json.loads("[" * depth + "]" * depth)


LARGE: dict[str, tuple[str, Callable[[int], object]]] = {
    "images": ("number of images|record size", lambda n: bad_data.show(*["good.png"] * n)),
    "images without a mark": (
        "number of images|record size",
        lambda n: {"images": ["x"] * n, "conversations": TALK},
    ),
    "marks": ("record size", lambda n: bad_data.show("good.png", marks=n)),
    "turns": ("record size", lambda n: {"conversations": bad_data.talk(*["x"] * 2 * n)}),
    "parts": ("record size", lambda n: messages([{"type": "text", "text": "x"}] * n)),
    "image parts": ("record size", lambda n: messages([{"type": "image"}] * n)),
    "indices": (
        "record size",
        lambda n: {"images": ["good.png"]} | messages([{"type": "image", "index": 0}] * n),
    ),
    "a text": ("record size", lambda n: {"conversations": bad_data.talk("what?", "a word " * n)}),
    "a word": ("record size", lambda n: {"conversations": bad_data.talk("what?", "x" * 8 * n)}),
    "a path": ("image path|record size", lambda n: bad_data.show("a/" * n)),
    "other fields": ("record size", lambda n: bad_data.WHOLE | {"other": ["word"] * 4 * n}),
    "deep": ("form|not JSON", lambda n: bad_data.WHOLE | {"other": nested(100 + n // 5000)}),
    "a deep conversation": ("form|not JSON", lambda n: {"conversations": nested(100 + n // 5000)}),
    "a deep category": (
        "form|not JSON",
        lambda n: bad_data.WHOLE | {"category": nested(100 + n // 5000)},
    ),
}


@pytest.mark.parametrize("size", [150_000, pytest.param(MANY, marks=pytest.mark.slow)])
def test_a_record_that_is_too_large_is_a_bad_sample(size, root, tmp_path):
    paths, good = [], json.dumps(bad_data.WHOLE)
    for name, (_, make) in LARGE.items():
        large = json.dumps(make(size))
        paths.append(write(tmp_path / f"{name}.jsonl", f"{good}\n{large}\n{good}".encode()))
        paths.append(write(tmp_path / f"{name}.json", f"[{good}, {large}, {good}]".encode()))
    for path, found in zip(paths, check_apart(paths, root, tried=1), strict=True):
        [(sample, kind, reason)] = found["bad"]
        assert sample == 1
        assert kind in LARGE[path.stem][0].split("|"), (path, reason)
        assert len(reason) < 500


GOOD = json.dumps(bad_data.WHOLE)


def between(text: str) -> str:
    """Something between two good records of a list."""
    return f"[{GOOD},{text},{GOOD}]"


SLOW = {
    "braces": lambda size: between(",{" * (size // 2)),
    "open objects": lambda size: between(',{"a":' * (size // 6)),
    "open lists": lambda size: between(',{"a":[{' * (size // 8)),
    "open texts": lambda size: between('{"a":"' + ",{" * (size // 2)),
    "open conversations": lambda size: between(',{"conversations":"' * (size // 19)),
    "open fields": lambda size: between(',{"conversations":1,"b":"' * (size // 25)),
    "deep": lambda size: between("[" * size),
    "deep objects": lambda size: between('{"a":' * (size // 5)),
    "deep after deep": lambda size: between(
        (',{"conversations":' + '{"a":' * 900) * (size // 4520)
    ),
    "repeated keys": lambda size: between("{" + '"a":1,' * (size // 6) + '"b":1}'),
    "digits": lambda size: between('{"id":' + "9" * size + "}"),
    "numbers": lambda size: between('{"id":[' + ("9" * 4000 + ",") * (size // 4001) + "1]}"),
    "backslashes": lambda size: between('{"id":"' + "\\" * size + '"}'),
    "halves of characters": lambda size: between('{"id":"' + "\\ud83d" * (size // 6) + '"}'),
    "space": lambda size: between(" " * size + "x"),
    "space after commas": lambda size: between("x" + ("," + " " * 1000) * (size // 1001)),
    "empty objects": lambda size: between("{}," * (size // 3) + "1"),
    # Few good records: each takes half a millisecond, which says nothing about the damaged ones.
    "damaged records": lambda size: between(f"{'x' * 300},{GOOD}," * (size // 400) + "1"),
    "no commas": lambda size: between(f"{GOOD} " * (size // 100)),
    "lines of a digit": lambda size: "{}\n" + "1\n" * (size // 2),
    "lines of a brace": lambda size: "{\n" * (size // 2),
    "an open line": lambda size: f'{GOOD}\n{{"a": "' + "x" * 4 * size + f"\n{GOOD}\n",
}


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_a_bad_sample(root, tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("w") as file:
        file.write(f"{GOOD}\n" + '{"conversations": "')
        for _ in range(1000):
            file.write("x" * 10**6)
        file.write(f'"}}\n{GOOD}\n')
    [found] = check_apart([path], root)
    assert [(sample, kind) for sample, kind, _ in found["bad"]] == [(1, "record size")]


def test_most_records_of_a_file_are_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("llava_jax.data.records.MAX_BAD", 100)
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n" * 90 + '{"a": 1}\n' * 200)
    with pytest.raises(ConfigError, match=r"data\.jsonl: \d+ of the first \d+ records have"):
        load_records(str(path), "")
    path.write_text(f"{GOOD}\n" * 200 + '{"a": 1}\n' * 190)
    assert len(load_records(str(path), "")) == 390


TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(conversations: list, **columns: pa.Array) -> pa.Table:
    return pa.table({"conversations": pa.array(conversations, TURNS), **columns})


BOMBS: dict[str, tuple[str, Callable[[], pa.Table]]] = {
    "empty rows": ("rows", lambda: pa.table({"messages": pa.nulls(30 * MANY, TURNS)})),
    "empty lists": (
        "rows",
        lambda: pa.table(
            {"messages": pa.ListArray.from_arrays([0] * (MANY + 1), pa.array([], IMAGE))}
        ),
    ),
    "empty turns": (
        "values",
        lambda: pa.table(
            {
                "messages": pa.ListArray.from_arrays(
                    [0, 10 * MANY], pa.nulls(10 * MANY, TURNS.value_type)
                )
            }
        ),
    ),
    "one text": ("bytes of values", lambda: table([bad_data.talk("what?", "x" * 100 * MANY)])),
    "a bytes column": (
        "bytes of values",
        lambda: table([TALK], image=pa.array([{"bytes": bytes(100 * MANY)}], IMAGE)),
    ),
}


def test_parquet_that_stands_for_far_more_is_refused(root, tmp_path):
    """As a whole, or a row of it: of texts that are stored once, and shown again and again."""
    long = bad_data.talk("what?", "x" * 900_000)
    rows = [TALK, long * 12, TALK, bad_data.talk(*["x"] * 5000), TALK, long, TALK]
    pq.write_table(table(rows), tmp_path / "rows")
    many = pa.concat_tables([table([long])] * 1_500 + [table([TALK])])
    pq.write_table(many, tmp_path / "many")
    for name, (_, make) in BOMBS.items():
        pq.write_table(make(), tmp_path / name, compression="zstd")
    [rows, *refused] = check_apart([tmp_path / name for name in ("rows", *BOMBS)], root)
    assert [(n, kind) for n, kind, _ in rows["bad"]] == [(1, "record size"), (3, "record size")]
    for (what, _), one in zip(BOMBS.values(), refused, strict=True):
        assert re.search(f"has [\\d,]+ bytes, but contains [\\d,]+ {what}", one["error"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = load_records(str(tmp_path / "many"), "")
    assert [records[n].turns[1].text for n in (5, 1_500)] == ["x" * 900_000, "that"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEBIBYTES * 2**10


OTHERS = ("pipe", "link to a pipe", "/dev/zero", "/dev/tty", "link to a device", "folder")


def make_other(kind: str, place: Path) -> Path:
    """Something that is no regular file, at a path or where it is already."""
    if kind.startswith("/dev"):
        return Path(kind)
    if kind.startswith("link"):
        target = place.with_name(f"{place.name}.target")
        if kind.endswith("pipe"):
            os.mkfifo(target)
        place.symlink_to(target if kind.endswith("pipe") else "/dev/zero")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    return place


@pytest.mark.parametrize("kind", OTHERS)
def test_only_regular_files_are_read(kind, tmp_path):
    place = make_other(kind, tmp_path / "data.jsonl")
    if kind != "folder":
        with pytest.raises(ConfigError, match=f"data file {place}: "):
            load_records(str(place), "")
        with pytest.raises(ConfigError, match=r"data file|cannot be read"):
            load_records(f"{tmp_path}/*.js*" if place.parent == tmp_path else str(place), "")
    if place.parent == tmp_path:
        with pytest.raises(ConfigError, match=r"data file .*data\.jsonl: "):
            load_records(str(tmp_path), "")
    for read in (read_json, read_lines):
        with pytest.raises(ConfigError, match=f"{place} cannot be read: "):
            read(place)
    with pytest.raises(SampleError, match=f"cannot read image {place}: "):
        open_image(str(place))


def test_no_pipe_is_waited_for_in_parquet(tmp_path):
    """Nor one that took the file's place after it was opened."""
    pq.write_table(table([TALK] * 3), tmp_path / "data.parquet")
    records = load_records(str(tmp_path / "data.parquet"), "")
    (tmp_path / "data.parquet").unlink()
    os.mkfifo(tmp_path / "data.parquet")
    with pytest.raises((ConfigError, SampleError), match=r"data\.parquet"):
        records[0]


@functools.cache
def whole(form: str, folder: Path) -> bytes:
    if form == "parquet":
        file = io.BytesIO()
        images = [{"bytes": (folder / "good.png").read_bytes(), "path": None}, None] * 10
        pq.write_table(table([TALK] * 20, image=pa.array(images, IMAGE)), file, row_group_size=7)
        return file.getvalue()
    samples = [bad_data.as_bytes(raw) for raw in bad_data.GOOD * 2]
    return b"[" + b",\n".join(samples) + b"]" if form == "list" else b"\n".join(samples)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at, length = int(rng.integers(len(changed))), int(rng.integers(1, 60))
        way = rng.integers(6)
        if way == 0:
            changed[at] = rng.integers(256)
        elif way == 1:
            del changed[at : at + length]
        elif way == 2:
            changed[at:at] = changed[at : at + length] * int(rng.integers(1, 20_000))
        elif way == 3:
            changed[at:at] = rng.choice([b'"', b"[", b"{", b"\\", b"\0", b",", b"\n", b"1e999"])
        elif way == 4:
            changed[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        else:
            changed[at:at] = rng.choice([b"[", b"{", b'{"a":', b",{", b'"', b"9"]) * 100_000
    return bytes(changed)


FORMS = ("list", "lines", "parquet")


QUICK = ("braces", "open objects", "open texts", "deep", "damaged records", "an open line")


@pytest.mark.parametrize(
    ("seeds", "names", "tried"),
    [(range(8), QUICK, 10), pytest.param(range(100), SLOW, 1, marks=pytest.mark.slow)],
    ids=["few", "300"],
)
def test_hostile_files_are_read_or_named(seeds, names, tried, root, tmp_path):
    paths = [write(tmp_path / f"{name}.json", SLOW[name](1_600_000).encode()) for name in names]
    paths += [
        write(tmp_path / f"{form}-{seed}", mutated(whole(form, root), np.random.default_rng(seed)))
        for form in FORMS
        for seed in seeds
    ]
    found = check_apart(paths, root, tried=tried)
    assert {"error", "bad"} == {next(iter(one)) for one in found}
    assert any(one.get("bad") for one in found)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path

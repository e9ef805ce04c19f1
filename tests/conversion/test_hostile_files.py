"""Files from strangers that ask for more than they may: each is refused, in little time and memory.

Each group of files is read in a process of its own, whose time and memory are measured.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from damage import write_header
from damage_pickles import BOMBS, LISTS, LONG_BOMBS, NESTED, text, write_bomb

MAX_SECONDS, MAX_MIB = 10, 1024

READ = """
import resource, sys, time
from pathlib import Path
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.errors import CheckpointError, ConfigError

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
for place in sorted(Path(sys.argv[1]).iterdir()):
    start, said = time.monotonic(), "read"
    try:
        for tensor in open_any(place).values():
            tensor.read()
    except (CheckpointError, ConfigError) as error:
        said = str(error)
    except BaseException as error:
        said = f"traceback {error!r:.500}"
    print(f"{time.monotonic() - start:.2f}", place.name, said.replace("\\n", " ")[:5000], sep="\\t")
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024)
"""


def read_all(folder: Path) -> dict[str, str]:
    """What is said of each file or directory in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder)],
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS * 60,
        check=True,
    )
    *lines, mebibytes = done.stdout.splitlines()
    rows = [line.split("\t") for line in lines]
    slowest = sorted(rows, key=lambda row: -float(row[0]))[:3]
    print(f"{len(rows)} files, {mebibytes} MiB; the slowest: {[row[:2] for row in slowest]}")
    assert [row for row in rows if float(row[0]) > MAX_SECONDS or "traceback" in row[2]] == []
    assert int(mebibytes) < MAX_MIB
    return {name: said for _, name, said in rows}


def assert_refused(folder: Path, names: list[str] | None = None) -> None:
    """All in a folder are, with a message that can be read."""
    said = read_all(folder)
    named = {name if names is None else names[int(name)]: text for name, text in said.items()}
    assert [name for name, text in named.items() if text == "read"] == []
    assert max(map(len, named.values())) < 4000


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize(
    "bombs", [BOMBS, pytest.param(LONG_BOMBS, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_pickles_that_ask_for_much(bombs: dict[str, bytes], as_zip: bool, tmp_path: Path):
    for number, bomb in enumerate(bombs.values()):
        write_bomb(tmp_path / f"{number}", bomb, as_zip=as_zip)
    assert_refused(tmp_path, [*bombs])


def test_old_pickles_whose_storages_are_named_by_anything(tmp_path: Path):
    for number, keys in enumerate((NESTED, LISTS, b"K\x01")):
        before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}]
        pickles = b"".join(pickle.dumps(value, protocol=2) for value in before)
        (tmp_path / f"{number}").write_bytes(pickles + b"](" + keys + b"e.")
    assert all("storage" in said for said in read_all(tmp_path).values())


def test_archives_that_lie(tmp_path: Path):
    """Of lengths, of places, twice of one name, compressed."""
    for name in ("size", "overlap", "twice", "bomb", "directory", "comment"):
        write_bomb(tmp_path / name, b"}" + text("w") + b"Ns.", as_zip=True)
    with zipfile.ZipFile(tmp_path / "size") as archive:
        place = archive.start_dir
    raw = bytearray((tmp_path / "size").read_bytes())
    raw[place + 24 : place + 28] = struct.pack("<I", 2**31)
    (tmp_path / "size").write_bytes(raw)

    raw = bytearray((tmp_path / "overlap").read_bytes())
    first, last = raw.index(b"PK\1\2"), raw.rindex(b"PK\1\2")
    raw[last + 20 : last + 28] = struct.pack("<II", first - 60, first - 60)
    raw[last + 42 : last + 46] = struct.pack("<I", 0)
    (tmp_path / "overlap").write_bytes(raw)

    with zipfile.ZipFile(tmp_path / "twice", "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    raw = bytearray((tmp_path / "directory").read_bytes())
    raw[-10:-6] = struct.pack("<I", 2**31)
    (tmp_path / "directory").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "comment", "a") as archive:
        archive.comment = b"x" * 1000
    said = read_all(tmp_path)
    assert "member list" in said["directory"]
    assert "member list" in said["comment"]
    assert "overlap" in said["size"]
    assert "overlap" in said["overlap"]
    assert "two members" in said["twice"]
    assert "is compressed" in said["bomb"]


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NAN = float("nan")
TABLES: dict[str, Any] = {
    "65 dimensions": {"w": ENTRY | {"shape": [1] * 64 + [2]}},
    "no items, 2 ** 62 of them": {
        "w": ENTRY,
        "x": ENTRY | {"shape": [0, 2**62], "data_offsets": [8, 8]},
    },
    "many dimensions": {"w": ENTRY | {"shape": [2**62] * 10**6}},
    "a huge size": {"w": ENTRY | {"shape": [10**4000]}},
    "a huge offset": {"w": ENTRY | {"data_offsets": [0, 10**4000]}},
    "no number": {"w": ENTRY | {"shape": [NAN]}},
    "an endless offset": {"w": ENTRY | {"data_offsets": [0, float("inf")]}},
    "overlapping": {"w": ENTRY, "x": ENTRY},
    "a nested shape": {"w": ENTRY | {"shape": json.loads("[" * 60 + "]" * 60)}},
    "a deep table": '{"w":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a deep entry": '{"w":' * 900 + "1" + "}" * 900,
    "a key a million times": "{" + ",".join(['"w":1'] * 10**6) + "}",
    "lists": '{"w":[' + ",".join(["[]"] * 5_500_000) + "]}",
    "objects": '{"w":[' + ",".join(["{}"] * 5_500_000) + "]}",
    "too long": "{" + " " * 2**24 + "}",
}


def test_tables_that_ask_for_much(tmp_path: Path):
    for name, table in TABLES.items():
        write_header(tmp_path / name, table, bytes(8))
    (tmp_path / "a longer header than file").write_bytes(
        struct.pack("<Q", 2**62) + b"{}" + bytes(90)
    )
    assert_refused(tmp_path)


def special(kind: str, place: Path) -> None:
    """Something that is no regular file."""
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    else:
        place.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_tensors_are_read_from_regular_files(kind: str, tmp_path: Path):
    index = json.dumps({"weight_map": {"w": "model.safetensors"}})
    names = ["model.safetensors", "pytorch_model.bin", "rank_0_model_states.pt", "latest"]
    for name in names:
        (tmp_path / f"{name} alone").mkdir()
        special(kind, tmp_path / f"{name} alone" / name)
        (tmp_path / f"{name} named").mkdir()
        special(kind, tmp_path / f"{name} named" / name)
        (tmp_path / f"{name} named" / "model.safetensors.index.json").write_text(index)
    (tmp_path / "index").mkdir()
    special(kind, tmp_path / "index" / "model.safetensors.index.json")
    special(kind, tmp_path / "itself") if kind != "directory" else None
    assert_refused(tmp_path)


FUZZER = Path(__file__).with_name("fuzz_checkpoints.py")


@pytest.mark.parametrize(
    ("kinds", "count"),
    [
        ("tables,pickles,directories", 5),
        pytest.param("tables", 1500, marks=pytest.mark.slow),
        pytest.param("pickles", 200, marks=pytest.mark.slow),
        pytest.param("directories", 100, marks=pytest.mark.slow),
    ],
)
def test_mutated_checkpoints(kinds: str, count: int, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(FUZZER), kinds, "0", str(count), str(tmp_path / "fuzz")],
        capture_output=True,
        text=True,
        timeout=3600,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    *failed, about = map(json.loads, done.stdout.splitlines())
    print(about)
    assert failed == []
    assert about["mebibytes"] < MAX_MIB
    assert about["ends"]["CheckpointError"] > sum(about["ends"].values()) / 3

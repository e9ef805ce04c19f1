"""Parquet files as Hugging Face's `datasets` writes them."""

import builtins
import io
import logging
import pickle
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_jax.data import parquet_file
from llava_jax.data.conversation import Turn
from llava_jax.data.images import open_image
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.sources import FileRecords, load_records
from llava_jax.errors import ConfigError, SampleError

# The types of datasets.Image(), and of lists of turns.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CONVERSATIONS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
PART = pa.struct([("index", pa.int64()), ("text", pa.string()), ("type", pa.string())])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (3, 2), level).save(file, "PNG")
    return file.getvalue()


def level(image: str | bytes) -> int:
    return int(np.asarray(open_image(image))[0, 0, 0])


def talk(question: str = "<image>\nwhat?", answer: str = "that") -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def table(count: int = 5, first: int = 0) -> pa.Table:
    """Records with an image of their number's grey; every fifth has none."""
    images = [None if n % 5 == 4 else {"bytes": png(n), "path": None} for n in range(count)]
    return pa.table(
        {
            "id": pa.array(range(first, first + count)),
            "image": pa.array(images, IMAGE),
            "conversations": pa.array([talk(answer=str(n)) for n in range(count)], CONVERSATIONS),
            "embedding": pa.array([[0.5] * 4] * count),
        }
    )


def write(path, content: pa.Table, **options) -> str:
    pq.write_table(content, path, **options)
    return str(path)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_embedded_images(tmp_path, rows):
    records = load_records(write(tmp_path / "data", table(first=7), row_group_size=rows), "root")
    assert len(records) == 5
    assert records.sizes.most_images == 1
    for number in (0, 4, 1, 3, 2):
        record = records[number]
        assert record.id == str(number + 7)
        assert record.turns == (Turn("human", "<image>\nwhat?"), Turn("gpt", str(number)))
        assert [level(image) for image in record.images] == ([] if number == 4 else [number])
    assert records[-1].id == "11"
    assert [record.id for record in pickle.loads(pickle.dumps(records[1:3]))] == ["8", "9"]


def test_messages_with_lists_of_images(tmp_path):
    content = [
        {"index": 1, "text": None, "type": "image"},
        {"index": 0, "text": None, "type": "image"},
        {"index": None, "text": "which?", "type": "text"},
    ]
    answer = [{"index": None, "text": "this", "type": "text"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in (10, 20)]
    columns = {
        "images": pa.array([images, []], pa.list_(IMAGE)),
        "messages": pa.array([messages, messages[1:] * 2], MESSAGES),
    }
    records = load_records(write(tmp_path / "data", pa.table(columns)), "root")
    assert records.sizes.most_images == 2
    assert [level(image) for image in records[0].images] == [20, 10]
    assert records[0].turns == (Turn("human", "<image>\n<image>\nwhich?"), Turn("gpt", "this"))
    assert (records[1].id, records[1].images) == ("1", ())


def test_images_that_are_not_embedded(tmp_path):
    paths = ["a/b.png", "../b.png", None]
    columns = {
        "image": pa.array([{"bytes": None, "path": path} for path in paths], IMAGE),
        "conversations": pa.array([talk()] * 3, CONVERSATIONS),
    }
    # load_records' result is type-checked here, which may read any record of it.
    records = FileRecords([ParquetFile(write(tmp_path / "data", pa.table(columns)))], "root")
    assert records[0].images == ("root/a/b.png",)
    with pytest.raises(SampleError, match="is outside"):
        records[1]
    with pytest.raises(SampleError, match="must be a path or embedded bytes, found None"):
        records[2]


@pytest.mark.parametrize(
    "column", [pa.array([png(3)]), pa.array([{"bytes": png(3)}])], ids=["binary", "no paths"]
)
def test_other_columns_of_images(tmp_path, column):
    columns = {"image": column, "conversations": pa.array([talk()], CONVERSATIONS)}
    records = load_records(write(tmp_path / "data", pa.table(columns)), "")
    assert records.sizes.most_images == 1
    assert level(records[0].images[0]) == 3


def test_shards(tmp_path):
    for shard in range(2):
        write(tmp_path / f"train-0000{shard}-of-00002.parquet", table(3, first=10 * shard))
    records = load_records(str(tmp_path), "")
    assert [record.id for record in records] == ["0", "1", "2", "10", "11", "12"]
    assert [level(records[n].images[0]) for n in (5, 0, 4)] == [2, 0, 1]


def test_opening_reads_no_image_and_reading_one_row_group(tmp_path, monkeypatch):
    asked = []
    read_group = ParquetFile._read_group

    def note(file, group, columns):
        asked.append((group, "image.bytes" in columns, "embedding.list.element" in columns))
        return read_group(file, group, columns)

    monkeypatch.setattr(ParquetFile, "_read_group", note)
    file = ParquetFile(write(tmp_path / "data", table(6), row_group_size=2))
    assert asked == [(0, False, False), (1, False, False), (2, False, False)]
    asked.clear()
    assert [file.read(n)["id"] for n in (2, 3, 0, 5)] == [2, 3, 0, 5]
    assert asked == [(1, True, False), (0, True, False), (2, True, False)]


@pytest.mark.parametrize("kept", [0, 700, 2**26])
def test_a_row_group_is_read_by_parts_in_any_order(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(parquet_file, "_BATCH_ROWS", 3)
    monkeypatch.setattr(parquet_file, "_KEPT_BYTES", kept)
    records = load_records(write(tmp_path / "data", table(20)), "")
    for order in (range(20), range(19, -1, -1), np.random.default_rng(0).permutation(20).tolist()):
        assert [records[n].id for n in order] == [str(n) for n in order]


def test_two_threads_read_at_once(tmp_path):
    records = load_records(write(tmp_path / "data", table(40), row_group_size=3), "")
    found: list[list[str]] = [[], []]

    def read(which: int) -> None:
        order = np.random.default_rng(which).permutation(40).tolist()
        found[which] = [records[n].id for n in order if records[n].id == str(n)]

    threads = [threading.Thread(target=read, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(ids) for ids in found] == [40, 40]


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "data", table())
    load_records(path, "")
    assert not caplog.records
    monkeypatch.setattr(parquet_file, "MAX_GROUP_BYTES", 100)
    with caplog.at_level(logging.WARNING):
        load_records(path, "")
    assert "row_group_size=100" in caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, 'no column "conversations" or "messages"; its columns are text'),
        ({"messages": ["a"]}, 'row 0: "conversations" or "messages" must be'),
        ({"conversations": [talk(answer=None)] * 2}, "row 0: turn 1: expected"),  # pyright: ignore
        ({"conversations": [talk()], "image": [3]}, 'row 0: "image" must be'),
    ],
)
def test_a_malformed_table_is_one_message(tmp_path, columns, message):
    with pytest.raises(ConfigError, match=f"data file .*data.*{message}"):
        load_records(write(tmp_path / "data", pa.table(columns)), "")


def test_a_broken_file_is_one_message(tmp_path):
    path = tmp_path / "data"
    whole = write(path, table(200), row_group_size=50)
    content = path.read_bytes()
    path.write_bytes(content[:-50])
    with pytest.raises(ConfigError, match="the file cannot be read as Parquet"):
        load_records(whole, "")
    tail = int.from_bytes(content[-8:-4], "little") + 8  # the footer, which has its length
    path.write_bytes(content[:4] + bytes(len(content) - tail - 4) + content[-tail:])
    with pytest.raises(ConfigError, match="row group 0 cannot be read as Parquet"):
        load_records(whole, "")


def test_a_file_that_changes_is_noticed(tmp_path):
    records = load_records(write(tmp_path / "data", table()), "")
    write(tmp_path / "data", table(4))
    with pytest.raises(ConfigError, match="changed while it was in use"):
        records[0]


def test_a_broken_image_is_a_sample_error(tmp_path):
    with pytest.raises(SampleError, match="cannot read an embedded image of 3 bytes"):
        open_image(b"png")


def test_text_that_is_no_unicode_is_a_bad_sample(tmp_path):
    said = pa.array([b"what?", b"\xff\xfe", b"who?"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, said.buffers())
    turns = pa.StructArray.from_arrays([pa.array(["human"] * 3), texts], ["from", "value"])
    ones = pa.ListArray.from_arrays(pa.array(range(4), pa.int32()), turns)
    records = load_records(write(tmp_path / "data", pa.table({"conversations": ones})), "")
    assert records.sizes.images.tolist() == [0, -1, 0]
    assert records[2].turns == (Turn("human", "who?"),)
    with pytest.raises(SampleError, match="not valid UTF-8"):
        records[1]


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "data", table())
    find = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'llava_jax\[parquet\]'"):
        load_records(path, "")


def test_a_small_row_group_is_read_once_in_any_order(tmp_path, monkeypatch):
    file = ParquetFile(write(tmp_path / "data", table(300), row_group_size=300))
    opened = []
    read = ParquetFile._read_group
    monkeypatch.setattr(
        ParquetFile, "_read_group", lambda *given: opened.append(given) or read(*given)
    )
    answers = [file.read(n)["conversations"][1]["value"] for n in (299, 0, 130, 64, 63)]
    assert answers == ["299", "0", "130", "64", "63"]
    assert len(opened) == 1
    monkeypatch.setattr(parquet_file, "_KEPT_BYTES", 0)
    other = ParquetFile(file.path)
    opened.clear()
    answers = [other.read(n)["conversations"][1]["value"] for n in (299, 0)]
    assert answers == ["299", "0"]
    assert len(opened) == 2

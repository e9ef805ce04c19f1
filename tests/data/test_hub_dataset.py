"""Data sets that Hugging Face's library reads, from directories in its own formats."""

import io
import json
import pickle
import sys

import pytest
from PIL import Image

from llava_jax.data.digest import data_digest
from llava_jax.data.images import open_image
from llava_jax.data.sources import FileRecords, load_records
from llava_jax.errors import ConfigError, SampleError

datasets = pytest.importorskip("datasets")


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (3, 2), level).save(file, "PNG")
    return file.getvalue()


def rows(count: int, path: str | None = None) -> list[dict]:
    return [
        {
            "id": n,
            "images": [{"bytes": png(n), "path": path}],
            "messages": [
                {"role": "user", "content": "what?"},
                {"role": "assistant", "content": str(n)},
            ],
            "embedding": [0.5],
        }
        for n in range(count)
    ]


FEATURES = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "images": datasets.List(datasets.Image()),
        "messages": datasets.List(
            {"role": datasets.Value("string"), "content": datasets.Value("string")}
        ),
        "embedding": datasets.List(datasets.Value("float32")),
    }
)


def make(count: int = 5, path: str | None = None) -> "datasets.Dataset":
    return datasets.Dataset.from_list(rows(count, path), features=FEATURES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def check(records: object, count: int = 5) -> None:
    assert isinstance(records, FileRecords)
    assert len(records) == count
    for number in (0, count - 1, 1):
        record = records[number]
        assert record.id == str(number)
        assert record.turns[0].text == "<image>\nwhat?"
        assert record.turns[1].text == str(number)
        (image,) = record.images
        assert open_image(image).getpixel((0, 0)) == (number,) * 3
    assert records.sizes.images.tolist() == [1] * count


@pytest.mark.parametrize("path", [None, "x.png"])
def test_a_data_set_saved_to_disk(path, tmp_path):
    make(path=path).save_to_disk(tmp_path / "one")
    records = load_records(f"hf:{tmp_path}/one", "root")
    check(records)
    check(pickle.loads(pickle.dumps(records)))
    assert records.where(3) == f"hf:{tmp_path}/one, row 3"
    assert [records[1:][n].id for n in (0, 3)] == ["1", "4"]
    again = load_records(f"hf:{tmp_path}/one", "root")
    assert data_digest(records) == data_digest(again)


def test_splits(tmp_path, monkeypatch):
    both = datasets.DatasetDict({"train": make(5), "test": make(3)})
    both.save_to_disk(tmp_path / "both")
    check(load_records(f"hf:{tmp_path}/both", ""))
    check(load_records(f"hf:{tmp_path}/both:test", ""), 3)
    monkeypatch.chdir(tmp_path)
    check(load_records("hf:./both:test", ""), 3)
    with pytest.raises(ConfigError, match=r"no split 'dev'; the splits are train, test"):
        load_records(f"hf:{tmp_path}/both:dev", "")
    with pytest.raises(ConfigError, match="has no splits"):
        load_records(f"hf:{tmp_path}/both/train:dev", "")
    with pytest.raises(ConfigError, match=r"write hf:.*both"):
        load_records(f"{tmp_path}/both", "")
    with pytest.raises(ConfigError, match=r"write hf:.*both/train"):
        load_records(f"{tmp_path}/both/train/data-00000-of-00001.arrow", "")


def test_a_folder_of_files_of_its_own_format(tmp_path):
    (tmp_path / "parquet").mkdir()
    make().to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    make(3).to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    check(load_records(f"hf:{tmp_path}/parquet", ""))
    check(load_records(f"hf:{tmp_path}/parquet:test", ""), 3)
    check(load_records(f"hf:{tmp_path}/parquet:train[:4]", ""), 4)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("image,question,answer\na.png,what?,that\n")
    record = load_records(f"hf:{tmp_path}/csv", "r")[0]
    assert record.images == ("r/a.png",)
    assert [turn.text for turn in record.turns] == ["<image>\nwhat?", "that"]


def test_a_changed_data_set_has_another_digest(tmp_path):
    digests = set()
    for name, data in {"a": make(), "b": make(4), "c": make(path="x.png")}.items():
        data.save_to_disk(tmp_path / name)
        digests.add(load_records(f"hf:{tmp_path}/{name}", "").files[0].digest)  # pyright: ignore
    assert len(digests) == 3


def test_a_data_set_without_conversations(tmp_path):
    datasets.Dataset.from_list([{"text": "x"}]).save_to_disk(tmp_path / "x")
    with pytest.raises(ConfigError, match=r'no column "conversations" or "messages".* are text'):
        load_records(f"hf:{tmp_path}/x", "")


def test_a_record_that_is_too_large_is_a_bad_sample(tmp_path):
    turns = lambda words: [
        {"role": "user", "content": words},
        {"role": "assistant", "content": "x"},
    ]
    data = [{"messages": turns("a")}, {"messages": turns("a" * 2**22)}, {"messages": turns("b")}]
    datasets.Dataset.from_list(data).save_to_disk(tmp_path / "x")
    records = load_records(f"hf:{tmp_path}/x", "")
    assert records.sizes.images.tolist() == [0, -1, 0]
    with pytest.raises(SampleError, match="bytes of text"):
        records[1]


def test_what_cannot_be_read_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no directory \./nothing"):
        load_records("hf:./nothing", "")
    with pytest.raises(ConfigError, match=r"^hf:user/nothing: the package datasets cannot read"):
        load_records("hf:user/nothing", "")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "state.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="cannot read this data set"):
        load_records(f"hf:{tmp_path}/x", "")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_jax\[hf\]'"):
        load_records("hf:user/name", "")


def test_configs(tmp_path):
    both = tmp_path / "both"
    for name in ("a", "b"):
        (both / name).mkdir(parents=True)
        for split, count in (("train", 1), ("test", 2)):
            line = json.dumps({"question": split, "answer": name}) + "\n"
            (both / name / f"{split}.jsonl").write_text(line * count)
    files = lambda name: [
        f"- config_name: {name}",
        "  data_files:",
        *(f"  - split: {s}\n    path: {name}/{s}.jsonl" for s in ("train", "test")),
    ]
    lines = ["---", "configs:", *files("a"), *files("b"), "---"]
    (both / "README.md").write_text("\n".join(lines))
    said = lambda end: [turn.text for turn in load_records(f"hf:{both}{end}", "")[0].turns]
    assert said(":b:test") == ["test", "b"]
    assert said(":a:train[:100%]") == ["train", "a"]
    assert said(":b:") == ["train", "b"]
    with pytest.raises(ConfigError, match=r"\['a', 'b'\].*is written as hf:.*:CONFIG"):
        said("")
    make().save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match="a directory of save_to_disk has no configs"):
        load_records(f"hf:{tmp_path}/saved:a:train", "")

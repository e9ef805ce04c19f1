"""What data is known again by."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_jax.data import digest
from llava_jax.data.digest import data_changes, data_digest
from llava_jax.data.records import survey
from llava_jax.data.sources import JoinedRecords, ListRecords, load_records

COUNT = 12


def raw(number: int, answer: str = "red") -> dict:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.bmp", "conversations": turns}


def image(number: int) -> Image.Image:
    """Of the same number of bytes as every other, as a BMP."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(COUNT):
        image(number).save(root / f"{number}.bmp")
    write(root, [raw(number) for number in range(COUNT)])
    return root


def write(root: Path, records: list[dict]) -> None:
    (root / "data.json").write_text(json.dumps(records))


def digest_of(root: Path, name: str = "data.json") -> list[dict]:
    """As it comes back from a file."""
    return json.loads(json.dumps(data_digest(load_records(str(root / name), str(root)))))


def read(root: Path) -> list[dict]:
    return json.loads((root / "data.json").read_text())


def edit_answer(root: Path) -> None:
    records = read(root)
    records[5] = raw(5, "tan")
    write(root, records)


def change_order(root: Path) -> None:
    write(root, read(root)[::-1])


def swap_images(root: Path) -> None:
    records = read(root)
    records[0]["image"], records[1]["image"] = records[1]["image"], records[0]["image"]
    write(root, records)


def change_category(root: Path) -> None:
    write(root, [record | {"category": "new"} for record in read(root)])


def shorten(root: Path) -> None:
    write(root, read(root)[:-1])


def replace_image(root: Path) -> None:
    """By one of the same size, with the old times."""
    file = root / "7.bmp"
    before = file.stat()
    image(99).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def remove_image(root: Path) -> None:
    (root / "7.bmp").unlink()


EDITED = "data.json: the content or the order of the 12 records changed since the run began"
CHANGES = {
    edit_answer: EDITED,
    change_order: EDITED,
    swap_images: EDITED,
    change_category: EDITED,
    shorten: "data.json: 12 records when the run began, 11 now",
    replace_image: "image 7.bmp: 174 bytes, CRC-32",
    remove_image: "image 7.bmp: 174 bytes, CRC-32",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_found_and_named(folder: Path, change: Callable[[Path], None]):
    before = digest_of(folder)
    change(folder)
    (found,) = data_changes(before, digest_of(folder))
    assert CHANGES[change] in found


def as_lines(root: Path) -> str:
    (root / "data.jsonl").write_text(
        "".join(json.dumps(row, indent=None) + "\n" for row in read(root))
    )
    return "data.jsonl"


def with_more_fields(root: Path) -> str:
    write(root, [record | {"source": "me", "id": "new"} for record in read(root)])
    return "data.json"


def touched(root: Path) -> str:
    for file in root.iterdir():
        os.utime(file, (1, 1))
    return "data.json"


@pytest.mark.parametrize("change", [as_lines, with_more_fields, touched])
def test_what_does_not_matter_is_no_change(folder: Path, change: Callable[[Path], str]):
    before = digest_of(folder)
    assert list(data_changes(before, digest_of(folder, change(folder)))) == []


def test_a_copy_elsewhere_is_the_same_data(folder: Path, tmp_path: Path):
    before = digest_of(folder)
    shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy)  # with new times
    shutil.rmtree(folder)
    assert list(data_changes(before, digest_of(tmp_path / "elsewhere"))) == []


def table(numbers: list[int], path: str | None) -> pa.Table:
    images = []
    for number in numbers:
        file = io.BytesIO()
        image(number).save(file, "BMP")
        images.append({"bytes": file.getvalue(), "path": path})
    turns = [raw(number)["conversations"] for number in range(len(numbers))]
    return pa.table({"image": images, "conversations": turns})


@pytest.mark.parametrize("path", [None, "name.bmp"])
def test_an_image_inside_of_a_table(tmp_path: Path, path: str | None):
    pq.write_table(table([0, 1, 2], path), tmp_path / "data")
    before = digest_of(tmp_path, "data")
    pq.write_table(table([0, 9, 2], path), tmp_path / "data")
    assert list(data_changes(before, digest_of(tmp_path, "data")))


def test_of_much_data_images_are_sampled_evenly():
    found = survey(
        [raw(number) for number in range(10_000)], "data.json", sampled_images=100
    ).images
    numbers = [int(name.removesuffix(".bmp")) for name in found]
    assert 100 <= len(numbers) <= 200
    assert len({*np.diff(numbers)}) == 1
    assert numbers[0] == 0
    assert numbers[-1] > 9_800


def test_several_sources(folder: Path):
    files = load_records(str(folder / "data.json"), str(folder))
    joined = data_digest(JoinedRecords([files, ListRecords(files)]))
    edit_answer(folder)
    other = load_records(str(folder / "data.json"), str(folder))
    found = data_changes(joined, data_digest(JoinedRecords([other, ListRecords(other)])))
    names = [f"training data {folder / 'data.json'}", "training data records"]
    assert [line.split(":")[0] for line in found] == names
    assert list(data_changes(joined, joined[:1])) == [
        "training data: 2 data sets when the run began, 1 now"
    ]


def test_many_images_that_differ_are_counted(folder: Path):
    before = digest_of(folder)
    for file in folder.glob("*.bmp"):
        file.unlink()
    found = list(data_changes(before, digest_of(folder)))
    assert len(found) == digest._NAMED + 1
    assert found[-1] == f"and {COUNT - digest._NAMED} more changed images, of {COUNT} compared"


def test_remote_data():
    import fsspec

    system = fsspec.filesystem("memory")
    lines = "".join(json.dumps(raw(number)) + "\n" for number in range(2))
    system.pipe("/digest/data.jsonl", lines.encode())
    system.pipe("/digest/0.bmp", b"0" * 100_000)
    load = lambda: load_records("memory://digest/data.jsonl", "memory://digest")
    before = data_digest(load())
    assert before[0]["images"]["1.bmp"] == "missing"
    assert before[0]["images"]["0.bmp"].startswith("100000 bytes")
    system.pipe("/digest/0.bmp", b"1" + b"0" * 99_999)
    assert len(list(data_changes(before, data_digest(load())))) == 1


def test_an_image_path_that_cannot_be_encoded(folder: Path):
    records = read(folder)
    records[3]["image"] = "\ud83d.bmp"
    write(folder, records)
    assert digest_of(folder)[0]["images"]["\ud83d.bmp"] == "not in image_root"


def test_a_passing_read_error_is_no_change(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = digest_of(folder)

    def fail(path: str) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(digest, "open_file", fail)
        unread = digest_of(folder)
    assert unread[0]["images"] == {}
    assert list(data_changes(whole, unread)) == list(data_changes(unread, whole)) == []


def test_both_names_of_data_that_changed_are_said(folder: Path):
    before = digest_of(folder)
    shorten(folder)
    (folder / "data.json").rename(folder / "new.json")
    (found,) = data_changes(before, digest_of(folder, "new.json"), "eval data")
    assert found == (
        f"eval data {folder / 'new.json'} (was {folder / 'data.json'}): 12 records when the run "
        "began, 11 now"
    )

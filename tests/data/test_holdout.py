"""Records that are held out for evaluation."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from llava_jax.config import DataConfig, DataSet
from llava_jax.config.fields import check_fields
from llava_jax.data.holdout import hold_out, image_key
from llava_jax.errors import ConfigError
from llava_jax.training.data_sets import OpenedData, open_data


def raw(number: int, *images: str) -> dict:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": str(number)}]
    return {"id": number, "image": list(images), "conversations": turns}


def write(path: Path, records: list) -> str:
    path.write_text(json.dumps(records))
    return str(path)


def ids(records: object) -> list[str]:
    return [records[number].id for number in range(len(records))]  # pyright: ignore


def images(records: object) -> set[object]:
    return {image for n in range(len(records)) for image in records[n].images}  # pyright: ignore


def open_fraction(path: str, fraction: float, seed: int = 0, **fields: object) -> OpenedData:
    data = DataConfig(path=path, image_root="r", eval_fraction=fraction, **fields)  # pyright: ignore
    return open_data(data, seed)


@pytest.mark.parametrize("seed", range(2))
def test_no_image_is_in_both_parts(seed, tmp_path):
    """Also not through records of two images, nor by another way to write its path."""
    rng = np.random.default_rng(seed)
    records = [raw(n, f"{rng.integers(25)}.png") for n in range(30)]
    records += [raw(30 + n, f"./{n}.png", f"{n + 1}.png") for n in range(0, 20, 4)]
    records += [raw(50 + n) for n in range(5)]
    path = write(tmp_path / "x.json", records)
    opened = open_fraction(path, 0.2, seed)
    train, held = opened.records, opened.eval_records
    assert not {str(i).replace("./", "") for i in images(train)} & {
        str(i).replace("./", "") for i in images(held)
    }
    assert sorted(ids(train) + ids(held), key=int) == sorted(
        (str(raw["id"]) for raw in records), key=int
    )
    assert len(held) == 8
    assert opened.counts == (32,)
    assert train.sizes.images.tolist() == [len(train[n].images) for n in range(32)]  # pyright: ignore
    again = open_fraction(path, 0.2, seed)
    assert ids(again.eval_records) == ids(held)
    assert ids(open_fraction(path, 0.2, seed + 7).eval_records) != ids(held)


def test_the_parts_of_a_mixture_are_divided_together(tmp_path):
    one = write(tmp_path / "a.json", [raw(n, f"{n}.png") for n in range(30)])
    two = write(tmp_path / "b.json", [raw(100 + n, f"{n}.png") for n in range(10)])
    mixture = (DataSet(one, "r"), DataSet(two, "r", weight=2.0), DataSet("easy_vqa:test"))
    opened = open_fraction("", 0.1, mixture=mixture, eval_samples=50)
    assert len(opened.eval_records) == 50
    assert sum(opened.counts) == len(opened.records) < 9673 + 40
    assert opened.weights == (1.0, 2.0, 1.0)
    whole = open_fraction("", 0.1, mixture=mixture)
    assert not images(whole.records) & images(whole.eval_records)
    assert len(whole.records) + len(whole.eval_records) == 9673 + 40
    start = whole.counts[0]
    assert whole.records.where(start - 1).startswith(one)
    assert whole.records.where(start).startswith(two)


def test_a_small_data_set_is_divided(tmp_path):
    path = write(tmp_path / "x.json", [raw(n, f"{n // 3}.png") for n in range(6)])
    opened = open_fraction(path, 0.01)
    assert (len(opened.records), len(opened.eval_records)) == (3, 3)


def test_what_cannot_be_divided(tmp_path):
    path = write(tmp_path / "x.json", [raw(n, f"{n}.png", f"{n + 1}.png") for n in range(5)])
    with pytest.raises(ConfigError, match=r"without a common image.*data\.eval_path"):
        open_fraction(path, 0.2)
    with pytest.raises(ConfigError, match=r"data\.eval_fraction 0\.2 are both set"):
        open_fraction(path, 0.2, eval_path=path)
    with pytest.raises(ConfigError, match=r"eval_fraction = 1\.0: it must be"):
        check_fields(DataConfig(eval_fraction=1.0))


def test_records_of_an_unknown_format_stay_in_the_training_data():
    sizes = np.array([1, -1, 1, -1, 0], np.int32)
    keys = np.array([image_key("a"), image_key("b")], np.int64)
    held = hold_out(sizes, keys, 0.9, 0)
    assert not held[[1, 3]].any()
    assert held.sum() == 2


def test_a_corrected_record_changes_the_choice_little():
    sizes, keys = np.ones(200, np.int32), np.arange(1, 201)
    whole = hold_out(sizes, keys, 0.2, 3)
    sizes[50] = -1
    damaged = hold_out(sizes, np.delete(keys, 50), 0.2, 3)
    assert (whole != damaged).sum() <= 2


def test_images_of_unknown_content_are_not_grouped(caplog):
    assert image_key({"path": None}) == image_key({"bytes": None, "path": None}) == 0
    assert image_key({"bytes": b"x", "path": "a"}) == image_key(b"x") != image_key("x.png")
    held = hold_out(np.ones(10, np.int32), np.zeros(10, np.int64), 0.3, 0)
    assert held.sum() == 3
    assert "10 images or videos have no path" in caplog.text


def test_a_file_has_one_key_however_its_path_is_written(tmp_path):
    data = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(200)).decode()
    one = {image_key(path, "/r") for path in ("a.png", "./a.png", "/r/a.png", "file:///r/a.png")}
    assert len(one) == 1
    assert image_key("a.png", "/r") != image_key("a.png", "/s") == image_key("../s/a.png", "/r")
    assert image_key("data:image/png;base64," + data) == image_key(base64.b64decode(data))
    assert image_key("a.png", "gs://r") == image_key("x/../a.png", "gs://r") != image_key("a.png")


def test_a_file_of_two_data_sets_is_in_one_part(tmp_path):
    """Also if the sets have other roots, but not if only the names of files are the same."""
    inner = [raw(n, f"{n}.png") for n in range(20)]
    outer = [raw(100 + n, f"in/{n}.png") for n in range(20)]
    whole = [raw(200 + n, f"{tmp_path}/in/{n}.png") for n in range(20)]
    other = [raw(300 + n, f"{n}.png") for n in range(20)]
    roots = (tmp_path / "in", tmp_path, tmp_path, tmp_path / "other")
    mixture = tuple(
        DataSet(write(tmp_path / f"{n}.json", raws), str(root))
        for n, (raws, root) in enumerate(zip((inner, outer, whole, other), roots, strict=True))
    )
    opened = open_data(DataConfig(mixture=mixture, eval_fraction=0.3), 0)
    held = {int(name) for name in ids(opened.eval_records)}
    groups = [{n + start for start in (0, 100, 200)} for n in range(20)]
    assert all(group <= held or not group & held for group in groups)
    assert any((n in held) != (300 + n in held) for n in range(20))


def test_another_folder_for_the_images_of_the_eval_data(tmp_path):
    path = write(tmp_path / "x.json", [raw(0, "a.png")])
    for root, expected in ((None, "r/a.png"), ("other", "other/a.png"), ("", "a.png")):
        data = DataConfig(path=path, image_root="r", eval_path=path, eval_image_root=root)
        opened = open_data(data, 0)
        assert images(opened.records) == {"r/a.png"}
        assert images(opened.eval_records) == {expected}

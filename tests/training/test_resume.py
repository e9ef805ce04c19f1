"""Runs that an older version of the package began."""

import dataclasses
import json
from pathlib import Path

import pytest

from llava_jax.config import TrainConfig, load_config, to_json
from llava_jax.training.resume import begun_buckets, changes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def older(tmp_path: Path) -> TrainConfig:
    """The config of a run whose config.json lacks fields that were added later."""
    config = load_config(ROOT / "configs" / "tiny_lora.py")
    config = dataclasses.replace(config, name="older", output_dir=str(tmp_path))
    began = to_json(config)
    for field in ("exif_orientation", "image_buckets", "train_on"):
        del began["data"][field]
    del began["lora"]["use_rslora"]
    began["data"]["buckets"] = [64]
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(
        json.dumps({"config": began, "base_fingerprint": None})
    )
    return config


def test_a_run_of_an_older_version_did_not_turn_images(older: TrainConfig):
    now = lambda config: {"config": to_json(config), "base_fingerprint": None, "data": {}}
    found = changes(older.run_dir, now(older))
    assert found.recipe == ["  data.exif_orientation: False before, True now"]
    data = dataclasses.replace(older.data, exif_orientation=False)
    assert not changes(older.run_dir, now(dataclasses.replace(older, data=data))).recipe


def test_a_run_of_an_older_version_keeps_one_number_of_image_slots(older: TrainConfig):
    assert begun_buckets(older) == ((64,), ())

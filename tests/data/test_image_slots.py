"""How many images a sample has at most, and which sample is named as an outlier."""

from pathlib import Path

import pytest

from llava_jax.config import parse_config
from llava_jax.data import image_slots
from llava_jax.data.conversation import Turn
from llava_jax.data.image_slots import describe_outlier, find_most_images
from llava_jax.data.order import NO_RECORD
from llava_jax.data.records import Record
from llava_jax.data.sources import ListRecords
from llava_jax.training.inputs import find_model, open_inputs

ROOT = Path(__file__).parents[2]


def record(images: int, before: str = "") -> Record:
    """Its images are missing, so whoever decodes one fails. The text `before` is in front."""
    turns = (Turn("human", before + "<image>" * images + "what?"), Turn("gpt", "that"))
    return Record("x", ("nowhere.png",) * images, turns)


@pytest.fixture(scope="module")
def encoder():
    """An image has 64 tokens."""
    options = ["--data.max-length", "400", "--data.max-images", "30", "--data.eval-path", "None"]
    config = parse_config(["--config", str(ROOT / "configs" / "tiny_lora.py"), *options])
    return open_inputs(config, *find_model(config, Path(str(config.init_from)))).encoder


def test_the_most_images_are_those_of_samples_that_are_used(encoder, monkeypatch):
    usual = [record(n % 3) for n in range(20)]
    assert find_most_images(ListRecords(usual), encoder) == (2, 2)
    assert find_most_images(ListRecords([*usual, record(5)]), encoder) == (5, 20)
    # 24 images do not fit into 400 tokens, so that no answer is left; 40 are not allowed.
    assert find_most_images(ListRecords([record(24), *usual, record(40)]), encoder) == (2, 3)
    turns = (*record(5).turns, Turn("human", "<image>" * 19), Turn("gpt", "that"))
    cut = Record("x", ("nowhere.png",) * 24, turns)
    assert find_most_images(ListRecords([*usual, cut]), encoder) == (5, 20)
    assert find_most_images(ListRecords([record(0)]), encoder) == (0, NO_RECORD)
    assert find_most_images(ListRecords([]), encoder) == (0, NO_RECORD)
    monkeypatch.setattr(image_slots, "SAMPLED", 3)  # then as many as fit are assumed
    assert find_most_images(ListRecords([record(24)] * 5 + usual), encoder) == (6, NO_RECORD)


def test_an_outlier_is_named_with_what_to_do():
    records = ListRecords([record(1)] * 100 + [record(24)])
    line = describe_outlier(records, 24, 100)
    assert line == (
        "images: sample 100 has 24 images; 99 % of the samples have at most 1. Memory is planned "
        "for rows of 24 images. To leave out samples with more than 1, set data.max_images to 1"
    )
    assert describe_outlier(ListRecords([record(1)] * 5 + [record(3)]), 3, 5)
    assert describe_outlier(ListRecords([record(1)] * 5 + [record(2)]), 2, 5) is None
    assert describe_outlier(ListRecords([record(1)] * 5 + [record(3)] * 2), 3, 5) is None
    assert describe_outlier(records, 24, NO_RECORD) is None

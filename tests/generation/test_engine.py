"""What an engine does to the model that it is given."""

import gc
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from llava_jax import LlavaModel, generate
from llava_jax.generation.assistant import Assistant
from llava_jax.generation.engine import Engine, Request
from llava_jax.models.layers import split
from llava_jax.pretrained.model_inputs import BatchMedia, RowInputs, split_rows
from llava_jax.pretrained.resolve import resolve

TINY = Path(__file__).parents[2] / "assets" / "tiny-llava"


@pytest.fixture
def model() -> LlavaModel:
    return LlavaModel.from_pretrained(TINY)


def prompt(model: LlavaModel) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] with one image, and its pixels."""
    config = model.config
    rng = np.random.default_rng(0)
    image = [config.image_token_id] * config.image_tokens
    ids = np.array([*rng.integers(5, 300, 4), *image, *rng.integers(5, 300, 6)], np.int32)
    size = config.vision.image_size
    return ids, rng.standard_normal((1, 3, size, size), np.float32)


def row_of(model: LlavaModel, ids: np.ndarray, pixels: np.ndarray) -> RowInputs:
    return split_rows(model.config, ids[None], np.ones((1, len(ids)), bool), BatchMedia(pixels))[0]


def held_bytes() -> Iterator[int]:
    """Bytes of live arrays, again and again."""
    while True:
        gc.collect()
        yield sum(x.nbytes for x in jax.live_arrays())


def test_a_model_is_as_before_when_an_engine_was_made_of_it(model: LlavaModel):
    ids, pixels = prompt(model)
    before, structure = np.asarray(model(ids[None], pixels)), split(model)[0]
    engine = Engine(model, slots=2, length=128)
    (request,) = engine.run([Request(row_of(model, ids, pixels), 5)])
    assert split(model)[0] == structure
    np.testing.assert_array_equal(np.asarray(model(ids[None], pixels)), before)
    again = generate(model, ids[None], pixels, max_new_tokens=5, eos_token_id=())
    assert again.tolist() == [request.tokens]


def test_a_model_that_generated_can_be_called_merged_and_saved(model: LlavaModel, tmp_path: Path):
    ids, pixels = prompt(model)
    before = np.asarray(model(ids[None], pixels))
    generate(model, ids[None], pixels, max_new_tokens=2)
    model.save_pretrained(tmp_path)
    saved = LlavaModel.from_pretrained(tmp_path)
    np.testing.assert_array_equal(np.asarray(saved(ids[None], pixels)), before)


def test_a_donated_model_gives_its_weights_away(model: LlavaModel):
    ids, pixels = prompt(model)
    kept = Engine(model, slots=1, length=128)
    (expected,) = kept.run([Request(row_of(model, ids, pixels), 5)])
    del kept
    held = held_bytes()
    before = next(held)
    engine = Engine(model, slots=1, length=128, donate=True)
    caches = sum(x.nbytes for x in jax.tree.leaves((engine._caches, engine._seen)))
    assert next(held) - before == caches
    (request,) = engine.run([Request(row_of(model, ids, pixels), 5)])
    assert request.tokens == expected.tokens
    assert model.llm.layers is None


def test_an_assistant_holds_its_weights_once(model: LlavaModel):
    weights = sum(x.nbytes for x in split(model)[1].values())
    held = held_bytes()
    before = next(held)
    assistant = Assistant.load(resolve(TINY), slots=1, max_length=64)
    engine = assistant._engine
    caches = sum(x.nbytes for x in jax.tree.leaves((engine._caches, engine._seen)))
    assert next(held) - before == weights + caches

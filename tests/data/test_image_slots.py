"""How many images samples have, which one is an outlier, and that blank slots change nothing."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_training import CONFIG, change, random_batch, run, start

from llava_jax.config import parse_config
from llava_jax.data import image_slots
from llava_jax.data.batch import Batch
from llava_jax.data.conversation import Turn
from llava_jax.data.image_slots import MostSlots, describe_outlier, find_most_slots
from llava_jax.data.order import NO_RECORD
from llava_jax.data.records import Record
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import ListRecords
from llava_jax.train_step.loss import next_tokens, token_losses
from llava_jax.train_step.step import forward
from llava_jax.training.inputs import Inputs, find_model, open_inputs

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


def most(records: ListRecords, encoder: SampleEncoder) -> tuple[int, int]:
    """The number of slots, and the index of the sample."""
    found = find_most_slots(records, encoder)
    assert found.images == (0 if found.number == NO_RECORD else found.slots)
    return found.slots, found.number


def test_the_most_images_are_those_of_samples_that_are_used(encoder, monkeypatch):
    usual = [record(n % 3) for n in range(20)]
    assert most(ListRecords(usual), encoder) == (2, 2)
    assert most(ListRecords([*usual, record(5)]), encoder) == (5, 20)
    # 24 images do not fit into 400 tokens, so that no answer is left; 40 are not allowed.
    assert most(ListRecords([record(24), *usual, record(40)]), encoder) == (2, 3)
    turns = (*record(5).turns, Turn("human", "<image>" * 19), Turn("gpt", "that"))
    cut = Record("x", ("nowhere.png",) * 24, turns)
    assert most(ListRecords([*usual, cut]), encoder) == (5, 20)
    assert most(ListRecords([record(0)]), encoder) == (0, NO_RECORD)
    assert most(ListRecords([]), encoder) == (0, NO_RECORD)
    monkeypatch.setattr(image_slots, "SAMPLED", 3)  # then as many as fit are assumed
    assert most(ListRecords([record(24)] * 5 + usual), encoder) == (6, NO_RECORD)


def test_an_outlier_is_named_with_what_to_do():
    records = ListRecords([record(1)] * 100 + [record(24)])
    line = describe_outlier(records, MostSlots(24, 24, 100))
    assert line == (
        "images: sample 100 has 24 images; 99 % of the samples have at most 1. Memory is planned "
        "for rows of 24 image slots. To leave out samples with more than 1, set data.max_images "
        "to 1"
    )
    assert describe_outlier(ListRecords([record(1)] * 5 + [record(3)]), MostSlots(3, 3, 5))
    assert describe_outlier(ListRecords([record(1)] * 5 + [record(2)]), MostSlots(2, 2, 5)) is None
    assert (
        describe_outlier(ListRecords([record(1)] * 5 + [record(3)] * 2), MostSlots(3, 3, 5)) is None
    )
    assert describe_outlier(records, MostSlots(24, 0, NO_RECORD)) is None


def write(file: Path, *counts: int) -> None:
    """Writes records with so many images, all of the same picture."""
    Image.new("RGB", (8, 8), "red").save(file.parent / "a.png")
    turns = lambda n: [
        {"from": "human", "value": "<image>" * n + "what?"},
        {"from": "gpt", "value": "that"},
    ]
    records = [{"image": ["a.png"] * n, "conversations": turns(n)} for n in counts]
    file.write_text(json.dumps(records))


def open_counts(folder: Path, train: list[int], evaluated: list[int], *options: str) -> Inputs:
    write(folder / "train.json", *train)
    write(folder / "eval.json", *evaluated)
    files = ["--data.path", str(folder / "train.json"), "--data.image-root", str(folder)]
    config = parse_config(
        ["--config", str(ROOT / "configs" / "tiny_lora.py"), *files, "--data.buckets",
         "--data.eval-path", str(folder / "eval.json"), "--batch.global-size", "4",
         "--data.workers", "0", *options]
    )  # fmt: skip
    inputs = open_inputs(config, *find_model(config, Path(str(config.init_from))))
    return inputs.with_buckets(inputs.choose_buckets(10**4)[0])


def shapes(inputs: Inputs) -> list[int]:
    """The numbers of image slots in the batches of an epoch."""
    batches = inputs.train_batches()
    made = [next(batches).pixel_values.shape[1] for _ in range(inputs.order.batches)]
    batches.close()
    return made


def test_one_record_with_many_images_changes_only_its_own_batch(tmp_path: Path):
    inputs = open_counts(tmp_path, [1] * 40 + [5], [1, 1, 5], "--data.max-length", "400")
    assert inputs.summary().endswith("padded to 400 tokens; image slots per row: 1, 5")
    (line,) = inputs.warnings
    assert line.startswith(f"images: {tmp_path}/train.json, record 40 has 5 images; 99 %")
    assert Counter(shapes(inputs)) == {1: 10, 5: 1}
    made = [batch.pixel_values.shape[:2] for batch, _ in inputs.eval_batches(2)]
    assert made == [(2, 1), (2, 5)]


def test_a_record_that_is_left_out_needs_no_slots(tmp_path: Path):
    """With 24 images, no token of its answer fits into 400 tokens."""
    inputs = open_counts(tmp_path, [1] * 40 + [24], [24, 1], "--data.max-length", "400")
    assert inputs.spec.slots == [1]
    assert inputs.warnings == ()
    assert Counter(shapes(inputs)) == {1: 11}
    assert [batch.pixel_values.shape[1] for batch, _ in inputs.eval_batches(1)] == [1, 1]


def test_packed_rows_have_the_slots_that_they_need(tmp_path: Path):
    """About 90 tokens for each sample: four of them in a row, which has room for six images."""
    options = ["--data.max-length", "400", "--data.packing"]
    inputs = open_counts(tmp_path, [1] * 40, [1], *options)
    assert inputs.spec.slots == [4, 6]
    assert set(shapes(inputs)) == {4}
    assert [batch.pixel_values.shape[1] for batch, _ in inputs.eval_batches(1)] == [1]


def blank_slots(batch: Batch, count: int) -> Batch:
    """The same batch with so many image slots; the further slots are blank."""
    pixels = np.zeros((len(batch.input_ids), count, *batch.pixel_values.shape[2:]), np.uint8)
    pixels[:, : batch.pixel_values.shape[1]] = batch.pixel_values
    new = [(0, 0), (0, count - batch.slot_tokens.shape[1])]
    slot_tokens = np.pad(batch.slot_tokens, new)
    return dataclasses.replace(batch, pixel_values=pixels, slot_tokens=slot_tokens)


def test_blank_slots_change_no_loss():
    """Here a batch without images, which skips the vision tower."""
    program, state, frozen = start(CONFIG, 1, 1)
    batch = random_batch(0, images=0)

    @jax.jit
    def loss(batch: Batch) -> jax.Array:
        targets, learned = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        hidden, head = forward(program.graphdef, frozen | state.trainable, batch, None)
        return token_losses(hidden, head, targets, learned).nll.sum()

    assert batch.pixel_values.shape[1] == 0
    np.testing.assert_allclose(loss(batch), loss(blank_slots(batch, 2)), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"memory": {"offload_optimizer": True}}], ids=str)
def test_a_run_does_not_notice_how_many_slots_its_batches_have(fields: dict):
    """With dropout in decoder and tower; batches need none, one and two slots."""
    make = lambda step: random_batch(step, images=step)
    config = change(CONFIG, batch={"micro_size": 4}, **fields)
    few, _, _ = run(config, make=make)
    many, _, _ = run(config, make=lambda step: blank_slots(make(step), 2))
    for ours, theirs in zip(few, many, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)

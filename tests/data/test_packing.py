"""Several samples in a row: which go together, and that they do not notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, change, packed, random_batch, run, start

from llava_jax.config import DataConfig, ModelConfig, TilingConfig
from llava_jax.data.batch import Batch
from llava_jax.data.packing import deal, first_fit, slots_in_row
from llava_jax.train_step.loss import next_tokens, token_losses
from llava_jax.train_step.step import filled_micro_batches, forward

ROOM = 50
"""Tokens of a packed row: two or three of the samples, which have 16 to 20."""

PACKED = change(CONFIG, data={"packing": True})


def fit(lengths: dict[int, int], room: int) -> list[list[int]]:
    """Rows of samples without images."""
    return first_fit(lengths, dict.fromkeys(lengths, 0), room, 0)


def test_rows_have_room_for_tokens_and_for_slots():
    lengths, slots = {0: 6, 1: 5, 2: 4, 3: 3, 4: 2}, {0: 1, 1: 3, 2: 5, 3: 4, 4: 1}
    assert first_fit(lengths, slots, 10, 5) == [[0, 3], [1, 4], [2]]


def test_the_longest_comes_first_into_the_first_row_with_room():
    assert fit({0: 3, 1: 9, 2: 0, 3: 6, 4: 4, 5: 1}, 10) == [[1, 5], [3, 4], [0]]
    assert fit({}, 10) == []
    assert fit({7: 10, 8: 10}, 10) == [[7], [8]]


def test_rows_are_nearly_as_few_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = dict(enumerate(rng.integers(1, 1024, 128).tolist()))
        rows = fit(lengths, 2048)
        assert sorted(item for row in rows for item in row) == sorted(lengths)
        assert all(sum(lengths[item] for item in row) <= 2048 for row in rows)
        assert len(rows) <= 1.05 * sum(lengths.values()) / 2048 + 1


def test_devices_take_rows_in_turn():
    rows = [[0], [1, 4], [2], [3], [5]]
    assert deal(rows, 6, 2) == {0: [0], 3: [1, 4], 1: [2], 4: [3], 2: [5]}
    assert deal(rows, 6, 1) == dict(enumerate(rows))


def test_images_of_a_row_are_as_many_as_its_tokens_allow():
    data = DataConfig(max_length=2048)
    assert slots_in_row(data, ModelConfig(), 1) == 1
    assert slots_in_row(data, ModelConfig(), 24) == 3  # of 576 tokens each
    data = dataclasses.replace(data, packing=True)
    assert slots_in_row(data, ModelConfig(), 1) == 3
    assert slots_in_row(data, ModelConfig(), 0) == 0


def test_micro_batches_without_a_token_are_left_out():
    ids = jnp.zeros((12, 3), jnp.int32).at[jnp.array([0, 1, 2, 6, 7]), 0].set(1)
    for count, filled in ((6, 3), (3, 2), (2, 1), (1, 1)):
        assert filled_micro_batches(ids, count, devices=2) == filled
    assert filled_micro_batches(jnp.zeros_like(ids), 6, devices=2) == 0


@pytest.mark.parametrize(
    ("devices", "fields"),
    [
        (1, {"batch": {"micro_size": 2}}),
        pytest.param(
            8,
            {"batch": {"micro_size": 1, "loss_weighting": "sample_mean", "loss_group": 2}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_does_not_notice_that_it_is_packed(devices: int, fields: dict):
    """With dropout in decoder and tower; what was learned is in the later losses."""
    one, _, _ = run(change(CONFIG, **fields), devices)
    pack = lambda step: packed(random_batch(step), ROOM, devices)
    assert len(np.flatnonzero(pack(0).segment_ids.any(axis=1))) <= 7
    two, _, _ = run(change(PACKED, **fields), devices, make=pack)
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-6)


def test_every_sample_has_the_same_loss():
    program, state, frozen = start(CONFIG, 1, 1)
    batch = random_batch(0)

    @jax.jit
    def losses(batch: Batch) -> jax.Array:
        targets, learned = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
        hidden, head = forward(program.graphdef, frozen | state.trainable, batch, None)
        nll = token_losses(hidden, head, targets, learned).nll
        return jnp.zeros(len(nll) + 1).at[batch.segment_ids].add(nll)[1:]

    found = losses(packed(batch, ROOM))
    np.testing.assert_allclose(found, losses(batch), rtol=1e-5)
    assert (found > 1).all()


def test_slots_of_rows_with_tiles():
    tiling = TilingConfig(((336, 672), (672, 672)))
    model, data = ModelConfig(tiling=tiling), DataConfig(max_length=8192)
    assert slots_in_row(data, model, 5) == 5
    assert slots_in_row(dataclasses.replace(data, packing=True), model, 5) == 21
    assert slots_in_row(dataclasses.replace(data, packing=True), model, 25) == 25
    assert slots_in_row(dataclasses.replace(data, packing=True), model, 0) == 0

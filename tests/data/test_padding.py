"""Which bucket lengths a run chooses for its data."""

import dataclasses

import numpy as np
import pytest

from llava_jax.data.batching import BatchSpec
from llava_jax.data.padding import (
    COMPILATION_STEPS,
    LENGTH_UNIT,
    Padding,
    choose_buckets,
    choose_image_buckets,
)


def padding(*batches: list[int], images: list[list[int]] | None = None) -> Padding:
    lengths = [np.array(batch, np.int64) for batch in batches]
    shown = [np.array(batch, np.int64) for batch in images or [[0] * len(b) for b in batches]]
    return Padding(lengths, max(map(len, batches)), sum(map(sum, batches)), shown)


def spec(max_length: int = 512, **fields) -> BatchSpec:
    return BatchSpec(4, 1, (8, 8), max_length, 0, **fields)


SHORT_AND_LONG = padding(*[[100, 90]] * 50, *[[400, 300]] * 50)


def test_lengths_are_rounded_up_and_cover_the_longest_sample():
    assert choose_buckets(padding([149, 20], [3, 9]), spec(), 10) == (152,)
    assert choose_buckets(padding([149], [510]), spec(511), 10) == ()  # max_length is enough
    assert 152 % LENGTH_UNIT == 0


def test_a_further_length_must_pay_for_its_compilation():
    """Half of the batches save three quarters of their tokens: 37.5 % of a step on average."""
    pays = COMPILATION_STEPS / 0.375
    assert choose_buckets(SHORT_AND_LONG, spec(), int(0.95 * pays)) == (400,)
    assert choose_buckets(SHORT_AND_LONG, spec(), int(1.05 * pays)) == (104, 400)


def test_at_most_four_lengths_however_long_the_run():
    many = padding(*([length] for length in range(50, 500, 3)))
    chosen = choose_buckets(many, spec(), 10**6)
    assert len(chosen) == 4
    assert chosen[-1] == 504
    assert list(chosen) == sorted(chosen)


@pytest.mark.parametrize("packing", [False, True])
def test_data_without_a_text_has_no_buckets(packing):
    assert choose_buckets(padding([], []), spec(packing=packing), 10) == ()


def test_a_packed_row_is_as_long_as_the_samples_of_a_step_need():
    """Four samples of 500 tokens need one row of 512, not of 2048; many fill long rows."""
    few = padding(*[[140, 130, 120, 110]] * 10)
    assert choose_buckets(few, spec(2048, packing=True), 10) == (512,)
    many = padding(*[[100] * 200] * 10)
    assert choose_buckets(many, spec(2048, packing=True), 10) == ()


def test_a_packed_row_is_short_if_all_rows_are_computed_together():
    few = padding(*[[100] * 4] * 10)
    assert choose_buckets(few, spec(2048, packing=True, micro_rows=4), 10) == (104,)


def test_packed_tokens_are_those_that_are_computed():
    assert padding([60, 50, 40]).packed([100], 1) == 200
    assert padding([60, 50, 40]).packed([100, 160], 1) == 160
    assert padding([60, 50, 40]).packed([100], 1, together=4) == 400
    assert padding([60], []).packed([100], 1) == 100


def with_images(*images: list[int]) -> Padding:
    """Samples of 100 tokens with so many images, one list per batch."""
    return padding(*[[100] * len(batch) for batch in images], images=list(images))


def slots(padding: Padding, steps: int, *, slot_tokens: float = 50.0, **fields) -> tuple[int, ...]:
    shapes = dataclasses.replace(spec(100), max_slots=24, **fields)
    return choose_image_buckets(padding, shapes, steps, slot_tokens)


def test_image_slots_follow_what_most_batches_need():
    """A slot costs half of a row: the outlier's 24 slots would make all other steps 9 times slower
    (12.5 to 1.5), and as many as pay for a compilation do not wait for it."""
    outlier = with_images(*[[1, 1]] * 9, [1, 24])
    assert slots(outlier, 10**4) == (1,)
    assert slots(outlier, 20) == ()  # a second compilation takes longer than the run
    assert slots(with_images(*[[1, 1]] * 9), 1) == (1,)  # no measured batch needs more
    assert slots(with_images([0, 0], [0, 1], [2, 0], [3, 5]), 10**6) == (0, 1, 2, 5)
    assert slots(with_images([0, 0], [0, 0]), 10) == (0,)


def test_a_further_number_of_slots_must_pay_for_its_compilation():
    """Half of the batches save a slot of 50 tokens, of 200 tokens with two slots."""
    half = with_images(*[[1, 1]] * 50, *[[2, 1]] * 50)
    pays = COMPILATION_STEPS / (0.5 * 50 / 200)
    assert slots(half, int(0.95 * pays)) == (2,)
    assert slots(half, int(1.05 * pays)) == (1, 2)
    assert slots(half, int(1.05 * pays), slot_tokens=5.0) == (2,)  # a small vision tower


def test_slots_of_packed_rows_are_those_of_their_samples():
    packed = with_images(*[[1] * 6] * 10)
    assert slots(packed, 10**4, packing=True, max_length=300) == (3,)


def test_text_without_images_has_no_slots():
    shapes = dataclasses.replace(spec(100), max_slots=0)
    assert choose_image_buckets(with_images([0], [0]), shapes, 10, 5.0) == ()

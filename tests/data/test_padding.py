"""Which bucket lengths a run chooses for its data."""

import numpy as np
import pytest

from llava_jax.data.batching import BatchSpec
from llava_jax.data.padding import COMPILATION_STEPS, LENGTH_UNIT, Padding, choose_buckets


def padding(*batches: list[int]) -> Padding:
    lengths = [np.array(batch, np.int64) for batch in batches]
    return Padding(lengths, max(map(len, batches)), sum(map(sum, batches)))


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
    assert padding([60, 50, 40]).packed([100]) == 200
    assert padding([60, 50, 40]).packed([100, 160]) == 160
    assert padding([60, 50, 40]).packed([100], together=4) == 400
    assert padding([60], []).packed([100]) == 100

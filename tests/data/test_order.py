"""Which records each batch holds."""

import pickle
from collections import Counter

import numpy as np
import pytest

from llava_jax.data.order import NO_RECORD, EpochOrder, Grouping, InOrder
from llava_jax.errors import ConfigError


def epoch(order: EpochOrder, number: int = 0) -> list[int]:
    """The records of an epoch, if epochs are whole batches."""
    batches = -(-order.samples // order.size)
    of_epoch = range(number * batches, (number + 1) * batches)
    return [record for batch in of_epoch for record in order.batch(batch).tolist()]


def test_in_order():
    order = InOrder(5, 2)
    assert [order.batch(n).tolist() for n in range(order.batches)] == [[0, 1], [2, 3], [4, -1]]


def test_whole_weights_repeat_records():
    order = EpochOrder((4, 3), 10, seed=1, weights=(1.0, 2.0))
    assert order.samples == 10
    for number in range(3):
        assert Counter(epoch(order, number)) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2}
    assert epoch(order) != epoch(order, 1)


def test_of_broken_weights_every_record_comes_equally_often():
    order = EpochOrder((4, 6), 4, seed=1, weights=(0.5, 1 / 3))
    assert order.samples == 4
    epochs = [epoch(order, number) for number in range(6)]
    assert all(sum(record < 4 for record in records) == 2 for records in epochs)
    assert set(Counter(record for records in epochs for record in records).values()) == {2, 3}
    first, second = ({r for r in records if r < 4} for records in epochs[:2])
    assert not first & second


def test_no_records():
    with pytest.raises(ConfigError, match=r"data\.path"):
        EpochOrder((0,), 4, seed=1)
    with pytest.raises(ConfigError, match=r"data\.path"):
        EpochOrder((4,), 4, seed=1, weights=(0.01,))


def grouped(count: int, *, every: int = 3, size: int = 4, group: int = 2, **options) -> EpochOrder:
    """Records of which each `every`th has no image; the record's number is its length."""
    numbers = np.arange(count)
    grouping = Grouping(numbers % every > 0, numbers, group)
    return EpochOrder((count,), size, seed=1, grouping=grouping, **options)


@pytest.mark.parametrize("count", [1, 4, 12, 23, 24, 90])
def test_grouped_batches_are_of_one_modality(count):
    order = grouped(count)
    with_images, without, of_both = order.batches_alike()
    assert with_images + without + of_both == -(-count // 4)
    for number in range(3):
        records = np.array(epoch(order, number)).reshape(-1, 4)
        assert sorted(records[records >= 0].tolist()) == list(range(count))
        kinds = Counter(frozenset(bool(r % 3) for r in row if r >= 0) for row in records)
        assert kinds[frozenset({True})] >= with_images
        assert kinds[frozenset({False})] >= without
        assert (records[:-1] != NO_RECORD).all()
    if count > 23:
        assert epoch(order) != epoch(order, 1)


@pytest.mark.parametrize("every", [1, 1000])
def test_grouping_works_for_one_modality(every):
    order = grouped(10, every=every)
    assert sorted(epoch(order)) == [NO_RECORD, NO_RECORD, *range(10)]


def test_groups_have_like_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, 256)
    order = EpochOrder((256,), 64, seed=3, grouping=Grouping(lengths > 0, lengths, 8))
    for number in range(4):
        groups = lengths[order.batch(number)].reshape(8, 8)
        assert np.ptp(groups.sum(axis=1)) < 0.1 * groups.sum(axis=1).mean()
        assert (np.diff(groups, axis=1) <= 0).all()


def test_without_shuffling_grouped_batches_keep_the_order():
    order = grouped(12, every=2, size=3, group=1, shuffle=False)
    batches = [sorted(order.batch(number).tolist()) for number in range(4)]
    assert batches == [[1, 3, 5], [7, 9, 11], [0, 2, 4], [6, 8, 10]]


def test_an_order_is_the_same_in_another_process():
    order = grouped(23)
    again = pickle.loads(pickle.dumps(order))
    assert epoch(again, 5) == epoch(order, 5)

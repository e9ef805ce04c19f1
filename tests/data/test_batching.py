"""The order, shapes and position of batches."""

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import model_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_jax.data import workers as workers_module
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches, BatchSpec, ReadBatch, eval_batches
from llava_jax.data.conversation import Turn
from llava_jax.data.images import ImageTransform
from llava_jax.data.order import EpochOrder
from llava_jax.data.records import Record
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import ListRecords
from llava_jax.data.templates import Template
from llava_jax.errors import ConfigError, SampleError
from llava_jax.train_step.step import normalised

PAD, IMAGE, EOS = 0, 1, 2
TEMPLATE = Template(system="", answer_prefix=" ", image_suffix=" ")
SIDE = 4  # pixels
IMAGE_TOKENS = 3


@pytest.fixture(scope="module")
def tokenizer():
    words = {"[PAD]": PAD, "<image>": IMAGE, "</s>": EOS, "[UNK]": 3, "q": 4, "a": 5}
    words |= {str(number): 10 + number for number in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Makes the file of an image whose pixels are all of one value."""
    folder = tmp_path_factory.mktemp("images")

    def make(value: int) -> str:
        path = folder / f"{value}.png"
        Image.new("RGB", (SIDE, SIDE), (value, value, value)).save(path)
        return str(path)

    return make


def encoder(tokenizer, **changes) -> SampleEncoder:
    fields = {
        "tokenizer": tokenizer,
        "template": TEMPLATE,
        "transform": ImageTransform(SIDE, SIDE, SIDE, mean=(0.0,) * 3, std=(1.0,) * 3),
        "model": model_of(IMAGE, IMAGE_TOKENS),
        "max_length": 16,
        "max_images": 2,
    }
    return SampleEncoder(**{**fields, **changes})


def spec(size: int = 4, **changes) -> BatchSpec:
    fields = {"max_slots": 2, "image_size": (SIDE, SIDE), "max_length": 16, "pad_token_id": PAD}
    fields |= {"slot_features": IMAGE_TOKENS, "pixel_scale": ((1 / 255,) * 3, (0.0,) * 3)}
    return BatchSpec(size=size, **{**fields, **changes})


def record(number: int, images: tuple[str, ...] = (), words: int = 1) -> Record:
    """`number` is the answer's first word, so that a batch tells which records it holds."""
    answer = " ".join([str(number)] + ["a"] * (words - 1))
    turns = (Turn("human", "<image>" * len(images) + "q"), Turn("gpt", answer))
    return Record(f"r{number}", images, turns)


def numbers(batch: Batch) -> list[int]:
    """Numbers of the records in a batch; -1 for a row that was skipped."""
    firsts = [
        row[mask][0] - 10 if mask.any() else -1
        for row, mask in zip(np.asarray(batch.input_ids), np.asarray(batch.loss_mask), strict=True)
    ]
    return [int(first) for first in firsts]


def take(batches: Batches, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def make(tokenizer):
    """Makes batches over ten records, closed when the test ends."""
    opened = []

    def make(records=None, *, size=4, seed=1, shuffle=True, workers=0, rows=None, **shapes):
        records = ListRecords(records or [record(number) for number in range(10)])
        order = EpochOrder((len(records),), size, seed=seed, shuffle=shuffle)
        read = ReadBatch(order, records, encoder(tokenizer), spec(size, **shapes), rows)
        opened.append(Batches(read, workers, order.identity))
        return opened[-1]

    yield make
    for batches in opened:
        batches.close()


def test_text_one_and_two_images_in_one_batch(make, picture):
    records = [record(0), record(1, (picture(51),)), record(2, (picture(102), picture(204)), 3)]
    batch = next(make(records, size=3, shuffle=False))
    ids = np.zeros((3, 16), np.int32)
    ids[0, :3] = [4, 10, EOS]
    ids[1, :6] = [1, 1, 1, 4, 11, EOS]
    ids[2, :11] = [1, 1, 1, 1, 1, 1, 4, 12, 5, 5, EOS]
    np.testing.assert_array_equal(batch.input_ids, ids)
    learned = np.zeros((3, 16), bool)
    learned[0, 1:3] = learned[1, 4:6] = learned[2, 7:11] = True
    np.testing.assert_array_equal(batch.loss_mask, learned)
    places = np.array([[1], [2], [3]], np.int32)
    np.testing.assert_array_equal(batch.segment_ids, np.where(ids != PAD, places, 0))
    values = np.array([[0, 0], [0.2, 0], [0.4, 0.8]], np.float32)
    expected = np.broadcast_to(values[:, :, None, None, None], (3, 2, 3, SIDE, SIDE))
    np.testing.assert_allclose(normalised(batch), expected, rtol=1e-6)
    dtypes = {name: str(x.dtype) for name, x in vars(batch).items() if name != "text_checksum"}
    assert dtypes == {
        "input_ids": "int32",
        "loss_mask": "bool",
        "segment_ids": "int32",
        "feature_index": "int32",
        "feature_weights": "float32",
        "slot_tokens": "int32",
        "pixel_values": "uint8",
        "pixel_scale": "float32",
    }


def test_each_epoch_has_each_sample_once_and_its_own_order(make):
    order = [number for batch in take(make(), 10) for number in numbers(batch)]
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed(make):
    first, again, other = (
        [numbers(batch) for batch in take(make(seed=seed), 5)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_order_does_not_depend_on_the_batch_size(make):
    orders = [
        [number for batch in take(make(size=size), 20 // size) for number in numbers(batch)]
        for size in (2, 4, 10)
    ]
    assert orders[0] == orders[1] == orders[2]


def test_without_shuffling_the_order_is_the_datas(make):
    batches = take(make(shuffle=False), 5)
    assert [n for batch in batches for n in numbers(batch)] == list(range(10)) * 2


def test_a_batch_larger_than_the_data(make):
    batch = next(make(size=25, shuffle=False))
    assert Counter(numbers(batch)) == {n: 3 if n < 5 else 2 for n in range(10)}


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resume_continues_exactly(make, stop):
    batches = make()
    take(batches, stop)
    state = json.loads(json.dumps(batches.state()))
    expected = take(batches, 4)
    fresh = make()
    fresh.restore(state)
    assert fresh.state() == state
    assert_equal(take(fresh, 4), expected)
    batches.restore(state)
    assert_equal(take(batches, 4), expected)


def test_workers_change_nothing_and_resume(make, picture):
    records = [record(number, (picture(10 * number),)) for number in range(9)]
    records.append(record(9, ("nothing.png",)))
    batches = make(records)
    take(batches, 3)
    state = batches.state()
    expected = take(batches, 5)
    with_workers = make(records, workers=2)
    with_workers.restore(state)
    found = take(with_workers, 2)
    assert_equal(found, expected[:2])
    assert type(found[0].pixel_values) is np.ndarray
    middle = with_workers.state()
    assert_equal(take(with_workers, 2), expected[2:4])
    with_workers.restore(middle)
    assert_equal(take(with_workers, 3), expected[2:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "seed = 1, but this run has 2"),
        ({"size": 5}, "batch_size = 4, but this run has 5"),
        ({"records": [record(0)]}, r"records = \[10\], but this run has \[1\]"),
        ({"shuffle": False}, "seed = 1, but this run has None"),
    ],
)
def test_a_position_of_another_run_is_refused(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes).restore(make().state())


def test_buckets(make):
    buckets = spec(buckets=(8, 4))
    assert [buckets.bucket(length) for length in (0, 4, 5, 8, 9, 16)] == [4, 4, 8, 8, 16, 16]
    records = [record(0), record(1, words=5), record(2, words=8), record(3, words=30)]
    batches = make(records, size=1, buckets=(4, 8), shuffle=False)
    assert [next(batches).input_ids.shape for _ in range(4)] == [(1, 4), (1, 8), (1, 16), (1, 16)]
    with pytest.raises(ConfigError, match=r"data\.buckets \(8, 32\).*data\.max_length 16"):
        spec(buckets=(8, 32))


def test_devices_that_divide_rows_get_equally_many_tokens(make):
    records = [record(0), record(1, words=30)]
    batches = make(records, size=1, buckets=(4, 8), shuffle=False, sequence=6)
    assert [next(batches).input_ids.shape for _ in range(2)] == [(1, 6), (1, 18)]


def test_image_slots(make, picture):
    """The fewest that hold the images of the batch; a sample without a text needs none."""
    show = lambda number, count: record(number, (picture(10),) * count)
    records = [record(0), show(1, 1), show(2, 2), show(3, 0), show(4, 3), show(5, 1)]
    shapes = {"size": 2, "max_slots": 3, "shuffle": False}
    made = take(make(records, image_buckets=(0, 1, 9), **shapes), 6)
    whole = take(make(records, **shapes), 6)
    for few, all_slots, count in zip(made, whole, [1, 3, 1, 1, 3, 1], strict=True):
        assert few.pixel_values.shape[1] == count
        cut = dataclasses.replace(few, pixel_values=all_slots.pixel_values[:, :count])
        assert_equal([few], [cut])
        np.testing.assert_array_equal(few.input_ids, all_slots.input_ids)


def test_a_bad_sample_is_a_row_of_padding(make):
    records = [record(0), record(1, ("nothing.png",)), record(2)]
    batch = take(make(records, size=3, shuffle=False), 3)[-1]
    assert numbers(batch) == [0, -1, 2]
    assert not batch.loss_mask[1].any()
    assert not batch.segment_ids[1].any()
    assert (batch.input_ids[1] == PAD).all()
    assert not batch.pixel_values[1].any()


@pytest.mark.parametrize(
    ("shapes", "count"),
    [
        ({}, 1),
        ({"buckets": (4, 8)}, 2),
        ({"packing": True, "devices": 2}, 1),
        ({"packing": True, "buckets": (9,), "micro_rows": 4}, 2),
        ({"image_buckets": (0, 1), "max_slots": 2}, 1),
        ({"image_buckets": (2,), "max_slots": 5, "packing": True}, 1),
    ],
)
def test_processes_read_their_rows_of_the_same_batches(make, picture, shapes, count):
    """Of like shapes, also where the longest sample is another process' and has a bad image."""
    records = [record(n, (picture(9 * n),) if n % 3 else (), words=1 + n % 5) for n in range(9)]
    records.append(record(9, ("nothing.png",), words=5))
    whole = take(make(records, **shapes), 6)
    assert len({batch.input_ids.shape for batch in whole}) == count
    for rows in ([0, 1], [2, 3], [0, 2], [3]):
        part = take(make(records, rows=rows, **shapes), 6)
        assert_equal(part, [jax.tree.map(lambda x, rows=rows: x[rows], one) for one in whole])


@pytest.mark.parametrize(
    "shapes", [{"buckets": (8,)}, {"image_buckets": (1,)}, {"packing": True}], ids=str
)
def test_a_batch_knows_the_texts_of_all_its_rows(make, shapes):
    """Also of those of another process: a text of another length, or content, or none."""
    whole = {"records": [record(n, words=2) for n in range(4)], "shuffle": False, "rows": [0]}
    checksum = next(make(**whole, **shapes)).text_checksum
    assert 0 < checksum < 2**31
    assert next(make(**whole, **shapes)).text_checksum == checksum
    bad = dataclasses.replace(record(2), turns=())
    for other in (record(2, words=3), record(7, words=2), bad):
        records = [*whole["records"][:2], other, record(3, words=2)]
        assert next(make(**whole | {"records": records}, **shapes)).text_checksum != checksum


def test_a_batch_that_depends_on_its_own_rows_has_no_checksum(make):
    assert next(make()).text_checksum == 0


def test_packed_rows_have_the_samples_whole(make, picture):
    """The longest first, into the first row with room; a bad one is left out."""
    records = [
        record(0, (picture(51),), words=3),  # 8 tokens
        record(1, words=2),  # 4
        record(2, ("nothing.png", picture(0)), words=2),  # 10
        record(3, (picture(102),), words=2),  # 7
        record(4),  # 3
    ]
    batch = next(make(records, size=5, shuffle=False, packing=True, max_slots=5))
    one, two, four = [4, 11, 5, EOS], [1, 1, 1, 4, 13, 5, EOS], [4, 14, EOS]
    ids, places = np.zeros((2, 5, 16), np.int32)
    ids[0, :4], places[0, :4] = one, 2
    ids[1, :15], places[1, :15] = [1, 1, 1, 4, 10, 5, 5, EOS, *two], [1] * 8 + [4] * 7
    ids[2, :3], places[2, :3] = four, 5
    np.testing.assert_array_equal(batch.input_ids, ids)
    np.testing.assert_array_equal(batch.segment_ids, places)
    np.testing.assert_array_equal(batch.loss_mask, (ids >= 5) | (ids == EOS))
    values = np.zeros((5, 5))
    values[1, :2] = 0.2, 0.4
    np.testing.assert_allclose(normalised(batch)[:, :, 0, 0, 0], values, rtol=1e-6)


def test_packed_rows_have_the_length_that_needs_the_fewest_tokens(make, picture):
    """A longer sample than the bucket still trains. Short rows have room for fewer images."""
    words = [2, 2, 2, 2, 7, 7, 7, 9]
    records = [record(n, (picture(9 * n),) * (n < 4), count) for n, count in enumerate(words)]
    shapes = {"size": 4, "packing": True, "buckets": (7,), "shuffle": False, "max_slots": 5}
    tokens = lambda batch: (batch.segment_ids > 0).sum(1).tolist()
    short, long = take(make(records, **shapes), 2)
    assert short.input_ids.shape == (4, 7)
    assert short.pixel_values.shape[:2] == (4, 2)
    assert tokens(short) == [7, 7, 7, 7]
    assert long.input_ids.shape == (4, 16)
    assert long.pixel_values.shape[:2] == (4, 5)
    assert sum(tokens(long)) == sum(words[4:]) + 2 * 4
    together = take(make(records, **shapes, micro_rows=4), 1)[0]
    assert together.input_ids.shape == (4, 7)  # else four rows of 16 tokens would be computed


@pytest.mark.parametrize("workers", [0, 2])
def test_packing_changes_which_row_a_sample_is_in_and_nothing_else(make, picture, workers):
    records = [record(n, (picture(9 * n),) if n % 3 else (), words=1 + n % 9) for n in range(40)]
    shapes = {"size": 16, "max_slots": 5}
    rows = take(make(records, **shapes), 3)
    packed = take(make(records, packing=True, devices=2, workers=workers, **shapes), 3)
    for one, other in zip(rows, packed, strict=True):
        assert samples(one) == samples(other)
        filled = (other.segment_ids > 0).any(axis=1).reshape(2, 8).sum(axis=1)
        assert filled.sum() < 16
        assert abs(filled[0] - filled[1]) <= 1  # devices have alike


def samples(batch: Batch) -> list[tuple]:
    """What every sample of a batch has, in order."""
    found = {}
    for row in zip(*jax.tree.leaves(batch), strict=True):
        ids, mask, segments, index, _, slot_tokens, pixels, _ = row
        for place in dict.fromkeys(segments[segments > 0].tolist()):
            here = segments == place
            slots = np.unique(index[here & (ids == IMAGE), 0] // IMAGE_TOKENS)
            own = [pixels[slot].tolist() for slot in slots]
            firsts = (slot_tokens[slots] - np.flatnonzero(here)[0]).tolist()
            found[place] = ids[here].tolist(), mask[here].tolist(), own, firsts
    assert sorted(found) == list(range(1, len(batch.input_ids) + 1))
    return [found[place] for place in sorted(found)]


def test_a_bug_is_no_bad_sample(make):
    broken = Record("broken", (), (Turn("human", None), Turn("gpt", "a")))  # pyright: ignore
    with pytest.raises(AttributeError):
        next(make([broken]))


def test_what_an_encoder_refuses(tokenizer, picture):
    encode = encoder(tokenizer)
    path = picture(0)
    with pytest.raises(SampleError, match=r"3 images.*data\.max_images is 2"):
        encode(record(0, (path,) * 3))
    for images, said in [((path,), "q"), ((), "<image>q"), ((path,), "<image><image>q")]:
        turns = (Turn("human", said), Turn("gpt", "a"))
        with pytest.raises(
            SampleError, match=rf"<image> {said.count('<image>')} times.*{len(images)}"
        ):
            encode(Record("r", images, turns))
    with pytest.raises(SampleError, match=r"truncated to 3.*data\.max_length"):
        encoder(tokenizer, max_length=3)(record(0, (path,)))


def test_images_behind_the_cut_are_left_out(tokenizer, picture):
    turns = (
        Turn("human", "<image>q"),
        Turn("gpt", "a"),
        Turn("human", "<image>q"),
        Turn("gpt", "a"),
    )
    two = Record("two", (picture(10), "never read.png"), turns)
    sample = encoder(tokenizer, max_length=8)(two)
    assert sample.input_ids.tolist() == [1, 1, 1, 4, 5, EOS]
    assert sample.pixel_values.shape == (1, 3, SIDE, SIDE)


def test_eval_batches_have_every_record_in_order(tokenizer):
    records = [record(0), record(1, ("nothing.png",)), *(record(n) for n in range(2, 6))]
    found = list(eval_batches(ListRecords(records), encoder(tokenizer), spec(4)))
    assert [indices.tolist() for _, indices in found] == [[0, 1, 2, 3], [4, 5, -1, -1]]
    assert [numbers(batch) for batch, _ in found] == [[0, -1, 2, 3], [4, 5, -1, -1]]
    assert not found[1][0].loss_mask[2:].any()
    assert found[1][0].input_ids.shape == (4, 16)


def test_eval_batches_of_nothing(tokenizer):
    assert list(eval_batches(ListRecords(), encoder(tokenizer), spec())) == []


def test_a_batch_is_a_pytree(make):
    batch = next(make())
    on_device = jax.tree.map(jax.numpy.asarray, batch)
    assert isinstance(on_device, Batch)
    assert int(jax.jit(lambda batch: (batch.segment_ids > 0).sum())(on_device)) == 12


def test_little_shared_memory_is_not_overrun(make, picture, monkeypatch):
    records = [record(number, (picture(10 * number),)) for number in range(10)]
    expected = take(make(records), 3)
    monkeypatch.setattr(workers_module, "_fits_shared_memory", lambda size: False)
    found = take(make(records, workers=1), 3)
    assert_equal(found, expected)
    assert type(found[0].pixel_values) is np.ndarray

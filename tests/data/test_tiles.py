"""Tiles: which features become which tokens, and batches of samples with tiles."""

import dataclasses
import itertools
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_training import CONFIG, MODEL, change, start
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_jax.config import NEWLINE, NO_FEATURE, TilingConfig, VideoConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec, ReadBatch
from llava_jax.data.conversation import Turn
from llava_jax.data.image_slots import find_most_slots
from llava_jax.data.images import ImageTransform
from llava_jax.data.lengths import estimate_sizes
from llava_jax.data.order import EpochOrder
from llava_jax.data.padding import measure_padding
from llava_jax.data.records import Record
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import ListRecords
from llava_jax.data.templates import Template
from llava_jax.data.tiles import (
    best_resolution,
    image_sources,
    max_image_tokens,
    resized_size,
    video_sources,
)
from llava_jax.data.video_file import Video
from llava_jax.errors import SampleError

SIDE = MODEL.vision.image_size
TILING = TilingConfig(tuple((SIDE * a, SIDE * b) for a, b in [(1, 2), (2, 1), (2, 2)]))
TILED = dataclasses.replace(MODEL, tiling=TILING)
POOLED = dataclasses.replace(
    MODEL,
    tiling=dataclasses.replace(TILING, max_tiles=1, tiles_several_images=False),
    video=VideoConfig(62, "bilinear"),
)


def test_the_resolution_shows_most_pixels_and_pads_least():
    pinpoints = TilingConfig(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
    assert best_resolution((300, 600), pinpoints) == (336, 672)
    assert best_resolution((100, 100), pinpoints) == (336, 672)  # of equals, the first
    assert best_resolution((2000, 700), pinpoints) == (1008, 336)
    assert best_resolution((10, 5000), pinpoints) == (336, 1008)
    assert best_resolution((1, 5000), pinpoints) == (336, 672)  # at none it has a whole pixel
    assert resized_size((300, 700), (336, 672)) == (288, 672)
    assert resized_size((1, 5000), (336, 1008)) == (1, 1008)


def test_tokens_follow_the_rows_of_the_picture():
    """Tiles of 2 x 2 features; a wide image in two tiles has one row of padding above and below."""
    found = image_sources(TILED, (28, 56))
    assert found.slots == 3
    rows = [[4, 5, 8, 9, NEWLINE], [6, 7, 10, 11, NEWLINE]]
    assert found.index[:, 0].tolist() == [0, 1, 2, 3, *itertools.chain(*rows)]
    tall = image_sources(TILED, (56, 28)).index[4:, 0].tolist()
    assert tall == [4, 5, NEWLINE, 6, 7, NEWLINE, 8, 9, NEWLINE, 10, 11, NEWLINE]
    assert image_sources(TILED, None).index[:, 0].tolist() == [0, 1, 2, 3, NEWLINE]
    assert image_sources(MODEL, None).index[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [(56, 56), (60, 60), (28, 56), (90, 41), (7, 200)])
def test_pooled_tokens_are_means_of_neighbors(size: tuple[int, int]):
    found = image_sources(POOLED, size)
    is_feature = found.index[:, 0] != NEWLINE
    np.testing.assert_allclose(found.weights[is_feature].sum(axis=1), 1, rtol=1e-6)
    assert found.index.max() < found.slots * POOLED.image_tokens
    assert (found.index[~is_feature] == NEWLINE).all()


@pytest.mark.parametrize("config", [MODEL, TILED, POOLED], ids=["whole", "tiled", "pooled"])
def test_no_image_has_more_tokens(config):
    sizes = np.random.default_rng(0).integers(1, 300, (300, 2)).tolist()
    sizes = [None] if config.tiling is None else [(a, b) for a, b in sizes]
    most = max(len(image_sources(config, size).index) for size in sizes)
    assert 0.8 * max_image_tokens(config) <= most <= max_image_tokens(config)


def test_frames_of_a_video_are_pooled():
    found = video_sources(POOLED, 3)
    assert (len(found.index), found.slots) == (4, 3)  # one token for each frame, and a newline
    assert found.index.tolist()[1] == [4, 5, 6, 7]
    np.testing.assert_allclose(found.weights[:3], 0.25)
    average = dataclasses.replace(POOLED, video=VideoConfig(62, "average"))
    assert video_sources(average, 3).index.tolist() == found.index.tolist()[:3]


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    words = {"[PAD]": 61, "<image>": 60, "</s>": 2, "q": 4, "[UNK]": 3}
    words |= {f"a{number}": 5 + number for number in range(50)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="[PAD]", unk_token="[UNK]"
    )
    transform = ImageTransform(SIDE, SIDE, SIDE, tiling=TILED.tiling)
    template = Template(answer_prefix=" ", image_suffix=" ")
    return SampleEncoder(tokenizer, template, transform, TILED, max_length=64, max_images=2)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> ListRecords:
    """Samples with none, one or two images of random sizes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    found = []
    for number in range(96):
        paths = []
        for image in range(rng.choice(3, p=[0.2, 0.7, 0.1])):
            size = rng.integers(8, 90, 2)
            path = folder / f"{number}-{image}.png"
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
            paths.append(str(path))
        answer = " ".join(f"a{word}" for word in rng.integers(0, 50, rng.integers(1, 12)))
        turns = Turn("human", "<image>" * len(paths) + " q"), Turn("gpt", answer)
        found.append(Record(str(number), tuple(paths), turns))
    return ListRecords(found)


def spec_of(size: int = 8, **fields) -> BatchSpec:
    scale = ImageTransform().scale
    shapes = {"slot_features": TILED.image_tokens, "sources_per_token": 1} | fields
    return BatchSpec(size, 10, (SIDE, SIDE), 64, 61, scale, **shapes)


def reader(records: ListRecords, encoder: SampleEncoder, **fields) -> ReadBatch:
    order = EpochOrder((len(records),), 8, seed=0)
    return ReadBatch(order, records, encoder, spec_of(**fields))


def test_each_slot_is_a_tile_of_the_picture(records, encoder):
    """The levels of the slots, put together, are the resized picture."""
    record = next(record for record in map(records.__getitem__, range(96)) if record.images)
    sample = encoder(dataclasses.replace(record, images=record.images[:1], turns=record.turns))
    picture = Image.open(record.images[0])
    size = (picture.height, picture.width)
    height, width = best_resolution(size, TILING)
    new = resized_size(size, (height, width))
    canvas = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new[0]) // 2, (width - new[1]) // 2
    resized = picture.resize(new[::-1], Image.Resampling.BICUBIC)
    canvas[top : top + new[0], left : left + new[1]] = resized
    rows, columns = height // SIDE, width // SIDE
    tiles = sample.pixel_values[1:].reshape(rows, columns, 3, SIDE, SIDE)
    joined = tiles.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)
    np.testing.assert_array_equal(joined, canvas)
    whole = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(sample.pixel_values[0].transpose(1, 2, 0), whole)


def test_sizes_of_samples_are_known_before_a_run(records, encoder):
    sizes = estimate_sizes(records, encoder)
    texts = [encoder.encode_text(records[number]) for number in range(len(records))]
    assert sizes.tokens.tolist() == [len(text.input_ids) for text in texts]
    assert sizes.slots.tolist() == [sum(text.slots) for text in texts]
    assert find_most_slots(records, encoder).slots == sizes.slots.max()
    images = records.sizes.images
    assert (sizes.slots > images).any()


LENGTHS, SLOTS = (16, 40), (3, 5)


def test_mixed_batches_have_one_program_for_each_shape(records, encoder):
    config = dataclasses.replace(CONFIG, model=TILED)
    program, state, frozen = start(change(config, batch={"global_size": 8}), 1, 200)
    read = reader(records, encoder, buckets=LENGTHS, image_buckets=SLOTS)
    shapes = set()
    with jax.set_mesh(program.mesh):
        for number in range(200):
            batch = read(number)
            shapes.add((*batch.input_ids.shape, batch.pixel_values.shape[1]))
            placed = program.device_put(batch)
            state, metrics = program.train_step(state, frozen, placed)
            assert metrics["samples"] == 8
    assert np.isfinite(metrics["loss"])
    assert 1 < len(shapes) <= (len(LENGTHS) + 1) * (len(SLOTS) + 1)
    assert program.train_step._cache_size() == len(shapes)


def losses(config, records, encoder, **fields) -> tuple[list[float], list[Batch]]:
    program, state, frozen = start(config, 1, 3)
    read = reader(records, encoder, **fields)
    batches = [read(number) for number in range(3)]
    found = []
    with jax.set_mesh(program.mesh):
        for batch in batches:
            state, metrics = program.train_step(state, frozen, program.device_put(batch))
            found.append(float(metrics["loss"]))
    return found, batches


def test_packing_and_buckets_change_no_loss(records, encoder):
    """With dropout in decoder and tower; rows have room for tokens and for slots."""
    config = change(dataclasses.replace(CONFIG, model=TILED), batch={"global_size": 8})
    plain, rows = losses(config, records, encoder)
    fewer, _ = losses(config, records, encoder, buckets=LENGTHS, image_buckets=SLOTS)
    small = change(config, batch={"micro_size": 2})
    accumulated, _ = losses(small, records, encoder, image_buckets=SLOTS)
    packed, joined = losses(change(small, data={"packing": True}), records, encoder, packing=True)
    for other in (fewer, accumulated, packed):
        assert other == pytest.approx(plain, rel=2e-6)
    filled = lambda batch: int((batch.segment_ids > 0).any(axis=1).sum())
    assert sum(map(filled, joined)) < sum(map(filled, rows))
    assert max(batch.pixel_values.shape[1] for batch in joined) <= 10


def test_padding_of_slots_is_measured(records, encoder):
    sizes = estimate_sizes(records, encoder)
    order = EpochOrder((len(records),), 8, seed=0)
    padding = measure_padding(order, sizes.tokens, sizes.tokens > 0, sizes.slots)
    spec = spec_of(buckets=LENGTHS, image_buckets=SLOTS)
    read = ReadBatch(order, records, encoder, spec)
    made = [read(number) for number in range(order.batches)]
    assert padding.padded(spec.lengths) == sum(batch.input_ids.size for batch in made)
    slots = sum(math.prod(batch.pixel_values.shape[:2]) for batch in made)
    assert padding.slot_waste(spec) == pytest.approx(1 - sizes.slots.sum() / slots)


def test_an_image_that_is_missing_is_a_bad_sample(encoder, tmp_path: Path):
    turns = (Turn("human", "<image> q"), Turn("gpt", "a1"))
    records = ListRecords([Record("a", (str(tmp_path / "none.png"),), turns)])
    batch = reader(records, encoder)(0)
    assert not batch.segment_ids.any()
    assert (batch.feature_index == NO_FEATURE).all()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> ListRecords:
    """A record with a video of so many frames in a folder, beside others; 0 has an image only."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    found = []
    for number, frames in enumerate((0, 1, 3, 8)):
        place = folder / str(number)
        place.mkdir()
        for frame in range(max(frames, 1)):
            levels = rng.integers(0, 256, (40, 60, 3), np.uint8)
            Image.fromarray(levels).save(place / f"{frame}.png")
        media = "<video>" if frames else "<image>"
        turns = Turn("human", f"{media} q"), Turn("gpt", "a1 a2")
        images = () if frames else (str(place / "0.png"),)
        own = (Video(str(place)),) if frames else ()
        found.append(Record(str(number), images, turns, videos=own))
    return ListRecords(found)


def test_frames_of_videos_are_slots(videos, encoder):
    tokens = encoder.tokenizer
    tokens.add_tokens(["<video>"], special_tokens=True)
    token = tokens.convert_tokens_to_ids("<video>")
    video = VideoConfig(token, "bilinear")
    model = dataclasses.replace(POOLED, video=video)
    frames = ImageTransform(SIDE, SIDE, SIDE, aspect="squash")
    reads = dataclasses.replace(encoder, model=model, frame_transform=frames, max_frames=4)
    for record, count in zip(map(videos.__getitem__, range(4)), (0, 1, 3, 4), strict=True):
        sample = reads(record)
        if count:
            assert sample.pixel_values.shape[0] == count
            assert (sample.input_ids == token).sum() == count + 1
            assert sample.feature_index[:, 0].max() < 4 * count
            first = Image.open(f"{record.videos[0].source}/0.png")
            expected = np.asarray(first.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(sample.pixel_values[0].transpose(1, 2, 0), expected)
    assert find_most_slots(videos, reads).slots == 5
    assert estimate_sizes(videos, reads).slots.tolist() == [5, 1, 3, 4]
    with pytest.raises(SampleError, match="this model reads no videos"):
        encoder(videos[1])
    twice = dataclasses.replace(videos[1], videos=videos[1].videos * 2)
    with pytest.raises(SampleError, match="contain <video> 1 times, but the sample has 2 videos"):
        reads(twice)

"""Twenty steps of models with tiles and videos beside transformers, torch and peft."""

import dataclasses
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from test_training import CONFIG, FULL, GROUP, SIZE, apart, ours, theirs
from tiny_family import IMAGE, make_member
from tiny_training import change

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec, fill
from llava_jax.data.conversation import Encoded
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.samples import Sample
from llava_jax.data.tiles import image_sources, is_tiled, video_sources
from llava_jax.pretrained.model_config import read_model_config

LIMIT = 1e-4

SIZES = [[(20, 70)], [(60, 33)], [], [(50, 50), (30, 90)]]
"""Sizes of the images of the first samples of a batch; the last one is a video."""

TOWER = {"vision_learning_rate": 2e-4}
CASES = {
    "LoRA": change(CONFIG, batch={"micro_size": GROUP}),
    "full": FULL,
    "LoRA and tower in full": change(CONFIG, tune={"vision": "full"}, optimizer=TOWER),
    "full, tower too": change(FULL, tune={"vision": "full"}, optimizer=TOWER),
}
MEMBERS = ("next", "next_video", "onevision_pooled")


def samples_of(config: ModelConfig, step: int) -> list[tuple[Sample, list, int]]:
    """Random samples, each with the sizes of its images and the number of frames of its video."""
    rng = np.random.default_rng(step)
    found = []
    for number in range(SIZE):
        sizes, frames = SIZES[number % len(SIZES)], 0
        tiled = is_tiled(config, len(sizes))
        sources = [image_sources(config, size if tiled else None) for size in sizes]
        media = [config.image_token_id] * len(sizes)
        if config.video is not None and number % len(SIZES) == 2:
            frames = 1 + number % 3
            sources, media = [video_sources(config, frames)], [config.video.token_id]
        words = rng.integers(3, IMAGE, 12).tolist()
        ids = np.array(words[:3] + media + words[3:], np.int32)
        learned = np.arange(len(ids)) >= len(ids) - 6
        text = expand_images(Encoded(ids, learned), config, sources)
        pixels = rng.integers(0, 256, (sum(text.slots), 3, 28, 28), np.uint8)
        features = text.feature_index, text.feature_weights
        found.append((Sample(text.input_ids, text.loss_mask, *features, pixels), sizes, frames))
    return found


SCALE = ((0.015,) * 3, (-1.9, -2.0, -1.8))


def batch_of(model: ModelConfig, config: TrainConfig, step: int) -> Batch:
    samples = [sample for sample, _, _ in samples_of(model, step)]
    spec = BatchSpec(
        SIZE,
        max(len(sample.pixel_values) for sample in samples),
        (28, 28),
        512,
        0,
        SCALE,
        slot_features=model.image_tokens,
        sources_per_token=model.sources_per_token,
    )
    length = max(len(sample.input_ids) for sample in samples)
    batch = fill([{at: sample} for at, sample in enumerate(samples)], SIZE, spec, length)
    return dataclasses.replace(batch, text_checksum=step)


def logits_of(config: ModelConfig, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Logits [B, T, V] of transformers, one sample at a time."""
    factors, offsets = np.array(SCALE, np.float32)[:, :, None, None]
    rows = []
    for row, (sample, sizes, frames) in enumerate(samples_of(config, batch.text_checksum)):
        pixels = torch.tensor(sample.pixel_values * factors + offsets)
        inputs = {"input_ids": torch.tensor(batch.input_ids[row : row + 1]).long()}
        inputs["attention_mask"] = torch.tensor(batch.segment_ids[row : row + 1] > 0).long()
        if frames:
            inputs["pixel_values_videos"] = pixels[None]
        elif sizes:
            tiled = is_tiled(config, len(sizes))
            counts = [image_sources(config, size if tiled else None).slots for size in sizes]
            inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(
                torch.split(pixels, counts), batch_first=True
            )
            inputs["image_sizes"] = torch.tensor(sizes)
            if not config.tiling.tiles_several_images:
                inputs["batch_num_images"] = torch.tensor([len(sizes)])
        rows.append(model(**inputs).logits)
    return torch.cat(rows)


pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft 0.21, transformers 5
    pytest.mark.parity("training", "peft", "transformers"),
]


SHORT = {("LoRA", "next"), ("full, tower too", "onevision_pooled"), ("full", "next_video")}


@pytest.mark.parametrize(
    ("name", "member"),
    [
        pytest.param(*pair, marks=() if pair in SHORT else pytest.mark.slow)
        for pair in itertools.product(CASES, MEMBERS)
    ],
)
def test_twenty_steps_beside_torch(name: str, member: str, assert_parity, tmp_path):
    base = make_member(member)
    base.save_pretrained(tmp_path / "base")
    model = read_model_config(tmp_path / "base")
    make = partial(batch_of, model)
    found, _, _ = ours(CASES[name], tmp_path / "base", tmp_path / "start", make)
    wanted = theirs(CASES[name], base, tmp_path / "start", make, partial(logits_of, model))
    assert_parity("losses, relative", apart(found, wanted), LIMIT)
    assert len(set(found)) == len(found)

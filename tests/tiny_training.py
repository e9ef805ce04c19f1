"""A tiny model and random batches for tests of the training step."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from llava_jax.config import (
    VISION_LINEARS,
    BatchConfig,
    LlmConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec, fill
from llava_jax.data.packing import deal, first_fit
from llava_jax.data.samples import Sample
from llava_jax.data.tiles import index_whole_images
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.build import initialise
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import TrainState, init_state

MODEL = ModelConfig(
    VisionConfig(
        image_size=28,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
    ),
    LlmConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
    image_token_id=60,
    pad_token_id=61,
)

CONFIG = TrainConfig(
    name="tiny",
    model=MODEL,
    dtype="float32",
    tune=TuneConfig(llm="lora", vision="lora", projector="full"),
    lora=LoraConfig(rank=8, alpha=16.0, dropout=0.1),
    vision_lora=LoraConfig(rank=8, alpha=8.0, dropout=0.1, targets=VISION_LINEARS),
    batch=BatchConfig(global_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-2, projector_learning_rate=1e-3),
)


SCALE = ((0.015,) * 3, (-1.9, -2.0, -1.8))
"""Normalises pixels, about."""


def random_batch(seed: int, size: int = 16, length: int = 20, images: int = 2) -> Batch:
    """Samples with none, one or two images and different lengths."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, 60, (size, length), dtype=np.int32)
    segment_ids = np.repeat(1 + np.arange(size, dtype=np.int32)[:, None], length, axis=1)
    for row in range(size):
        for image in range(row % (images + 1)):
            start = 1 + image * 6
            input_ids[row, start : start + MODEL.image_tokens] = MODEL.image_token_id
        cut = length - row % 5
        input_ids[row, cut:], segment_ids[row, cut:] = MODEL.pad_token_id, 0
    loss_mask = (segment_ids > 0) & (input_ids != MODEL.image_token_id)
    loss_mask[:, : length // 2] = False
    pixels = rng.integers(0, 256, (size, images, 3, 28, 28), np.uint8)
    scale = np.tile(np.array(SCALE, np.float32), (size, 1, 1))
    features = index_whole_images(input_ids, MODEL, images)
    return Batch(
        input_ids, loss_mask, segment_ids, **features, pixel_values=pixels, pixel_scale=scale
    )


def packed(batch: Batch, room: int, devices: int = 1) -> Batch:
    """The same samples, several in a row of so many tokens."""
    samples = {}
    for place, row in enumerate(zip(*jax.tree.leaves(batch), strict=True)):
        ids, mask, segments, index, weights, _, pixels, _ = row
        images = int((ids == MODEL.image_token_id).sum()) // MODEL.image_tokens
        real = segments > 0
        samples[place] = Sample(ids[real], mask[real], index[real], weights[real], pixels[:images])
    size, images = len(samples), room // MODEL.image_tokens
    lengths = {place: len(s.input_ids) for place, s in samples.items()}
    slots = {place: len(s.pixel_values) for place, s in samples.items()}
    layout = first_fit(lengths, slots, room, images)
    features = MODEL.image_tokens
    spec = BatchSpec(
        size, images, (28, 28), room, MODEL.pad_token_id, SCALE, slot_features=features
    )
    dealt = deal(layout, size, devices)
    rows = [{at: samples[at] for at in dealt.get(row, ())} for row in range(size)]
    return fill(rows, size, spec, room)


def start(
    config: TrainConfig, devices: int, steps: int
) -> tuple[Program, TrainState, dict[str, jax.Array]]:
    """A program on so many devices, its first state and its frozen parameters, from the seed."""
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program = build_program(config, config.model or MODEL, steps, mesh)
    params = initialise(program.abstract, config.seed)
    trainable = {path: params.pop(path) for path in program.trainable}
    return program, init_state(program.state, trainable, config.seed), params


def run(
    config: TrainConfig,
    devices: int = 1,
    steps: int = 3,
    make: Callable[[int], Batch] = random_batch,
) -> tuple[list[dict[str, float]], Program, TrainState]:
    """Trains on batches by number; returns the metrics of each step."""
    program, state, frozen = start(config, devices, steps)
    rows = []
    with jax.set_mesh(program.mesh):
        for step in range(steps):
            batch = program.device_put(make(step))
            state, metrics = program.train_step(state, frozen, batch)
            rows.append({name: value.sum().item() for name, value in metrics.items()})
    return rows, program, state


def change(config: TrainConfig, **fields: dict[str, object]) -> TrainConfig:
    """A config with fields of its groups replaced: change(c, batch={"micro_size": 4})."""
    return dataclasses.replace(
        config,
        **{
            group: dataclasses.replace(getattr(config, group), **values)
            for group, values in fields.items()
        },
    )


__all__ = ["CONFIG", "MODEL", "MeshConfig", "change", "packed", "random_batch", "run", "start"]

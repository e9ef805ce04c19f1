"""Makes the comparison of `tools/packing_speed.py`."""

import argparse
import dataclasses
import statistics
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import (
    BatchConfig,
    DataConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    TilingConfig,
    TrainConfig,
    TuneConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.data.batching import BatchSpec, fill
from llava_jax.data.conversation import Encoded
from llava_jax.data.image_tokens import expand_images
from llava_jax.data.images import ImageTransform
from llava_jax.data.packing import deal, first_fit, slots_in_row
from llava_jax.data.samples import Sample
from llava_jax.data.tiles import image_sources, is_tiled
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.build import initialise
from llava_jax.planning.compile import attention_here
from llava_jax.speed.case import SHAPES
from llava_jax.train_step.loss import next_tokens, token_losses
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import forward, init_state

LIMIT = 1e-5  # largest relative difference between a sample's losses with and without packing

COCO = (480, 640)

MIXTURE = (
    # Name of the data set, thousands of samples, size of an image, text tokens. The sizes (height,
    # width) in pixels are those of most images of COCO, and estimates for the other data sets.
    # The numbers of samples are from table 7 of Liu et al., "Improved Baselines with Visual
    # Instruction Tuning" (2023). The numbers of text tokens are estimated medians of log-normal
    # distributions, derived from the number of questions in a sample. They include 40 tokens of the
    # system prompt.
    ("LLaVA", 158, COCO, 260),
    ("ShareGPT", 40, None, 1200),
    ("VQAv2", 83, COCO, 150),
    ("GQA", 72, COCO, 240),
    ("OKVQA", 9, COCO, 80),
    ("OCRVQA", 80, (475, 330), 200),
    ("A-OKVQA", 66, COCO, 110),
    ("TextCaps", 22, (768, 1024), 120),
    ("RefCOCO", 48, COCO, 250),
    ("VG", 86, COCO, 300),
)
TILING = TilingConfig(((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
"""Resolutions of LLaVA-1.6."""

SPREAD = 0.5  # standard deviation of the logarithm of the number of text tokens


def compare(given: argparse.Namespace) -> bool:
    """Measures training with and without packing, and prints the results.

    Args:
        given: Arguments of the command.

    Returns:
        True if the two losses of each sample differ by at most `LIMIT`, relative to the loss.
    """
    model = SHAPES[given.shape]
    if given.tiles:
        model = dataclasses.replace(model, tiling=TILING)
    config = TrainConfig(
        "packing",
        model=model,
        tune=TuneConfig("lora", "frozen", "full"),
        lora=LoraConfig(16, 32.0, dropout=0.0),
        data=DataConfig(max_length=given.max_length),
        batch=BatchConfig(given.samples, given.micro_size),
        memory=MemoryConfig(remat="full"),
        dtype=given.dtype,
    )
    packing = dataclasses.replace(config.data, packing=True, max_length=given.packed_length)
    sides = [Side(config), Side(dataclasses.replace(config, data=packing))]
    seconds: list[list[float]] = [[], []]
    tokens, apart = [], 0.0
    for step in range(given.rounds + 1):  # the first step compiles and is not counted
        samples = make_samples(model, given.samples, given.max_length, step)
        batches = [side.batch(samples) for side in sides]
        losses = [side.losses(batch) for side, batch in zip(sides, batches, strict=True)]
        apart = max(apart, float(np.max(np.abs(losses[1] / losses[0] - 1))))
        tokens.append(sum(len(sample.input_ids) for sample in samples))
        for side, batch, times in zip(sides, batches, seconds, strict=True):
            times.append(side.step(batch))
        rows = [int((batch.segment_ids > 0).any(axis=1).sum()) for batch in batches]
        text = f"{tokens[-1]:,} tokens in {rows[0]} rows, or in {rows[1]} packed rows"
        print(f"step {step}: {text}", flush=True)
    speeds = [
        statistics.median(n / s for n, s in zip(tokens[1:], times[1:], strict=True))
        for times in seconds
    ]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {given.shape}, {given.dtype}")
    print(f"tokens/s without padding tokens: {speeds[0]:,.0f}; with packing {speeds[1]:,.0f}")
    print(
        f"packing is {speeds[1] / speeds[0]:.2f} x as fast; the largest relative difference of a "
        f"sample's losses is {apart:.1e}"
    )
    return apart <= LIMIT


def make_samples(model: ModelConfig, count: int, most: int, seed: int) -> list[Sample]:
    """Returns random samples with lengths as in `MIXTURE`; the second half of a text is learned.

    Args:
        model: Sizes of the model.
        count: Number of samples.
        most: Maximum number of tokens in a sample.
        seed: Random seed.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([size for _, size, _, _ in MIXTURE], float)
    side = model.vision.image_size
    samples = []
    for kind in rng.choice(len(MIXTURE), count, p=sizes / sizes.sum()):
        _, _, size, median = MIXTURE[kind]
        sources = []
        if size is not None:
            sources = [image_sources(model, size if is_tiled(model, 1) else None)]
        room = most - sum(len(one.index) for one in sources)
        length = int(np.clip(rng.lognormal(np.log(median), SPREAD), 8, room))
        words = rng.integers(3, model.image_token_id, length, np.int32)
        ids = np.insert(words, 1, [model.image_token_id] * len(sources)).astype(np.int32)
        learned = np.arange(len(ids)) >= len(ids) - length // 2
        text = expand_images(Encoded(ids, learned), model, sources)
        pixels = rng.integers(0, 256, (sum(text.slots), 3, side, side), np.uint8)
        features = text.feature_index, text.feature_weights
        samples.append(Sample(text.input_ids, text.loss_mask, *features, pixels))
    return samples


class Side:
    """A model in training, either with one sample in each row or with packed rows.

    Args:
        config: Config of the run; `data.packing` switches packing on.
    """

    def __init__(self, config: TrainConfig):
        assert config.model is not None
        self._data, self._model = config.data, config.model
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        implementation = attention_here(config, config.model)
        self._program = build_program(
            config, config.model, 100, mesh, implementation=implementation
        )
        self._frozen = initialise(self._program.abstract, config.seed)
        trainable = {path: self._frozen.pop(path) for path in self._program.trainable}
        self._state = init_state(self._program.state, trainable, config.seed)
        self._losses = jax.jit(partial(sample_losses, self._program, config.batch.global_size))

    def batch(self, samples: list[Sample]) -> Batch:
        """Returns a batch of the samples with rows of `data.max_length` tokens."""
        length = self._data.max_length
        most = max(len(sample.pixel_values) for sample in samples)
        images = slots_in_row(self._data, self._model, max(most, 1))
        layout = {place: [place] for place in range(len(samples))}
        if self._data.packing:
            lengths = {place: len(sample.input_ids) for place, sample in enumerate(samples)}
            slots = {place: len(sample.pixel_values) for place, sample in enumerate(samples)}
            layout = deal(first_fit(lengths, slots, length, images), len(samples), 1)
        rows = [{at: samples[at] for at in layout.get(row, ())} for row in range(len(samples))]
        size = (self._model.vision.image_size,) * 2
        scale = ImageTransform().scale
        spec = BatchSpec(
            len(samples),
            images,
            size,
            length,
            self._model.pad_token_id,
            scale,
            slot_features=self._model.image_tokens,
            sources_per_token=self._model.sources_per_token,
        )
        return fill(rows, len(samples), spec, length)

    def step(self, batch: Batch) -> float:
        """Makes a train step and returns its duration in seconds."""
        placed = self._program.device_put(batch)
        start = time.perf_counter()
        self._state, metrics = self._program.train_step(self._state, self._frozen, placed)
        loss = metrics["loss"].item()
        assert np.isfinite(loss)
        return time.perf_counter() - start

    def losses(self, batch: Batch) -> np.ndarray:
        """Returns the loss of each sample, without training.

        One row at a time is computed, because all rows together could need too much memory.
        """
        params = self._frozen | self._state.trainable
        rows = jax.tree.map(lambda x: np.split(x, len(x)), batch)
        total: Any = 0
        for row in range(len(batch.input_ids)):
            one = jax.tree.map(lambda x: x[row], rows, is_leaf=lambda x: isinstance(x, list))
            if (one.segment_ids > 0).any():
                place = self._program.device_put(one)
                total += np.asarray(self._losses(params, place), np.float64)
        return total[1 : 1 + len(batch.input_ids)]


def sample_losses(program: Program, count: int, params: dict[str, Any], batch: Batch) -> jax.Array:
    """Returns the sum of the token losses of each sample, [count + 1]; index 0 is padding."""
    targets, learned = next_tokens(batch.input_ids, batch.loss_mask, batch.segment_ids)
    nll = token_losses(*forward(program.graphdef, params, batch, None), targets, learned).nll
    return jnp.zeros(count + 1).at[batch.segment_ids].add(nll)

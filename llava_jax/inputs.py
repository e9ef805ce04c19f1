"""What goes into a run besides weights: its tokenizer, its image transform and its data."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ConfigError, ModelConfig, Parts, TrainConfig
from llava_jax.data.batching import (
    Batch,
    Batches,
    BatchSpec,
    SampleEncoder,
    eval_batches,
    make_dataset,
)
from llava_jax.data.conversation import TEMPLATES
from llava_jax.data.records import Record
from llava_jax.data.sources import load_records, max_images
from llava_jax.hf.processor import load_image_transform
from llava_jax.hf.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's data, ready to be read.

    Attributes:
        tokenizer: The checkpoint's.
        encoder: Record -> tokens and pixels.
        spec: Shapes of training batches.
        records: What is learned from.
        eval_records: Held-out data; empty without.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: SampleEncoder
    spec: BatchSpec
    records: Sequence[Record]
    eval_records: Sequence[Record]

    def train_batches(self) -> Batches:
        """Batches without end, from the start of the first epoch."""
        return make_dataset(
            self.records,
            self.encoder,
            self.spec,
            seed=self.config.seed,
            shuffle=self.config.data.shuffle,
            workers=self.config.data.workers,
        )

    def eval_batches(self, size: int) -> Iterator[tuple[Batch, np.ndarray]]:
        """All held-out samples in order, `size` at a time, with their indices."""
        spec = dataclasses.replace(self.spec, size=size)
        return eval_batches(self.eval_records, self.encoder, spec, workers=self.config.data.workers)


def open_inputs(config: TrainConfig, model: ModelConfig, processor: Path | Parts) -> Inputs:
    """Opens a run's data.

    Args:
        config: The run.
        model: The model's sizes and token ids.
        processor: Where the tokenizer and image processor lie.

    Raises:
        ConfigError: The data or the template does not exist or fit.
        CheckpointError: The tokenizer or image processor cannot be read.
    """
    data = config.data
    if data.template not in TEMPLATES:
        raise ConfigError(f"data.template {data.template!r}; there are {', '.join(TEMPLATES)}")
    records = load_records(data.path, data.image_root)
    eval_records = load_records(data.eval_path, data.image_root) if data.eval_path else []
    eval_records = eval_records[: data.eval_samples]
    images = data.max_images
    if images is None:
        images = max(max_images(records), max_images(eval_records))
    transform = load_image_transform(processor, data.image_aspect)
    height, width = size = transform.height, transform.width
    if not height == width == model.vision.image_size:
        raise ConfigError(
            f"{processor}: the image processor gives {height} x {width} pixels, but the vision "
            f"tower takes {model.vision.image_size}; they belong to different models"
        )
    tokenizer = load_tokenizer(processor)
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=TEMPLATES[data.template],
        transform=transform,
        image_token_id=model.image_token_id,
        image_tokens=model.image_tokens,
        max_length=data.max_length,
        max_images=images,
        max_text_length=data.max_text_length,
    )
    spec = BatchSpec(
        size=config.batch.global_size,
        max_images=images,
        image_size=size,
        max_length=data.max_length,
        pad_token_id=model.pad_token_id,
        buckets=data.buckets,
    )
    return Inputs(config, tokenizer, encoder, spec, records, eval_records)

"""What goes into a run besides weights: its tokenizer, its image transform and its data."""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.config import DataConfig, DataSet, ModelConfig, Parts, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches, BatchSpec, ReadBatch, SampleEncoder, eval_batches
from llava_jax.data.conversation import SampleError
from llava_jax.data.digest import data_digest
from llava_jax.data.order import EpochOrder, Grouping
from llava_jax.data.packing import images_in_row
from llava_jax.data.sources import JoinedRecords, ListRecords, Records, load_records
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.processor import load_fitting_transform
from llava_jax.pretrained.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A run's data, ready to be read.

    Attributes:
        tokenizer: The checkpoint's.
        encoder: Record -> tokens and pixels.
        spec: Shapes of training batches.
        records: What is learned from.
        order: Which of them each batch has.
        eval_records: Held-out data; empty without.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: SampleEncoder
    spec: BatchSpec
    records: Records
    order: EpochOrder
    eval_records: Records

    def divided(self, devices: int) -> "Inputs":
        """The same, for so many devices that the rows of a batch are divided among."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, devices=devices))

    def train_batches(self, rows: Sequence[int] | None = None) -> Batches:
        """Batches without end, from the start of the first epoch; of each but some rows."""
        read = ReadBatch(self.order, self.records, self.encoder, self.spec, rows)
        return Batches(read, self.config.data.workers, self.order.identity)

    def eval_batches(
        self, size: int, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """All held-out samples in order, `size` at a time, with their indices."""
        images = self.encoder.max_images
        spec = dataclasses.replace(self.spec, size=size, max_images=images, packing=False)
        workers = self.config.data.workers
        return eval_batches(self.eval_records, self.encoder, spec, rows, workers=workers)

    @functools.cached_property
    def digest(self) -> dict[str, list[dict[str, Any]]]:
        """What the data is known again by; plain JSON."""
        return {
            "train": data_digest(self.records),
            "eval": data_digest(self.eval_records) if self.eval_records else [],
        }

    def summary(self) -> str:
        """How the data is made into batches."""
        text = f"{len(self.records):,} samples, batches of {self.spec.size}"
        if self.config.data.group_by_modality_length:
            alike = self.order.batches_alike()
            text += ": an epoch has {:,} with images, {:,} without, {:,} of both".format(*alike)
        if self.spec.packing:
            return f"{text}; packed into rows of {self.spec.max_length} tokens"
        lengths = ", ".join(map(str, sorted({*self.spec.buckets, self.spec.max_length})))
        return f"{text}; padded to {lengths} tokens"

    def why_skipped(self, number: int, records: Records | None = None) -> str:
        """What is wrong with a record, of the training data or others, by reading it once more."""
        found = self._what_is_wrong(self.records if records is None else records, number)
        return found or "it could not be read when its turn came, but can be now"

    def _what_is_wrong(self, records: Records, number: int) -> str | None:
        try:
            self.encoder(records[number])
        except SampleError as error:
            return str(error)
        return None

    def describe_text(self, number: int, records: Records) -> str:
        """What a record's text is as tokens, short; or why it cannot be used."""
        try:
            ids = self.encoder.encode_text(records[number]).input_ids
        except SampleError as error:
            return f"none ({error})"
        return f"{len(ids)} with checksum {zlib.crc32(ids.tobytes()):08x}"

    def check_some(self) -> None:
        """Tries a few records, spread over the data, before anything is loaded.

        Raises:
            ConfigError: More cannot be used than chance allows, if as few are bad as may be.
        """
        count = len(self.records)
        tried = np.unique(np.linspace(0, count - 1, min(count, _TRIED)).astype(int)).tolist()
        found = {number: self._what_is_wrong(self.records, number) for number in tried}
        bad = {number: reason for number, reason in found.items() if reason}
        by_chance = _BY_CHANCE if len(tried) < count else 0
        if len(bad) > self.config.data.max_skipped * len(tried) + by_chance:
            number, reason = next(iter(bad.items()))
            raise ConfigError(
                f"of {len(tried)} samples that were tried, {len(bad)} cannot be used; the first, "
                f"{self.records.where(number)}: {reason}. `llava-jax check-data` lists them all, "
                "and writes the others with --write-clean; or raise data.max_skipped, which is "
                f"{self.config.data.max_skipped:g}"
            )


_TRIED, _BY_CHANCE = 64, 6
"""Of 64 samples, 7 or more are bad once in a million data sets of which one in a hundred is."""


def open_records(data: DataConfig) -> tuple[Records, tuple[int, ...], tuple[float, ...]]:
    """A run's records, how many each data set has, and their weights.

    Raises:
        ConfigError: One is missing or malformed.
    """
    mixture = data.mixture or (DataSet(data.path, data.image_root),)
    if data.mixture and data.path:
        raise ConfigError(f"data.path {data.path} and data.mixture: give one of them")
    parts = [
        load_records(part.path, part.image_root, follow_links=data.follow_links) for part in mixture
    ]
    records = parts[0] if len(parts) == 1 else JoinedRecords(parts)
    return records, tuple(map(len, parts)), tuple(part.weight for part in mixture)


def make_order(
    config: TrainConfig,
    records: Records,
    counts: tuple[int, ...],
    weights: tuple[float, ...],
) -> EpochOrder:
    """The order of a run's samples."""
    grouping = None
    if config.data.group_by_modality_length:
        images, words = records.sizes
        grouping = Grouping(images > 0, words, config.batch.loss_group)
    return EpochOrder(
        counts,
        config.batch.global_size,
        seed=config.seed,
        weights=weights,
        shuffle=config.data.shuffle,
        grouping=grouping,
    )


def find_model(
    config: TrainConfig, source: Path | Parts | None
) -> tuple[ModelConfig, Path | Parts]:
    """The model's sizes, and where its tokenizer and image processor lie.

    Raises:
        ConfigError: The config does not say.
    """
    processor = source if config.processor is None else Path(config.processor)
    if processor is None:
        raise ConfigError("set processor: a model from scratch brings no tokenizer")
    if source is not None:
        return read_config(source), processor
    if config.model is None:
        raise ConfigError("set init_from to a checkpoint, or model to train from scratch")
    return config.model, processor


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
    records, counts, weights = open_records(data)
    order = make_order(config, records, counts, weights)
    eval_records: Records = ListRecords()
    if data.eval_path:
        eval_records = load_records(data.eval_path, data.image_root, follow_links=data.follow_links)
    eval_records = eval_records[: data.eval_samples]
    images = data.max_images
    if images is None:
        images = max(records.sizes.most_images, eval_records.sizes.most_images)
    transform = load_fitting_transform(processor, model, data.image_aspect)
    tokenizer = load_tokenizer(processor)
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=TEMPLATES[data.template],
        transform=dataclasses.replace(transform, decode=data.image_decode),
        image_token_id=model.image_token_id,
        image_tokens=model.image_tokens,
        max_length=data.max_length,
        max_images=images,
        max_text_length=data.max_text_length,
    )
    spec = BatchSpec(
        size=config.batch.global_size,
        max_images=images_in_row(data, model, images),
        image_size=(transform.height, transform.width),
        max_length=data.max_length,
        pad_token_id=model.pad_token_id,
        pixel_scale=transform.scale,
        buckets=data.buckets,
        packing=data.packing,
    )
    return Inputs(config, tokenizer, encoder, spec, records, order, eval_records)

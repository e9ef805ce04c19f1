"""Opens the inputs of a run, except the weights: tokenizer, image transform and data."""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.config import DataConfig, DataSet, ModelConfig, Parts, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches, BatchSpec, ReadBatch, SampleEncoder, eval_batches
from llava_jax.data.conversation import end_token
from llava_jax.data.digest import data_digest
from llava_jax.data.lengths import estimate_lengths
from llava_jax.data.order import EpochOrder, Grouping
from llava_jax.data.packing import images_in_row
from llava_jax.data.padding import choose_buckets, measure_padding
from llava_jax.data.sources import JoinedRecords, ListRecords, Records, load_records
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError, SampleError
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.processor import end_tokens, load_fitting_transform
from llava_jax.pretrained.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Opened inputs of a run: tokenizer, encoder and data.

    Attributes:
        config: Config of the run.
        tokenizer: Tokenizer of the model.
        encoder: Encoder that turns a record into tokens and pixels.
        spec: Shapes of training batches.
        records: Training data.
        order: Order of the samples; gives the indices of the records in each training batch.
        eval_records: Eval data; empty if the run has no eval data.
        ends: Ids of the tokens that end an answer, as the export of the run names them.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: SampleEncoder
    spec: BatchSpec
    records: Records
    order: EpochOrder
    eval_records: Records
    ends: frozenset[int] = frozenset()

    def planned(self, devices: int, micro_rows: int) -> "Inputs":
        """Returns the same inputs for the plan of a run.

        Args:
            devices: Number of devices that the rows of a batch are divided among.
            micro_rows: Number of rows in a micro-batch on all devices together.
        """
        return self._with_spec(devices=devices, micro_rows=micro_rows)

    def with_buckets(self, buckets: tuple[int, ...]) -> "Inputs":
        """Returns the same inputs for batches whose rows have one of these lengths in tokens."""
        return self._with_spec(buckets=buckets)

    def _with_spec(self, **fields: Any) -> "Inputs":
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **fields))

    def choose_buckets(self, steps: int) -> tuple[tuple[int, ...], float]:
        """Chooses the bucket lengths for the training data; see `padding.choose_buckets`.

        The choice takes seconds at most. It depends only on the config and on the data.

        Args:
            steps: Number of train steps of the run.

        Returns:
            The bucket lengths, and the expected fraction of padding among the tokens.

        Raises:
            ConfigError: A data file changed after it was opened.
        """
        tokens = estimate_lengths(self.records, self.encoder)
        # Each further epoch costs a new order of all records; the batches of one are enough.
        last = min(steps, max(self.order.batches, _MEASURED)) - 1
        numbers = np.unique(np.linspace(0, last, min(last + 1, _MEASURED)).astype(int)).tolist()
        padding = measure_padding(self.order, tokens, tokens > 0, numbers)
        buckets = choose_buckets(padding, self.spec, steps)
        spec = dataclasses.replace(self.spec, buckets=buckets)
        computed = (
            padding.packed(spec.lengths, spec.micro_rows)
            if spec.packing
            else padding.padded(spec.lengths)
        )
        return buckets, padding.waste(computed)

    def train_batches(self, rows: Sequence[int] | None = None) -> Batches:
        """Returns an endless iterator over training batches, starting with the first epoch.

        Args:
            rows: Indices of the rows of each batch that this process reads; None reads all rows.
        """
        read = ReadBatch(self.order, self.records, self.encoder, self.spec, rows)
        return Batches(read, self.config.data.workers, self.order.identity)

    def eval_batches(
        self, size: int, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Returns an iterator over batches of all eval samples, in the order of the eval data.

        The iterator yields pairs of a batch and the record index of each row, int64 [size]. Rows
        that pad the last batch have the index NO_RECORD.

        Args:
            size: Number of samples in a batch.
            rows: Indices of the rows of each batch that this process reads; None reads all rows.
        """
        spec, workers = self.eval_spec(size), self.config.data.workers
        return eval_batches(self.eval_records, self.encoder, spec, rows, workers=workers)

    def eval_spec(self, size: int) -> BatchSpec:
        """Returns the shapes of eval batches of `size` samples, which have one sample per row."""
        images = self.encoder.max_images
        return dataclasses.replace(self.spec, size=size, max_images=images, packing=False)

    def digest(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the digests of the training data and the eval data, as a JSON object.

        A resumed run compares these digests with the digests in data.json. Some images are read for
        them, so a run calls this once.
        """
        return {
            "train": data_digest(self.records),
            "eval": data_digest(self.eval_records) if self.eval_records else [],
        }

    def summary(self) -> str:
        """Returns a line of text that describes the batches of the training data."""
        text = f"{len(self.records):,} samples, batches of {self.spec.size}"
        if self.config.data.group_by_modality_length:
            alike = self.order.batches_alike()
            text += " (per epoch: {:,} with images, {:,} without, {:,} mixed)".format(*alike)
        lengths = ", ".join(map(str, self.spec.lengths))
        if self.spec.packing:
            return f"{text}; packed into rows of {lengths} tokens"
        return f"{text}; padded to {lengths} tokens"

    def why_skipped(self, number: int, records: Records | None = None) -> str:
        """Reads a skipped record again, and returns the reason why it was skipped.

        Args:
            number: Index of the record.
            records: Records that the index refers to; None is the training data.
        """
        found = self._what_is_wrong(self.records if records is None else records, number)
        return found or "it could not be read before, but it can be read now"

    def _what_is_wrong(self, records: Records, number: int) -> str | None:
        """Returns the reason why a record cannot be used; None if it can be used."""
        try:
            self.encoder(records[number])
        except SampleError as error:
            return str(error)
        return None

    def describe_text(self, number: int, records: Records) -> str:
        """Returns a record's number of tokens and their checksum, or why it cannot be used.

        Args:
            number: Index of the record.
            records: Records that the index refers to.
        """
        try:
            ids = self.encoder.encode_text(records[number]).input_ids
        except SampleError as error:
            return f"no tokens ({error})"
        return f"{len(ids)} tokens with checksum {zlib.crc32(ids.tobytes()):08x}"

    def check_some(self) -> None:
        """Reads up to 64 training records, evenly spread, to find bad data before a run starts.

        Raises:
            ConfigError: Too many of these records cannot be used. The training data therefore
                almost certainly contains more bad records than data.max_skipped allows.
        """
        count = len(self.records)
        tried = np.unique(np.linspace(0, count - 1, min(count, _TRIED)).astype(int)).tolist()
        found = {number: self._what_is_wrong(self.records, number) for number in tried}
        bad = {number: reason for number, reason in found.items() if reason}
        by_chance = _BY_CHANCE if len(tried) < count else 0
        if len(bad) > self.config.data.max_skipped * len(tried) + by_chance:
            number, reason = next(iter(bad.items()))
            raise ConfigError(
                f"{len(bad)} of {len(tried)} tested samples cannot be used. The first one is "
                f"{self.records.where(number)}: {reason}. Run `llava-jax check-data` to list all "
                "bad samples; with --write-clean, it writes the good samples to a new file. Or "
                f"raise data.max_skipped, which is {self.config.data.max_skipped:g}"
            )


_MEASURED = 128
"""Number of batches whose padding is measured to choose the bucket lengths."""

_TRIED, _BY_CHANCE = 64, 6
"""Number of records to test, and number of bad records among them that may be due to chance.

If 1 % of the data is bad, 64 random records have 7 or more bad ones with a probability of 4e-6.
"""


def open_records(data: DataConfig) -> tuple[Records, tuple[int, ...], tuple[float, ...]]:
    """Opens the training data of a run.

    Returns:
        All records, the number of records in each data set, and the weight of each data set.

    Raises:
        ConfigError: A data set is missing or malformed, or both `path` and `mixture` are set.
    """
    mixture = data.mixture or (DataSet(data.path, data.image_root),)
    if data.mixture and data.path:
        raise ConfigError(
            f"data.path {data.path} and data.mixture are both set; set only one of them"
        )
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
    """Returns the order in which a run reads its samples.

    Args:
        config: Config of the run.
        records: All training records.
        counts: Number of records in each data set.
        weights: Weight of each data set.
    """
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
    """Returns the sizes of the model, and the source of its tokenizer and image processor.

    Args:
        config: Config of the run.
        source: The resolved `init_from`; None if the model is trained from scratch.

    Raises:
        ConfigError: `init_from` is None, and `model` or `processor` is None too.
        CheckpointError: The config.json of `source` cannot be read, or its model is not supported.
    """
    processor = source if config.processor is None else Path(config.processor)
    if processor is None:
        raise ConfigError(
            "a model that is trained from scratch has no tokenizer; set processor to a directory "
            "with a tokenizer and an image processor"
        )
    if source is not None:
        return read_config(source), processor
    if config.model is None:
        raise ConfigError(
            "init_from and model are both None; set init_from to a checkpoint, or set model to "
            "train from scratch"
        )
    return config.model, processor


def open_inputs(config: TrainConfig, model: ModelConfig, processor: Path | Parts) -> Inputs:
    """Opens the tokenizer, the image processor and the data of a run.

    Args:
        config: Config of the run.
        model: Sizes and token ids of the model.
        processor: Source of the tokenizer and the image processor.

    Raises:
        ConfigError: The data or the template does not exist, or the data does not fit the model.
        CheckpointError: The tokenizer or the image processor cannot be read.
    """
    data = config.data
    if data.template not in TEMPLATES:
        raise ConfigError(
            f"data.template {data.template!r} does not exist; choose one of {', '.join(TEMPLATES)}"
        )
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
    template = TEMPLATES[data.template]
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=template,
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
        buckets=() if data.buckets == "auto" else data.buckets,  # a run chooses them later
        packing=data.packing,
    )
    end = end_token(template, tokenizer)
    ends = end_tokens(processor) | (frozenset() if end is None else {end})
    return Inputs(config, tokenizer, encoder, spec, records, order, eval_records, ends)

"""Opens the inputs of a run, except the weights: tokenizer, image transform and data."""

import dataclasses
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ModelConfig, Parts, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.batching import Batches, BatchSpec, ReadBatch, eval_batches
from llava_jax.data.conversation import end_token
from llava_jax.data.digest import data_digest
from llava_jax.data.files import is_remote
from llava_jax.data.image_slots import describe_outlier, find_most_slots
from llava_jax.data.lengths import estimate_sizes
from llava_jax.data.order import EpochOrder, Grouping
from llava_jax.data.packing import slots_in_row
from llava_jax.data.padding import (
    Buckets,
    choose_buckets,
    choose_image_buckets,
    measure_padding,
)
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.data.templates import TEMPLATES
from llava_jax.errors import ConfigError, SampleError
from llava_jax.planning.model_flops import slot_tokens
from llava_jax.pretrained.image_processor import load_fitting_transform, load_frame_transform
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.processor import end_tokens
from llava_jax.pretrained.tokenizer import (
    check_vocabulary,
    image_token_of,
    load_tokenizer,
    video_token_of,
)
from llava_jax.training.check_template import template_warning
from llava_jax.training.data_sets import open_data


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
        eval_slots: Maximum number of image slots of a sample of the eval data.
        slot_tokens: Number of tokens whose computation takes as long as that of an image slot.
        warnings: Lines of text that warn of a training sample with far too many images, and of a
            chat template that the model was not trained with.
        ends: Ids of the tokens that end an answer, as the export of the run names them.
    """

    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    encoder: SampleEncoder
    spec: BatchSpec
    records: Records
    order: EpochOrder
    eval_records: Records
    eval_slots: int
    slot_tokens: float
    warnings: tuple[str, ...]
    ends: frozenset[int] = frozenset()

    def planned(self, devices: int, micro_rows: int, sequence: int) -> "Inputs":
        """Returns the same inputs for the plan of a run.

        Args:
            devices: Number of devices that the rows of a batch are divided among.
            micro_rows: Number of rows in a micro-batch on all devices together.
            sequence: Number of devices that the tokens of a row are divided among.
        """
        return self._with_spec(devices=devices, micro_rows=micro_rows, sequence=sequence)

    def with_buckets(self, buckets: Buckets) -> "Inputs":
        """Returns the same inputs for batches whose rows have these lengths and image slots."""
        return self._with_spec(buckets=buckets.lengths, image_buckets=buckets.images)

    def _with_spec(self, **fields: Any) -> "Inputs":
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, **fields))

    def choose_buckets(self, steps: int) -> tuple[Buckets, float]:
        """Chooses row lengths and numbers of image slots for the training data.

        The choice takes seconds at most. It depends only on the config and on the data. Only values
        that are "auto" in the config are chosen; see `padding.choose_buckets` and
        `padding.choose_image_buckets`.

        Args:
            steps: Number of train steps of the run.

        Returns:
            The buckets, and the expected fraction of padding among the tokens.

        Raises:
            ConfigError: A data file changed after it was opened.
        """
        data = self.config.data
        tokens, slots = estimate_sizes(self.records, self.encoder)
        # Each further epoch costs a new order of all records; the batches of one are enough.
        last = min(steps, max(self.order.batches, _MEASURED)) - 1
        numbers = np.unique(np.linspace(0, last, min(last + 1, _MEASURED)).astype(int)).tolist()
        padding = measure_padding(self.order, tokens, tokens > 0, slots, numbers)
        spec = self.spec
        if data.buckets == "auto":
            spec = dataclasses.replace(spec, buckets=choose_buckets(padding, spec, steps))
        images = spec.image_buckets
        if data.image_buckets == "auto":
            images = choose_image_buckets(padding, spec, steps, self.slot_tokens)
        computed = (
            padding.packed(spec.lengths, spec.max_slots, spec.micro_rows)
            if spec.packing
            else padding.padded(spec.lengths)
        )
        return Buckets(spec.buckets, images), padding.waste(computed)

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
        return dataclasses.replace(
            self.spec,
            size=size,
            max_slots=self.eval_slots,
            image_buckets=tuple(self.spec.slots),
            packing=False,
        )

    def digest(self) -> dict[str, list[dict[str, Any]]]:
        """Returns the digests of the training data and the eval data, as a JSON object.

        A resumed run compares these digests with the digests in data.json. Some images are read for
        them, so a run calls this once. Eval records that were held out are in the training data.
        """
        is_apart = self.eval_records and self.config.data.eval_path
        return {
            "train": data_digest(self.records),
            "eval": data_digest(self.eval_records) if is_apart else [],
        }

    def summary(self) -> str:
        """Returns lines of text that describe the batches and the records of the training data."""
        return "\n".join([self._describe_batches(), *self.records.sizes.describe_notes()])

    def _describe_batches(self) -> str:
        text = f"{len(self.records):,} samples, batches of {self.spec.size}"
        if self.config.data.eval_fraction:
            text += f", {len(self.eval_records):,} other samples for evaluation"
        if self.config.data.group_by_modality_length:
            alike = self.order.batches_alike()
            text += " (per epoch: {:,} with images, {:,} without, {:,} mixed)".format(*alike)
        lengths, slots = (", ".join(map(str, n)) for n in (self.spec.lengths, self.spec.slots))
        how = "packed into rows of" if self.spec.packing else "padded to"
        return f"{text}; {how} {lengths} tokens; image slots per row: {slots}"

    def why_skipped(self, number: int, records: Records | None = None) -> str:
        """Reads a skipped record again, and returns the reason why it was skipped.

        Args:
            number: Index of the record.
            records: Records that the index refers to; None is the training data.
        """
        found = self._what_is_wrong(self.records if records is None else records, number)
        return str(found or "it could not be read before, but it can be read now")

    def _what_is_wrong(self, records: Records, number: int) -> SampleError | None:
        """Returns the error because of which a record cannot be used; None if it can be used."""
        try:
            self.encoder(records[number])
        except SampleError as error:
            return error
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
        """Reads some training records to find bad data before a run starts.

        Of a small data set, all records are read; otherwise, 64 that are evenly spread.

        Raises:
            ConfigError: Too many of these records cannot be used. The training data therefore
                almost certainly contains more bad records than data.max_skipped allows.
        """
        count = len(self.records)
        read = count if count <= _SMALL else _TRIED
        tried = np.unique(np.linspace(0, count - 1, read).astype(int)).tolist()
        found = {number: self._what_is_wrong(self.records, number) for number in tried}
        bad = {number: error for number, error in found.items() if error is not None}
        by_chance = _BY_CHANCE if len(tried) < count else 0
        if len(bad) <= self.config.data.max_skipped * len(tried) + by_chance:
            return
        number, error = next(iter(bad.items()))
        good = [number for number in tried if number not in bad]
        kinds = {number: error.kind for number, error in bad.items()}
        mend = self.advise_image_root(kinds, good) or (
            "Run `llava-jax check-data` to list all bad samples; with --write-clean, it writes the "
            "good samples to a new file. Or raise data.max_skipped, which is "
            f"{self.config.data.max_skipped:g}"
        )
        raise ConfigError(
            f"{len(bad)} of {len(tried)} tested samples cannot be used. The first one is "
            f"{self.records.where(number)}: {error}. {mend}"
        )

    def advise_image_root(self, bad: Mapping[int, str], good: Sequence[int]) -> str | None:
        """Returns what to do if no image was found at all, so that the directory is wrong.

        Args:
            bad: Kind of the problem of each bad record, by index.
            good: Indices of the records without a problem.

        Returns:
            A sentence without its full stop; None if there are other problems, or images.
        """
        is_missing = bool(bad) and {*bad.values()} == {"image missing"}
        if not is_missing or self.records.sizes.images[good].any():
            return None
        where = self._nearby_image(next(iter(bad)))
        return f"Set data.image_root to the directory of the images{where}"

    def _nearby_image(self, number: int) -> str:
        """Says where the first image of a record is, if that is in the directory of the data."""
        data, image = self.config.data, self.records[number].images[0]
        if data.mixture or is_remote(data.path) or not isinstance(image, str):
            return ""
        folder, path = Path(data.path).parent, os.path.relpath(image, data.image_root or ".")
        found = [root for root in (folder, *folder.glob("*/")) if (root / path).is_file()]
        return f"; {path} is in {found[0]}" if found else f", which is {data.image_root!r} now"


_MEASURED = 128
"""Number of batches whose padding is measured to choose the bucket lengths."""

_SMALL = 256
"""Largest number of records of a data set that is tested as a whole, which takes some seconds."""

_TRIED, _BY_CHANCE = 64, 6
"""Number of records to test, and number of bad records among them that may be due to chance.

If 1 % of the data is bad, 64 random records have 7 or more bad ones with a probability of 4e-6.
"""


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
        sizes = records.sizes
        grouping = Grouping(sizes.images + sizes.videos > 0, sizes.words, config.batch.loss_group)
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
        ConfigError: The model is trained from scratch, and `processor` is None.
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
    assert config.model is not None  # see `check_sources`
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
    opened = open_data(data, config.seed)
    records, eval_records = opened.records, opened.eval_records
    order = make_order(config, records, opened.counts, opened.weights)
    images = data.max_images
    if images is None:
        images = max(records.sizes.most_images, eval_records.sizes.most_images)
    transform = load_fitting_transform(processor, model, data.image_aspect)
    frames = load_frame_transform(processor, model)
    tokenizer = load_tokenizer(processor)
    image_token_of(tokenizer, model, processor)
    video_token_of(tokenizer, model, processor)
    check_vocabulary(tokenizer, model, processor)
    template = TEMPLATES[data.template]
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        template=template,
        transform=dataclasses.replace(
            transform, decode=data.image_decode, exif_orientation=data.exif_orientation
        ),
        model=model,
        max_length=data.max_length,
        max_images=images,
        max_text_length=data.max_text_length,
        frame_transform=frames,
        max_frames=data.max_frames,
        train_on=data.train_on,
    )
    most = find_most_slots(records, encoder)
    spec = BatchSpec(
        size=config.batch.global_size,
        max_slots=slots_in_row(data, model, most.slots),
        image_size=(transform.height, transform.width),
        max_length=data.max_length,
        pad_token_id=model.pad_token_id,
        pixel_scale=transform.scale,
        buckets=() if data.buckets == "auto" else data.buckets,  # a run chooses them later
        image_buckets=() if data.image_buckets == "auto" else data.image_buckets,
        packing=data.packing,
        slot_features=model.image_tokens,
        sources_per_token=model.sources_per_token,
    )
    end = end_token(template, tokenizer)
    warnings = (
        None if data.packing else describe_outlier(records, most),
        template_warning(data.template, processor, tokenizer),
    )
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        encoder=encoder,
        spec=spec,
        records=records,
        order=order,
        eval_records=eval_records,
        eval_slots=find_most_slots(eval_records, encoder).slots,
        slot_tokens=slot_tokens(config, model),
        warnings=tuple(filter(None, warnings)),
        ends=end_tokens(processor) | (frozenset() if end is None else {end}),
    )

"""Records to batches: encoded, padded, from any position."""

import contextlib
import copy
import dataclasses
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from transformers import PreTrainedTokenizerBase

from llava_jax.data.batch import Batch
from llava_jax.data.conversation import (
    Encoded,
    SampleError,
    count_placeholders,
    encode,
    expand_images,
)
from llava_jax.data.images import ImageTransform, Triple
from llava_jax.data.order import NO_RECORD, EpochOrder, InOrder
from llava_jax.data.packing import deal, first_fit
from llava_jax.data.records import Record
from llava_jax.data.sources import Records
from llava_jax.data.templates import Template
from llava_jax.data.workers import WITHOUT_END, WorkerError, read_ahead, write_progress
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, RunError


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shapes of batches.

    Attributes:
        size: Samples in a batch, and rows of it, B.
        max_images: Images of every row, M.
        image_size: Height and width of the pixels.
        max_length: Longest sample in tokens.
        pad_token_id: Fills rows on their right.
        pixel_scale: The same as `ImageTransform.scale`.
        buckets: Lengths that T is chosen from, beside max_length.
        packing: Whether rows, then of max_length, have as many samples as fit; the other rows are
            left empty.
        devices: Number of devices that share the rows. Packed rows are dealt out to them in turn.
    """

    size: int
    max_images: int
    image_size: tuple[int, int]
    max_length: int
    pad_token_id: int
    pixel_scale: tuple[Triple, Triple] = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    buckets: tuple[int, ...] = ()
    packing: bool = False
    devices: int = 1

    def __post_init__(self):
        if any(bucket > self.max_length or bucket < 1 for bucket in self.buckets):
            raise ConfigError(
                f"data.buckets {self.buckets} must lie between 1 and data.max_length "
                f"{self.max_length}, which is always a bucket itself; give others, or "
                "--data.buckets with none behind it"
            )

    def bucket(self, length: int) -> int:
        """Returns the smallest bucket that holds `length` tokens."""
        return min(b for b in (*self.buckets, self.max_length) if b >= length)

    @property
    def is_fixed(self) -> bool:
        """Whether a row's shape and its sample do not depend on other samples."""
        return not self.packing and not self.buckets

    @property
    def has_one_shape(self) -> bool:
        """Whether all batches have rows of the same length."""
        return self.packing or not self.buckets


@dataclasses.dataclass(frozen=True)
class Sample:
    """An encoded record, before padding."""

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    pixel_values: UInt8[np.ndarray, "I 3 H W"]


@dataclasses.dataclass(frozen=True)
class SampleEncoder:
    """Encodes a record: its conversation as tokens, its images as pixels. Can be pickled.

    Attributes:
        tokenizer: A fast tokenizer.
        template: The text around the turns.
        transform: What happens to an image.
        image_token_id: The token that stands for an image.
        image_tokens: Tokens of one image.
        max_length: Longer samples are cut to so many tokens.
        max_images: Most images in a sample.
        max_text_length: Longer samples are cut to so many tokens, an image counting as one.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    transform: ImageTransform
    image_token_id: int
    image_tokens: int
    max_length: int
    max_images: int
    max_text_length: int | None = None

    def __call__(self, record: Record) -> Sample:
        """Encodes a record.

        Raises:
            SampleError: It cannot be learned from.
        """
        return self.add_images(record, self.encode_text(record))

    def encode_text(self, record: Record) -> Encoded:
        """Encodes a record without looking at its images.

        Raises:
            SampleError: The sample cannot be used.
        """
        self._check_images(record)
        encoded = encode(record.turns, self.template, self.tokenizer, self.image_token_id)
        return expand_images(
            encoded, self.image_token_id, self.image_tokens, self.max_length, self.max_text_length
        )

    def add_images(self, record: Record, encoded: Encoded) -> Sample:
        """Completes a record's text with its images.

        Raises:
            SampleError: One cannot be read.
        """
        # A cut may have left images out.
        kept = int((encoded.input_ids == self.image_token_id).sum()) // self.image_tokens
        pixels = np.empty((kept, 3, self.transform.height, self.transform.width), np.uint8)
        for image, levels in zip(record.images[:kept], pixels, strict=True):
            self.transform.read(image, levels)
        return Sample(encoded.input_ids, encoded.loss_mask, pixels)

    def _check_images(self, record: Record) -> None:
        count = len(record.images)
        if count > self.max_images:
            raise SampleError(
                f"it has {count} images, and data.max_images is {self.max_images}; raise that",
                "number of images",
            )
        placeholders = count_placeholders(record.turns)
        if placeholders != count:
            raise SampleError(
                f"its human turns say <image> {placeholders} times, and it has {count} images",
                "number of images",
            )


class Batches(Iterator[Batch]):
    """Batches without end, from a position that can be saved and returned to."""

    def __init__(self, read: "ReadBatch", workers: int, identity: Json):
        """Begins with the first.

        Args:
            read: Makes a batch of its number.
            workers: Processes that encode; 0 encodes in a thread of this one.
            identity: What the order depends on; a position is only good for the same.
        """
        self._read = read
        self._workers = workers
        self._identity = identity
        self._next = 0
        self._iterator: Generator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._read.from_batch(self._next, self._workers)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def state(self) -> Json:
        """Returns the position: what `restore` takes. JSON can hold it."""
        return {**self._identity, "next_batch": self._next}

    def restore(self, state: Json) -> None:
        """Goes to a position: the next batch is the one that came next when it was saved.

        Raises:
            ConfigError: The position belongs to other data, another seed or another batch size.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ConfigError(
                    f"the saved data position has {name} = {state.get(name)}, this run has "
                    f"{value}; resume with the same data, seed and batch size, or start a new run"
                )
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def eval_batches(
    records: Records,
    encode_fn: SampleEncoder,
    spec: BatchSpec,
    rows: Sequence[int] | None = None,
    *,
    workers: int = 0,
) -> Iterator[tuple[Batch, Int64[np.ndarray, " B"]]]:
    """Yields every record once, in order, with its index; the last batch is filled up.

    Args:
        records: Where the samples come from.
        encode_fn: Encodes one of them.
        spec: Shapes.
        rows: Rows to make, as in `ReadBatch`.
        workers: Processes that encode; 0 encodes in a thread of this one.

    Yields:
        A batch and the index of each row's record. Rows that fill up the last batch are padding
        with index -1.
    """
    order = InOrder(len(records), spec.size)
    read = ReadBatch(order, records, encode_fn, spec, rows)
    iterator = read.from_batch(0, workers, stop=order.batches)
    try:
        for number, batch in enumerate(iterator):
            yield batch, order.batch(number)
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class ReadBatch:
    """Number of a batch -> its samples, encoded and padded. Can be pickled.

    A record that raises SampleError becomes padding. So neither shapes nor order depend on it.

    Attributes:
        order: Which records a batch has.
        records: Where the samples come from.
        encode_fn: Encodes one of them.
        spec: Shapes of a whole batch.
        rows: The rows of the batch to make, in order; None is all. Of other rows' samples,
            nothing is read but, where shapes depend on it, their text: all of a run's processes
            must take the same.
    """

    order: EpochOrder | InOrder
    records: Records
    encode_fn: SampleEncoder
    spec: BatchSpec
    rows: Sequence[int] | None = None

    def __post_init__(self):
        # It runs in a thread beside its owner's, and a tokenizer must not be shared between two.
        object.__setattr__(self, "encode_fn", copy.deepcopy(self.encode_fn))

    def __call__(self, number: int) -> Batch:
        numbers = self.order.batch(number).tolist()
        spec, every = self.spec, range(self.spec.size)
        own = every if self.rows is None else self.rows
        read = {
            position: self._read_text(numbers[position])
            for position in (own if spec.is_fixed else every)
        }
        texts = {position: text for position, text in read.items() if text}
        lengths = {position: len(text.encoded.input_ids) for position, text in texts.items()}
        layout = {position: [position] for position in lengths}
        if spec.packing:
            layout = deal(first_fit(lengths, spec.max_length), spec.size, spec.devices)
        length = spec.max_length if spec.packing else spec.bucket(max(lengths.values(), default=0))
        # One row at a time: its pixels, once they are copied, make room for the next one's.
        samples = ({at: self._add_images(texts[at]) for at in layout.get(row, ())} for row in own)
        batch = fill(samples, len(own), spec, length)
        checksum = 0 if spec.is_fixed else _checksum(read)
        return dataclasses.replace(batch, text_checksum=checksum)

    def from_batch(self, start: int, workers: int, *, stop: int = WITHOUT_END) -> Generator[Batch]:
        """Yields the batches from number `start` on, made ahead.

        Raises:
            RunError: A worker process died; names the record that it was at.
        """
        try:
            yield from read_ahead(self, start, workers, stop=stop, most_bytes=self.most_bytes)
        except WorkerError as error:
            raise worker_died(error, self.records) from error

    @property
    def most_bytes(self) -> int:
        """Bytes of a batch in its longest bucket."""
        pixels = 3 * self.spec.max_images * self.spec.image_size[0] * self.spec.image_size[1]
        rows = self.spec.size if self.rows is None else len(self.rows)
        return rows * (pixels + 4 * 6 + 9 * self.spec.max_length)

    def _read_text(self, number: int) -> "_Text | None":
        """A record and its tokens; None if it cannot be learned from."""
        if number == NO_RECORD:
            return None
        write_progress(number)
        with contextlib.suppress(SampleError):
            record = self.records[number]
            return _Text(number, record, self.encode_fn.encode_text(record))
        return None

    def _add_images(self, text: "_Text") -> Sample | None:
        """The whole sample; None if an image cannot be read."""
        write_progress(text.number)
        with contextlib.suppress(SampleError):
            return self.encode_fn.add_images(text.record, text.encoded)
        return None


class _Text(NamedTuple):
    number: int
    record: Record
    encoded: Encoded


def _checksum(texts: Mapping[int, _Text | None]) -> int:
    value = 0
    for position, text in texts.items():
        ids = b"" if text is None else text.encoded.input_ids.tobytes()
        value = zlib.crc32(b"%d:%d:" % (position, len(ids)) + ids, value)
    return value & 0x7FFFFFFF


def worker_died(error: WorkerError, records: Records) -> RunError:
    """Says at which record a worker process died."""
    at = "" if error.record is None else f" at {records.where(error.record)}"
    return RunError(
        f"a worker process that reads data died{at}: {error} Exit code -9 is mostly want of "
        "memory: lower data.workers; else leave that sample out"
    )


def fill(
    rows: Iterable[Mapping[int, Sample | None]], size: int, spec: BatchSpec, length: int
) -> Batch:
    """`size` rows of `length` tokens, each with its samples by their places in the batch."""
    input_ids = np.full((size, length), spec.pad_token_id, np.int32)
    loss_mask = np.zeros((size, length), bool)
    segment_ids = np.zeros((size, length), np.int32)
    pixels = np.zeros((size, spec.max_images, 3, *spec.image_size), np.uint8)
    scale = np.tile(np.array(spec.pixel_scale, np.float32), (size, 1, 1))
    for row, samples in enumerate(rows):
        at = image = 0
        for position, sample in samples.items():
            if sample is None:
                continue
            tokens = slice(at, at + len(sample.input_ids))
            input_ids[row, tokens] = sample.input_ids
            loss_mask[row, tokens] = sample.loss_mask
            segment_ids[row, tokens] = 1 + position
            pixels[row, image : image + len(sample.pixel_values)] = sample.pixel_values
            at, image = tokens.stop, image + len(sample.pixel_values)
    return Batch(input_ids, loss_mask, segment_ids, pixels, scale)

"""Collects encoded records in padded batches, starting at any batch number."""

import contextlib
import copy
import dataclasses
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llava_jax.config import NO_FEATURE
from llava_jax.data.batch import Batch, round_up
from llava_jax.data.conversation import SampleError
from llava_jax.data.image_tokens import Expanded
from llava_jax.data.images import Triple
from llava_jax.data.order import NO_RECORD, EpochOrder, InOrder
from llava_jax.data.packing import deal, pack
from llava_jax.data.records import Record
from llava_jax.data.samples import Sample, SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.data.tiles import find_slot_tokens, shift
from llava_jax.data.workers import WITHOUT_END, WorkerError, read_ahead, write_progress
from llava_jax.disk import Json
from llava_jax.errors import ConfigError, RunError


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Shapes of batches.

    Attributes:
        size: Number of samples in a batch, B, which is also the number of rows.
        max_slots: Maximum number of image slots in a row, M. Unused slots are blank.
        image_size: Height and width of an image in pixels.
        max_length: Maximum number of tokens in a sample.
        pad_token_id: Id of the token that pads rows on the right.
        pixel_scale: Factors and offsets of the color channels; see `ImageTransform.scale`.
        buckets: Lengths in tokens that the rows of a batch may have, in addition to max_length.
        image_buckets: Numbers of image slots that the rows of a batch may have, in addition to
            max_slots. Larger numbers than max_slots are not used.
        packing: Whether several samples share a row; rows that are not needed stay empty.
        devices: Number of devices that the rows are divided among. Packed rows are assigned to the
            devices in turn.
        micro_rows: Number of rows in a micro-batch on all devices together. A micro-batch without
            samples is not computed.
        sequence: Number of devices that the tokens of a row are divided among. The lengths of rows
            are multiples of this number.
        slot_features: Number of features of an image slot.
        sources_per_token: Number of features of which a token is the sum, K.

    Raises:
        ConfigError: A bucket is smaller than 1 or larger than max_length.
    """

    size: int
    max_slots: int
    image_size: tuple[int, int]
    max_length: int
    pad_token_id: int
    pixel_scale: tuple[Triple, Triple] = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    buckets: tuple[int, ...] = ()
    image_buckets: tuple[int, ...] = ()
    packing: bool = False
    devices: int = 1
    micro_rows: int = 1
    sequence: int = 1
    slot_features: int = 1
    sources_per_token: int = 1

    def __post_init__(self):
        if any(bucket > self.max_length or bucket < 1 for bucket in self.buckets):
            raise ConfigError(
                f"each length in data.buckets {self.buckets} must be between 1 and data.max_length "
                f"{self.max_length}; choose other lengths, or give --data.buckets without a value "
                "to use only data.max_length"
            )

    @property
    def lengths(self) -> list[int]:
        """Returns all lengths that the rows of a batch may have, in ascending order."""
        lengths = (*self.buckets, self.max_length)
        return sorted({round_up(length, self.sequence) for length in lengths})

    @property
    def slots(self) -> list[int]:
        """Returns all numbers of image slots that rows may have, in ascending order."""
        return sorted({*(n for n in self.image_buckets if n < self.max_slots), self.max_slots})

    def bucket(self, length: int) -> int:
        """Returns the smallest bucket that holds `length` tokens."""
        return next(bucket for bucket in self.lengths if bucket >= length)

    def image_bucket(self, needed: int, length: int) -> int:
        """Returns the number of image slots of the rows of a batch.

        Args:
            needed: Largest number of slots that a row of the batch needs.
            length: Number of tokens in a row. Short rows have no room for as many whole images as
                the rows of max_length tokens.
        """
        bucket = next(slots for slots in self.slots if slots >= needed)
        if self.max_slots > self.max_length // self.slot_features:
            return bucket  # tiles and frames need less room than whole images
        room = max(length // self.slot_features, 1)
        return room if needed <= room < bucket else bucket

    @property
    def is_fixed(self) -> bool:
        """Returns True if the shape and the content of a row do not depend on other samples."""
        return not self.packing and self.has_one_shape

    @property
    def has_one_shape(self) -> bool:
        """Returns True if the rows of all batches have the same length and number of images."""
        return len(self.lengths) == len(self.slots) == 1


class Batches(Iterator[Batch]):
    """Endless iterator over batches, whose position can be saved and restored."""

    def __init__(self, read: "ReadBatch", workers: int, identity: Json):
        """Starts at batch 0.

        Args:
            read: Function that reads the batch with a given number.
            workers: Number of processes that encode samples; 0 encodes them in a thread of this
                process.
            identity: Values that determine the order of the records. A saved position can be
                restored only if these values are the same.
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
        """Returns the current position for `restore`, as a dict that can be written as JSON."""
        return {**self._identity, "next_batch": self._next}

    def restore(self, state: Json) -> None:
        """Moves to a saved position.

        Args:
            state: Position that `state` returned.

        Raises:
            ConfigError: The position belongs to other data, another seed or another batch size.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise ConfigError(
                    f"the data position was saved with {name} = {state.get(name)}, but this run "
                    f"has {value}; resume with the same data, seed and batch size, or start a new "
                    "run"
                )
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends the worker processes. Reading the next batch starts them again."""
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
    """Yields all records once, in order, as batches; the last batch is padded to the full size.

    Args:
        records: Records to encode.
        encode_fn: Encoder of the records.
        spec: Shapes of the batches.
        rows: Indices of the rows to make in each batch; see `ReadBatch.rows`.
        workers: Number of processes that encode samples; 0 encodes them in a thread of this
            process.

    Yields:
        A batch, and an int64 array [spec.size] with the record index of each row of the global
        batch. The index is -1 for the padding rows of the last batch.
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
    """Callable that reads and returns the batch with a given number. Can be pickled.

    A sample that cannot be used (SampleError) becomes padding; no other record replaces it.

    Attributes:
        order: Order that determines the record indices of each batch.
        records: Records to encode.
        encode_fn: Encoder of the records.
        spec: Shapes of the global batch.
        rows: Indices of the rows of the global batch to make, in this order; None makes all rows.
            With buckets or packing, the texts of all rows are read, so that all processes choose
            the same shapes. Images are read only for the rows to make.
    """

    order: EpochOrder | InOrder
    records: Records
    encode_fn: SampleEncoder
    spec: BatchSpec
    rows: Sequence[int] | None = None

    def __post_init__(self):
        # Batches are read in a thread of their own, and two threads must not share a tokenizer.
        object.__setattr__(self, "encode_fn", copy.deepcopy(self.encode_fn))

    def __call__(self, number: int) -> Batch:
        """Returns the batch with the given number; the batch contains only the rows in `rows`."""
        numbers = self.order.batch(number).tolist()
        spec, every = self.spec, range(self.spec.size)
        own = every if self.rows is None else self.rows
        read = {
            position: self._read_text(numbers[position])
            for position in (own if self.spec.is_fixed else every)
        }
        texts = {position: text for position, text in read.items() if text}
        lengths = {position: len(text.encoded.input_ids) for position, text in texts.items()}
        slots = {position: sum(text.encoded.slots) for position, text in texts.items()}
        layout = {position: [position] for position in lengths}
        length = spec.bucket(max(lengths.values(), default=0))
        if spec.packing:
            length, packed = pack(lengths, slots, spec.lengths, spec.max_slots, spec.micro_rows)
            layout = deal(packed, spec.size, spec.devices)
        needed = max((sum(slots[at] for at in row) for row in layout.values()), default=0)
        spec = dataclasses.replace(spec, max_slots=spec.image_bucket(needed, length))
        # With a generator, the pixels of only one row are in memory in addition to the batch.
        samples = ({at: self._add_images(texts[at]) for at in layout.get(row, ())} for row in own)
        batch = fill(samples, len(own), spec, length)
        checksum = 0 if self.spec.is_fixed else _checksum(read)
        return dataclasses.replace(batch, text_checksum=checksum)

    def from_batch(self, start: int, workers: int, *, stop: int = WITHOUT_END) -> Generator[Batch]:
        """Yields the batches, starting with number `start`; prepares the next batches in advance.

        Args:
            start: Number of the first batch.
            workers: Number of processes that encode samples; 0 encodes them in a thread of this
                process.
            stop: Number of the first batch that is not yielded.

        Raises:
            RunError: A worker process died. The message names the record that the process was
                reading.
        """
        try:
            yield from read_ahead(self, start, workers, stop=stop, most_bytes=self.most_bytes)
        except WorkerError as error:
            raise worker_died(error, self.records) from error

    @property
    def most_bytes(self) -> int:
        """Returns the size in bytes of the largest batch, in tokens and in image slots."""
        spec = self.spec
        slot = 4 + 3 * spec.image_size[0] * spec.image_size[1]
        token = 9 + 8 * spec.sources_per_token
        rows = spec.size if self.rows is None else len(self.rows)
        return rows * (spec.max_slots * slot + 4 * 6 + spec.lengths[-1] * token)

    def _read_text(self, number: int) -> "_Text | None":
        """Returns a record and its tokens; None if the record cannot be used for training."""
        if number == NO_RECORD:
            return None
        write_progress(number)
        with contextlib.suppress(SampleError):
            record = self.records[number]
            return _Text(number, record, self.encode_fn.encode_text(record))
        return None

    def _add_images(self, text: "_Text") -> Sample | None:
        """Returns the complete sample; None if one of its images cannot be read."""
        write_progress(text.number)
        with contextlib.suppress(SampleError):
            return self.encode_fn.add_images(text.record, text.encoded)
        return None


class _Text(NamedTuple):
    """A record, its index, and its encoded text."""

    number: int
    record: Record
    encoded: Expanded


def _checksum(texts: Mapping[int, _Text | None]) -> int:
    """Returns a checksum of at most 31 bits of the token ids of all texts."""
    value = 0
    for position, text in texts.items():
        ids = b"" if text is None else text.encoded.input_ids.tobytes()
        value = zlib.crc32(b"%d:%d:" % (position, len(ids)) + ids, value)
    return value & 0x7FFFFFFF


def worker_died(error: WorkerError, records: Records) -> RunError:
    """Returns an error that names the record that a worker process was reading when it died.

    Args:
        error: Error of the worker process.
        records: Records that the process was reading.
    """
    at = "" if error.record is None else f" while it read {records.where(error.record)}"
    return RunError(
        f"a data worker process died{at}: {error} Exit code -9 usually means that memory ran out; "
        "lower data.workers. With another exit code, the sample that was being read may be the "
        "cause; remove it from the data"
    )


def fill(
    rows: Iterable[Mapping[int, Sample | None]], size: int, spec: BatchSpec, length: int
) -> Batch:
    """Returns a batch of `size` rows with `length` tokens each.

    Args:
        rows: One dict per row, from positions in the global batch to samples. None stands for a
            sample that could not be read. If there are fewer dicts than rows, the remaining rows
            are padding.
        size: Number of rows.
        spec: Shapes of the batch.
        length: Number of tokens in a row, T.
    """
    input_ids = np.full((size, length), spec.pad_token_id, np.int32)
    loss_mask = np.zeros((size, length), bool)
    segment_ids = np.zeros((size, length), np.int32)
    index = np.full((size, length, spec.sources_per_token), NO_FEATURE, np.int32)
    weights = np.zeros(index.shape, np.float32)
    slot_tokens = np.zeros((size, spec.max_slots), np.int32)
    pixels = np.zeros((size, spec.max_slots, 3, *spec.image_size), np.uint8)
    scale = np.tile(np.array(spec.pixel_scale, np.float32), (size, 1, 1))
    for row, samples in enumerate(rows):
        at = slot = 0
        for position, sample in samples.items():
            if sample is None:
                continue
            tokens = slice(at, at + len(sample.input_ids))
            input_ids[row, tokens] = sample.input_ids
            loss_mask[row, tokens] = sample.loss_mask
            segment_ids[row, tokens] = 1 + position
            index[row, tokens] = shift(sample.feature_index, slot * spec.slot_features)
            weights[row, tokens] = sample.feature_weights
            pixels[row, slot : slot + len(sample.pixel_values)] = sample.pixel_values
            at, slot = tokens.stop, slot + len(sample.pixel_values)
        slot_tokens[row] = find_slot_tokens(index[row], spec.slot_features, spec.max_slots)
    return Batch(input_ids, loss_mask, segment_ids, index, weights, slot_tokens, pixels, scale)

"""Records to batches: encoded in worker processes, ordered by the seed, from any position."""

import copy
import dataclasses
import logging
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags
from jaxtyping import Bool, Float32, Int32, Int64
from transformers import PreTrainedTokenizerBase

from llava_jax.config import ConfigError
from llava_jax.data import images
from llava_jax.data.conversation import (
    Encoded,
    SampleError,
    Template,
    count_placeholders,
    encode,
    expand_images,
)
from llava_jax.data.images import ImageTransform
from llava_jax.data.records import Record

logger = logging.getLogger(__name__)

MOST_WARNINGS = 50

Leaf = Any
"""An array, or what stands for one in a tree of shapes or shardings."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B samples of T tokens, M images each.

    Attributes:
        input_ids: int32 [B, T]. Token ids, each image as many image tokens as it has features;
            right padded.
        loss_mask: bool [B, T]. True where the token is a target: answers and what ends them.
        segment_ids: int32 [B, T]. 0 for padding, 1 for the sample.
        pixel_values: float32 [B, M, 3, H, W]. The images; zeros where a sample has fewer than M.
        skipped: int32 [B]. 1 where the sample could not be read and the row is all padding, else 0.
    """

    input_ids: Leaf
    loss_mask: Leaf
    segment_ids: Leaf
    pixel_values: Leaf
    skipped: Leaf


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The shapes of batches.

    Attributes:
        size: Samples in a batch, B.
        max_images: Images of every sample, M.
        image_size: Height and width of the pixels.
        max_length: Longest sample in tokens.
        pad_token_id: Fills rows on their right.
        buckets: Lengths that T is chosen from, beside max_length.
    """

    size: int
    max_images: int
    image_size: tuple[int, int]
    max_length: int
    pad_token_id: int
    buckets: tuple[int, ...] = ()

    def __post_init__(self):
        if any(bucket > self.max_length or bucket < 1 for bucket in self.buckets):
            raise ConfigError(
                f"data.buckets {self.buckets} must lie between 1 and data.max_length "
                f"{self.max_length}, which is always a bucket itself"
            )

    def bucket(self, length: int) -> int:
        """Returns the smallest bucket that holds `length` tokens."""
        return min(b for b in (*self.buckets, self.max_length) if b >= length)

    @property
    def most_bytes(self) -> int:
        """Bytes of a batch in its longest bucket."""
        pixels = 3 * self.max_images * self.image_size[0] * self.image_size[1]
        return self.size * (4 * pixels + 9 * self.max_length)


@dataclasses.dataclass(frozen=True)
class Sample:
    """An encoded record, before padding."""

    input_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    pixel_values: Float32[np.ndarray, "I 3 H W"]


class Skip(NamedTuple):
    """A record that could not be encoded."""

    number: int
    reason: str


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
        self._check_images(record)
        encoded = self._encode(record)
        # A cut may have left images out.
        kept = int((encoded.input_ids == self.image_token_id).sum()) // self.image_tokens
        pixels = [self.transform(images.open_image(image)) for image in record.images[:kept]]
        shape = (0, 3, self.transform.height, self.transform.width)
        return Sample(
            encoded.input_ids,
            encoded.loss_mask,
            np.stack(pixels) if pixels else np.zeros(shape, np.float32),
        )

    def _encode(self, record: Record) -> Encoded:
        encoded = encode(record.turns, self.template, self.tokenizer, self.image_token_id)
        return expand_images(
            encoded, self.image_token_id, self.image_tokens, self.max_length, self.max_text_length
        )

    def _check_images(self, record: Record) -> None:
        count = len(record.images)
        if count > self.max_images:
            raise SampleError(
                f"it has {count} images, and data.max_images is {self.max_images}; raise that"
            )
        placeholders = count_placeholders(record.turns)
        if placeholders != count:
            raise SampleError(
                f"its human turns say <image> {placeholders} times, and it has {count} images"
            )


class Batches(Iterator[Batch]):
    """Batches without end, from a position that can be saved and returned to."""

    def __init__(
        self,
        dataset: grain.MapDataset,
        workers: int,
        batch_bytes: int,
        identity: dict[str, Any],
    ):
        """Wraps a grain dataset of (Batch, skips).

        Args:
            dataset: Gives batch number i at index i.
            workers: Processes that encode; 0 encodes in a thread of this one.
            batch_bytes: Most bytes of a batch.
            identity: What the order depends on; a position is only good for the same.
        """
        self._dataset = dataset
        self._workers = workers
        self._batch_bytes = batch_bytes
        self._identity = identity
        self._next = 0
        self._iterator: Any = None
        self._reported: set[int] = set()

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = _iterate(self._dataset, self._next, self._workers, self._batch_bytes)
        batch, skips = next(self._iterator)
        self._next += 1
        for skip in skips:
            self._report(skip)
        if len(skips) == len(batch.skipped):
            raise ConfigError(
                f"none of the {len(skips)} samples of a batch can be read; the last, number "
                f"{skips[-1].number}: {skips[-1].reason}"
            )
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position: what `restore` takes. JSON can hold it."""
        return {**self._identity, "next_batch": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position: the next batch is the one that came next when it was saved.

        Raises:
            ConfigError: The position belongs to other data, another seed or another batch size.
        """
        for name, value in self._identity.items():
            if state[name] != value:
                raise ConfigError(
                    f"the saved data position has {name} = {state[name]}, this run has {value}; "
                    "resume with the same data, seed and batch size, or start a new run"
                )
        self.close()
        self._next = state["next_batch"]

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _report(self, skip: Skip) -> None:
        if skip.number not in self._reported and len(self._reported) < MOST_WARNINGS:
            self._reported.add(skip.number)
            logger.warning("sample %d is left out: %s", skip.number, skip.reason)
            if len(self._reported) == MOST_WARNINGS:
                logger.warning("more are counted in metrics.jsonl, but not named here")


def make_dataset(
    records: Sequence[Record],
    encode_fn: Callable[[Record], Sample],
    spec: BatchSpec,
    *,
    seed: int,
    shuffle: bool = True,
    workers: int = 0,
) -> Batches:
    """Makes the batches of a training run.

    Each epoch holds every record once, in an order of its own that depends on the seed alone;
    batches run across the borders of epochs. A record that raises SampleError becomes a row of
    padding with `skipped` set, and is logged once.

    Args:
        records: Where the samples come from. Must pickle when there are workers.
        encode_fn: Encodes one of them. Must pickle when there are workers.
        spec: Shapes.
        seed: Of the order.
        shuffle: Whether to shuffle; else every epoch has the order of `records`.
        workers: Processes that encode whole batches; 0 encodes in a thread of this one.

    Raises:
        ConfigError: There are no records.
    """
    if not records:
        raise ConfigError("the training data has no records; check data.path")
    indices = grain.MapDataset.range(len(records))
    if shuffle:
        indices = indices.shuffle(seed=seed % 2**32)
    dataset = (
        indices.repeat()
        .map(_Load(records, encode_fn))
        .batch(spec.size, drop_remainder=True, batch_fn=_Collate(spec))
    )
    identity = {
        "records": len(records),
        "batch_size": spec.size,
        "seed": seed if shuffle else None,
    }
    return Batches(dataset, workers, spec.most_bytes, identity)


def eval_batches(
    records: Sequence[Record],
    encode_fn: Callable[[Record], Sample],
    spec: BatchSpec,
    *,
    workers: int = 0,
) -> Iterator[tuple[Batch, Int64[np.ndarray, " B"]]]:
    """Yields every record once, in order, with its index; the last batch is filled up.

    Args:
        records: Where the samples come from.
        encode_fn: Encodes one of them.
        spec: Shapes.
        workers: Processes that encode; 0 encodes in a thread of this one.

    Yields:
        A batch and the index of each row's record. Rows that fill up the last batch are padding
        with index -1; their `skipped` is 0.
    """
    count = -(-len(records) // spec.size)
    dataset = (
        grain.MapDataset.range(count * spec.size)
        .map(_Load(records, encode_fn))
        .batch(spec.size, drop_remainder=True, batch_fn=_Collate(spec))
    )
    iterator = _iterate(dataset, 0, workers, spec.most_bytes)
    try:
        for number, (batch, skips) in enumerate(iterator):
            for skip in skips:
                logger.warning("held-out sample %d is left out: %s", skip.number, skip.reason)
            indices = np.arange(number * spec.size, (number + 1) * spec.size)
            yield batch, np.where(indices < len(records), indices, -1)
    finally:
        iterator.close()


@dataclasses.dataclass(frozen=True)
class _Load:
    """Index of a record -> the encoded sample, why there is none, or None past the last record."""

    records: Sequence[Record]
    encode_fn: Callable[[Record], Sample]

    def __post_init__(self):
        # It runs in a thread beside its owner's, and a tokenizer must not be shared between two.
        object.__setattr__(self, "encode_fn", copy.deepcopy(self.encode_fn))

    def __call__(self, index: int) -> Sample | Skip | None:
        if index >= len(self.records):
            return None
        name = ""
        try:
            record = self.records[index]
            name = f"{record.id}: "
            return self.encode_fn(record)
        except SampleError as error:
            return Skip(int(index), f"{name}{error}")


@dataclasses.dataclass(frozen=True)
class _Collate:
    """Samples -> a batch of them, padded, and the skips among them."""

    spec: BatchSpec

    def __call__(self, samples: Sequence[Sample | Skip | None]) -> tuple[Batch, tuple[Skip, ...]]:
        spec = self.spec
        found = {row: s for row, s in enumerate(samples) if isinstance(s, Sample)}
        length = spec.bucket(max((len(s.input_ids) for s in found.values()), default=0))
        input_ids = np.full((spec.size, length), spec.pad_token_id, np.int32)
        loss_mask = np.zeros((spec.size, length), bool)
        segment_ids = np.zeros((spec.size, length), np.int32)
        pixels = np.zeros((spec.size, spec.max_images, 3, *spec.image_size), np.float32)
        for row, sample in found.items():
            tokens = len(sample.input_ids)
            input_ids[row, :tokens] = sample.input_ids
            loss_mask[row, :tokens] = sample.loss_mask
            segment_ids[row, :tokens] = 1
            pixels[row, : len(sample.pixel_values)] = sample.pixel_values
        skipped = np.array([isinstance(sample, Skip) for sample in samples], np.int32)
        skips = tuple(sample for sample in samples if isinstance(sample, Skip))
        return Batch(input_ids, loss_mask, segment_ids, pixels, skipped), skips


def _iterate(dataset: grain.MapDataset, start: int, workers: int, batch_bytes: int) -> Any:
    """Iterates over a dataset from `start`; the order does not depend on the workers."""
    # Grain's own buffers are meant for small elements: of whole batches, one ahead is enough.
    ahead = 0 if workers else 1
    options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
    iterable = dataset.slice(slice(start, None)).to_iter_dataset(options)
    if not workers:
        return iter(iterable)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which we do not use.
    if not _fits_shared_memory(3 * workers * batch_bytes):
        # A container's 64 MB of shared memory would end the run with a bus error: use pipes.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        iterable = grain.experimental.WithOptionsIterDataset(iterable, options)
    options = grain.MultiprocessingOptions(num_workers=workers)
    iterable = iterable.mp_prefetch(options, worker_init_fn=_ignore_interrupts)
    return iter(iterable.map(_own))


def _ignore_interrupts(worker: int, workers: int) -> None:
    """Ctrl-C reaches every process of a terminal's job, but only the main one may act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _own(element: tuple[Batch, tuple[Skip, ...]]) -> tuple[Batch, tuple[Skip, ...]]:
    """Copies a batch out of shared memory, which is then free at once, whoever holds the batch."""
    batch, skips = element
    return jax.tree.map(np.array, batch), skips


def _fits_shared_memory(size: int) -> bool:
    try:
        return shutil.disk_usage("/dev/shm").free > size
    except OSError:  # Not Linux: no such limit.
        return True

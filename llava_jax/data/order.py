"""Decides which records each batch has, from the seed and the number of the batch alone.

The order is therefore independent of the number of processes and of interruptions of a run.
"""

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import Int64

from llava_jax.errors import ConfigError

NO_RECORD = -1
"""Index that stands for no record, for example in the padding of a batch."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Batches of all records once, in order; NO_RECORD fills the last batch.

    Attributes:
        count: Number of records.
        size: Number of records in a batch.
    """

    count: int
    size: int

    @property
    def batches(self) -> int:
        """Returns the number of batches."""
        return -(-self.count // self.size)

    def batch(self, number: int) -> Int64[np.ndarray, " B"]:
        """Returns the record indices of a batch, int64 [size]; NO_RECORD after the last record."""
        numbers = np.arange(number * self.size, (number + 1) * self.size)
        return np.where(numbers < self.count, numbers, NO_RECORD)


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """Settings that group similar samples into batches.

    In each epoch, samples with images and samples without images are cut into separate batches, and
    the order of these batches is shuffled. The remaining samples of both kinds come last. Within a
    batch, samples are then assigned to groups, the longest samples first, so that the groups have
    similar total lengths.

    This is what the option `group_by_modality_length` of LLaVA-1.5's scripts does.

    Attributes:
        has_images: bool [N]. True if the record has images.
        lengths: [N]. Length of each record, in any unit.
        group: Number of samples in a group. The samples of a group are adjacent in the batch.
    """

    has_images: np.ndarray
    lengths: np.ndarray
    group: int


class EpochOrder:
    """Record indices of batches without end, in epochs that each have their own order.

    Several data sets may be mixed: an epoch has each record of a data set as often as the weight of
    the data set says. If the weight is not an integer, consecutive epochs take different records,
    so that all records occur equally often in the long run. A batch may span two epochs. If batches
    are grouped, NO_RECORD fills the last batch of each epoch instead.

    Attributes:
        size: Number of records in a batch.
        samples: Number of samples in an epoch.
        identity: Values that determine the order, as a dict for JSON.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        size: int,
        *,
        seed: int,
        weights: tuple[float, ...] | None = None,
        shuffle: bool = True,
        grouping: Grouping | None = None,
    ):
        """Plans the order.

        Args:
            counts: Number of records in each data set. Indices count through all data sets.
            size: Number of records in a batch.
            seed: Seed of the order.
            weights: Number of times that an epoch has each record, for each data set; None means
                once.
            shuffle: Whether to shuffle the records; otherwise each epoch has them in the order of
                their indices.
            grouping: How batches are grouped; None does not group.

        Raises:
            ConfigError: An epoch has no records.
        """
        self.size = size
        self.identity = {
            "records": list(counts),
            "weights": list(weights or [1.0] * len(counts)),
            "batch_size": size,
            "seed": seed if shuffle else None,
            "group": grouping.group if grouping else None,
        }
        self._counts = counts
        self._shares = [
            round(count * weight)
            for count, weight in zip(counts, self.identity["weights"], strict=True)
        ]
        self.samples = sum(self._shares)
        if not self.samples:
            raise ConfigError("the training data has no records; check data.path")
        self._seed, self._shuffle, self._grouping = seed, shuffle, grouping
        self._shuffled = grain.MapDataset.range(self.samples).shuffle(seed=seed % 2**32).repeat()
        self._length = self.samples if grouping is None else -(-self.samples // size) * size
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    @property
    def batches(self) -> int:
        """Returns the number of batches that an epoch needs.

        Unless batches are grouped, the last of them may also have the first records of the next
        epoch.
        """
        return -(-self._length // self.size)

    def batch(self, number: int) -> Int64[np.ndarray, " B"]:
        """Returns the record indices of the batch with this number, int64 [size]."""
        positions = np.arange(number * self.size, (number + 1) * self.size)
        epochs, offsets = np.divmod(positions, self._length)
        if self._grouping is None and self._shuffle:
            offsets = np.array([self._shuffled[int(position)] for position in positions])
        records = np.concatenate(
            [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return records if self._grouping is None else _deal(records, self._grouping)

    def batches_alike(self) -> tuple[int, int, int]:
        """Returns the numbers of batches in which all, no or some samples have images."""
        if self._grouping is None:
            return 0, 0, self.batches
        count = int(self._grouping.has_images[self._epoch(0)[self._epoch(0) >= 0]].sum())
        alike = count // self.size, (self.samples - count) // self.size
        return *alike, self.batches - sum(alike)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> Int64[np.ndarray, " N"]:
        records = self._records(epoch)
        if self._grouping is None:
            return records  # `batch` shuffles the positions
        if self._shuffle:
            records = self._rng(epoch).permutation(records)
        return self._group(records, self._grouping, self._rng(epoch, 1))

    def _records(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """Returns the records of an epoch, sorted by data set."""
        parts, first = [], 0
        for part, (count, share) in enumerate(zip(self._counts, self._shares, strict=True)):
            wanted = np.arange(epoch * share, (epoch + 1) * share)
            # With a fractional weight, all epochs share one permutation, and each epoch takes its
            # records from where the previous epoch stopped.
            if share % max(count, 1):
                order = self._rng(part, 2).permutation(count) if self._shuffle else np.arange(count)
                parts.append(first + order[wanted % count])
            elif share:
                parts.append(first + wanted % count)
            first += count
        return np.concatenate(parts)

    def _group(
        self, records: Int64[np.ndarray, " N"], grouping: Grouping, rng: np.random.Generator
    ) -> Int64[np.ndarray, " M"]:
        """Returns the records of an epoch, batch after batch, with NO_RECORD at the end."""
        has_images = grouping.has_images[records]
        kinds = records[has_images], records[~has_images]
        whole = [len(kind) // self.size * self.size for kind in kinds]
        batches = np.concatenate([kind[:end] for kind, end in zip(kinds, whole, strict=True)])
        batches = batches.reshape(-1, self.size)
        if self._shuffle:
            batches = rng.permutation(batches)
        rest = np.concatenate([kind[end:] for kind, end in zip(kinds, whole, strict=True)])
        empty = np.full(self._length - len(records), NO_RECORD)
        return np.concatenate([batches.reshape(-1), rest, empty])

    def _rng(self, number: int, purpose: int = 0) -> np.random.Generator:
        """Returns a random generator that depends on the seed, a number and a purpose."""
        return np.random.default_rng([self._seed, purpose, number])


def _deal(records: Int64[np.ndarray, " B"], grouping: Grouping) -> Int64[np.ndarray, " B"]:
    """Assigns samples to groups, each sample to the group with the smallest total length so far."""
    lengths = np.where(records == NO_RECORD, 0, grouping.lengths[records])
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = [[] for _ in range(len(records) // grouping.group)]
    sums = np.zeros(len(groups))
    for row in order:
        to = int(np.argmin(sums))
        groups[to].append(row)
        sums[to] = sums[to] + lengths[row] if len(groups[to]) < grouping.group else np.inf
    return records[np.concatenate([np.array(group) for group in groups])]

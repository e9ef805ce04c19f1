"""Determines the records of each batch, using only the seed and the number of the batch.

The order therefore does not depend on the number of processes, and does not change if a run is
interrupted and resumed.
"""

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import Int64

from llava_jax.errors import ConfigError

NO_RECORD = -1
"""Index that is used where there is no record, for example for the padding rows of a batch."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """An order of one epoch without shuffling; NO_RECORD pads the last batch.

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

    In each epoch, samples with images and samples without images are put into separate batches, and
    the order of these batches is shuffled. The samples that are left over form the last batches of
    the epoch. Within a batch, the samples are then assigned to groups, starting with the longest
    sample, so that the groups have similar total lengths.

    The option `group_by_modality_length` of LLaVA-1.5's scripts does the same.

    Attributes:
        has_images: bool [N]. True if the record has images.
        lengths: int or float [N]. Length of each record, in any unit.
        group: Number of samples in a group. The samples of a group are adjacent in the batch.
    """

    has_images: np.ndarray
    lengths: np.ndarray
    group: int


class EpochOrder:
    """An endless order of records, in which each epoch is shuffled differently.

    Several data sets may be mixed. The weight of a data set is the number of times that each of its
    records occurs in an epoch. If the weight is not an integer, consecutive epochs use different
    records, so that in the long run, all records of the data set occur equally often.

    A batch may contain the end of one epoch and the start of the next epoch. But with grouping, the
    last batch of each epoch is padded with NO_RECORD.

    Attributes:
        size: Number of records in a batch.
        samples: Number of samples in an epoch.
        identity: Values that determine the order, as a dict that can be written as JSON.
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
        """Prepares the order; reads no records.

        Args:
            counts: Number of records in each data set. The indices of the records of a data set
                follow the indices of the previous data set.
            size: Number of records in a batch.
            seed: Seed of the order.
            weights: One number per data set: how many times each of its records occurs in an
                epoch; None means once.
            shuffle: Whether to shuffle the records; otherwise, the records of each epoch are in the
                order of their indices.
            grouping: Settings that group similar samples into batches; None does not group.

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
        """Returns the number of batches in an epoch.

        Without grouping, the last of these batches may also contain the first records of the next
        epoch.
        """
        return -(-self._length // self.size)

    def batch(self, number: int) -> Int64[np.ndarray, " B"]:
        """Returns the record indices of the batch with the given number, int64 [size]."""
        positions = np.arange(number * self.size, (number + 1) * self.size)
        epochs, offsets = np.divmod(positions, self._length)
        if self._grouping is None and self._shuffle:
            offsets = np.array([self._shuffled[int(position)] for position in positions])
        records = np.concatenate(
            [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return records if self._grouping is None else _deal(records, self._grouping)

    def batches_alike(self) -> tuple[int, int, int]:
        """Returns how many batches of an epoch have images in all samples, in none, or in some."""
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
            return records  # `batch` shuffles the positions of the records
        if self._shuffle:
            records = self._rng(epoch).permutation(records)
        return self._group(records, self._grouping, self._rng(epoch, 1))

    def _records(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """Returns the record indices of an epoch, sorted by data set."""
        parts, first = [], 0
        for part, (count, share) in enumerate(zip(self._counts, self._shares, strict=True)):
            wanted = np.arange(epoch * share, (epoch + 1) * share)
            # With a fractional weight, all epochs use the same permutation of the records, and each
            # epoch continues where the previous epoch stopped.
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
        """Returns the record indices of an epoch, batch after batch, padded with NO_RECORD."""
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
    """Assigns each sample to the group that has the smallest total length so far."""
    lengths = np.where(records == NO_RECORD, 0, grouping.lengths[records])
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = [[] for _ in range(len(records) // grouping.group)]
    sums = np.zeros(len(groups))
    for row in order:
        to = int(np.argmin(sums))
        groups[to].append(row)
        sums[to] = sums[to] + lengths[row] if len(groups[to]) < grouping.group else np.inf
    return records[np.concatenate([np.array(group) for group in groups])]

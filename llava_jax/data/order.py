"""Which records each batch holds: a function of the seed and the batch's number alone.

So the order depends neither on the processes of a run nor on how often it was stopped.
"""

import dataclasses
import functools

import grain
import numpy as np
from jaxtyping import Int64

from llava_jax.errors import ConfigError

NO_RECORD = -1
"""Stands instead of a record's number where there is no record."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Every record once, the last batch filled up.

    Attributes:
        count: Records.
        size: Records in a batch.
    """

    count: int
    size: int

    @property
    def batches(self) -> int:
        return -(-self.count // self.size)

    def batch(self, number: int) -> Int64[np.ndarray, " B"]:
        """The records of a batch; NO_RECORD past the last."""
        numbers = np.arange(number * self.size, (number + 1) * self.size)
        return np.where(numbers < self.count, numbers, NO_RECORD)


@dataclasses.dataclass(frozen=True, eq=False)
class Grouping:
    """Batches of samples that are alike, as LLaVA's sampler makes them.

    In an epoch, samples with images and those without are cut into batches each for themselves, and
    the batches shuffled; what is left over of both comes last. A batch is then dealt out to groups,
    the longest samples first, so that the groups' sums of lengths are alike.

    Source: what the option `group_by_modality_length` of LLaVA-1.5's scripts does.

    Attributes:
        has_images: Whether a record has any.
        lengths: Length of each record, in any unit.
        group: Samples in a group; those of a group follow each other.
    """

    has_images: np.ndarray
    lengths: np.ndarray
    group: int


class EpochOrder:
    """Epoch after epoch without end, each in an order of its own.

    Data sets may be mixed: an epoch has each record of one as often as its weight says. Of a weight
    that is no whole number, every epoch takes other records, until all have come equally often.
    Batches run across the borders of epochs, unless they are grouped: then an epoch's last batch is
    filled up with NO_RECORD.

    Attributes:
        size: Records in a batch.
        samples: Samples in an epoch.
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
            counts: Records of each data set; they are numbered through.
            size: Records in a batch.
            seed: Seed of the order.
            weights: How often an epoch has each record of a data set; None is once.
            shuffle: Whether to shuffle; else every epoch has the records as they are numbered.
            grouping: What batches have in common; None does not group.

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
        """Batches of an epoch; the last may have the first records of the next."""
        return -(-self._length // self.size)

    def batch(self, number: int) -> Int64[np.ndarray, " B"]:
        """The records of a batch."""
        positions = np.arange(number * self.size, (number + 1) * self.size)
        epochs, offsets = np.divmod(positions, self._length)
        if self._grouping is None and self._shuffle:
            offsets = np.array([self._shuffled[int(position)] for position in positions])
        records = np.concatenate(
            [self._epoch(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        return records if self._grouping is None else _deal(records, self._grouping)

    def batches_alike(self) -> tuple[int, int, int]:
        """Batches of an epoch whose samples all have images, none has, and some have."""
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
            return records  # its places are shuffled
        if self._shuffle:
            records = self._rng(epoch).permutation(records)
        return self._group(records, self._grouping, self._rng(epoch, 1))

    def _records(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """What an epoch has, data set after data set."""
        parts, first = [], 0
        for part, (count, share) in enumerate(zip(self._counts, self._shares, strict=True)):
            wanted = np.arange(epoch * share, (epoch + 1) * share)
            if share % max(count, 1):  # of an order of its own, which all epochs share
                order = self._rng(part, 2).permutation(count) if self._shuffle else np.arange(count)
                parts.append(first + order[wanted % count])
            elif share:
                parts.append(first + wanted % count)
            first += count
        return np.concatenate(parts)

    def _group(
        self, records: Int64[np.ndarray, " N"], grouping: Grouping, rng: np.random.Generator
    ) -> Int64[np.ndarray, " M"]:
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
        return np.random.default_rng([self._seed, purpose, number])


def _deal(records: Int64[np.ndarray, " B"], grouping: Grouping) -> Int64[np.ndarray, " B"]:
    """Deals a batch out to groups: each sample to the group with the least sum so far."""
    lengths = np.where(records == NO_RECORD, 0, grouping.lengths[records])
    order = np.argsort(-lengths, kind="stable")
    groups: list[list[int]] = [[] for _ in range(len(records) // grouping.group)]
    sums = np.zeros(len(groups))
    for row in order:
        to = int(np.argmin(sums))
        groups[to].append(row)
        sums[to] = sums[to] + lengths[row] if len(groups[to]) < grouping.group else np.inf
    return records[np.concatenate([np.array(group) for group in groups])]

"""Measures the cost of padding, and finds the bucket lengths that minimize it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64

from llava_jax.data.order import NO_RECORD, EpochOrder
from llava_jax.data.packing import first_fit


@dataclasses.dataclass(frozen=True)
class Padding:
    """The padding of the batches of an epoch.

    Attributes:
        longest: int64 [batches]. Length in tokens of the longest sample in each batch; 1 if the
            batch has no samples.
        size: Number of samples in a batch.
        tokens: Sum of the lengths in tokens of all samples that are used.
        packed: Number of tokens in all rows if the samples are packed into rows of maximum length.
    """

    longest: Int64[np.ndarray, " batches"]
    size: int
    tokens: int
    packed: int

    def padded(self, lengths: Sequence[int]) -> int:
        """Returns the number of tokens, including padding, in all batches.

        Args:
            lengths: Bucket lengths in tokens. Each batch is padded to the smallest length that is
                sufficient; the largest length must be sufficient for every batch.
        """
        ordered = np.array(sorted(lengths), np.int64)
        return int(ordered[np.searchsorted(ordered, self.longest)].sum()) * self.size

    def waste(self, lengths: Sequence[int]) -> float:
        """Returns the fraction of the tokens counted by `padded` that are padding."""
        return 1 - self.tokens / self.padded(lengths)

    @property
    def packed_waste(self) -> float:
        """Returns the fraction of padding if samples are packed; 1 if no sample can be used."""
        return 1 - self.tokens / max(self.packed, 1)

    def best_lengths(self, count: int) -> tuple[int, ...]:
        """Returns at most `count` bucket lengths, for which `padded` is smallest.

        The result is optimal. In an optimal solution, each bucket length equals the length of a
        batch. If the batches are sorted by length, each bucket therefore contains a range of
        consecutive batches. Dynamic programming finds the best division into ranges: the best k
        ranges for the first n lengths are the best k - 1 ranges for the first i lengths and one
        more range, for some i.
        """
        values, counts = np.unique(self.longest, return_counts=True)
        before = np.concatenate([[0], np.cumsum(counts)])
        cost = np.where(before == 0, 0.0, np.inf)
        cuts = []
        for _ in range(min(count, len(values))):
            cost, cut = _add_run(cost, values, before)
            cuts.append(cut)
        end, lengths = len(values), []
        for cut in reversed(cuts):
            lengths.append(int(values[end - 1]))
            end = cut[end]
        return tuple(reversed(lengths))


def _add_run(
    cost: np.ndarray, values: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Adds one range to the best divisions of the samples into ranges.

    Returns:
        For each n, the minimum cost of the first n samples, and the index at which the last range
        of this division begins.
    """
    best, begin = np.full(len(cost), np.inf), np.zeros(len(cost), np.int64)
    for end in range(1, len(cost)):
        costs = cost[:end] + values[end - 1] * (before[end] - before[:end])
        begin[end] = np.argmin(costs)
        best[end] = costs[begin[end]]
    return best, begin


def measure_padding(
    order: EpochOrder, tokens: Int[np.ndarray, " N"], good: Bool[np.ndarray, " N"], room: int
) -> Padding:
    """Measures the padding of the first epoch.

    Args:
        order: Order of the records in the run.
        tokens: int [N]. Number of tokens in each sample. If the images of a sample are bad, its
            tokens contribute to the length of its batch, as in a run, but are counted as padding.
        good: bool [N]. True if a sample is used for training.
        room: Number of tokens in a packed row.
    """
    longest = np.ones(order.batches, np.int64)
    learned = packed = 0
    for number in range(order.batches):
        rows = order.batch(number)
        rows = rows[rows != NO_RECORD]
        longest[number] = tokens[rows].max(initial=1)
        learned += int(tokens[rows[good[rows]]].sum())
        packed += room * len(first_fit(dict(enumerate(tokens[rows].tolist())), room))
    return Padding(longest, order.size, learned, packed)

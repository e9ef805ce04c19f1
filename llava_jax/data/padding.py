"""What padding costs, and the bucket lengths with which it costs least."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int64

from llava_jax.data.order import NO_RECORD, EpochOrder
from llava_jax.data.packing import first_fit


@dataclasses.dataclass(frozen=True)
class Padding:
    """The batches of an epoch.

    Attributes:
        longest: Tokens of the longest sample of each batch; 1 where it has none.
        size: Samples in a batch.
        tokens: Sum over all samples that are used.
        packed: Tokens of all rows, if samples were packed into rows of the longest length.
    """

    longest: Int64[np.ndarray, " batches"]
    size: int
    tokens: int
    packed: int

    def padded(self, lengths: Sequence[int]) -> int:
        """Tokens of all batches, padded to the first of the lengths that holds each.

        Args:
            lengths: The largest holds every batch.
        """
        ordered = np.array(sorted(lengths), np.int64)
        return int(ordered[np.searchsorted(ordered, self.longest)].sum()) * self.size

    def waste(self, lengths: Sequence[int]) -> float:
        """The share of `padded` that is no token of a sample."""
        return 1 - self.tokens / self.padded(lengths)

    @property
    def packed_waste(self) -> float:
        """The same of `packed`; 1 where no text can be learned from."""
        return 1 - self.tokens / max(self.packed, 1)

    def best_lengths(self, count: int) -> tuple[int, ...]:
        """The lengths, up to a number of them, with which `padded` is least.

        Exact: such a length is that of a batch, so batches in the order of their lengths are cut
        into runs, and the best cut of the first n into k runs is one of their first i into k - 1.
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
    """The least cost of the first n values with one run more, and where that run begins."""
    best, begin = np.full(len(cost), np.inf), np.zeros(len(cost), np.int64)
    for end in range(1, len(cost)):
        costs = cost[:end] + values[end - 1] * (before[end] - before[:end])
        begin[end] = np.argmin(costs)
        best[end] = costs[begin[end]]
    return best, begin


def measure_padding(
    order: EpochOrder, tokens: Int[np.ndarray, " N"], good: Bool[np.ndarray, " N"], room: int
) -> Padding:
    """Measures the first epoch.

    Args:
        order: The run's.
        tokens: Tokens of each sample. A sample with bad images counts for the length of its batch,
            as it does in the run, but is all padding.
        good: Which samples are learned from.
        room: Tokens of a packed row.
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

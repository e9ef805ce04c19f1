"""Measures the cost of padding, and finds the row lengths and image slots that minimize it."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int64

from llava_jax.data.batching import BatchSpec
from llava_jax.data.order import NO_RECORD, EpochOrder
from llava_jax.data.packing import pack

MAX_BUCKETS = 4
"""Maximum number of bucket lengths that are chosen for a run or compared for a data set, and of
numbers of image slots that are chosen for a run."""

COMPILATION_STEPS = 20
"""Number of train steps that take about as long as the compilation of one more train step. This is
an estimate: 5 steps of a large model on one GPU, and 40 steps on many GPUs, take as long."""

LENGTH_UNIT = 8
"""Chosen lengths are multiples of this number of tokens. Matrix units work on 8 rows or more at a
time, and cuDNN's backward pass supports only even lengths."""

_ROOMS = 8
"""Number of row lengths that are tried for packed rows."""

_PACKED_SHARE = 1.02
"""Packed rows may have this many times the fewest tokens, if they are longer. Longer rows make
larger micro-batches, because the size of a micro-batch in rows is planned for max_length."""


class Buckets(NamedTuple):
    """The shapes that the rows of a run's batches may have, besides the largest shape.

    Attributes:
        lengths: Lengths in tokens.
        images: Numbers of image slots.
    """

    lengths: tuple[int, ...]
    images: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Padding:
    """The padding of some batches of a run.

    Attributes:
        batches: Lengths in tokens of the samples in each batch, as int64 arrays. Samples whose text
            cannot be used are left out.
        size: Number of samples in a batch.
        tokens: Sum of the lengths in tokens of all samples that are used.
        slots: Numbers of image slots of the same samples, as int64 arrays.
    """

    batches: Sequence[Int64[np.ndarray, " _"]]
    size: int
    tokens: int
    slots: Sequence[Int64[np.ndarray, " _"]]

    @functools.cached_property
    def longest(self) -> Int64[np.ndarray, " batches"]:
        """Returns the length of the longest sample in each batch; 1 if a batch has no samples."""
        return np.array([lengths.max(initial=1) for lengths in self.batches], np.int64)

    def padded(self, lengths: Sequence[int]) -> int:
        """Returns the number of tokens, including padding, in all batches.

        Args:
            lengths: Bucket lengths in tokens. Each batch is padded to the smallest length that is
                sufficient; the largest length must be sufficient for every batch.
        """
        ordered = np.array(sorted(lengths), np.int64)
        return int(ordered[np.searchsorted(ordered, self.longest)].sum()) * self.size

    def packed(self, lengths: Sequence[int], max_slots: int, together: int = 1) -> int:
        """Returns the number of tokens that are computed if the samples of each batch are packed.

        Args:
            lengths: Row lengths in tokens; the largest one must be sufficient for every sample.
            max_slots: Number of image slots of a row, sufficient for every sample.
            together: Number of rows that are computed together; see `packing.pack`.
        """
        packed = self._pack(lengths, max_slots, together)
        return sum(room * together * -(-len(rows) // together) for room, rows in packed)

    def _pack(
        self, lengths: Sequence[int], max_slots: int, together: int
    ) -> Iterator[tuple[int, list[list[int]]]]:
        """Yields the row length and the samples of each row, for each batch."""
        for batch, slots in zip(self.batches, self.slots, strict=True):
            samples, needed = (dict(enumerate(x.tolist())) for x in (batch, slots))
            yield pack(samples, needed, lengths, max_slots, together)

    def waste(self, tokens: int) -> float:
        """Returns the fraction of padding among `tokens` tokens; 1 if no sample can be used."""
        return 1 - self.tokens / max(tokens, 1)

    def slot_waste(self, spec: BatchSpec) -> float:
        """Returns the fraction of blank slots among the image slots; 0 if there are no slots.

        Args:
            spec: Shapes of the batches.
        """
        rows = [spec.size] * len(self.batches)
        if spec.packing:
            packed = self._pack(spec.lengths, spec.max_slots, spec.micro_rows)
            rows = [len(filled) for _, filled in packed]
        shapes = self.shapes(spec)
        slots = [spec.image_bucket(needed, length) for length, needed in shapes]
        computed = sum(count * number for count, number in zip(rows, slots, strict=True))
        return 1 - sum(int(own.sum()) for own in self.slots) / computed if computed else 0.0

    def best_lengths(self, count: int) -> tuple[int, ...]:
        """Returns at most `count` bucket lengths, for which `padded` is smallest.

        The result is optimal; see `best_bounds`.
        """
        return best_bounds(self.longest, count)

    def shapes(self, spec: BatchSpec) -> Iterator[tuple[int, int]]:
        """Yields the row length of each batch, and the largest number of slots that a row needs.

        Args:
            spec: Shapes of the batches. `spec.image_buckets` is not used.
        """
        if not spec.packing:
            for lengths, slots in zip(self.batches, self.slots, strict=True):
                yield spec.bucket(int(lengths.max(initial=1))), int(slots.max(initial=0))
            return
        packed = self._pack(spec.lengths, spec.max_slots, spec.micro_rows)
        for (room, rows), slots in zip(packed, self.slots, strict=True):
            yield room, max((int(slots[row].sum()) for row in rows), default=0)


def best_bounds(needed: Int64[np.ndarray, " batches"], count: int) -> tuple[int, ...]:
    """Returns at most `count` sizes, so that batches of these sizes are as small as possible.

    The sum over all batches of the smallest size that is sufficient is minimal. In an optimal
    solution, each size equals the need of a batch. If the batches are sorted by their needs, each
    size is therefore used for a range of consecutive batches. Dynamic programming finds the best
    division into ranges: the best k ranges for the first n needs are the best k - 1 ranges for the
    first i needs and one more range, for some i.

    Args:
        needed: Size that each batch needs at least, for example in tokens.
        count: Maximum number of sizes.
    """
    values, counts = np.unique(needed, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    cost = np.where(before == 0, 0.0, np.inf)
    cuts = []
    for _ in range(min(count, len(values))):
        cost, cut = _add_run(cost, values, before)
        cuts.append(cut)
    end, sizes = len(values), []
    for cut in reversed(cuts):
        sizes.append(int(values[end - 1]))
        end = cut[end]
    return tuple(reversed(sizes))


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
    order: EpochOrder,
    tokens: Int[np.ndarray, " N"],
    good: Bool[np.ndarray, " N"],
    slots: Int[np.ndarray, " N"],
    numbers: Iterable[int] | None = None,
) -> Padding:
    """Measures the padding of some batches.

    Args:
        order: Order of the records in the run.
        tokens: int [N]. Number of tokens in each sample; 0 if its text cannot be used. If the
            images of a sample are bad, its tokens contribute to the length of its batch, as in a
            run, but are counted as padding.
        good: bool [N]. True if a sample is used for training.
        slots: int [N]. Number of image slots of each sample.
        numbers: Numbers of the batches; None measures all batches of the first epoch.
    """
    batches, shown, learned = [], [], 0
    for number in range(order.batches) if numbers is None else numbers:
        rows = order.batch(number)
        rows = rows[(rows != NO_RECORD) & (tokens[rows] > 0)]
        batches.append(tokens[rows].astype(np.int64))
        shown.append(slots[rows].astype(np.int64))
        learned += int(tokens[rows[good[rows]]].sum())
    return Padding(batches, order.size, learned, shown)


def choose_buckets(padding: Padding, spec: BatchSpec, steps: int) -> tuple[int, ...]:
    """Chooses the bucket lengths of a run, which cost least in padding and compilations.

    Without packing, the result has at most `MAX_BUCKETS` lengths. A longer list of lengths is
    chosen only if it pays: each further length must save more tokens in the whole run than
    `COMPILATION_STEPS` steps have, because the train step is compiled once for each length.

    With packing, the result is one row length. The lengths that are tried are that of the longest
    sample and `_ROOMS` equally spaced lengths up to max_length. The longest one is chosen with
    which the rows have at most `_PACKED_SHARE` times the fewest tokens.

    Args:
        padding: Padding of typical batches of the run.
        spec: Shapes of the batches. `spec.buckets` is not used.
        steps: Number of train steps of the run.

    Returns:
        Lengths in tokens below `spec.max_length`, in ascending order. `spec.max_length` is always
        an additional length, for samples that are longer than the measured ones. It is compiled
        only if such a sample occurs.
    """
    limit = spec.max_length
    if not padding.tokens:
        return ()
    if spec.packing:
        return _choose_room(padding, spec)
    rounded = dataclasses.replace(padding, batches=[_round(n, limit) for n in padding.batches])
    choices = [rounded.best_lengths(count) for count in range(1, MAX_BUCKETS + 1)]
    tokens = [rounded.padded(choice) for choice in choices]
    compilation = COMPILATION_STEPS / steps * tokens[0]  # as a part of the measured batches
    costs = [n + compilation * len(choice) for n, choice in zip(tokens, choices, strict=True)]
    return tuple(length for length in choices[int(np.argmin(costs))] if length < limit)


def choose_image_buckets(
    padding: Padding, spec: BatchSpec, steps: int, slot_tokens: float
) -> tuple[int, ...]:
    """Chooses the numbers of image slots of a run, like `choose_buckets` chooses the row lengths.

    The train step is compiled once for each pair of a row length and a number of slots that occurs.

    Args:
        padding: Padding of typical batches of the run.
        spec: Shapes of the batches, with the chosen row lengths. `spec.image_buckets` is not used.
        steps: Number of train steps of the run.
        slot_tokens: Number of tokens whose computation takes as long as that of an image slot.

    Returns:
        Numbers of slots below `spec.max_slots`, in ascending order. `spec.max_slots` is always an
        additional number; it is compiled only if a batch needs it.
    """
    if not (padding.tokens and spec.max_slots):
        return ()
    lengths, needed = np.array(list(padding.shapes(spec)), np.int64).T
    choices = [best_bounds(needed, count) for count in range(1, MAX_BUCKETS + 1)]
    slots = [np.array(choice)[np.searchsorted(choice, needed)] for choice in choices]
    tokens = [float(np.sum(lengths + slot_tokens * chosen)) for chosen in slots]
    compiled = [len(np.unique(np.stack([lengths, chosen]), axis=1).T) for chosen in slots]
    compilation = COMPILATION_STEPS / steps * tokens[0]  # as a part of the measured batches
    costs = [n + compilation * count for n, count in zip(tokens, compiled, strict=True)]
    return tuple(n for n in choices[int(np.argmin(costs))] if n < spec.max_slots)


def _round(lengths: Int64[np.ndarray, " n"], limit: int) -> Int64[np.ndarray, " n"]:
    """Rounds lengths up to multiples of `LENGTH_UNIT`, but not above `limit`."""
    return np.minimum(-(-lengths // LENGTH_UNIT) * LENGTH_UNIT, limit)


def _choose_room(padding: Padding, spec: BatchSpec) -> tuple[int, ...]:
    """Returns the row length for packed rows; an empty tuple if it is `spec.max_length`."""
    limit = spec.max_length
    spaced = limit * np.arange(1, _ROOMS + 1) // _ROOMS
    rooms = _round(np.append(spaced, padding.longest.max()), limit).tolist()
    tokens = {
        room: padding.packed([room, limit], spec.max_slots, spec.micro_rows) for room in rooms
    }
    least = min(tokens.values())
    room = max(room for room in rooms if tokens[room] <= _PACKED_SHARE * least)
    return () if room == limit else (room,)

"""Several samples in one row: which go together."""

from collections.abc import Mapping, Sequence

from llava_jax.config import DataConfig, ModelConfig


def first_fit(lengths: Mapping[int, int], room: int) -> list[list[int]]:
    """Puts items into as few rows as first fit does, the longest items first.

    That takes at most 11/9 of the fewest rows, and one more (Johnson, 1973).

    Args:
        lengths: Length of each item, at most `room`. Items without a length are in no row.
        room: Length of a row.

    Returns:
        The items of each row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for item in sorted(filter(lengths.__getitem__, lengths), key=lambda item: -lengths[item]):
        length = lengths[item]
        row = next((row for row, free in enumerate(left) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(item)
        left[row] -= length
    return rows


def deal(rows: Sequence[list[int]], size: int, devices: int) -> dict[int, list[int]]:
    """Deals rows out to devices in turn, each of which has its share of `size` places.

    So all devices are filled alike, each from its first place on.

    Returns:
        The rows by place, those of the first device first.
    """
    share = size // devices
    return {i % devices * share + i // devices: row for i, row in enumerate(rows)}


def images_in_row(data: DataConfig, model: ModelConfig, most: int) -> int:
    """The most images of a row, if samples have at most `most` each."""
    if not data.packing or not most:
        return most
    return max(data.max_length // model.image_tokens, 1)

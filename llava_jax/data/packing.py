"""Packs several samples into one row."""

from collections.abc import Collection, Mapping, Sequence

from llava_jax.config import DataConfig, ModelConfig


def first_fit(
    lengths: Mapping[int, int], slots: Mapping[int, int], room: int, max_slots: int
) -> list[list[int]]:
    """Assigns items to rows by first-fit decreasing.

    The items are assigned in order of decreasing length, each to the first row in which it fits.
    If the image slots never fill a row before the tokens do, the number of rows is at most 11/9 of
    the minimum number, plus one (Yue, 1991).

    Args:
        lengths: Length of each item, at most `room`. Items of length 0 are left out.
        slots: Number of image slots of each item, at most `max_slots`.
        room: Length of a row.
        max_slots: Number of image slots of a row.

    Returns:
        One list of items per row.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []
    for item in sorted(filter(lengths.__getitem__, lengths), key=lambda item: -lengths[item]):
        length, needed = lengths[item], slots[item]
        fits = (row for row, (free, empty) in enumerate(left) if free >= length and empty >= needed)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            left.append((room, max_slots))
        rows[row].append(item)
        left[row] = left[row][0] - length, left[row][1] - needed
    return rows


def pack(
    lengths: Mapping[int, int],
    slots: Mapping[int, int],
    rooms: Collection[int],
    max_slots: int,
    together: int = 1,
) -> tuple[int, list[list[int]]]:
    """Packs items into rows of one length, which is chosen so that the fewest tokens are computed.

    Args:
        lengths: Length of each item. Items of length 0 are left out.
        slots: Number of image slots of each item.
        rooms: Row lengths to choose from; the largest one must be sufficient for every item.
        max_slots: Number of image slots of a row, sufficient for every item.
        together: Number of rows that are computed together, even if only one of them has items.

    Returns:
        The length of the rows, and one list of items per row. Among row lengths with the same
        number of computed tokens, the largest one is chosen.
    """
    longest = max(lengths.values(), default=0)
    fitting = sorted((room for room in rooms if room >= longest), reverse=True)
    packed = [(room, first_fit(lengths, slots, room, max_slots)) for room in fitting]
    return min(packed, key=lambda choice: choice[0] * -(-len(choice[1]) // together))


def deal(rows: Sequence[list[int]], size: int, devices: int) -> dict[int, list[int]]:
    """Assigns packed rows to devices in turn, so that all devices have almost the same number.

    Args:
        rows: Items of each packed row, at most `size` rows.
        size: Number of rows in a batch; each device has an equal, contiguous share of the rows.
        devices: Number of devices.

    Returns:
        A dict from the index of a row in the batch to the items of the row, without empty rows.
        The rows of each device are filled starting with its first row.
    """
    share = size // devices
    return {i % devices * share + i // devices: row for i, row in enumerate(rows)}


TILE_DENSITY = 1.5
"""Number of image slots of a packed row, relative to the number of whole images that fit. Tiles
have fewer tokens than features, because padding is removed: a photograph of 640 x 480 pixels has
2,340 tokens in 5 slots of 576 features."""


def slots_in_row(data: DataConfig, model: ModelConfig, most: int) -> int:
    """Returns the maximum number of image slots in a row.

    If images are not cut into tiles, it is at most the number of images whose tokens fit into
    data.max_length, but at least 1; with packing, it is that number. If images are cut into tiles,
    packed rows have `TILE_DENSITY` times as many slots, or more if a sample has more. If the
    samples have no images, it is 0.

    Args:
        data: Config of the data.
        model: Config of the model.
        most: Maximum number of image slots in a sample.
    """
    room = max(data.max_length // model.image_tokens, 1)
    if model.has_newline:
        return max(most, int(TILE_DENSITY * room)) if data.packing and most else most
    return room if data.packing and most else min(most, room)

"""Finds how many image slots the samples of a data set have at most, and names an outlier."""

import contextlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llava_jax.data.lengths import SAMPLED
from llava_jax.data.order import NO_RECORD
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.data.tiles import max_slots
from llava_jax.errors import SampleError

_PERCENT, _FACTOR = 99, 2
"""A sample has far too many images if it has more than `_FACTOR` times as many as `_PERCENT`
percent of the samples have at most."""


class MostSlots(NamedTuple):
    """The sample of a data set that has the most image slots.

    Attributes:
        slots: Number of image slots that no sample exceeds.
        images: Number of images and videos of the sample, without those that truncation removes; 0
            if the sample is not known.
        number: Index of the sample; NO_RECORD if it is not known.
    """

    slots: int
    images: int
    number: int


def find_most_slots(records: Records, encoder: SampleEncoder) -> MostSlots:
    """Finds the usable sample with the most image slots. No image is decoded.

    Only texts of samples that may have many slots are encoded, and at most `lengths.SAMPLED` of
    them. An image that truncation removes is not counted.

    Args:
        records: Records of the data set.
        encoder: Encoder that the run uses.

    Raises:
        ConfigError: A data file changed after it was opened, or the tokenizer lacks a control token
            of the template.
    """
    possible = _possible_slots(records, encoder)
    found = MostSlots(0, 0, NO_RECORD)
    for rank, number in enumerate(np.argsort(-possible, kind="stable").tolist()):
        if possible[number] <= found.slots:
            break
        if rank == SAMPLED:
            return MostSlots(int(possible[number]), 0, NO_RECORD)
        with contextlib.suppress(SampleError):
            kept = encoder.encode_text(records[number]).slots
            if sum(kept) > found.slots:
                found = MostSlots(sum(kept), len(kept), number)
    return found


def _possible_slots(records: Records, encoder: SampleEncoder) -> Int64[np.ndarray, " N"]:
    """Returns a number of image slots that each sample does not exceed; reads nothing."""
    images = np.where(records.sizes.images > encoder.max_images, 0, records.sizes.images)
    frames = records.sizes.videos * encoder.max_frames
    return max_slots(encoder.model, images, encoder.max_length, frames)


def describe_outlier(records: Records, most: MostSlots) -> str | None:
    """Names a sample that has many more images than almost all other samples.

    Args:
        records: Records of the data set.
        most: Result of `find_most_slots`.

    Returns:
        A line of text; None if the sample does not have many more images.
    """
    if most.number == NO_RECORD:
        return None
    images = records.sizes.images + records.sizes.videos
    usual = max(1, int(np.percentile(images, _PERCENT, method="lower")))
    if most.images <= _FACTOR * usual:
        return None
    return (
        f"images: {records.where(most.number)} has {most.images} images; {_PERCENT} % of the "
        f"samples have at most {usual}. Memory is planned for rows of {most.slots} image slots. To "
        f"leave out samples with more than {usual}, set data.max_images to {usual}"
    )

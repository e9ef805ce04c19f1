"""Finds how many images the samples of a data set have at most, and names an outlier."""

import contextlib

import numpy as np

from llava_jax.data.lengths import SAMPLED
from llava_jax.data.order import NO_RECORD
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.errors import SampleError

_PERCENT, _FACTOR = 99, 2
"""A sample has far too many images if it has more than `_FACTOR` times as many as `_PERCENT`
percent of the samples have at most."""


def find_most_images(records: Records, encoder: SampleEncoder) -> tuple[int, int]:
    """Finds the usable sample with the most images. No image is read.

    Only texts of samples with many images are encoded, and at most `lengths.SAMPLED` of them. An
    image that truncation removes is not counted.

    Args:
        records: Records of the data set.
        encoder: Encoder that the run uses.

    Returns:
        The number of images that no sample exceeds, and the index of a sample that has as many; the
        index is NO_RECORD if no such sample was found.

    Raises:
        ConfigError: A data file changed after it was opened, or the tokenizer lacks a control token
            of the template.
    """
    images = np.where(records.sizes.images > encoder.max_images, 0, records.sizes.images)
    fitting = encoder.max_length // encoder.image_tokens
    most, found = 0, NO_RECORD
    for rank, number in enumerate(np.argsort(-images, kind="stable").tolist()):
        possible = min(int(images[number]), fitting)
        if possible <= most:
            break
        if rank == SAMPLED:
            return possible, NO_RECORD
        with contextlib.suppress(SampleError):
            kept = encoder.count_images(encoder.encode_text(records[number]))
            if kept > most:
                most, found = kept, number
    return most, found


def describe_outlier(records: Records, most: int, number: int) -> str | None:
    """Names a sample that has many more images than almost all other samples.

    Args:
        records: Records of the data set.
        most: Number of images of the sample, as `find_most_images` returns it.
        number: Index of the sample; NO_RECORD if it is not known.

    Returns:
        A line of text; None if the sample does not have many more images.
    """
    if number == NO_RECORD:
        return None
    usual = max(1, int(np.percentile(records.sizes.images, _PERCENT, method="lower")))
    if most <= _FACTOR * usual:
        return None
    return (
        f"images: {records.where(number)} has {most} images; {_PERCENT} % of the samples have at "
        f"most {usual}. Memory is planned for rows of {most} images. To leave out samples with "
        f"more than {usual}, set data.max_images to {usual}"
    )

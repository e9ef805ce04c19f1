"""Estimates the sizes of all samples of a data set by encoding only a few of them."""

import contextlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from llava_jax.config import NO_FEATURE
from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.errors import SampleError

SAMPLED = 256
"""Number of samples whose texts are encoded. It takes less than a second, except for remote files,
where each record is a request."""


class SampleSizes(NamedTuple):
    """Sizes of the N samples of a data set, after truncation.

    Attributes:
        tokens: int64 [N]. Number of tokens in each sample; 0 if its text cannot be used.
        slots: int64 [N]. Number of image slots of each sample.
    """

    tokens: Int64[np.ndarray, " N"]
    slots: Int64[np.ndarray, " N"]


def estimate_sizes(records: Records, encoder: SampleEncoder) -> SampleSizes:
    """Estimates the number of tokens and of image slots of each sample. No image is decoded.

    The numbers of images, videos and words of all samples are known, because opening a data file
    counts them. The samples are sorted by these numbers, and `SAMPLED` of them, evenly spaced and
    with the largest one, are encoded. The text of each other sample is assumed to be as long as the
    text of the nearest encoded sample, plus a number of tokens for each further word, which is
    fitted to the encoded samples. In a language without spaces, where all texts have about the same
    number of words, this is the length of a random sample. Its images are assumed to have as many
    tokens and slots as those of the nearest encoded sample, which differ only if images are cut
    into tiles.

    Args:
        records: Records of the data set.
        encoder: Encoder that the run uses.

    Returns:
        The sizes. The number of tokens is 0 if the sample was encoded and its text cannot be used.
        If none of the encoded samples can be used, all values are 0.

    Raises:
        ConfigError: A data file changed after it was opened, or the tokenizer lacks a control token
            of the template.
    """
    images, words = (np.maximum(column, 0).astype(np.int64) for column in records.sizes[:2])
    images = images + records.sizes.videos
    order = np.argsort(images * encoder.model.image_tokens + words, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(len(order), SAMPLED)).astype(int))
    # Columns: tokens, tokens that have features, image slots.
    encoded = np.zeros((len(ranks), 3), np.int64)
    for index, number in enumerate(order[ranks].tolist()):
        with contextlib.suppress(SampleError):
            text = encoder.encode_text(records[number])
            shown = int((text.feature_index[:, 0] != NO_FEATURE).sum())
            encoded[index] = len(text.input_ids), shown, sum(text.slots)
    sizes = SampleSizes(np.zeros(len(order), np.int64), np.zeros(len(order), np.int64))
    if not encoded[:, 0].any():
        return sizes
    known, found = ranks[encoded[:, 0] > 0], encoded[encoded[:, 0] > 0]
    shown = images[order[known]][:, None]
    mean = found[:, 1:].sum(axis=0) / max(shown.sum(), 1)
    per_image = np.where(shown, found[:, 1:] / np.maximum(shown, 1), mean)
    text = found[:, 0] - found[:, 1]
    spread = words[order[known]] - words[order[known]].mean()
    slope = max(spread @ text / max(spread @ spread, 1), 0)  # tokens per word, by least squares
    nearest = np.searchsorted((known[1:] + known[:-1]) / 2, np.arange(len(order)))
    more_words = words[order] - words[order[known]][nearest]
    features, slots = images[order] * per_image[nearest].T
    sizes.tokens[order] = np.clip(
        features + text[nearest] + slope * more_words, 1, encoder.max_length
    )
    sizes.slots[order] = np.rint(slots)
    sizes.tokens[order[ranks]], sizes.slots[order[ranks]] = encoded[:, 0], encoded[:, 2]
    return sizes

"""Estimates the lengths in tokens of all samples of a data set by encoding only a few of them."""

import contextlib

import numpy as np
from jaxtyping import Int64

from llava_jax.data.samples import SampleEncoder
from llava_jax.data.sources import Records
from llava_jax.errors import SampleError

SAMPLED = 256
"""Number of samples whose texts are encoded. It takes less than a second, except for remote files,
where each record is a request."""


def estimate_lengths(records: Records, encoder: SampleEncoder) -> Int64[np.ndarray, " N"]:
    """Estimates the number of tokens in each sample. No image is read.

    The numbers of images and words of all samples are known, because opening a data file counts
    them. The samples are sorted by these numbers, and `SAMPLED` of them, evenly spaced and with the
    largest one, are encoded. The text of each other sample is assumed to be as long as the text of
    the nearest encoded sample, plus a number of tokens for each further word, which is fitted to
    the encoded samples. In a language without spaces, where all texts have about the same number of
    words, this is the length of a random sample.

    Args:
        records: Records of the data set.
        encoder: Encoder that the run uses.

    Returns:
        int64 [N]. Number of tokens in each sample after truncation; 0 if the sample was encoded and
        its text cannot be used. If none of the encoded samples can be used, all values are 0.

    Raises:
        ConfigError: A data file changed after it was opened, or the tokenizer lacks a control token
            of the template.
    """
    images, words = (np.maximum(column, 0).astype(np.int64) for column in records.sizes[:2])
    order = np.argsort(images * encoder.image_tokens + words, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(len(order), SAMPLED)).astype(int))
    encoded = np.zeros(len(ranks), np.int64)
    for index, number in enumerate(order[ranks].tolist()):
        with contextlib.suppress(SampleError):
            encoded[index] = len(encoder.encode_text(records[number]).input_ids)
    lengths = np.zeros(len(order), np.int64)
    if not encoded.any():
        return lengths
    known, text = ranks[encoded > 0], encoded[encoded > 0]
    text = text - images[order[known]] * encoder.image_tokens
    spread = words[order[known]] - words[order[known]].mean()
    slope = max(spread @ text / max(spread @ spread, 1), 0)  # tokens per word, by least squares
    nearest = np.searchsorted((known[1:] + known[:-1]) / 2, np.arange(len(order)))
    more_words = words[order] - words[order[known]][nearest]
    estimated = images[order] * encoder.image_tokens + text[nearest] + slope * more_words
    lengths[order] = np.clip(estimated, 1, encoder.max_length)
    lengths[order[ranks]] = encoded
    return lengths

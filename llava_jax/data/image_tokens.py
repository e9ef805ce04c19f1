"""Repeats the token of each image, so that there is one token for each feature of the image."""

import numpy as np

from llava_jax.data.conversation import Encoded
from llava_jax.errors import SampleError


def expand_images(
    encoded: Encoded,
    image_token_id: int,
    image_tokens: int,
    max_length: int | None = None,
    max_text_length: int | None = None,
) -> Encoded:
    """Repeats the token of each image once per image feature, and truncates the sequence.

    An image that does not fit completely is removed, together with everything after it.

    Args:
        encoded: Conversation with one token for each image.
        image_token_id: Id of the token that represents an image.
        image_tokens: Number of features of one image.
        max_length: Maximum number of tokens after the repetition; None sets no limit.
        max_text_length: Maximum number of tokens before the repetition, with one token per image;
            None sets no limit.

    Raises:
        SampleError: Truncation removed all learned tokens.
    """
    is_image = encoded.input_ids == image_token_id
    widths = np.where(is_image, image_tokens, 1)
    ends = np.cumsum(widths)
    length = int(widths.sum())
    if max_length is not None:
        widths = widths[: np.searchsorted(ends, max_length, side="right")]
    widths = widths[:max_text_length]
    input_ids = np.repeat(encoded.input_ids[: len(widths)], widths)
    loss_mask = np.repeat(encoded.loss_mask[: len(widths)], widths)
    if encoded.loss_mask.any() and not loss_mask.any():
        limit = "data.max_length" + ("" if max_text_length is None else " or data.max_text_length")
        raise SampleError(
            f"the sample has {length} tokens and is truncated to {len(input_ids)}, so that no "
            f"answer is left to learn from; increase {limit}",
            "no answer after the cut",
        )
    return Encoded(input_ids, loss_mask, length - len(input_ids))

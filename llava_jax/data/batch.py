"""Defines the batch that the train step takes as its input."""

import dataclasses
from typing import Any

import jax

Leaf = Any
"""An array, or an object that replaces an array in a pytree, such as a shape or a sharding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of B rows, each of which has T tokens and M image slots.

    A slot holds a whole image, a tile of an image, or a frame of a video.

    Without packing, each row has one sample. With packing, a row has several samples or none.

    Attributes:
        input_ids: int32 [B, T]. Token ids, padded on the right. An image has as many image tokens
            as it has features for the decoder.
        loss_mask: bool [B, T]. True for training targets: the tokens of the answers, and the tokens
            that end the answers.
        segment_ids: int32 [B, T]. 1 plus the position of the token's sample in the global batch; 0
            for padding. A sample that could not be read has no tokens.
        feature_index: int32 [B, T, K]. Features that replace each token: indices over all features
            of the row's slots, NEWLINE, or NO_FEATURE.
        feature_weights: float32 [B, T, K]. A token is replaced by the sum of K features with these
            weights. If K is 1, the weights are not used.
        slot_tokens: int32 [B, M]. Position of the first token that has a feature of the slot; 0 for
            slots without tokens.
        pixel_values: uint8 [B, M, 3, H, W]. Image slots of each row; zeros in unused slots.
        pixel_scale: float32 [B, 2, 3]. For each color channel, the factor by which `pixel_values`
            is multiplied and the offset that is then added, to normalize the pixels.
        text_checksum: Checksum of at most 31 bits of all texts of the global batch; 0 if each row
            depends only on its own sample. If the checksums of two processes differ, the processes
            have read different batches.
    """

    input_ids: Leaf
    loss_mask: Leaf
    segment_ids: Leaf
    feature_index: Leaf
    feature_weights: Leaf
    slot_tokens: Leaf
    pixel_values: Leaf
    pixel_scale: Leaf
    text_checksum: int = dataclasses.field(default=0, metadata={"static": True})


def round_up(length: int, divisor: int) -> int:
    """Returns the smallest multiple of `divisor` that is at least `length`."""
    return -(-length // divisor) * divisor

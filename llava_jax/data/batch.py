"""A batch as the train step takes it."""

import dataclasses
from typing import Any

import jax

Leaf = Any
"""An array, or what stands for one in a tree of shapes or shardings."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B samples in as many rows of T tokens and M images: one in each, unless they are packed.

    Attributes:
        input_ids: int32 [B, T]. Token ids, each image as many image tokens as it has features;
            right padded.
        loss_mask: bool [B, T]. True where the token is a target: answers and what ends them.
        segment_ids: int32 [B, T]. The token's sample, 1 and its place in the batch; 0 for padding.
            A sample that could not be read is nowhere.
        pixel_values: uint8 [B, M, 3, H, W]. A row's images; zeros where it has fewer than M.
        pixel_scale: float32 [B, 2, 3]. What these are multiplied by, and what is then added, to
            normalise each channel.
        text_checksum: Checksum of the texts of the whole batch, even of some rows only, if shapes
            or places of rows depend on all of them; else 0. Processes whose checksums differ have
            made parts of different batches. At most 31 bits.
    """

    input_ids: Leaf
    loss_mask: Leaf
    segment_ids: Leaf
    pixel_values: Leaf
    pixel_scale: Leaf
    text_checksum: int = dataclasses.field(default=0, metadata={"static": True})

"""Determines which features of an image's tiles, or of a video's frames, become which tokens.

An image of high resolution is resized to one of a few resolutions, padded, and cut into tiles. The
whole image and each tile take one image slot. The tokens of the image are the features of the whole
image, followed by the features of the tiles in the order of the rows of the padded image, without
the padding. A newline ends each row. Source: LLaVA-NeXT (Liu et al., 2024), whose model and
processors in transformers define every rounding. OneVision (Li et al., 2024) adds the pooling.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64

from llava_jax.config import NEWLINE, NO_FEATURE, ModelConfig, TilingConfig

MAX_EXCESS = 1.1
"""Features of tiles are pooled if the side of a square of so many features is this many times the
side of a square of `TilingConfig.max_tiles` tiles. Source: LLaVA-OneVision."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sources:
    """The features that become the N tokens of an image or a video.

    Attributes:
        index: int32 [N, K]. Indices of the features, counted over all slots of the image, or
            NEWLINE. A token is the weighted sum of K features.
        weights: float32 [N, K]. Weights of the features.
        slots: Number of image slots.
    """

    index: Int32[np.ndarray, "N K"]
    weights: Float32[np.ndarray, "N K"]
    slots: int


def best_resolution(size: tuple[int, int], tiling: TilingConfig) -> tuple[int, int]:
    """Returns the resolution (height, width) that an image is resized and padded to.

    It is the one at which the image has the most pixels of its own; of several such resolutions, it
    is the one with the least padding.

    Args:
        size: Height and width of the image in pixels.
        tiling: How images are cut into tiles.
    """

    def rank(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        pixels = min(math.prod(int(side * scale) for side in size), math.prod(size))
        return pixels, pixels - math.prod(resolution)

    return max(tiling.grid_pinpoints, key=rank)


def resized_size(size: tuple[int, int], resolution: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size (height, width) that fits into a resolution, with the same aspect.

    Args:
        size: Height and width of the image in pixels.
        resolution: Height and width that `best_resolution` returned.
    """
    scales = [new / old for new, old in zip(resolution, size, strict=True)]
    if scales[1] < scales[0]:
        return min(math.ceil(size[0] * scales[1]), resolution[0]), resolution[1]
    return resolution[0], min(math.ceil(size[1] * scales[0]), resolution[1])


def is_tiled(config: ModelConfig, images: int) -> bool:
    """Returns True if the images of a sample are cut into tiles.

    Args:
        config: Sizes of the model.
        images: Number of images of the sample.
    """
    tiling = config.tiling
    return tiling is not None and (images == 1 or tiling.tiles_several_images)


@lru_cache(maxsize=256)
def image_sources(config: ModelConfig, size: tuple[int, int] | None) -> Sources:
    """Returns the features that become the tokens of an image.

    Args:
        config: Sizes of the model.
        size: Height and width of the image in pixels; None if the image is not cut into tiles.
    """
    whole = np.arange(config.image_tokens)
    if config.tiling is None:
        return _sources(config, [(whole[:, None], 1.0)], 1)
    if size is None:
        return _sources(config, [(np.append(whole, NEWLINE)[:, None], 1.0)], 1)
    side, grid = config.vision.image_size, math.isqrt(config.image_tokens)
    rows, columns = (length // side for length in best_resolution(size, config.tiling))
    row, column = np.indices((rows * grid, columns * grid))
    slot = 1 + row // grid * columns + column // grid
    features = slot * config.image_tokens + row % grid * grid + column % grid
    features = _without_padding(features, size)
    index, weights = features[:, :, None], np.ones((*features.shape, 1))
    if config.tiling.max_tiles is not None:
        ratio = math.sqrt(features.size / (config.tiling.max_tiles * config.image_tokens))
        if ratio > MAX_EXCESS:
            height, width = (int(length // ratio) for length in features.shape)
            index, weights = _resize(features, (height, width))
    newlines = [(0, 0), (0, 1), (0, 0)]
    index = np.pad(index, newlines, constant_values=NEWLINE).reshape(-1, index.shape[2])
    weights = np.pad(weights, newlines).reshape(index.shape)
    return _sources(config, [(whole[:, None], 1.0), (index, weights)], 1 + rows * columns)


def max_slots(
    config: ModelConfig,
    images: Int[np.ndarray, " N"],
    max_length: int,
    frames: Int[np.ndarray, " N"] | None = None,
) -> Int64[np.ndarray, " N"]:
    """Returns a number of image slots that each of N samples does not exceed, int64 [N].

    Args:
        config: Sizes of the model.
        images: Number of images of each sample.
        max_length: Maximum number of tokens of a sample, which limits its images and frames.
        frames: Number of frames in the videos of each sample; None if there are none.
    """
    most = config.max_slots_per_image
    one, several = (most if is_tiled(config, count) else 1 for count in (1, 2))
    slots = np.minimum(images, max_length // config.image_tokens).astype(np.int64)
    slots *= np.where(images == 1, one, several)
    if config.video is None or frames is None:
        return slots
    tokens = len(video_sources(config, 2).index) - len(video_sources(config, 1).index)
    return slots + np.minimum(frames, max_length // tokens)


def max_image_tokens(config: ModelConfig) -> int:
    """Returns a number of tokens that an image of any size does not exceed."""
    tiling, slot = config.tiling, config.image_tokens
    if tiling is None:
        return slot
    tiles = (config.max_slots_per_image - 1) * slot
    if tiling.max_tiles is not None:
        tiles = min(tiles, int(MAX_EXCESS**2 * tiling.max_tiles * slot))
    highest = max(height for height, _ in tiling.grid_pinpoints) // config.vision.patch_size
    return slot + tiles + highest


@lru_cache(maxsize=64)
def video_sources(config: ModelConfig, frames: int) -> Sources:
    """Returns the features that become the tokens of a video, each frame of which takes a slot.

    Args:
        config: Sizes of the model, which reads videos.
        frames: Number of frames.
    """
    video = config.video
    assert video is not None
    grid = math.isqrt(config.image_tokens)
    frame = np.arange(config.image_tokens).reshape(grid, grid)
    if video.pooling == "average":
        new = grid // video.stride
        squares = frame[: new * video.stride, : new * video.stride]
        squares = squares.reshape(new, video.stride, new, video.stride).swapaxes(1, 2)
        index = squares.reshape(new * new, -1)
        weights = np.full(index.shape, 1 / video.stride**2)
    else:
        new = math.ceil(grid / video.stride)
        index, weights = (x.reshape(new * new, -1) for x in _resize(frame, (new, new)))
    firsts = np.arange(frames)[:, None, None] * config.image_tokens
    index = (firsts + index).reshape(-1, index.shape[1])
    tokens = (index, np.tile(weights, (frames, 1)))
    newline = (np.full((1, 1), NEWLINE), 0.0)
    has_newline = video.pooling == "bilinear"
    return _sources(config, [tokens, newline] if has_newline else [tokens], frames)


def shift(feature_index: Int32[np.ndarray, "N K"], first: int) -> Int32[np.ndarray, "N K"]:
    """Adds the index of the first feature of some slots to indices of features."""
    return np.where(feature_index < 0, feature_index, feature_index + first).astype(np.int32)


def find_slot_tokens(
    feature_index: Int32[np.ndarray, "T K"], features: int, slots: int
) -> Int32[np.ndarray, " M"]:
    """Returns the position of the first token that has a feature of each image slot, int32 [M].

    The position is 0 for a slot of which no token has a feature.

    Args:
        feature_index: Indices of the features of each token of a row.
        features: Number of features of an image slot.
        slots: Number of image slots, M.
    """
    tokens = np.zeros(slots, np.int32)
    rows, columns = np.nonzero(feature_index >= 0)
    used, firsts = np.unique(feature_index[rows, columns] // features, return_index=True)
    tokens[used] = rows[firsts]
    return tokens


def index_whole_images(
    input_ids: Int32[np.ndarray, "B T"], config: ModelConfig, slots: int
) -> dict[str, np.ndarray]:
    """Returns the fields of a `Batch` that say which features replace the image tokens of its rows.

    No image is cut into tiles: the n-th image token of a row gets the n-th feature of the row.

    Args:
        input_ids: Token ids, with `config.image_tokens` image tokens for each image.
        config: Sizes and token ids of the model.
        slots: Number of image slots of a row, M.

    Returns:
        "feature_index" [B, T, K], "feature_weights" [B, T, K] and "slot_tokens" [B, M].
    """
    is_image = input_ids == config.image_token_id
    order = np.where(is_image, np.cumsum(is_image, axis=1) - 1, NO_FEATURE).astype(np.int32)
    index = np.repeat(order[..., None], config.sources_per_token, axis=2)
    weights = np.zeros(index.shape, np.float32)
    weights[..., 0] = is_image
    firsts = [find_slot_tokens(row, config.image_tokens, slots) for row in index]
    return {"feature_index": index, "feature_weights": weights, "slot_tokens": np.stack(firsts)}


def _without_padding(features: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Removes the features of the padding around an image of a size (height, width) in pixels."""
    height, width = features.shape
    # The padding is rounded down to an even number of rows or columns, as in LLaVA-NeXT's code.
    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return features[padding : height - padding]
    padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return features[:, padding : width - padding]


def _resize(features: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices and the weights, [h, w, 4], of features in bilinear interpolation.

    The corners of the features are not aligned, as in PyTorch's default.
    """
    steps = [_interpolate(old, new) for old, new in zip(features.shape, size, strict=True)]
    (rows, row_weights), (columns, column_weights) = steps
    index = features[rows[:, None, :, None], columns[None, :, None, :]]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    return index.reshape(*size, 4), weights.reshape(*size, 4)


def _interpolate(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two neighbors of each of `new` points on a line of `old`, and their weights."""
    at = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, old - 1)
    return np.stack([below, above], axis=1), np.stack([1 - (at - below), at - below], axis=1)


def _sources(
    config: ModelConfig, tokens: Sequence[tuple[np.ndarray, np.ndarray | float]], slots: int
) -> Sources:
    """Joins the indices [N, k] and the weights of tokens, padded to the model's number of sources.

    The results are cached, so their arrays cannot be written to.
    """
    count = sum(len(index) for index, _ in tokens)
    joined = np.zeros((count, config.sources_per_token), np.int32)
    weights = np.zeros(joined.shape, np.float32)
    first = 0
    for index, weight in tokens:
        rows, columns = slice(first, first + len(index)), slice(index.shape[1])
        joined[rows] = index[:, :1]
        joined[rows, columns], weights[rows, columns] = index, weight
        first += len(index)
    joined.flags.writeable = weights.flags.writeable = False
    return Sources(joined, weights, slots)

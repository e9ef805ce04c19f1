"""Divides a batch of token ids and pixels, as processors return them, into rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float32, Int32

from llava_jax.config import NO_FEATURE, ModelConfig
from llava_jax.data.tiles import Sources, image_sources, is_tiled, shift, video_sources
from llava_jax.models.llava import ImageInputs


class RowInputs(NamedTuple):
    """The inputs of one sequence of T tokens, on the host.

    Attributes:
        input_ids: int32 [T]. Token ids, with a token for each feature of the images.
        pixel_values: float32 [M, 3, H, W]. Normalized pixels of the image slots.
        feature_index: int32 [T, K]. Features that replace the tokens; see `ImageInputs`.
        feature_weights: float32 [T, K]. Weights of the features.
    """

    input_ids: Int32[np.ndarray, " T"]
    pixel_values: Float32[np.ndarray, "M 3 H W"]
    feature_index: Int32[np.ndarray, "T K"]
    feature_weights: Float32[np.ndarray, "T K"]


class BatchMedia(NamedTuple):
    """The images and videos of a batch, as the processors of transformers return them.

    Attributes:
        pixel_values: Normalized pixels of all images: [images, 3, H, W], or [images, slots, 3, H,
            W] if images are cut into tiles; None if there are no images.
        image_sizes: Height and width of each image in pixels before it was resized, [images, 2];
            None if images are not cut into tiles.
        pixel_values_videos: Normalized pixels of all videos, [videos, frames, 3, H, W]; None if
            there are no videos.
        batch_num_images: Number of images of each sample that has images, [samples]. It matters if
            samples with several images are not cut into tiles; None finds it out from the tokens.
    """

    pixel_values: np.ndarray | None = None
    image_sizes: np.ndarray | None = None
    pixel_values_videos: np.ndarray | None = None
    batch_num_images: np.ndarray | None = None

    @classmethod
    def of(cls, *arrays: ArrayLike | None) -> "BatchMedia":
        """Returns the images and videos of the fields, in their order, of any kind of array."""
        return cls(*(None if array is None else np.asarray(array) for array in arrays))


def split_rows(
    config: ModelConfig, input_ids: np.ndarray, kept: np.ndarray, media: BatchMedia
) -> list[RowInputs]:
    """Divides a batch into its rows, without padding.

    Args:
        config: Sizes and token ids of the model.
        input_ids: Token ids, int [batch, tokens]. The images and the videos of the batch are in the
            order of their tokens.
        kept: Mask of the tokens that are not padding, as `kept_tokens` returns it.
        media: Images and videos of the batch.

    Raises:
        ValueError: The tokens of images or videos do not match the images and videos.
    """
    ids = np.asarray(input_ids, np.int32)
    queues = [
        _Queue(
            config,
            "image",
            config.image_token_id,
            media.pixel_values,
            media.image_sizes,
            media.batch_num_images,
        )
    ]
    videos = media.pixel_values_videos
    if config.video is not None:
        queues.append(_Queue(config, "video", config.video.token_id, videos))
    elif videos is not None:
        raise ValueError("this model reads no videos; pass their frames as images")
    rows = []
    for number in range(len(ids)):
        row = ids[number][kept[number]]
        index = np.full((len(row), config.sources_per_token), NO_FEATURE, np.int32)
        weights = np.zeros(index.shape, np.float32)
        side = config.vision.image_size
        slots = [np.zeros((0, 3, side, side), np.float32)]
        for queue in queues:
            is_own = row == queue.token_id
            for pixels, sources in queue.take(int(is_own.sum()), number):
                tokens = np.flatnonzero(is_own & (index[:, 0] == NO_FEATURE))[: len(sources.index)]
                first = config.image_tokens * sum(map(len, slots))
                index[tokens] = shift(sources.index, first)
                weights[tokens] = sources.weights
                slots.append(pixels)
        rows.append(RowInputs(row, np.concatenate(slots), index, weights))
    for queue in queues:
        queue.check_empty()
    return rows


def kept_tokens(input_ids: np.ndarray, attention_mask: ArrayLike | None) -> np.ndarray:
    """Returns a mask of the tokens that are not padding, bool [batch, tokens]."""
    if attention_mask is None:
        return np.ones(input_ids.shape, bool)
    return np.asarray(attention_mask) > 0


def to_one_row(config: ModelConfig, rows: Sequence[RowInputs], kept: np.ndarray) -> ImageInputs:
    """Joins the images of a batch to the images of one row, as `Llava.logits` takes them.

    Args:
        config: Sizes of the model.
        rows: Rows of the batch without padding, as `split_rows` returns them.
        kept: Mask of the tokens that are not padding, as `kept_tokens` returns it.
    """
    index = np.full((kept.size, config.sources_per_token), NO_FEATURE, np.int32)
    weights = np.zeros(index.shape, np.float32)
    slots = np.cumsum([0, *(len(row.pixel_values) for row in rows)])
    firsts = (slots * config.image_tokens).tolist()
    tokens = kept.reshape(-1)
    index[tokens] = np.concatenate(
        [shift(row.feature_index, first) for row, first in zip(rows, firsts[:-1], strict=True)]
    )
    weights[tokens] = np.concatenate([row.feature_weights for row in rows])
    pixels = np.concatenate([row.pixel_values for row in rows])
    slot_tokens = np.zeros((1, len(pixels)), np.int32)
    leaves = (pixels[None], index[None], weights[None], slot_tokens)
    return ImageInputs(*leaves)


def padded_images(row: RowInputs, tokens: int, slots: int) -> ImageInputs:
    """Returns the images of a row, padded to numbers of tokens and image slots."""
    new_tokens, new_slots = tokens - len(row.input_ids), slots - len(row.pixel_values)
    leaves = (
        np.pad(row.pixel_values, [(0, new_slots), (0, 0), (0, 0), (0, 0)])[None],
        np.pad(row.feature_index, [(0, new_tokens), (0, 0)], constant_values=NO_FEATURE)[None],
        np.pad(row.feature_weights, [(0, new_tokens), (0, 0)])[None],
        np.zeros((1, slots), np.int32),
    )
    return ImageInputs(*leaves)


class _Queue:
    """The images, or the videos, of a batch that have not been assigned to a row.

    Args:
        config: Sizes of the model.
        name: "image" or "video", for messages.
        token_id: Id of the tokens of the images or videos.
        pixels: Pixels of all images or videos; None if there are none.
        sizes: Sizes of the images; None if they are not cut into tiles, and for videos.
        counts: Number of images of each sample that has images; None if it is not known.
    """

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        token_id: int,
        pixels: np.ndarray | None,
        sizes: np.ndarray | None = None,
        counts: np.ndarray | None = None,
    ):
        self.token_id = token_id
        self._config, self._name = config, name
        self._pixels = [] if pixels is None else list(np.asarray(pixels, np.float32))
        self._sizes = None if sizes is None else np.asarray(sizes).tolist()
        self._counts = None if counts is None else iter(np.asarray(counts).tolist())
        self._taken = 0

    def take(self, tokens: int, row: int) -> list[tuple[np.ndarray, Sources]]:
        """Returns the pixels [slots, 3, H, W] and the features of the next images of a row.

        Args:
            tokens: Number of their tokens.
            row: Index of the row, for messages.

        Raises:
            ValueError: The next images do not have this number of tokens.
        """
        sources = self._next_sources(tokens) if tokens else []
        found = sum(len(one.index) for one in sources)
        if found != tokens:
            raise ValueError(
                f"row {row} of input_ids has {tokens} {self._name} tokens, but its {len(sources)} "
                f"{self._name}s need {found}"
            )
        pixels = self._pixels[self._taken : self._taken + len(sources)]
        self._taken += len(sources)
        return [(self._slots_of(*pair, row), pair[1]) for pair in zip(pixels, sources, strict=True)]

    def check_empty(self) -> None:
        """Raises ValueError if some images belong to no row."""
        if self._taken < len(self._pixels):
            raise ValueError(
                f"input_ids has the tokens of {self._taken} {self._name}s, but there are "
                f"{len(self._pixels)} {self._name}s"
            )

    def _slots_of(self, pixels: np.ndarray, sources: Sources, row: int) -> np.ndarray:
        """Returns the pixels of the slots of an image or a video, without padding.

        Raises:
            ValueError: The image has fewer slots than its size needs.
        """
        slots = pixels.reshape(-1, *pixels.shape[-3:])
        if len(slots) < sources.slots:
            raise ValueError(
                f"an image of row {row} has {len(slots)} slots in pixel_values, but its size needs "
                f"{sources.slots}: the whole image, and its tiles"
            )
        return slots[: sources.slots]

    def _next_sources(self, tokens: int) -> list[Sources]:
        """Returns the features of the next images, up to a number of tokens or a little more."""
        config, rest = self._config, range(self._taken, len(self._pixels))
        if self._name == "video":
            return _take_while([video_sources(config, len(self._pixels[i])) for i in rest], tokens)
        if config.tiling is None:
            return _take_while([image_sources(config, None) for _ in rest], tokens)
        if self._sizes is None:
            raise ValueError("the images of this model need image_sizes, their sizes in pixels")
        sizes = [(int(self._sizes[i][0]), int(self._sizes[i][1])) for i in rest]
        if self._counts is not None:
            count = next(self._counts, 0)
            own = sizes[:count] if is_tiled(config, count) else [None] * count
            return [image_sources(config, size) for size in own]
        cut = _take_while([image_sources(config, size) for size in sizes], tokens)
        is_one = bool(cut) and len(cut[0].index) == tokens
        if config.tiling.tiles_several_images or (
            is_one and self._pixels[self._taken].shape[0] >= cut[0].slots
        ):
            return cut
        return _take_while([image_sources(config, None) for _ in rest], tokens)


def _take_while(sources: list[Sources], tokens: int) -> list[Sources]:
    """Returns the first sources that have at least this number of tokens together."""
    ends = np.cumsum([len(one.index) for one in sources])
    return sources[: int(np.searchsorted(ends, tokens)) + 1]

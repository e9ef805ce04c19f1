"""Repeats the token of each image or video for its features, and truncates samples."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from llava_jax.config import NO_FEATURE, ModelConfig
from llava_jax.data.conversation import Encoded
from llava_jax.data.tiles import Sources, shift
from llava_jax.errors import SampleError


@dataclasses.dataclass(frozen=True)
class Expanded(Encoded):
    """A conversation of T tokens, with one token for each feature of its images and videos.

    Attributes:
        feature_index: int32 [T, K]. Indices of the features that replace each token, counted over
            all image slots of the sample; NEWLINE, or NO_FEATURE for a token of the text.
        feature_weights: float32 [T, K]. Weights of these features.
        slots: Number of image slots of each image and video that truncation has not removed.
        media_ids: Token id of each of these images and videos.
    """

    feature_index: Int32[np.ndarray, "T K"] = dataclasses.field(kw_only=True)
    feature_weights: Float32[np.ndarray, "T K"] = dataclasses.field(kw_only=True)
    slots: tuple[int, ...] = ()
    media_ids: tuple[int, ...] = ()

    def first(self, tokens: int, slot_features: int) -> "Expanded":
        """Returns the first tokens, with the images and videos that have features in them.

        Args:
            tokens: Number of tokens.
            slot_features: Number of features of an image slot.
        """
        index = self.feature_index[:tokens]
        used = index.max(initial=NO_FEATURE) // slot_features + 1
        count = int((np.cumsum([0, *self.slots])[:-1] < used).sum())
        return Expanded(
            self.input_ids[:tokens],
            self.loss_mask[:tokens],
            feature_index=index,
            feature_weights=self.feature_weights[:tokens],
            slots=self.slots[:count],
            media_ids=self.media_ids[:count],
        )


def expand_images(
    encoded: Encoded,
    config: ModelConfig,
    sources: Sequence[Sources],
    max_length: int | None = None,
    max_text_length: int | None = None,
) -> Expanded:
    """Repeats the token of each image or video once per feature, and truncates the sequence.

    An image or a video that does not fit completely is removed, together with everything after it.

    Args:
        encoded: Conversation with one token for each image or video.
        config: Sizes and token ids of the model.
        sources: Features of each image and video, in the order of their tokens.
        max_length: Maximum number of tokens after the repetition; None sets no limit.
        max_text_length: Maximum number of tokens before the repetition, with one token per image or
            video; None sets no limit.

    Raises:
        SampleError: Truncation removed all learned tokens.
    """
    is_media = np.isin(encoded.input_ids, config.media_token_ids)
    widths = np.ones(len(is_media), np.int64)
    widths[is_media] = [len(one.index) for one in sources]
    ends = np.cumsum(widths)
    length = int(widths.sum())
    if max_length is not None:
        widths = widths[: np.searchsorted(ends, max_length, side="right")]
    widths = widths[:max_text_length]
    kept = len(widths)
    input_ids = np.repeat(encoded.input_ids[:kept], widths)
    loss_mask = np.repeat(encoded.loss_mask[:kept], widths)
    if encoded.loss_mask.any() and not loss_mask.any():
        limit = "data.max_length" + ("" if max_text_length is None else " or data.max_text_length")
        raise SampleError(
            f"the sample has {length} tokens and is truncated to {len(input_ids)}, so that no "
            f"answer is left to learn from; increase {limit}",
            "no answer after the cut",
        )
    sources = sources[: int(is_media[:kept].sum())]
    index = np.full((len(input_ids), config.sources_per_token), NO_FEATURE, np.int32)
    weights = np.zeros(index.shape, np.float32)
    first = 0
    for one, end in zip(sources, ends[:kept][is_media[:kept]].tolist(), strict=True):
        tokens = slice(end - len(one.index), end)
        index[tokens] = shift(one.index, first)
        weights[tokens] = one.weights
        first += one.slots * config.image_tokens
    return Expanded(
        input_ids,
        loss_mask,
        length - len(input_ids),
        feature_index=index,
        feature_weights=weights,
        slots=tuple(one.slots for one in sources),
        media_ids=tuple(encoded.input_ids[:kept][is_media[:kept]].tolist()),
    )

"""Defines LLaVA (Liu et al., 2023): a vision tower, a projector and a decoder.

The features of image slots replace tokens of the sequence. Which feature replaces which token is an
index that the host computes, so the same program computes whole images, tiles and video frames.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from llava_jax.config import NEWLINE, NO_FEATURE, ModelConfig
from llava_jax.distributed.sharding import constrain
from llava_jax.models.compute import FLOAT32, ComputeConfig
from llava_jax.models.dropout import TokenKeys, fold_in, position_keys
from llava_jax.models.layers import ACTIVATIONS, Linear
from llava_jax.models.llama import Llama, positions_in_segments
from llava_jax.models.vision import VisionTower


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageInputs:
    """The image slots of B rows of T tokens, and the tokens that their features replace.

    Attributes:
        pixel_values: Normalized pixels of M slots per row, [batch, M, channels, height, width].
        feature_index: Features that replace each token, int [batch, tokens, K]: indices over all
            features of the row's slots, NEWLINE, or NO_FEATURE for a token that is not replaced.
        feature_weights: A token is the sum of K features with these weights, float
            [batch, tokens, K]. If K is 1, the weights are not used.
        slot_tokens: Position of the first token that has a feature of the slot, int [batch, M].
            Only dropout depends on it.
    """

    # JAX also makes trees of this class whose leaves are not arrays.
    pixel_values: Any
    feature_index: Any
    feature_weights: Any
    slot_tokens: Any


VISION_DROPOUT, PROJECTOR_DROPOUT = 2**31 - 1, 2**31 - 2
"""Numbers that are folded into dropout keys: into the key of an image's first token to get the key
of the image, and into the keys of an image's positions to get the projector's keys. No layer has
these indices, so the keys of images, projector and layers differ."""


class Projector(nnx.Module):
    """Two linear layers that project image features to the decoder's embedding size."""

    def __init__(self, config: ModelConfig):
        width = config.llm.hidden_size
        self.act = config.projector_hidden_act
        features = len(config.feature_layers) * config.vision.hidden_size
        self.linear_1 = Linear(features, width, bias=True)
        self.linear_2 = Linear(width, width, bias=True)

    @jax.named_scope("projector")
    def __call__(self, x: Float[Array, "I Q Dv"], keys: TokenKeys = None) -> Float[Array, "I Q D"]:
        """Returns the projected features, [images, positions, hidden].

        Args:
            x: Image features, [images, positions, hidden of the vision tower].
            keys: Dropout keys of the adapters, one per position; None turns dropout off.
        """
        own = None
        if keys is not None and self.linear_1.lora_a is not None:
            own = fold_in(keys, PROJECTOR_DROPOUT)
        act = ACTIVATIONS[self.act]
        project = lambda x: self.linear_2(act(self.linear_1(x, own)), own)
        return jax.checkpoint(project)(x)  # the products are cheap to recompute


class Llava(nnx.Module):
    """LLaVA model, made of a vision tower, a projector and a decoder.

    Args:
        config: Sizes of the parts, and token ids.
        compute: Settings of the computation, such as the dtype and the attention implementation.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig = FLOAT32):
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.vision = VisionTower(config.vision, config.feature_layers, compute)
        self.projector = Projector(config)
        self.llm = Llama(config.llm, compute, has_newline=config.has_newline)

    def image_features(
        self, pixel_values: Float[Array, "I C Y X"], keys: Key[Array, "I"] | None = None
    ) -> Float[Array, "I Q D"]:
        """Returns the features of image slots, [slots, positions, hidden].

        These are features of the projector, or of the vision tower if the model sums features
        before the projector.

        Args:
            pixel_values: Normalized pixels, [slots, channels, height, width].
            keys: Dropout keys of the adapters, one per slot; None turns dropout off.
        """
        features = self.vision(pixel_values.astype(self.dtype), keys)
        if self.config.vision_feature_select_strategy == "default":
            # As in Hugging Face's model, this drops CLIP's class token, but SigLIP's first patch.
            features = features[:, 1:]
        if self.config.pools_before_projector:
            return features
        own = None if keys is None else position_keys(keys, features.shape[1])
        return self.projector(features, own)

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        images: ImageInputs,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalized final hidden states of a batch, [batch, tokens, hidden].

        Slots whose features replace no token are padding and change nothing.

        Args:
            input_ids: Token ids, [batch, tokens].
            segment_ids: Segment of each token, 0 for padding. A token attends to itself and to
                earlier tokens of its segment.
            images: Image slots of each row, and the tokens that their features replace.
            key: Dropout key of the adapters; None turns dropout off. The dropout mask of a token
                depends on its segment id and its position in the segment, not on its row.
        """
        keys = None if key is None else constrain(_token_keys(key, segment_ids), "batch", "tokens")
        return self.llm(self.embed(input_ids, images, keys), segment_ids, keys)

    def embed(
        self, input_ids: Int[Array, "B T"], images: ImageInputs | None, keys: TokenKeys = None
    ) -> Float[Array, "B T D"]:
        """Returns the input of the decoder, [batch, tokens, hidden].

        Args:
            input_ids: Token ids, [batch, tokens].
            images: Image slots of each row, and the tokens that their features replace; None if
                there are no images.
            keys: Dropout keys of the adapters, one per token; None turns dropout off.
        """
        embeds = self.llm.embed_tokens(input_ids, self.dtype)
        # The devices exchange columns of the table for tokens, and then for rows. XLA cannot do
        # both at once.
        embeds = constrain(embeds, "copies", "tokens", "columns")
        embeds = constrain(embeds, "batch", "tokens", "activations")
        if images is None or not images.pixel_values.shape[1]:
            return embeds
        slot_keys = None
        if keys is not None:
            firsts = jnp.take_along_axis(keys, images.slot_tokens, axis=1)
            slot_keys = fold_in(firsts, VISION_DROPOUT).reshape(-1)
        batch, slots, *pixels = images.pixel_values.shape
        features = self.image_features(
            images.pixel_values.reshape(batch * slots, *pixels), slot_keys
        )
        # The images may be divided among more devices than the rows that they belong to.
        features = constrain(features, "images", "patches", "activations")
        features = constrain(features, "batch", "patches", "activations")
        placed = _sum_features(features.reshape(batch, -1, features.shape[-1]), images)
        if self.config.pools_before_projector:
            placed = self.projector(placed, keys)
        kind = images.feature_index[:, :, :1]
        if self.llm.image_newline is not None:
            newline = self.llm.image_newline[...].astype(self.dtype)[None, None]
            placed = jnp.where(kind == NEWLINE, newline, placed)
        return jnp.where(kind == NO_FEATURE, embeds, placed)

    def logits(
        self,
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | None,
        images: ImageInputs | None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits, [batch, tokens, vocabulary].

        Args:
            input_ids: Token ids, [batch, tokens].
            attention_mask: 1 for tokens and 0 for padding, [batch, tokens]; None if there is no
                padding.
            images: All image slots of the batch as those of one row, whose tokens are the tokens of
                all rows; None if there are no images.
        """
        embeds = self.embed(input_ids.reshape(1, -1), images).reshape(*input_ids.shape, -1)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.llm(embeds, jnp.asarray(mask, jnp.int32))
        return head_logits(hidden, self.llm.head)


def _sum_features(features: Float[Array, "B S D"], images: ImageInputs) -> Float[Array, "B T D"]:
    """Returns the weighted sum of features for each token; other tokens get any feature."""
    index = jnp.maximum(images.feature_index, 0)
    take = lambda k: jnp.take_along_axis(features, index[:, :, k, None], axis=1, mode="clip")
    count = index.shape[2]
    if count == 1:
        return take(0)
    placed = jnp.zeros((), jnp.float32)  # the sum is rounded once
    for k in range(count):
        placed += images.feature_weights[:, :, k, None] * take(k).astype(jnp.float32)
    return placed.astype(features.dtype)


def whole_images(
    config: ModelConfig, input_ids: Int[Array, "B T"], pixel_values: Float[Array, "I C Y X"]
) -> ImageInputs:
    """Returns images that are not cut into tiles as the inputs of `Llava.logits`.

    The n-th image token of the batch gets the n-th feature of all images. Surplus image tokens get
    the last feature, and surplus features are unused.

    Args:
        config: Sizes and token ids of the model.
        input_ids: Token ids, [batch, tokens].
        pixel_values: Normalized pixels of all images, [images, channels, height, width].
    """
    is_image = input_ids.reshape(1, -1, 1) == config.image_token_id
    order = jnp.cumsum(is_image, axis=1) - 1
    last = pixel_values.shape[0] * config.image_tokens - 1
    index = jnp.where(is_image, jnp.minimum(order, last), NO_FEATURE).astype(jnp.int32)
    slot_tokens = jnp.zeros((1, pixel_values.shape[0]), jnp.int32)
    return ImageInputs(pixel_values[None], index, jnp.ones(index.shape), slot_tokens)


def head_logits(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Returns float32 logits, [batch, tokens, vocabulary], for arguments of any dtype.

    Args:
        hidden: Final hidden states.
        head: Output matrix, cast to the dtype of `hidden` for the product.
    """
    return jnp.einsum(
        "BTD,VD->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _token_keys(key: Key[Array, ""], segment_ids: Int[Array, "B T"]) -> Key[Array, "B T"]:
    """Derives one PRNG key per token from its segment id and its position in the segment."""
    fold_in_both = lambda segment, position: jax.random.fold_in(
        jax.random.fold_in(key, segment), position
    )
    return jax.vmap(jax.vmap(fold_in_both))(segment_ids, positions_in_segments(segment_ids))

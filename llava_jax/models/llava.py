"""LLaVA-1.5 (Liu et al., 2023): image features are projected into the decoder's tokens."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Int, Key

from llava_jax.config import ModelConfig
from llava_jax.models.compute import FLOAT32, ComputeConfig
from llava_jax.models.layers import ACTIVATIONS, Linear, TokenKeys, fold_in
from llava_jax.models.llama import Llama, positions_in_segments
from llava_jax.models.vision import VisionTower

VISION_DROPOUT = 2**31 - 1
"""What the dropout keys of images are folded with; no layer of the decoder has this number."""


class Projector(nnx.Module):
    """Two linear layers that turn features of the vision tower into embeddings of the decoder."""

    def __init__(self, config: ModelConfig):
        width = config.llm.hidden_size
        self.act = config.projector_hidden_act
        self.linear_1 = Linear(config.vision.hidden_size, width, bias=True)
        self.linear_2 = Linear(width, width, bias=True)

    def __call__(self, x: Float[Array, "I Q Dv"]) -> Float[Array, "I Q D"]:
        project = lambda x: self.linear_2(ACTIVATIONS[self.act](self.linear_1(x)))
        return jax.checkpoint(project)(x)  # cheap to compute again


class Llava(nnx.Module):
    """Vision tower, projector and decoder.

    Args:
        config: Sizes and token ids.
        compute: How it computes.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig = FLOAT32):
        self.config = config
        self.dtype = jnp.dtype(compute.dtype)
        self.vision = VisionTower(config.vision, config.used_vision_layers, compute)
        self.projector = Projector(config)
        self.llm = Llama(config.llm, compute)

    def image_features(
        self, pixel_values: Float[Array, "I C Y X"], keys: Key[Array, "I"] | None = None
    ) -> Float[Array, "I Q D"]:
        """Embeddings of each image for the decoder; `keys` are dropout keys, one for each image."""
        features = self.vision(pixel_values.astype(self.dtype), keys)
        if self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]  # without CLIP's class token (with SigLIP, a patch)
        return self.projector(features)

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        pixel_values: Float[Array, "B M C Y X"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Normed final hidden states of a batch whose rows have up to M images each.

        The n-th image token of a row takes the n-th feature of the row's images; images without
        image tokens change nothing.

        Args:
            input_ids: Token ids, with as many image tokens for each image as it has features.
            segment_ids: 0 for padding; tokens see earlier tokens of their own segment.
            pixel_values: The images of each row.
            key: Dropout key of the adapters; None turns dropout off. The mask of a token depends on
                its segment's number and its position there, not on the row that it is in.
        """
        embeds = self.llm.embed_tokens(input_ids, self.dtype)
        keys = None if key is None else _token_keys(key, segment_ids)
        batch, images = pixel_values.shape[:2]
        if images:
            flat = pixel_values.reshape(batch * images, *pixel_values.shape[2:])
            features = self.image_features(flat, self._image_keys(keys, input_ids, images))
            features = features.reshape(batch, -1, features.shape[-1])
            embeds = self._place_images(input_ids, embeds, features)
        return self.llm(embeds, segment_ids, keys)

    def embed(
        self, input_ids: Int[Array, "B T"], pixel_values: Float[Array, "I C Y X"] | None
    ) -> Float[Array, "B T D"]:
        """Input of the decoder: embeddings of tokens, with the images' features in their places."""
        embeds = self.llm.embed_tokens(input_ids, self.dtype)
        if pixel_values is None:
            return embeds
        features = self.image_features(pixel_values)
        features = features.reshape(1, -1, features.shape[-1])  # one long row of all images
        row = lambda x: x.reshape(1, -1, *x.shape[2:])
        return self._place_images(row(input_ids), row(embeds), features).reshape(embeds.shape)

    def _image_keys(
        self, keys: TokenKeys, input_ids: Int[Array, "B T"], images: int
    ) -> Key[Array, "I"] | None:
        """A key for each image, [B, M] flattened, made from the key of its first token."""
        if keys is None:
            return None
        is_image = input_ids == self.config.image_token_id
        so_far = jnp.cumsum(is_image, axis=1)
        starts = 1 + self.config.image_tokens * jnp.arange(images)
        firsts = jax.vmap(partial(jnp.searchsorted, v=starts))(so_far)
        firsts = jnp.minimum(firsts, input_ids.shape[1] - 1)  # for images without image tokens
        return fold_in(jnp.take_along_axis(keys, firsts, axis=1), VISION_DROPOUT).reshape(-1)

    def _place_images(
        self,
        input_ids: Int[Array, "B T"],
        embeds: Float[Array, "B T D"],
        features: Float[Array, "B S D"],
    ) -> Float[Array, "B T D"]:
        is_image = input_ids == self.config.image_token_id
        slots = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
        placed = jnp.take_along_axis(features, slots[:, :, None], axis=1, mode="clip")
        return jnp.where(is_image[:, :, None], placed, embeds)

    def __call__(
        self,
        input_ids: Int[ArrayLike, "B T"],
        pixel_values: Float[ArrayLike, "I C Y X"] | None = None,
        attention_mask: Int[ArrayLike, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits in float32.

        Args:
            input_ids: Token ids, with `config.image_tokens` image tokens for each image.
            pixel_values: The images, in the order of their tokens in the rows of the batch.
            attention_mask: 1 for tokens, 0 for padding; None means no padding.
        """
        input_ids = jnp.asarray(input_ids, jnp.int32)
        embeds = self.embed(input_ids, None if pixel_values is None else jnp.asarray(pixel_values))
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.llm(embeds, jnp.asarray(mask, jnp.int32))
        return head_logits(hidden, self.llm.head)


def head_logits(hidden: Float[Array, "B T D"], head: Float[Array, "V D"]) -> Float[Array, "B T V"]:
    """Logits in float32, whatever the dtype of the operands."""
    return jnp.einsum(
        "BTD,VD->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def _token_keys(key: Key[Array, ""], segment_ids: Int[Array, "B T"]) -> Key[Array, "B T"]:
    """A key for each token, made from its segment and its position there."""
    fold_in_both = lambda segment, position: jax.random.fold_in(
        jax.random.fold_in(key, segment), position
    )
    return jax.vmap(jax.vmap(fold_in_both))(segment_ids, positions_in_segments(segment_ids))

"""Defines LLaVA-1.5 (Liu et al., 2023): a vision tower, a projector and a decoder."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, Key

from llava_jax.config import ModelConfig
from llava_jax.models.compute import FLOAT32, ComputeConfig
from llava_jax.models.layers import ACTIVATIONS, Linear, TokenKeys, fold_in, position_keys
from llava_jax.models.llama import Llama, positions_in_segments
from llava_jax.models.vision import VisionTower

VISION_DROPOUT, PROJECTOR_DROPOUT = 2**31 - 1, 2**31 - 2
"""Numbers that are folded into dropout keys: into the key of an image's first token to get the key
of the image, and into the keys of an image's positions to get the projector's keys. No layer has
these indices, so the keys of images, projector and layers differ."""


class Projector(nnx.Module):
    """Two linear layers that project image features to the decoder's embedding size."""

    def __init__(self, config: ModelConfig):
        width = config.llm.hidden_size
        self.act = config.projector_hidden_act
        self.linear_1 = Linear(config.vision.hidden_size, width, bias=True)
        self.linear_2 = Linear(width, width, bias=True)

    def __call__(
        self, x: Float[Array, "I Q Dv"], keys: Key[Array, "I"] | None = None
    ) -> Float[Array, "I Q D"]:
        """Returns the projected features, [images, positions, hidden].

        Args:
            x: Image features, [images, positions, hidden of the vision tower].
            keys: Dropout keys of the adapters, one per image; None turns dropout off.
        """
        own = None
        if keys is not None and self.linear_1.lora_a is not None:
            own = fold_in(position_keys(keys, x.shape[1]), PROJECTOR_DROPOUT)
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
        self.vision = VisionTower(config.vision, config.used_vision_layers, compute)
        self.projector = Projector(config)
        self.llm = Llama(config.llm, compute)

    def image_features(
        self, pixel_values: Float[Array, "I C Y X"], keys: Key[Array, "I"] | None = None
    ) -> Float[Array, "I Q D"]:
        """Returns the projected features of images, [images, positions, hidden].

        Args:
            pixel_values: Normalized pixels, [images, channels, height, width].
            keys: Dropout keys of the adapters, one per image; None turns dropout off.
        """
        features = self.vision(pixel_values.astype(self.dtype), keys)
        if self.config.vision_feature_select_strategy == "default":
            # As in Hugging Face's model, this drops CLIP's class token, but SigLIP's first patch.
            features = features[:, 1:]
        return self.projector(features, keys)

    def hidden_states(
        self,
        input_ids: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        pixel_values: Float[Array, "B M C Y X"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the normalized final hidden states of a batch, [batch, tokens, hidden].

        Each row has the same number M of images. The n-th image token of a row gets the n-th
        feature of the row's images. Images without image tokens are padding and change nothing.

        Args:
            input_ids: Token ids, [batch, tokens]. Each image has as many image tokens as features.
            segment_ids: Segment of each token, 0 for padding. A token attends to itself and to
                earlier tokens of its segment.
            pixel_values: Normalized pixels, [batch, M, channels, height, width].
            key: Dropout key of the adapters; None turns dropout off. The dropout mask of a token
                depends on its segment id and its position in the segment, not on its row.
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
        """Returns the input of the decoder, [batch, tokens, hidden].

        The features of the images replace the embeddings of the image tokens.

        Args:
            input_ids: Token ids, [batch, tokens].
            pixel_values: Normalized pixels of all images, in the order of the image tokens in the
                batch; None if there are no images.
        """
        embeds = self.llm.embed_tokens(input_ids, self.dtype)
        if pixel_values is None:
            return embeds
        features = self.image_features(pixel_values)
        features = features.reshape(1, -1, features.shape[-1])  # all images in one row
        row = lambda x: x.reshape(1, -1, *x.shape[2:])
        return self._place_images(row(input_ids), row(embeds), features).reshape(embeds.shape)

    def _image_keys(
        self, keys: TokenKeys, input_ids: Int[Array, "B T"], images: int
    ) -> Key[Array, "I"] | None:
        """Derives each image's dropout key from the key of its first token; returns B x M keys."""
        if keys is None:
            return None
        is_image = input_ids == self.config.image_token_id
        so_far = jnp.cumsum(is_image, axis=1)
        starts = 1 + self.config.image_tokens * jnp.arange(images)
        firsts = jax.vmap(partial(jnp.searchsorted, v=starts, method="compare_all"))(so_far)
        firsts = jnp.minimum(firsts, input_ids.shape[1] - 1)  # for images without image tokens
        return fold_in(jnp.take_along_axis(keys, firsts, axis=1), VISION_DROPOUT).reshape(-1)

    def _place_images(
        self,
        input_ids: Int[Array, "B T"],
        embeds: Float[Array, "B T D"],
        features: Float[Array, "B S D"],
    ) -> Float[Array, "B T D"]:
        """Replaces the embeddings of each row's image tokens with the row's features, in order."""
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
        """Returns float32 logits, [batch, tokens, vocabulary].

        The number of image tokens is checked only outside of `jax.jit`, where the token ids are
        known. Inside, surplus image tokens get the last feature, and surplus features are unused.

        Args:
            input_ids: Token ids, [batch, tokens], with `config.image_tokens` image tokens per
                image.
            pixel_values: Normalized pixels of all images, [images, channels, height, width], in the
                order of the image tokens in the batch; None if there are no images.
            attention_mask: 1 for tokens and 0 for padding, [batch, tokens]; None if there is no
                padding.

        Raises:
            ValueError: The number of images does not match the number of image tokens.
        """
        check_images(self.config, input_ids, pixel_values)
        input_ids = jnp.asarray(input_ids, jnp.int32)
        embeds = self.embed(input_ids, None if pixel_values is None else jnp.asarray(pixel_values))
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.llm(embeds, jnp.asarray(mask, jnp.int32))
        return head_logits(hidden, self.llm.head)


def check_images(
    config: ModelConfig,
    input_ids: Int[ArrayLike, "B T"],
    pixel_values: Float[ArrayLike, "I C Y X"] | None,
) -> None:
    """Checks that there are as many image tokens as features of images.

    As in transformers, nothing is checked if there are no images. Nothing is checked while a
    function is traced, because the token ids are not known then.

    Args:
        config: Token ids and number of tokens per image.
        input_ids: Token ids.
        pixel_values: Pixels of all images; None if there are no images.

    Raises:
        ValueError: The numbers differ.
    """
    if pixel_values is None or isinstance(input_ids, Tracer):
        return
    ids = input_ids if isinstance(input_ids, jax.Array) else np.asarray(input_ids)
    with jax.ensure_compile_time_eval():  # the ids may be a constant of a function that is traced
        tokens = int((ids == config.image_token_id).sum())
    images = np.shape(pixel_values)[0]
    if tokens != images * config.image_tokens:
        raise ValueError(
            f"input_ids has {tokens} image tokens, but the {images} images in pixel_values need "
            f"{images * config.image_tokens} ({config.image_tokens} for each image)"
        )


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

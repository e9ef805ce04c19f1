"""Defines the vision transformer of CLIP and SigLIP, up to the layer whose output LLaVA uses.

SigLIP's transformer (Zhai et al., 2023) has no class token and no norm before the blocks, but it
has a bias in the patch embedding and a pooling head after the blocks.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Key

from llava_jax.config import AttentionImplementation, VisionConfig
from llava_jax.distributed.sharding import constrain
from llava_jax.models.attention import ATTENTION
from llava_jax.models.compute import ComputeConfig
from llava_jax.models.dropout import TokenKeys, position_keys
from llava_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    parameter,
)
from llava_jax.models.stack import scan_blocks, stack_blocks


class PatchEmbedding(nnx.Module):
    """Convolution whose stride equals its kernel size, computed as one matrix product."""

    def __init__(self, config: VisionConfig):
        width, size = config.hidden_size, config.patch_size
        self.weight = parameter(width, 3, size, size)
        self.bias = nnx.data(None) if config.has_class_token else parameter(width)

    def __call__(self, pixels: Float[Array, "I C Y X"]) -> Float[Array, "I P D"]:
        weight = self.weight[...].astype(pixels.dtype)
        size = weight.shape[-1]
        height, width = (side // size * size for side in pixels.shape[2:])
        patches = rearrange(
            pixels[:, :, :height, :width], "i c (y p) (x q) -> i (y x) (c p q)", p=size, q=size
        )
        x = jnp.einsum("IPC,DC->IPD", patches, weight.reshape(weight.shape[0], -1))
        return x if self.bias is None else x + self.bias[...].astype(x.dtype)[None, None]


class Embeddings(nnx.Module):
    """Embeddings of the class token, if there is one, and of the patches, with their positions."""

    def __init__(self, config: VisionConfig):
        width = config.hidden_size
        self.class_embedding = parameter(width) if config.has_class_token else nnx.data(None)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(config.num_positions, width)

    def __call__(self, pixels: Float[Array, "I C Y X"]) -> Float[Array, "I Q D"]:
        x = self.patch_embedding(pixels)
        if self.class_embedding is not None:
            first = self.class_embedding[...].astype(x.dtype)
            first = jnp.broadcast_to(first, (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        return x + self.position_embedding.weight[...].astype(x.dtype)[None]


class Attention(nnx.Module):
    """Self-attention in which every position attends to all positions."""

    def __init__(self, config: VisionConfig, implementation: AttentionImplementation):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attend = ATTENTION[implementation]
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def __call__(self, x: Float[Array, "I Q D"], keys: TokenKeys) -> Float[Array, "I Q D"]:
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        q, k, v = (heads(f(x, keys)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v), keys)


class Mlp(nnx.Module):
    """Feed-forward layer."""

    def __init__(self, config: VisionConfig):
        self.act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: Float[Array, "I Q D"], keys: TokenKeys) -> Float[Array, "I Q D"]:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x, keys)), keys)


class Block(nnx.Module):
    """Transformer layer with norms before the attention and before the MLP."""

    def __init__(self, config: VisionConfig, implementation: AttentionImplementation):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, implementation)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def __call__(
        self, x: Float[Array, "I Q D"], context: None, keys: TokenKeys
    ) -> Float[Array, "I Q D"]:
        x += self.self_attn(self.layer_norm1(x), keys)
        x += self.mlp(self.layer_norm2(x), keys)
        return constrain(x, "images", "patches", "activations")


class Encoder(nnx.Module):
    """Stacked transformer layers.

    `layers` computes the image features. `tail` contains the layers after the feature layer, which
    are never computed but are saved with the model.
    """

    def __init__(self, config: VisionConfig, used: int, implementation: AttentionImplementation):
        self.layers = stack_blocks(Block(config, implementation), used)
        unused = config.num_hidden_layers - used
        self.tail = (
            stack_blocks(Block(config, implementation), unused) if unused else nnx.data(None)
        )


class PoolingAttention(nnx.Module):
    """Parameters of PyTorch's MultiheadAttention, with PyTorch's names."""

    def __init__(self, width: int):
        self.in_proj_weight = parameter(3 * width, width)
        self.in_proj_bias = parameter(3 * width)
        self.out_proj = Linear(width, width, bias=True)


class PoolingHead(nnx.Module):
    """Attention pooling of SigLIP.

    The head comes after the feature layer, so it is saved with the model but never computed.
    """

    def __init__(self, config: VisionConfig):
        self.probe = parameter(1, 1, config.hidden_size)
        self.attention = PoolingAttention(config.hidden_size)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)


class VisionTower(nnx.Module):
    """Image encoder, which returns the hidden states of Hugging Face's class after some blocks.

    Args:
        config: Sizes of the vision tower.
        feature_layers: Numbers of blocks after which the hidden states are that are returned.
        compute: Settings of the computation, such as the attention implementation.
    """

    def __init__(
        self, config: VisionConfig, feature_layers: tuple[int, ...], compute: ComputeConfig
    ):
        self.compute, self.feature_layers = compute, feature_layers
        norm = lambda: LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.embeddings = Embeddings(config)
        # This is the spelling in Hugging Face's checkpoints.
        self.pre_layrnorm = norm() if config.has_class_token else nnx.data(None)
        self.encoder = Encoder(config, max(feature_layers), compute.implementation)
        self.post_layernorm = norm()
        self.head = PoolingHead(config) if config.vision_use_head else nnx.data(None)

    @jax.named_scope("vision")
    def __call__(
        self, pixels: Float[Array, "I C Y X"], keys: Key[Array, "I"] | None = None
    ) -> Float[Array, "I Q F"]:
        """Returns the features of all positions, [images, positions, hidden], without a final norm.

        Positions are the patches, after the class token if there is one. The hidden states of
        several feature layers are concatenated.

        Args:
            pixels: Normalized pixels, [images, channels, height, width].
            keys: Dropout keys of the adapters, one per image; None turns dropout off.
        """
        x = self.embeddings(pixels)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        x = constrain(x, "images", "patches", "activations")
        if keys is not None:
            keys = position_keys(keys, x.shape[1])
        layers, kept = self.encoder.layers, self.feature_layers
        return scan_blocks(layers, x, Block.__call__, None, keys, self.compute, kept)

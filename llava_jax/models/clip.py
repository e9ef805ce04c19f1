"""CLIP's vision transformer, up to the layer whose output LLaVA uses."""

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from llava_jax.config import AttentionKind, Remat, VisionConfig
from llava_jax.models.attention import ATTENTION
from llava_jax.models.layers import (
    ACTIVATIONS,
    Embedding,
    LayerNorm,
    Linear,
    SampleKeys,
    parameter,
)
from llava_jax.models.stack import scan_blocks, stack_blocks
from llava_jax.sharding import constrain


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel size, as one matrix product."""

    def __init__(self, config: VisionConfig):
        self.weight = parameter(config.hidden_size, 3, config.patch_size, config.patch_size)

    def __call__(self, pixels: Float[Array, "I C Y X"]) -> Float[Array, "I P D"]:
        weight = self.weight[...].astype(pixels.dtype)
        size = weight.shape[-1]
        patches = rearrange(pixels, "i c (y p) (x q) -> i (y x) (c p q)", p=size, q=size)
        return jnp.einsum("IPC,DC->IPD", patches, weight.reshape(weight.shape[0], -1))


class Embeddings(nnx.Module):
    def __init__(self, config: VisionConfig):
        self.class_embedding = parameter(config.hidden_size)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = Embedding(config.num_patches + 1, config.hidden_size)

    def __call__(self, pixels: Float[Array, "I C Y X"]) -> Float[Array, "I Q D"]:
        patches = self.patch_embedding(pixels)
        first = self.class_embedding[...].astype(patches.dtype)
        first = jnp.broadcast_to(first, (patches.shape[0], 1, patches.shape[2]))
        positions = self.position_embedding.weight[...].astype(patches.dtype)
        return jnp.concatenate([first, patches], axis=1) + positions[None]


class Attention(nnx.Module):
    def __init__(self, config: VisionConfig, kind: AttentionKind):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attend = ATTENTION[kind]
        self.q_proj = Linear(width, width, bias=True)
        self.k_proj = Linear(width, width, bias=True)
        self.v_proj = Linear(width, width, bias=True)
        self.out_proj = Linear(width, width, bias=True)

    def __call__(self, x: Float[Array, "I Q D"], keys: SampleKeys) -> Float[Array, "I Q D"]:
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        q, k, v = (heads(f(x, keys)) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(q, k, v), keys)


class Mlp(nnx.Module):
    def __init__(self, config: VisionConfig):
        self.act = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def __call__(self, x: Float[Array, "I Q D"], keys: SampleKeys) -> Float[Array, "I Q D"]:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x, keys)), keys)


class Block(nnx.Module):
    def __init__(self, config: VisionConfig, kind: AttentionKind):
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = Attention(config, kind)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config)

    def __call__(
        self, x: Float[Array, "I Q D"], context: None, keys: SampleKeys
    ) -> Float[Array, "I Q D"]:
        x += self.self_attn(self.layer_norm1(x), keys)
        x += self.mlp(self.layer_norm2(x), keys)
        return constrain(x, "batch", "patches", "activations")


class Encoder(nnx.Module):
    """`layers` reach the feature. `tail` are those after it: never computed, kept for saving."""

    def __init__(self, config: VisionConfig, used: int, kind: AttentionKind):
        self.layers = stack_blocks(Block(config, kind), used)
        unused = config.num_hidden_layers - used
        self.tail = stack_blocks(Block(config, kind), unused) if unused else nnx.data(None)


class ClipVision(nnx.Module):
    """CLIP's image encoder; its output is hidden_states[used] of Hugging Face's CLIP.

    Args:
        config: Sizes.
        used: Blocks before the feature.
        kind: How attention is computed.
        remat: What the backward pass computes again.
        offload: Whether the blocks' inputs wait for it in host memory.
    """

    def __init__(
        self, config: VisionConfig, used: int, *, kind: AttentionKind, remat: Remat, offload: bool
    ):
        self.remat: Remat = remat
        self.offload = offload
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # CLIP's spelling
        self.encoder = Encoder(config, used, kind)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(
        self, pixels: Float[Array, "I C Y X"], keys: SampleKeys = None
    ) -> Float[Array, "I Q D"]:
        """Features of the class token and all patches, no post-norm."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        x = constrain(x, "batch", "patches", "activations")
        return scan_blocks(
            self.encoder.layers,
            x,
            Block.__call__,
            None,
            keys,
            remat=self.remat,
            offload=self.offload,
        )

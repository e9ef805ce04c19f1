"""Defines the sizes of a model, with the same field names as Hugging Face's configs."""

import dataclasses
from typing import Annotated, Literal, cast

from llava_jax.config.fields import Bound, above, at_least, check_fields
from llava_jax.errors import ConfigError

NO_FEATURE, NEWLINE = -1, -2
"""Indices in place of the index of a feature: of tokens of the text, and of tokens that end a row
of an image's features."""

LLM_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

_Size = Annotated[int, at_least(1, "it is a size of the model")]
_TokenId = Annotated[int, at_least(0, "token ids are counted from 0")]
_Epsilon = Annotated[float, above(0, "it prevents a division by zero")]
_Factor = Annotated[float, above(0, "it scales or divides frequencies")]
_OptionalFactor = Annotated[float | None, above(0, "it is a factor or a number of turns")]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, which is a CLIP or SigLIP vision transformer.

    The fields have the same names as in Hugging Face's configs.

    Attributes:
        image_size: Width and height of an image in pixels.
        patch_size: Width and height of a patch in pixels.
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of attention heads.
        hidden_act: Name of the activation function, as in Hugging Face's configs.
        layer_norm_eps: Number that layer norms add to the variance.
        model_type: Architecture of the vision tower.
        vision_use_head: Whether the weights include SigLIP's pooling head. This package never uses
            the pooling head, but keeps its weights in saved checkpoints.
    """

    image_size: _Size = 336
    patch_size: _Size = 14
    hidden_size: _Size = 1024
    intermediate_size: _Size = 4096
    num_hidden_layers: _Size = 24
    num_attention_heads: _Size = 16
    hidden_act: str = "quick_gelu"
    layer_norm_eps: _Epsilon = 1e-5
    model_type: Literal["clip_vision_model", "siglip_vision_model"] = "clip_vision_model"
    vision_use_head: bool = False

    @property
    def has_class_token(self) -> bool:
        """Whether a class token precedes the patches; True for CLIP, False for SigLIP."""
        return self.model_type == "clip_vision_model"

    @property
    def num_patches(self) -> int:
        """Number of patches of an image; incomplete patches at the edges are left out."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Number of patches, plus one if there is a class token."""
        return self.num_patches + self.has_class_token


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies, with which a decoder reads longer sequences.

    The fields have the same names as in Hugging Face's `rope_scaling`, and None stands for the same
    defaults. `models/rope.py` describes what each kind computes.

    Attributes:
        rope_type: Kind of scaling.
        factor: Number that frequencies are divided by, or by which "dynamic" stretches the context.
        original_max_position_embeddings: Context length in tokens before the scaling, for "yarn"
            and "llama3". None stands for the decoder's `max_position_embeddings`.
        low_freq_factor: For "llama3": frequencies that make at most this number of turns in the
            original context length are divided by `factor`.
        high_freq_factor: For "llama3": frequencies that make at least this number of turns in the
            original context length are not changed. Frequencies in between are interpolated.
        attention_factor: For "yarn": factor of the rotated queries and keys. None computes it from
            `factor`, `mscale` and `mscale_all_dim`.
        beta_fast: For "yarn": number of turns in the original context length from which
            frequencies are not changed. None stands for 32.
        beta_slow: For "yarn": number of turns in the original context length up to which
            frequencies are divided by `factor`. None stands for 1.
        mscale: For "yarn": weight of log(factor) in the numerator of the attention factor. It is
            used if `mscale_all_dim` is also given.
        mscale_all_dim: For "yarn": weight of log(factor) in the denominator.
        truncate: For "yarn": whether the limits between changed and unchanged frequencies are
            rounded to whole frequencies. None stands for True.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: Annotated[float, at_least(1, "a scaling makes the context longer")]
    original_max_position_embeddings: Annotated[
        int | None, at_least(1, "it is a number of tokens")
    ] = None
    low_freq_factor: _OptionalFactor = None
    high_freq_factor: _OptionalFactor = None
    attention_factor: _OptionalFactor = None
    beta_fast: _OptionalFactor = None
    beta_slow: _OptionalFactor = None
    mscale: _OptionalFactor = None
    mscale_all_dim: _OptionalFactor = None
    truncate: bool | None = None

    def __post_init__(self):
        check_fields(self, "rope_scaling.")
        names = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_slow", "beta_fast"),
        }.get(self.rope_type)
        if names is None:
            return
        pair = f"rope_scaling of the kind {self.rope_type!r}: {' and '.join(names)}"
        if self.rope_type == "llama3" and None in (self.low_freq_factor, self.high_freq_factor):
            raise ConfigError(f"{pair} are needed, and one of them is missing")
        slow, fast = self.turns
        if not 0 < slow < fast:
            raise ConfigError(
                f"{pair} are {slow:g} and {fast:g}; the first must be above 0 and below the second"
            )

    @property
    def turns(self) -> tuple[float, float]:
        """Turns in the original context length between which frequencies are interpolated."""
        slow, fast = self.beta_slow or 1, self.beta_fast or 32
        if self.rope_type == "llama3":
            slow, fast = self.low_freq_factor or 0, self.high_freq_factor or 0
        return float(slow), float(fast)


@dataclasses.dataclass(frozen=True)
class LlmConfig:
    """Sizes of the decoder, which is a LLaMA, Mistral, Qwen2 or Qwen3 model.

    The fields have the same names as in Hugging Face's configs.

    Attributes:
        vocab_size: Number of rows of the embedding table.
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of transformer blocks.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Width of an attention head.
        max_position_embeddings: Longest sequence in tokens that the decoder was trained for; with
            some kinds of `rope_scaling`, before the scaling.
        rms_norm_eps: Number that RMS norms add to the mean square.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Scaling of the rotary frequencies; None does not scale them.
        tie_word_embeddings: Whether the output layer shares its weights with the embedding table.
        model_type: Architecture of the decoder.
        sliding_window: Number of tokens that each token attends to in a Mistral model, including
            the token itself. Longer sequences are refused. None sets no limit.
    """

    vocab_size: _Size = 32064
    hidden_size: _Size = 4096
    intermediate_size: _Size = 11008
    num_hidden_layers: _Size = 32
    num_attention_heads: _Size = 32
    num_key_value_heads: _Size = 32
    head_dim: _Size = 128
    max_position_embeddings: _Size = 4096
    rms_norm_eps: _Epsilon = 1e-5
    rope_theta: _Factor = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    sliding_window: Annotated[int | None, at_least(1, "it is a number of tokens")] = None

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens that the decoder is made for, with its `rope_scaling`."""
        trained, scaling = self.max_position_embeddings, self.rope_scaling
        if scaling is None:
            return trained
        # Some configs have the length before the scaling in `max_position_embeddings`, others the
        # length after it.
        original = scaling.original_max_position_embeddings or trained
        return max(trained, int(scaling.factor * original))

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.model_type == "qwen2"

    @property
    def has_qk_norm(self) -> bool:
        """Whether the heads of queries and keys have RMS norms before RoPE."""
        return self.model_type == "qwen3"


@dataclasses.dataclass(frozen=True)
class TilingConfig:
    """How an image of high resolution is cut into tiles, called "anyres" in LLaVA-NeXT.

    Attributes:
        grid_pinpoints: Resolutions (height, width) in pixels, one of which an image is resized to.
            They are multiples of the image size of the vision tower.
        max_tiles: Number of tiles whose features an image may have. The features of more tiles are
            pooled to about this number. None never pools.
        tiles_several_images: Whether the images of samples with several images are cut, too.
    """

    grid_pinpoints: Annotated[
        tuple[tuple[int, int], ...],
        Bound(
            lambda pinpoints: bool(pinpoints) and min(map(min, pinpoints)) >= 1,
            "positive",
            "they are heights and widths in pixels",
        ),
    ]
    max_tiles: Annotated[int | None, at_least(1, "it is a number of tiles")] = None
    tiles_several_images: bool = True


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How the frames of a video become tokens.

    Attributes:
        token_id: Token id that stands for a video in a prompt.
        pooling: How the features of a frame are reduced. "average" takes the mean of squares of
            `stride` x `stride` features, before the projector. "bilinear" resizes the features of
            the projector to 1 / `stride` of their height and width, and adds one newline at the end
            of the video.
        stride: Number of features that become one, in each direction.
    """

    token_id: _TokenId
    pooling: Literal["average", "bilinear"]
    stride: Annotated[int, at_least(1, "it is a number of features")] = 2


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a LLaVA model: a vision tower, a projector of two layers and a decoder.

    Attributes:
        vision: Sizes of the vision tower.
        llm: Sizes of the decoder.
        image_token_id: Token id that stands for an image in a prompt.
        pad_token_id: Token id of padding.
        tiling: How images are cut into tiles; None takes each image as a whole.
        video: How videos become tokens; None if the model reads no videos.
        vision_feature_layer: Index of the vision tower's hidden state that is the input of the
            projector, or several indices, whose hidden states are concatenated. Index 0 is the
            input of the first block, and -1 the output of the last block.
        vision_feature_select_strategy: "default" drops the first position of the vision tower's
            output, which is CLIP's class token; "full" keeps all positions.
        projector_hidden_act: Name of the projector's activation function, as in Hugging Face's
            configs.
    """

    vision: VisionConfig = VisionConfig()
    llm: LlmConfig = LlmConfig()
    image_token_id: _TokenId = 32000
    pad_token_id: _TokenId = 32001
    tiling: TilingConfig | None = None
    video: VideoConfig | None = None
    vision_feature_layer: Annotated[
        int | tuple[int, ...],
        Bound(
            lambda given: bool(given) and 0 not in (given if isinstance(given, tuple) else ()),
            "not 0",
            "hidden state 0 is the input of the tower",
        ),
    ] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    projector_hidden_act: str = "gelu"

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Numbers of vision blocks after which the hidden states of `vision_feature_layer` are.

        Raises:
            ConfigError: The vision tower has no hidden state with an index, or the hidden state is
                the input of the first block.
        """
        given, depth = self.vision_feature_layer, self.vision.num_hidden_layers
        if given == ():
            raise ConfigError("vision_feature_layer is empty; name at least one layer")
        found = []
        for layer in given if isinstance(given, tuple) else (given,):
            used = layer if layer >= 0 else depth + 1 + layer
            if not 0 < used <= depth:
                raise ConfigError(
                    f"vision_feature_layer {layer} is not the output of one of the {depth} layers "
                    f"of the vision tower; set it to 1 to {depth}, or to -{depth} to -1"
                )
            found.append(used)
        return tuple(found)

    @property
    def used_vision_layers(self) -> int:
        """Number of vision blocks that are computed, up to the last one of `feature_layers`."""
        return max(self.feature_layers)

    @property
    def image_tokens(self) -> int:
        """Number of features of an image slot, which holds an image, a tile or a video frame.

        An image that is not cut into tiles takes as many tokens. As in Hugging Face's LLaVA, the
        strategy "default" drops the first position. With CLIP, this is the class token. With
        SigLIP, which has no class token, this is the first patch.
        """
        return self.vision.num_positions - (self.vision_feature_select_strategy == "default")

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand for an image or a video."""
        return (self.image_token_id, *([] if self.video is None else [self.video.token_id]))

    @property
    def max_slots_per_image(self) -> int:
        """Largest number of image slots of an image: the whole image, and its tiles."""
        if self.tiling is None:
            return 1
        side = self.vision.image_size
        tiles = ((height // side) * (width // side) for height, width in self.tiling.grid_pinpoints)
        return 1 + max(tiles)

    @property
    def sources_per_token(self) -> int:
        """Largest number of features of which a token is the weighted sum."""
        if self.pools_before_projector:
            return cast("VideoConfig", self.video).stride ** 2
        is_resized = self.video is not None or (self.tiling and self.tiling.max_tiles is not None)
        return 4 if is_resized else 1  # bilinear interpolation

    @property
    def pools_before_projector(self) -> bool:
        """Whether tokens are sums of features of the vision tower, and not of the projector."""
        return self.video is not None and self.video.pooling == "average"

    @property
    def has_newline(self) -> bool:
        """Whether the decoder has a vector that ends the rows of an image's features."""
        return self.tiling is not None or self.video is not None

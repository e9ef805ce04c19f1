"""Defines the config of a run: recipe, plan, sizes of the model and source of the weights."""

from llava_jax.config.command_line import load_config, parse_config
from llava_jax.config.data import Aspect, DataConfig, DataSet, Decode
from llava_jax.config.model import (
    LLM_LINEARS,
    NEWLINE,
    NO_FEATURE,
    VISION_LINEARS,
    LlmConfig,
    ModelConfig,
    RopeScaling,
    TilingConfig,
    VideoConfig,
    VisionConfig,
)
from llava_jax.config.model_sizes import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_LLAMA3_8B,
    LLAVA_NEXT_7B,
    LLAVA_NEXT_13B,
    LLAVA_NEXT_34B,
    LLAVA_NEXT_72B,
    LLAVA_NEXT_LLAMA3_8B,
    LLAVA_NEXT_MISTRAL_7B,
    LLAVA_NEXT_VIDEO_7B,
    NEXT_TILING,
    ONEVISION_0_5B,
    ONEVISION_7B,
    ONEVISION_72B,
    ONEVISION_TILING,
    SIGLIP,
)
from llava_jax.config.source import Parts, Source, absolute_source, format_source, parse_source
from llava_jax.config.train import (
    IGNORED_BY_PLANS,
    MAY_CHANGE,
    MAY_DIFFER,
    AttentionImplementation,
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    Json,
    LogConfig,
    MemoryConfig,
    MeshConfig,
    OptimizerConfig,
    Quantisation,
    Remat,
    TrainConfig,
    flatten,
    to_json,
)
from llava_jax.config.tuning import ALL_LINEAR, LoraConfig, TuneConfig, Tuning

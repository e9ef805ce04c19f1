"""Defines the config of a run: recipe, plan, sizes of the model and source of the weights."""

from llava_jax.config.command_line import load_config, parse_config
from llava_jax.config.data import Aspect, DataConfig, DataSet, Decode
from llava_jax.config.model import (
    LLAVA_7B,
    LLAVA_13B,
    LLAVA_LLAMA3_8B,
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

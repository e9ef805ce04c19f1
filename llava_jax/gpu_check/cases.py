"""Defines the models, recipes and plans of `llava-jax gpu-check`, and makes random weights.

Every check uses only the first attached device. On a CPU, all checks use small sizes.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from llava_jax.config import (
    BatchConfig,
    DataConfig,
    LlmConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.distributed.environment import POOL_SHARE, host_memory
from llava_jax.distributed.host_memory import is_for_host
from llava_jax.models.build import initial_distribution
from llava_jax.models.layers import Abstract
from llava_jax.models.quant import NF4, Quantised
from llava_jax.speed.case import SHAPES, Case

RESIDENT = MemoryConfig()
HOSTED = MemoryConfig(offload_optimizer=True, stream_weights=True, offload_activations=True)
STREAMED = MemoryConfig(offload_optimizer=True, stream_weights=True)
OPTIMIZER_HOSTED = MemoryConfig(offload_optimizer=True)
INPUTS_HOSTED = MemoryConfig(offload_activations=True)

# The smallest model whose layers are all large enough to be kept in host memory (see
# `distributed.host_memory.MIN_SLICE`). It fits the tokenizer and the images of assets/tiny-llava.
SMALL = ModelConfig(
    VisionConfig(64, 8, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                 num_attention_heads=4),
    LlmConfig(512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
              num_attention_heads=4, num_key_value_heads=4, head_dim=64),
    image_token_id=3,
    pad_token_id=4,
)  # fmt: skip
SMALL_TEXT = 32

OPTIMIZER = OptimizerConfig(schedule="constant", warmup_ratio=0.0)
FULL = TrainConfig("full", tune=TuneConfig("full", "frozen", "full"), optimizer=OPTIMIZER)
LORA = TrainConfig("LoRA", tune=TuneConfig("lora", "frozen", "full"), optimizer=OPTIMIZER)
QLORA = dataclasses.replace(LORA, name="QLoRA", quantize="nf4_double")

NF4_STDDEV = float(np.std(NF4))
"""Standard deviation of NF4 weights with random codes, relative to the largest magnitude."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the checks.

    Attributes:
        compared: Recipes, dtypes and plans whose train steps are compared with resident steps.
        evaluated: Recipes, dtypes and plans whose evaluation steps are compared with resident
            steps.
        kernels: Implementations of attention to check.
        tokens: Number of tokens per row in the check of attention.
        large: Model for the checks of memory and speed.
        medium: Model for the check of full training.
        text_tokens: Number of text tokens per sample, for `large` and `medium`.
        micro_size: Number of samples in a micro-batch, for `large` and `medium`.
        rank: Rank of the LoRA adapters of `large`.
        dtype: Dtype of the computation of `large` and `medium`.
        pool_block: Bytes of one array in the check of pinned memory.
        pool_blocks: Number of arrays in the check of pinned memory.
    """

    compared: tuple[tuple[TrainConfig, str, MemoryConfig], ...]
    evaluated: tuple[tuple[TrainConfig, str, MemoryConfig], ...]
    kernels: tuple[str, ...]
    tokens: int
    large: ModelConfig
    medium: ModelConfig
    text_tokens: int
    micro_size: int
    rank: int
    dtype: str
    pool_block: int
    pool_blocks: int

    def case(self, model: ModelConfig, recipe: TrainConfig, memory: MemoryConfig) -> Case:
        """Returns a run of `large` or `medium` with two micro-batches per step."""
        config = dataclasses.replace(
            recipe,
            lora=LoraConfig(rank=self.rank, alpha=2.0 * self.rank),
            batch=BatchConfig(2 * self.micro_size, self.micro_size),
            data=DataConfig(max_length=model.image_tokens + self.text_tokens),
            memory=memory,
            dtype=self.dtype,
        )
        return Case(config, model, self.text_tokens)


RECIPES = (FULL, LORA, QLORA)
# bfloat16 comes first, because it is the default of a run.
ON_GPU = Sizes(
    compared=(
        *((recipe, "bfloat16", HOSTED) for recipe in RECIPES),
        (LORA, "bfloat16", INPUTS_HOSTED),
        (FULL, "float32", HOSTED),
    ),
    evaluated=((LORA, "bfloat16", HOSTED), (QLORA, "bfloat16", HOSTED)),
    kernels=("cudnn", "flash", "plain"),
    tokens=1024,
    large=SHAPES["7b"],
    medium=SHAPES["1b"],
    text_tokens=2048 - SHAPES["7b"].image_tokens,
    micro_size=4,
    rank=128,
    dtype="bfloat16",
    pool_block=2**28,
    pool_blocks=18,
)
ON_CPU = Sizes(
    compared=((FULL, "float32", HOSTED),),
    evaluated=((LORA, "float32", HOSTED),),
    kernels=("plain",),
    tokens=160,
    large=SMALL,
    medium=SMALL,
    text_tokens=SMALL_TEXT,
    micro_size=1,
    rank=16,
    dtype="float32",
    pool_block=2**22,
    pool_blocks=18,
)


def sizes_here() -> Sizes:
    """Returns the sizes of the checks for the attached devices."""
    return ON_CPU if jax.default_backend() == "cpu" else ON_GPU


def device_capacity() -> int:
    """Returns the memory of the first device in bytes, or of the host if the device is a CPU.

    JAX reports the memory of a device without the reserve; see `prepare_for_training`.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return host_memory() if limit is None else int(limit / POOL_SHARE)


def batch_of(case: Case, step: int = 0) -> Batch:
    """Returns a random batch on the host, in which sample i ends with i tokens of padding."""
    arrays: dict[str, Any] = case.batch(step)
    batch = Batch(**arrays)
    kept = np.arange(case.tokens) < case.tokens - np.arange(case.samples)[:, None]
    segment_ids = np.where(kept, batch.segment_ids, 0)
    return dataclasses.replace(batch, segment_ids=segment_ids, loss_mask=batch.loss_mask & kept)


def random_params(abstract: Abstract, seed: int) -> dict[str, PyTree]:
    """Returns random parameters, which are generated on the device.

    Generating the weights of a 7B model on the host would take minutes. The values have the same
    distributions as those of `models.build.initialise`, and depend only on the seed and the path of
    a parameter. The codes of quantized weights are uniform.

    Args:
        abstract: Shape, dtype and sharding of each parameter, by path.
        seed: Seed of the random values.
    """
    # Arrays in host memory come first, because each is on the device for a moment.
    hosted = lambda path: any(map(is_for_host, jax.tree.leaves(abstract[path])))
    paths = sorted(abstract, key=hosted, reverse=True)
    return {path: _random_parameter(path, abstract[path], seed) for path in paths}


def _random_parameter(path: str, leaf: PyTree, seed: int) -> PyTree:
    """Returns a random parameter, as an array or as a quantized weight."""
    kind, number = initial_distribution(path, leaf.shape)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))

    def make(x: jax.ShapeDtypeStruct) -> jax.Array:
        how, value = kind, number
        if isinstance(leaf, Quantised):
            # All scales are the same number, so that the weights have about the right size.
            is_code = jnp.issubdtype(x.dtype, jnp.integer)
            how, value = ("bits", 0.0) if is_code else ("constant", number / NF4_STDDEV)
        if how == "constant":
            array: jax.Array | np.ndarray = np.full(x.shape, value, x.dtype)
        else:
            on_device = x.sharding.with_memory_kind("device") if is_for_host(x) else x.sharding
            array = _filler(x.shape, np.dtype(x.dtype), how, on_device)(key, value)
        return jax.block_until_ready(jax.device_put(array, x.sharding))

    return jax.tree.map(make, leaf)


@functools.cache
def _filler(
    shape: tuple[int, ...], dtype: np.dtype, kind: str, sharding: NamedSharding
) -> Callable[[jax.Array, float], jax.Array]:
    """Returns a compiled function (key, number) that makes a random array on the device.

    A stack is made layer by layer, to save memory.

    Args:
        shape: Shape of the array.
        dtype: Dtype of the array.
        kind: Distribution of the values: "normal", "uniform", or "bits" for integers.
        sharding: Sharding of the array.
    """

    def draw(key: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if kind == "bits":
            return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
        values = jax.random.normal if kind == "normal" else partial(jax.random.uniform, minval=-1)
        return (number * values(key, shape)).astype(dtype)

    def fill(key: jax.Array, number: jax.Array) -> jax.Array:
        if len(shape) < 3:
            return draw(key, number, shape)
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda key: draw(key, number, shape[1:]), keys)

    return jax.jit(fill, out_shardings=sharding)

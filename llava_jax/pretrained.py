"""From a checkpoint to a model: shapes first, then shardings, then weights straight into place."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from llava_jax import lora
from llava_jax.config import ConfigError, LoraConfig, ModelConfig, Parts
from llava_jax.hf import model_config as hf_config
from llava_jax.hf import weights
from llava_jax.hf.tokenizer import IMAGE_TOKEN, load_tokenizer
from llava_jax.models.layers import Params, split
from llava_jax.models.llava import Llava

Abstract = dict[str, jax.ShapeDtypeStruct]

INIT_STDDEV = 0.02  # `initializer_range` of LlamaConfig and CLIPVisionConfig


def resolve(source: str | Parts) -> Path | Parts:
    """Where a checkpoint lies: a directory, a finished run's `model/`, or a hub id's snapshot.

    Raises:
        ConfigError: There is nothing of the kind.
    """
    if isinstance(source, Parts):
        return source
    path = Path(source)
    if (path / "model").is_dir():
        return path / "model"
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or source.startswith((".", "/")):
        raise ConfigError(f"init_from {source!r}: no such directory")
    return _download(source)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # only for those who name a hub id

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            )
        )
    except Exception as error:  # the hub's client has many, and no common base
        raise ConfigError(
            f"init_from {hub_id!r} is neither a directory nor to be had from the hub: {error}"
        ) from error


def read_config(source: Path | Parts) -> ModelConfig:
    """The model that a checkpoint's own files describe."""
    if isinstance(source, Parts):
        tokenizer = load_tokenizer(source)
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        return hf_config.read_parts_config(source, image_id, tokenizer.pad_token_id)
    return hf_config.read_model_config(source)


def build(
    config: ModelConfig,
    adapters: Mapping[str, LoraConfig],
    *,
    dtype: str,
    remat: bool = True,
) -> tuple[nnx.GraphDef, Abstract]:
    """A model's structure and its parameters' shapes, in float32; no memory is taken."""
    model = Llava(config, dtype=dtype, remat=remat)
    lora.add_adapters(model, dict(adapters))
    return split(model)


def initialise(abstract: Abstract, shardings: Mapping[str, Sharding], seed: int) -> Params:
    """Fresh parameters, the same on any devices: each depends on the seed and its path alone."""

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = _initial_value(path, leaf.shape, seed).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, shardings[path], lambda i: value[i])

    return {path: make(path, leaf) for path, leaf in abstract.items()}


def _initial_value(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    module, name = path.rsplit(".", 2)[-2:]
    if name in ("bias", "lora_b"):
        return np.zeros(shape, np.float32)
    if "norm" in module:
        return np.ones(shape, np.float32)
    if name == "lora_a":  # as PEFT: Kaiming uniform with a = sqrt(5)
        bound = 1 / math.sqrt(shape[-1])
        return rng.uniform(-bound, bound, shape).astype(np.float32)
    return INIT_STDDEV * rng.standard_normal(shape, np.float32)


def load(
    source: Path | Parts | None,
    config: ModelConfig,
    abstract: Abstract,
    shardings: Mapping[str, Sharding],
    *,
    seed: int,
    wanted: Collection[str] | None = None,
) -> Params:
    """Parameters from a checkpoint, and fresh ones where it has none.

    Args:
        source: From `resolve`; None makes everything fresh.
        config: The model.
        abstract: Shapes and dtypes of all parameters, adapters included.
        shardings: Where each goes.
        seed: For fresh ones: adapters, and a projector that `source` lacks.
        wanted: Only these are loaded or made; the checkpoint is checked in full all the same.
    """
    wanted = abstract.keys() if wanted is None else wanted
    base = {path: leaf for path, leaf in abstract.items() if not lora.is_adapter(path)}
    if source is None:
        params = {}
    elif isinstance(source, Parts):
        params = weights.load_parts(source, config, base, shardings, wanted=wanted)
    else:
        params = weights.load_params(source, config, base, shardings, wanted=wanted)
    fresh = {path: abstract[path] for path in wanted if path not in params}
    return params | initialise(fresh, shardings, seed)

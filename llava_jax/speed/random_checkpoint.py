"""Writes checkpoints of random weights, for models of any size."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from llava_jax.config import ModelConfig
from llava_jax.models import paths
from llava_jax.models.build import build_model
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.model_config import write_model_config
from llava_jax.pretrained.safetensors import Specs, write_sharded

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The number of values is a prime number, so that no two rows of a matrix are equal.
_NORMAL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)


def write_checkpoint(directory: Path, model: ModelConfig) -> None:
    """Writes a Hugging Face checkpoint in bfloat16, one tensor at a time.

    Args:
        directory: Directory of the checkpoint, which is created if needed.
        model: Sizes of the model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for path, leaf in build_model(model, {})[1].items():
        if paths.is_stacked(path):
            for layer in range(leaf.shape[0]):
                name = layouts.HF_4_36.file_name(paths.unstacked(path, layer, model))
                specs[name] = leaf.shape[1:], _BFLOAT16
        else:
            specs[layouts.HF_4_36.file_name(path)] = leaf.shape, _BFLOAT16
    write_sharded(directory, specs, lambda name: random_values(name, specs))
    write_model_config(model, directory)  # written last, to show that the checkpoint is complete


def random_values(name: str, specs: Specs) -> np.ndarray:
    """Returns random values with about the same variance as the initial weights of a model.

    Biases are 0, and the weights of norms are 1.

    Args:
        name: Name of the tensor.
        specs: Shape and dtype of each tensor, by name.
    """
    shape, dtype = specs[name]
    if name.endswith(".bias"):
        return np.zeros(shape, dtype)
    if "norm" in name.rsplit(".", 2)[-2]:
        return np.ones(shape, dtype)
    scale = 0.02 if "embed" in name else math.prod(shape[1:] or shape) ** -0.5
    return np.resize((scale * _NORMAL).astype(dtype), shape)

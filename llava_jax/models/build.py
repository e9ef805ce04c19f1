"""Builds the structure and the parameter shapes of a model, and initializes parameters."""

import math
import zlib
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from llava_jax.config import ModelConfig, Quantisation
from llava_jax.errors import ConfigError
from llava_jax.models import lora, quant
from llava_jax.models.compute import FLOAT32, ComputeConfig
from llava_jax.models.layers import Abstract, Params, split
from llava_jax.models.llava import Llava
from llava_jax.models.paths import is_stacked
from llava_jax.models.quant import Quantised, quantise

EMBEDDING_STDDEV = 0.02  # `initializer_range` of LlamaConfig


def build_model(
    config: ModelConfig,
    adapters: lora.Adapters,
    compute: ComputeConfig = FLOAT32,
) -> tuple[nnx.GraphDef, Abstract]:
    """Returns the structure of a model and the shapes of its parameters, without arrays.

    Args:
        config: Sizes of the model.
        adapters: Adapters by the path of their module, as `adapter_settings.expand` returns them.
        compute: Settings of the computation.
    """
    model = Llava(config, compute)
    lora.add_adapters(model, adapters)
    return split(model)


def quantised_shapes(shapes: Abstract, kind: Quantisation) -> Abstract:
    """Returns the quantized weights of a model as ShapeDtypeStructs, by path.

    Args:
        shapes: Shapes of all parameters of the model, by path.
        kind: Quantization format.

    Raises:
        ConfigError: A weight cannot be quantized.
    """
    found = {}
    for path in filter(quant.is_quantised, shapes):
        try:
            found[path] = quant.abstract(kind, shapes[path].shape)
        except quant.QuantisationError as error:
            raise ConfigError(f"quantize: {path}: {error}") from error
    return found


def initialise(abstract: Abstract, seed: int, adapters: lora.Adapters | None = None) -> Params:
    """Returns new parameters, whose values depend on the seed and on their paths, not on devices.

    Weights of linear layers have a variance of 1 / inputs (LeCun normal). Adapters are initialized
    as in PEFT, and projectors as in LLaVA.

    Args:
        abstract: Shape, dtype and sharding of each parameter, by path.
        seed: Seed of the random values.
        adapters: Adapters of the model, if the layers of a stack may have different ranks.
    """

    def make(path: str, leaf: PyTree) -> PyTree:
        value: PyTree = _initial_value(path, leaf.shape, seed)
        value = lora.without_padding(value, path, adapters or {})
        if isinstance(leaf, Quantised):
            layers = [quantise(layer, leaf.kind) for layer in value]
            value = jax.tree.map(lambda *parts: np.stack(parts), *layers)
        return jax.tree.map(place_value, leaf, value)

    def place_value(leaf: jax.ShapeDtypeStruct, value: np.ndarray) -> jax.Array:
        value = value.astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda i: value[i])

    return {path: make(path, leaf) for path, leaf in abstract.items()}


def initial_distribution(
    path: str, shape: tuple[int, ...]
) -> tuple[Literal["constant", "normal", "uniform"], float]:
    """Returns the distribution of the initial values of a parameter; see `initialise`.

    Args:
        path: Path of the parameter.
        shape: Shape of the parameter.

    Returns:
        The kind of the distribution, and its number: the constant, the standard deviation of normal
        values with mean 0, or the limit b of uniform values between -b and b.
    """
    module, name = path.rsplit(".", 2)[-2:]
    if name.endswith("bias") or name == "lora_b":
        return "constant", 0.0
    if "norm" in module:
        return "constant", 1.0
    if module == "embed_tokens":
        return "normal", EMBEDDING_STDDEV
    inputs = math.prod(shape[2 if is_stacked(path) else 1 :] or shape)
    if name == "lora_a" or path.startswith("projector."):
        # PEFT and LLaVA use PyTorch's default for linear layers: Kaiming uniform with a = sqrt(5).
        return "uniform", inputs**-0.5
    return "normal", inputs**-0.5


def _initial_value(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    kind, number = initial_distribution(path, shape)
    if kind == "constant":
        return np.full(shape, number, np.float32)
    if kind == "uniform":
        return rng.uniform(-number, number, shape).astype(np.float32)
    return np.float32(number) * rng.standard_normal(shape, np.float32)

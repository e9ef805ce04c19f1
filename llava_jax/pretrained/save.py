"""Writes parameters to safetensors files, and gathers them one layer at a time.

A parameter is an array on any devices, or a `Stored` parameter whose values are in other files.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llava_jax.config import ModelConfig
from llava_jax.distributed.disk_weights import DiskStack
from llava_jax.distributed.host_memory import fetch, layer_at
from llava_jax.distributed.multihost import is_main_process
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.models.lora import Adapters, stored_layers
from llava_jax.models.stack import jit_for_backend
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.safetensors import SHARD_BYTES, Specs, is_finite, natural, write_sharded


def save_params(
    params: Mapping[str, jax.Array | Stored],
    directory: str | Path,
    config: ModelConfig,
    *,
    layout: Layout = layouts.HF_4_36,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes model.safetensors, or several shards and their index.

    All processes of a run must call this function, because they gather the tensors together. Only
    the first process writes files.

    Args:
        params: Parameters of a model; adapters must be merged first.
        directory: Directory to write; it is created if it does not exist. Weights that are already
            in the directory are replaced.
        config: Sizes of the model that `params` belong to.
        layout: Layout of the tensor names.
        dtype: Dtype of all tensors, "bfloat16", "float16" or "float32"; None keeps their dtypes.
        shard_bytes: Largest size of a file in bytes.

    Raises:
        ValueError: There are adapters among the parameters.
        CheckpointError: A value is too large for `dtype`, or a `Stored` parameter cannot be read.
    """
    adapters = [path for path in params if paths.is_adapter(path)]
    if adapters:
        raise ValueError(f"merge the adapters before you save the model: {', '.join(adapters)}")
    write = lambda specs, fetch: write_sharded(Path(directory), specs, fetch, shard_bytes)
    save_tensors(params, config, layout.file_name, write, dtype)


def save_tensors(
    params: Mapping[str, jax.Array | Stored],
    config: ModelConfig,
    naming: Callable[[str], str],
    write: Callable[[Specs, Callable[[str], np.ndarray]], None],
    dtype: str | None = None,
    adapters: Adapters | None = None,
) -> None:
    """Gathers parameters layer by layer on all processes, and writes them on the first process.

    All processes gather the layers in the same order; otherwise they would wait for each other
    forever.

    Args:
        params: Parameters to write.
        config: Sizes of the model that `params` belong to.
        naming: Function that turns a parameter path with a layer index into a tensor name.
        write: Function that writes the file. It gets the shapes and dtypes of all tensors, and a
            function that returns a tensor by its name. `write` must call this function once for
            each tensor, in the order of the shapes.
        dtype: Dtype of all tensors, as in `save_params`.
        adapters: Adapters among the parameters; each layer is written with its own rank.

    Raises:
        CheckpointError: A value is too large for `dtype`, or a `Stored` parameter cannot be read.
    """
    origins, specs = {}, {}
    for path, param in params.items():
        for index, parameter, shape in stored_layers(path, param.shape, config, adapters or {}):
            name = naming(parameter)
            origins[name] = path, index
            specs[name] = shape, jnp.dtype(dtype or param.dtype)
    # Wide dtypes come first, so that every tensor in a file is aligned to its item size.
    specs = dict(sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, natural(item[0]))))

    def fetch(name: str) -> np.ndarray:
        shape, dtype = specs[name]
        own = _fetch(params, *origins[name])[tuple(map(slice, shape))]
        return _convert(name, np.ascontiguousarray(own), dtype)

    if is_main_process():
        write(specs, fetch)
    else:
        for name in specs:
            fetch(name)


def _convert(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        converted = values.astype(dtype)
    if not is_finite(converted.reshape(-1)):
        raise CheckpointError(
            f"{name} has values that are too large for {dtype}; choose another dtype"
        )
    return converted


def _fetch(params: Mapping[str, jax.Array | Stored], path: str, index: int) -> np.ndarray:
    """Returns one layer of a stacked parameter, or all of another parameter, as a NumPy array."""
    param = params[path]
    if isinstance(param, Stored):
        return param.read(index)
    if isinstance(param, DiskStack):
        return param.whole_layer(index)
    if paths.is_stacked(path):
        param = _take(param, np.int32(index))
    if not param.is_fully_addressable:
        mesh = cast(NamedSharding, param.sharding).mesh  # arrays across processes have a mesh
        param = _gather(NamedSharding(mesh, PartitionSpec()))(param).addressable_data(0)
    return np.asarray(param)


@cache  # a new function for each tensor of each checkpoint would be traced again
def _gather(replicated: NamedSharding) -> jax.stages.Wrapped:
    """Returns the function that copies an array to all processes."""
    return jax.jit(lambda x: x, out_shardings=replicated)


@partial(jit_for_backend, uses_host=True)
def _take(stack: Float[Array, "L *rest"], index: Array) -> Float[Array, "*rest"]:
    return fetch(layer_at(stack, index))

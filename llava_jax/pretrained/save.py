"""Parameters into safetensors files, gathered one layer at a time.

They are arrays, wherever these lie, or still in other files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from llava_jax.config import ModelConfig
from llava_jax.distributed.host_memory import fetch, layer_at
from llava_jax.distributed.multihost import is_main_process
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.pretrained import layouts
from llava_jax.pretrained.layouts import Layout
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
    """Writes model.safetensors, or shards of at most 5 GB with their index.

    Every process of a run must call it (tensors are gathered one at a time); the first one writes.

    Args:
        params: A whole model; adapters must be merged first.
        directory: Made if it does not exist; an earlier save in it is replaced.
        config: The model that `params` belong to.
        layout: How tensors are named.
        dtype: "bfloat16", "float16" or "float32" for all tensors; None keeps each as it is.
        shard_bytes: Largest size of a file.

    Raises:
        ValueError: There are adapters among the parameters.
    """
    adapters = [path for path in params if path.endswith((".lora_a", ".lora_b"))]
    if adapters:
        raise ValueError(f"merge the adapters before saving a model: {', '.join(adapters)}")
    write = lambda specs, fetch: write_sharded(Path(directory), specs, fetch, shard_bytes)
    save_tensors(params, config, layout.file_name, write, dtype)


def save_tensors(
    params: Mapping[str, jax.Array | Stored],
    config: ModelConfig,
    naming: Callable[[str], str],
    write: Callable[[Specs, Callable[[str], np.ndarray]], None],
    dtype: str | None = None,
) -> None:
    """Gathers parameters layer by layer, all processes in one order, and writes on the first.

    Args:
        params: What to write.
        config: The model that `params` belong to.
        naming: Turns our name of one layer into the tensor's name in the file.
        write: Takes the tensors' shapes and dtypes, and a function that fetches one by its name;
            must fetch them in that order.
        dtype: The dtype of the file, as in `save_params`.
    """
    origins, specs = {}, {}
    for path, param in params.items():
        for index, (parameter, shape) in enumerate(paths.layers(path, param.shape, config)):
            name = naming(parameter)
            origins[name] = path, index
            specs[name] = shape, jnp.dtype(dtype or param.dtype)
    # Wide dtypes first: then every tensor in a file is aligned to its item size.
    specs = dict(sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, natural(item[0]))))
    fetch = lambda name: _convert(name, _fetch(params, *origins[name]), specs[name][1])
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
        raise CheckpointError(f"{name} has values too large for {dtype}; choose another dtype")
    return converted


def _fetch(params: Mapping[str, jax.Array | Stored], path: str, index: int) -> np.ndarray:
    """One layer of a parameter (or all of one that is not stacked), on the host."""
    param = params[path]
    if isinstance(param, Stored):
        return param.read(index)
    if paths.is_stacked(path):
        param = _take(param, np.int32(index))
    if not param.is_fully_addressable:
        mesh = cast(NamedSharding, param.sharding).mesh  # only meshes span processes
        replicated = NamedSharding(mesh, PartitionSpec())
        param = jax.jit(lambda x: x, out_shardings=replicated)(param).addressable_data(0)
    return np.asarray(param)


@jax.jit
def _take(stack: Float[Array, "L *rest"], index: Array) -> Float[Array, "*rest"]:
    return fetch(layer_at(stack, index))

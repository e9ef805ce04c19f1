"""Loads the parameters of a checkpoint, one tensor at a time.

A stacked parameter is allocated on its devices and filled layer by layer, and each layer is cast on
the devices. So the host holds only one tensor of a checkpoint at a time, in addition to the
parameters that are kept in host memory. On the CPU backend, whose devices are the host, there are
two copies of this tensor.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.distributed.disk_weights import DiskStack
from llava_jax.distributed.host_memory import PINNED_HOST
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.models.layers import Abstract, Params
from llava_jax.models.lora import Adapters, stored_layers
from llava_jax.models.paths import EMBEDDING, HEAD, VOCABULARY
from llava_jax.models.quant import QuantisationError, Quantised, quantise
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.read_ahead import THREADS, open_stack
from llava_jax.pretrained.safetensors import Tensor, open_tensors
from llava_jax.pretrained.unsupported import refuse_quantized

Source = tuple[dict[str, Tensor], Layout]
"""Tensors of a file or directory by name, and the layout of these names."""

Reader = Callable[[Path], dict[str, Tensor]]
"""Function that opens a file or directory and returns its tensors by name, without values."""


def load_params(
    source: str | Path | Parts,
    config: ModelConfig,
    abstract: Abstract,
    wanted: Collection[str] | None = None,
) -> Params:
    """Loads a LLaVA checkpoint, or separate parts: decoder, vision tower and optionally projector.

    If the vocabulary of separate parts is smaller than the config's, rows are added, each of which
    is the mean of the existing rows. The logit of a new token is then the mean of all logits, so it
    is never the largest.

    Args:
        source: Directory in one of `layouts.LLAVA_LAYOUTS`, or the paths of the parts.
        config: Sizes of the model, as `model_config.read_config` returns them for `source`.
        abstract: Shapes, dtypes and shardings of all parameters of the model except adapters. A
            parameter without a sharding goes to the first local device.
        wanted: Paths of the parameters to load; None loads all. The checkpoint is always checked
            for all parameters.

    Returns:
        The wanted parameters by path; weights on disk are only opened. The projector's parameters
        are left out if no part has a projector.

    Raises:
        CheckpointError: A file cannot be read, or tensors are missing, do not belong to the model,
            or have the wrong shape. In the latter cases, the message names all these tensors.
    """
    sources = open_sources(source)
    found = find_base_tensors(source, sources, config, abstract)
    threads = ThreadPoolExecutor(THREADS)  # a thread is started only when it is needed

    def load(path: str, tensors: list[Tensor], spec: Any) -> Any:
        if isinstance(spec, DiskStack):
            return open_stack(tensors, common_dtype(tensors), spec, threads)
        return assemble(path, tensors, spec)

    return {
        path: load(path, tensors, abstract[path])
        for path, tensors in found.items()
        if wanted is None or path in wanted
    }


def open_sources(source: str | Path | Parts, read: Reader = open_tensors) -> list[Source]:
    """Opens a checkpoint or separate parts, and returns them in the order of precedence.

    A parameter is read from the first source that has it. So if LLaVA's own directory contains the
    weights of the vision tower, the weights in `source.vision` are not used.

    Args:
        source: Directory of a checkpoint, or the paths of the parts.
        read: Function that opens a file or directory and returns its tensors by name.

    Raises:
        CheckpointError: A file or directory cannot be read, or its tensor names fit no known
            layout.
    """
    if not isinstance(source, Parts):
        return [_open(source, layouts.LLAVA_LAYOUTS, read)]
    sources = [_open(source.llm, layouts.LLM_LAYOUTS, read)]
    if source.vision != source.llm:
        sources.append(_open(source.vision, layouts.VISION_LAYOUTS, read))
    if source.projector is not None:
        sources.insert(0, _open(source.projector, layouts.PROJECTOR_LAYOUTS, read))
    return sources


def _open(path: str | Path, known: tuple[Layout, ...], read: Reader) -> Source:
    tensors = read(Path(path))
    refuse_quantized(Path(path), tensors)
    try:
        return tensors, layouts.recognise(tensors, known)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_base_tensors(
    source: str | Path | Parts, sources: list[Source], config: ModelConfig, abstract: Abstract
) -> dict[str, list[Tensor]]:
    """Calls `find_tensors` for a base; leaves out the projector if separate parts have none."""
    is_parts = isinstance(source, Parts)
    if is_parts and not any(source[1].holds("projector.linear_1.weight") for source in sources):
        abstract = {path: x for path, x in abstract.items() if not path.startswith("projector.")}
    return find_tensors(format_source(source), sources, config, abstract, may_grow=is_parts)


def find_tensors(
    where: str,
    sources: list[Source],
    config: ModelConfig,
    abstract: Abstract,
    *,
    may_grow: bool = False,
    adapters: Adapters | None = None,
) -> dict[str, list[Tensor]]:
    """Returns each parameter's tensors by path; a stacked parameter has one tensor per layer.

    Args:
        where: Path or parts of the checkpoint, for messages.
        sources: Opened files or directories. A parameter is taken from the first source that has
            it, or its first layer.
        config: Sizes of the model that `abstract` belongs to.
        abstract: Shapes of the wanted parameters. Every tensor must belong to one parameter.
        may_grow: Whether a vocabulary may have fewer rows than in `abstract`.
        adapters: Adapters in `abstract`. Layers of a stack that have no adapter have no tensor.

    Raises:
        CheckpointError: Tensors are missing, do not belong to the model, or have the wrong shape;
            the message names all these tensors. Or a stored head is tied to the embedding, but
            differs from it.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in abstract}
    missing, misshapen, known = [], [], set()
    for path, spec in abstract.items():
        layers = [*stored_layers(path, spec.shape, config, adapters or {})]
        tensors, layout = _source_of(path, layers[0][1] if layers else path, sources)
        for _, parameter, shape in layers:
            known.add(parameter)
            name = layout.file_name(parameter) if layout else parameter
            tensor = tensors.get(name)
            if tensor is None:
                missing.append(f"{name} {list(shape)}")
            elif not _fits(tensor.shape, shape, may_grow and path in VOCABULARY):
                misshapen.append(
                    f"{name} has shape {list(tensor.shape)}, expected {list(shape)} "
                    f"({tensor.file.name})"
                )
            else:
                found[path].append(tensor)
    heads = _tied_heads(sources) if config.llm.tie_word_embeddings and found.get(EMBEDDING) else []
    left_over = [
        f"{name} {list(tensor.shape)} ({tensor.file.name})"
        for tensors, layout in sources
        for name, tensor in tensors.items()
        if layout.parameter(name) not in known
        and not layouts.is_ignored(name)
        and tensor not in heads
    ]
    _refuse(
        where,
        sources,
        {
            "missing tensors": missing,
            "tensors that do not belong to the model": left_over,
            "tensors with the wrong shape": misshapen,
        },
    )
    for head in heads:
        _check_tied(where, head, found[EMBEDDING][0])
    return found


def _source_of(
    path: str, first: str, sources: list[Source]
) -> tuple[dict[str, Tensor], Layout | None]:
    """Returns the source of a parameter, whose first layer has the path `first`.

    If no source has it, this is the first source whose layout has this parameter.
    """
    holding = [source for source in sources if source[1].holds(path)]
    having = (s for s in holding if s[1].file_name(first) in s[0])
    return next(having, holding[0] if holding else ({}, None))


def _refuse(where: str, sources: list[Source], problems: Mapping[str, list[str]]) -> None:
    """Raises one CheckpointError that names all tensors that do not fit, if there are any."""
    lines = [
        f"{what} ({len(items)}):" + "".join(f"\n  {item}" for item in items)
        for what, items in problems.items()
        if items
    ]
    if lines:
        names = "; ".join(source[1].name for source in sources)
        raise CheckpointError(
            f"{where} does not fit the model's config (tensor names: {names})\n" + "\n".join(lines)
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], may_grow: bool) -> bool:
    return shape == wanted or (may_grow and shape[1:] == wanted[1:] and 0 < shape[0] < wanted[0])


def _tied_heads(sources: list[Source]) -> list[Tensor]:
    """Returns the head's tensors in the files of a model that uses the embedding as its head."""
    return [
        tensor
        for tensors, layout in sources
        for name, tensor in tensors.items()
        if layout.parameter(name) == HEAD
    ]


def _check_tied(where: str, head: Tensor, embedding: Tensor) -> None:
    dtype = common_dtype([head, embedding])

    # Digests are compared, so that only one of the two tensors is in memory at a time.
    def digest(tensor: Tensor) -> bytes:
        values = tensor.read().astype(dtype, copy=False)
        return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()

    if head.shape != embedding.shape or digest(head) != digest(embedding):
        raise CheckpointError(
            f"tie_word_embeddings is true in the config of {where}, but {head.name} "
            f"{list(head.shape)} ({head.file.name}) is not equal to {embedding.name} "
            f"{list(embedding.shape)} ({embedding.file.name}): set tie_word_embeddings to false in "
            "config.json and, if it exists, in its text_config, or remove the wrong tensor"
        )


def assemble(path: str, tensors: list[Tensor], spec: Any) -> Any:
    """Reads the tensors of a parameter, and puts the parameter on its devices.

    A stack in pinned host memory is first assembled in ordinary host memory, so host memory holds
    the stack twice for a short time.

    Args:
        path: Path of the parameter.
        tensors: The parameter's only tensor, or one tensor per layer of a stacked parameter.
        spec: Shape, dtype and sharding; for a quantized parameter, a `Quantised` object of them.

    Raises:
        CheckpointError: A tensor cannot be read, or a weight cannot be quantized.
    """
    if not paths.is_stacked(path):
        values, sharding = _read(tensors[0], spec.shape), _sharding(spec)
        if sharding.memory_kind == PINNED_HOST:  # XLA must not compute there; see `host_memory.py`
            return _device_put(values.astype(spec.dtype, copy=False), sharding)
        return _cast(_device_put(values, sharding), spec.dtype)
    stack = jax.tree.map(_open_stack, spec)
    for index, tensor in enumerate(tensors):
        layer: Any = _read(tensor, spec.shape[1:])
        if isinstance(spec, Quantised):
            try:
                layer = quantise(layer, spec.kind)
            except QuantisationError as error:
                raise CheckpointError(f"{path}, layer {index}: {error}") from error
        stack = jax.tree.map(partial(_put, index), stack, layer)
    return jax.tree.map(
        lambda x, leaf: _device_put(x, leaf.sharding) if isinstance(x, np.ndarray) else x,
        stack,
        spec,
    )


def _open_stack(spec: jax.ShapeDtypeStruct) -> np.ndarray | Array:
    sharding = _sharding(spec)
    if sharding.memory_kind == PINNED_HOST:
        return np.empty(spec.shape, spec.dtype)
    return jnp.zeros(spec.shape, spec.dtype, device=sharding)


def _put(index: int, stack: np.ndarray | Array, layer: np.ndarray) -> np.ndarray | Array:
    if isinstance(stack, np.ndarray):
        stack[index] = layer
        return stack
    on_device = _device_put(layer, _layer_sharding(stack.sharding))
    # Without this wait, the host would read ahead and hold many tensors at the same time.
    return jax.block_until_ready(_insert(stack, on_device, np.int32(index)))


def _sharding(spec: jax.ShapeDtypeStruct) -> Sharding:
    return spec.sharding or SingleDeviceSharding(jax.local_devices()[0])


def _read(tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a tensor. If `shape` has more rows, each new row is the mean of the tensor's rows."""
    if tensor.shape == shape:
        return tensor.read()
    values = tensor.read(rows=shape[0])
    rows = tensor.shape[0]
    values[rows:] = values[:rows].mean(axis=0, dtype=np.float32).astype(values.dtype)
    return values


def _device_put(values: np.ndarray, sharding: Sharding) -> Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _layer_sharding(sharding: Sharding) -> Sharding:
    """Returns the sharding of one layer, given the sharding of its stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


@partial(jax.jit, donate_argnums=0)
def _insert(
    stack: Shaped[Array, "L *rest"], layer: Shaped[Array, "*rest"], index: Array
) -> Shaped[Array, "L *rest"]:
    # The update works on integers, because XLA:CPU copies the whole stack to update bfloat16.
    bits = f"uint{8 * stack.dtype.itemsize}"
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, bits)
    filled = jax.lax.dynamic_update_index_in_dim(
        as_bits(stack), as_bits(layer.astype(stack.dtype)), index, 0
    )
    return jax.lax.bitcast_convert_type(filled, stack.dtype)


@partial(jax.jit, static_argnames="dtype")
def _cast(x: Float[Array, "*rest"], dtype: jnp.dtype) -> Float[Array, "*rest"]:
    return x.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter whose values are still in files; `save_params` accepts it instead of an array.

    Attributes:
        shape: Shape of the whole parameter, with the layer axis of a stacked parameter.
        dtype: Dtype in which the parameter is written, unless another one is asked for. Arrays of
            `read` may have more precision.
        read: Function that reads the layer with a given index; index 0 reads the whole parameter if
            it is not stacked.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]


def common_dtype(tensors: list[Tensor]) -> np.dtype:
    """Returns the dtype that all tensors have; float32 if their dtypes differ."""
    kinds = {tensor.numpy_dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def stored(path: str, tensors: list[Tensor], spec: Any) -> Stored:
    """Returns a parameter whose values are still in files, with the dtype of `common_dtype`.

    If a vocabulary has too few rows, rows are added as in `load_params`.

    Args:
        path: Path of the parameter.
        tensors: The parameter's only tensor, or one tensor per layer of a stacked parameter.
        spec: Shape of the whole parameter.
    """
    shape = spec.shape[1:] if paths.is_stacked(path) else spec.shape
    dtype = common_dtype(tensors)
    return Stored(
        spec.shape, dtype, lambda index: _read(tensors[index], shape).astype(dtype, copy=False)
    )


def fingerprint(checkpoint: str | Path | Parts) -> str:
    """Returns a hash that identifies the weights of a checkpoint, without reading all of them.

    The hash covers the name, dtype, shape and up to 192 bytes (start, middle, end) of every tensor.
    It is different for another model, another state of training (in which practically every value
    differs), another dtype and another vocabulary size. It does not depend on shards, paths, or the
    layout of the tensor names. If only a few values change, the hash may stay the same.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    return fingerprint_of(open_sources(checkpoint))


def fingerprint_of(sources: list[Source]) -> str:
    """Returns the `fingerprint` of a checkpoint that is already open."""
    lines = []
    for tensors, layout in sources:
        for name, tensor in tensors.items():
            if not layouts.is_ignored(name):
                label = f"{layout.parameter(name) or name} {tensor.dtype} {tensor.shape} "
                lines.append(label.encode(errors="backslashreplace") + tensor.sample())
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

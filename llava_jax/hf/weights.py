"""Parameters from safetensors files and back, one tensor at a time.

A stacked parameter is made on its devices and filled layer by layer, each layer cast where it
lands. So the host never holds more of a checkpoint than one tensor of a file (on the CPU backend,
whose devices are the host, a second copy of it).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.hf import layouts
from llava_jax.hf.layouts import Layout
from llava_jax.hf.tensorfile import (
    SHARD_BYTES,
    CheckpointError,
    Specs,
    Tensor,
    is_finite,
    natural,
    open_tensors,
    write_sharded,
)
from llava_jax.host import PINNED_HOST, fetch, layer_at
from llava_jax.models.layers import Abstract, Params
from llava_jax.processes import is_first
from llava_jax.quant import QuantisationError, Quantised, quantise

Source = tuple[dict[str, Tensor], Layout]
"""The tensors of one file or directory, and how they are named."""

Reader = Callable[[Path], dict[str, Tensor]]
"""Finds the tensors of a file or directory."""

VOCABULARY = ("llm.embed_tokens.weight", "llm.lm_head.weight")


def load_params(
    place: str | Path | Parts,
    config: ModelConfig,
    abstract: Abstract,
    wanted: Collection[str] | None = None,
) -> Params:
    """Reads a LLaVA checkpoint, or a decoder, a vision tower and perhaps a projector.

    In separate parts a vocabulary smaller than the config's is filled up with its mean row: a new
    token's logit is then the mean logit, and never the largest.

    Args:
        place: A directory in one of `layouts.LLAVA_LAYOUTS`, or where the parts lie.
        config: The model that `abstract` belongs to, as `model_config` reads it from `place`.
        abstract: All parameters of the model, in their final dtypes, each where its sharding says
            or on the default device; adapters are not part of a checkpoint.
        wanted: Only these are read, though all are checked; None reads all.

    Returns:
        The wanted parameters, as `abstract` says; no projector's if parts have none.

    Raises:
        CheckpointError: One error that names every missing, left-over or wrong-shaped tensor.
    """
    sources = open_sources(place)
    found = find_base_tensors(place, sources, config, abstract)
    return {
        path: assemble(path, tensors, abstract[path])
        for path, tensors in found.items()
        if wanted is None or path in wanted
    }


def open_sources(place: str | Path | Parts, read: Reader = open_tensors) -> list[Source]:
    """The files of a checkpoint or of separate parts, those first that come before others.

    An original LLaVA's own vision tower comes before the one given beside it, whose config it has.

    Raises:
        CheckpointError: One cannot be read, or holds something else.
    """
    if not isinstance(place, Parts):
        return [_open(place, layouts.LLAVA_LAYOUTS, read)]
    sources = [_open(place.llm, layouts.LLM_LAYOUTS, read)]
    if place.vision != place.llm:
        sources.append(_open(place.vision, layouts.VISION_LAYOUTS, read))
    if place.projector is not None:
        sources.insert(0, _open(place.projector, layouts.PROJECTOR_LAYOUTS, read))
    return sources


def _open(path: str | Path, known: tuple[Layout, ...], read: Reader) -> Source:
    tensors = read(Path(path))
    try:
        return tensors, layouts.recognise(tensors, known)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_base_tensors(
    place: str | Path | Parts, sources: list[Source], config: ModelConfig, abstract: Abstract
) -> dict[str, list[Tensor]]:
    """`find_tensors` for a checkpoint or parts; a projector that no part has is left out."""
    is_parts = isinstance(place, Parts)
    if is_parts and not any(source[1].holds("projector.linear_1.weight") for source in sources):
        abstract = {path: x for path, x in abstract.items() if not path.startswith("projector.")}
    return find_tensors(format_source(place), sources, config, abstract, may_grow=is_parts)


def find_tensors(
    where: str,
    sources: list[Source],
    config: ModelConfig,
    abstract: Abstract,
    *,
    may_grow: bool = False,
) -> dict[str, list[Tensor]]:
    """The tensors of each parameter, one a layer if it is stacked.

    Args:
        where: What the sources are, for messages.
        sources: A parameter comes from the first whose layout has it.
        config: The model that `abstract` belongs to.
        abstract: The parameters wanted. Every tensor must belong to one of them.
        may_grow: Whether a vocabulary may be smaller than wanted.

    Raises:
        CheckpointError: One error that names every missing, left-over or wrong-shaped tensor.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in abstract}
    missing, misshapen, known = [], [], set()
    for path, spec in abstract.items():
        tensors, layout = next((s for s in sources if s[1].holds(path)), ({}, None))
        for parameter, shape in _layers(path, spec.shape, config):
            known.add(parameter)
            name = layout.file_name(parameter) if layout else parameter
            tensor = tensors.get(name)
            if tensor is None:
                missing.append(f"{name} {list(shape)}")
            elif not _fits(tensor.shape, shape, may_grow and path in VOCABULARY):
                misshapen.append(
                    f"{name} is {list(tensor.shape)}, expected {list(shape)} ({tensor.file.name})"
                )
            else:
                found[path].append(tensor)
    left_over = [
        f"{name} {list(tensor.shape)} ({tensor.file.name})"
        for tensors, layout in sources
        for name, tensor in tensors.items()
        if layout.parameter(name) not in known and not _is_spare(layout, name, config)
    ]
    problems = {"missing": missing, "left over": left_over, "of the wrong shape": misshapen}
    if any(problems.values()):
        names = "; ".join(source[1].name for source in sources)
        lines = [
            f"{len(items)} tensors {what}:" + "".join(f"\n  {item}" for item in items)
            for what, items in problems.items()
            if items
        ]
        raise CheckpointError(
            f"{where} does not fit the model's config (layout {names})\n" + "\n".join(lines)
        )
    return found


def _layers(
    path: str, shape: tuple[int, ...], config: ModelConfig
) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each layer of a parameter, or of the one that is not stacked."""
    if not layouts.is_stacked(path):
        return [(path, shape)]
    return [(layouts.unstacked(path, index, config), shape[1:]) for index in range(shape[0])]


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], may_grow: bool) -> bool:
    return shape == wanted or (may_grow and shape[1:] == wanted[1:] and 0 < shape[0] < wanted[0])


def _is_spare(layout: Layout, name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may hold this tensor although no parameter takes it."""
    tied_head = config.llm.tie_word_embeddings and layout.parameter(name) == "llm.lm_head.weight"
    return tied_head or layouts.is_ignored(name)


def assemble(path: str, tensors: list[Tensor], spec: Any) -> Any:
    """A parameter, read from its tensors (one a layer if it is stacked) into its place.

    A stack that goes to host memory is first put together there, so it is there twice for a moment.

    Raises:
        CheckpointError: A weight to quantise cannot be.
    """
    if not layouts.is_stacked(path):
        return _cast(_place(_read(tensors[0], spec.shape), _sharding(spec)), spec.dtype)
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
        lambda x, leaf: _place(x, leaf.sharding) if isinstance(x, np.ndarray) else x, stack, spec
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
    placed = _place(layer, _layer_sharding(stack.sharding))
    # Waiting keeps the host from running ahead with many tensors in flight.
    return jax.block_until_ready(_insert(stack, placed, np.int32(index)))


def _sharding(spec: jax.ShapeDtypeStruct) -> Sharding:
    return spec.sharding or SingleDeviceSharding(jax.local_devices()[0])


def _read(tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape == shape:
        return tensor.read()
    values = tensor.read(rows=shape[0])
    rows = tensor.shape[0]
    values[rows:] = values[:rows].mean(axis=0, dtype=np.float32).astype(values.dtype)
    return values


def _place(values: np.ndarray, sharding: Sharding) -> Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _layer_sharding(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = PartitionSpec(*sharding.spec[1:])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


@partial(jax.jit, donate_argnums=0)
def _insert(
    stack: Shaped[Array, "L *rest"], layer: Shaped[Array, "*rest"], index: Array
) -> Shaped[Array, "L *rest"]:
    # As integers, because XLA:CPU takes a bfloat16 update as reason to rewrite the whole stack.
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
    """A parameter that is still in its files: what `save_params` takes in the place of an array.

    Attributes:
        shape: Of the whole parameter.
        dtype: Of what `read` gives.
        read: One layer of it, or all of one that is not stacked.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int], np.ndarray]


def common_dtype(tensors: list[Tensor]) -> np.dtype:
    """The dtype of a parameter's layers, float32 if they have several."""
    kinds = {tensor.numpy_dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def stored(path: str, tensors: list[Tensor], spec: Any) -> Stored:
    """A parameter in its files, in their dtype, or in float32 if its layers have several.

    A vocabulary grows as in `load_params`.
    """
    shape = spec.shape[1:] if layouts.is_stacked(path) else spec.shape
    dtype = common_dtype(tensors)
    return Stored(
        spec.shape, dtype, lambda index: _read(tensors[index], shape).astype(dtype, copy=False)
    )


def save_params(
    params: Mapping[str, jax.Array | Stored],
    directory: str | Path,
    config: ModelConfig,
    *,
    layout: Layout = layouts.A,
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
        naming: From our name of one layer to the tensor's name in the file.
        write: Takes the tensors' shapes and dtypes, and a function that fetches one by its name;
            must fetch them in that order.
        dtype: As in `save_params`.
    """
    origins, specs = {}, {}
    for path, param in params.items():
        for index, (parameter, shape) in enumerate(_layers(path, param.shape, config)):
            name = naming(parameter)
            origins[name] = path, index
            specs[name] = shape, jnp.dtype(dtype or param.dtype)
    # Wide dtypes first: then every tensor in a file is aligned to its item size.
    specs = dict(sorted(specs.items(), key=lambda item: (-item[1][1].itemsize, natural(item[0]))))
    fetch = lambda name: _convert(name, _fetch(params, *origins[name]), specs[name][1])
    if is_first():
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
    if layouts.is_stacked(path):
        param = _take(param, np.int32(index))
    if not param.is_fully_addressable:
        mesh = cast(NamedSharding, param.sharding).mesh  # only meshes span processes
        replicated = NamedSharding(mesh, PartitionSpec())
        param = jax.jit(lambda x: x, out_shardings=replicated)(param).addressable_data(0)
    return np.asarray(param)


@jax.jit
def _take(stack: Float[Array, "L *rest"], index: Array) -> Float[Array, "*rest"]:
    return fetch(layer_at(stack, index))


def fingerprint(checkpoint: str | Path | Parts) -> str:
    """Identifies the weights of a checkpoint without reading them all.

    A hash of every tensor's name, dtype and shape and of 192 of its bytes (start, middle, end).
    It sees another model, another training state (which moves practically every value), another
    dtype, a resized vocabulary. It does not see how files are cut into shards, where they lie, or
    which of the known layouts names the tensors; nor a change of a few single values.

    Raises:
        CheckpointError: There is nothing to read.
    """
    return fingerprint_of(open_sources(checkpoint))


def fingerprint_of(sources: list[Source]) -> str:
    """`fingerprint` of what is open already."""
    lines = []
    for tensors, layout in sources:
        for name, tensor in tensors.items():
            if not layouts.is_ignored(name):
                label = f"{layout.parameter(name) or name} {tensor.dtype} {tensor.shape} "
                lines.append(label.encode(errors="backslashreplace") + tensor.sample())
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

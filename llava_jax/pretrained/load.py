"""Parameters from the files of a checkpoint, one tensor at a time.

A stacked parameter is made on its devices and filled layer by layer, each layer cast where it
lands. So the host never holds more of a checkpoint than one tensor of a file (on the CPU backend,
whose devices are the host, a second copy of it).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from llava_jax.config import ModelConfig, Parts, format_source
from llava_jax.distributed.host_memory import PINNED_HOST
from llava_jax.errors import CheckpointError
from llava_jax.models import paths
from llava_jax.models.layers import Abstract, Params
from llava_jax.models.quant import QuantisationError, Quantised, quantise
from llava_jax.pretrained import layouts
from llava_jax.pretrained.layouts import Layout
from llava_jax.pretrained.safetensors import Tensor, open_tensors

Source = tuple[dict[str, Tensor], Layout]
"""The tensors of one file or directory, and how they are named."""

Reader = Callable[[Path], dict[str, Tensor]]
"""Finds the tensors of a file or directory."""

EMBEDDING, HEAD = VOCABULARY = ("llm.embed_tokens.weight", "llm.lm_head.weight")


def load_params(
    source: str | Path | Parts,
    config: ModelConfig,
    abstract: Abstract,
    wanted: Collection[str] | None = None,
) -> Params:
    """Reads a LLaVA checkpoint, or a decoder, a vision tower and perhaps a projector.

    In separate parts a vocabulary smaller than the config's is filled up with its mean row: a new
    token's logit is then the mean logit, and never the largest.

    Args:
        source: A directory in one of `layouts.LLAVA_LAYOUTS`, or where the parts lie.
        config: The model that `abstract` belongs to, as `model_config` reads it from `source`.
        abstract: All parameters of the model, in their final dtypes, each where its sharding says
            or on the default device; adapters are not part of a checkpoint.
        wanted: Only these are read, though all are checked; None reads all.

    Returns:
        The wanted parameters, as `abstract` says; no projector's if parts have none.

    Raises:
        CheckpointError: One error that names every missing, left-over or wrong-shaped tensor.
    """
    sources = open_sources(source)
    found = find_base_tensors(source, sources, config, abstract)
    return {
        path: assemble(path, tensors, abstract[path])
        for path, tensors in found.items()
        if wanted is None or path in wanted
    }


def open_sources(source: str | Path | Parts, read: Reader = open_tensors) -> list[Source]:
    """The files of a checkpoint or of separate parts, those first that come before others.

    An original LLaVA's own vision tower comes before the one given beside it, whose config it has.

    Raises:
        CheckpointError: One cannot be read, or holds something else.
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
    try:
        return tensors, layouts.recognise(tensors, known)
    except layouts.LayoutError as error:
        raise CheckpointError(f"{path}: {error}") from error


def find_base_tensors(
    source: str | Path | Parts, sources: list[Source], config: ModelConfig, abstract: Abstract
) -> dict[str, list[Tensor]]:
    """`find_tensors` for a checkpoint or parts; a projector that no part has is left out."""
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
) -> dict[str, list[Tensor]]:
    """The tensors of each parameter, one a layer if it is stacked.

    Args:
        where: What the sources are, for messages.
        sources: A parameter comes from the first whose layout has it.
        config: The model that `abstract` belongs to.
        abstract: The parameters wanted. Every tensor must belong to one of them.
        may_grow: Whether a vocabulary may be smaller than wanted.

    Raises:
        CheckpointError: One error that names every missing, left-over or wrong-shaped tensor; or a
            stored head differs from the embedding that it is tied to.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in abstract}
    missing, misshapen, known = [], [], set()
    for path, spec in abstract.items():
        tensors, layout = next((s for s in sources if s[1].holds(path)), ({}, None))
        for parameter, shape in paths.layers(path, spec.shape, config):
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
        {"missing": missing, "left over": left_over, "of the wrong shape": misshapen},
    )
    for head in heads:
        _check_tied(where, head, found[EMBEDDING][0])
    return found


def _refuse(where: str, sources: list[Source], problems: Mapping[str, list[str]]) -> None:
    """Raises one error that names all tensors that do not fit, if there are any."""
    lines = [
        f"{len(items)} tensors {what}:" + "".join(f"\n  {item}" for item in items)
        for what, items in problems.items()
        if items
    ]
    if lines:
        names = "; ".join(source[1].name for source in sources)
        raise CheckpointError(
            f"{where} does not fit the model's config (found: {names})\n" + "\n".join(lines)
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], may_grow: bool) -> bool:
    return shape == wanted or (may_grow and shape[1:] == wanted[1:] and 0 < shape[0] < wanted[0])


def _tied_heads(sources: list[Source]) -> list[Tensor]:
    """Heads that are stored beside an embedding which is the head too."""
    return [
        tensor
        for tensors, layout in sources
        for name, tensor in tensors.items()
        if layout.parameter(name) == HEAD
    ]


def _check_tied(where: str, head: Tensor, embedding: Tensor) -> None:
    dtype = common_dtype([head, embedding])

    def digest(tensor: Tensor) -> bytes:  # so that only one of them is held at a time
        values = tensor.read().astype(dtype, copy=False)
        return hashlib.sha256(values.reshape(-1).view(np.uint8).data).digest()

    if head.shape != embedding.shape or digest(head) != digest(embedding):
        raise CheckpointError(
            f"{where} has tie_word_embeddings in its config, but {head.name} "
            f"{list(head.shape)} ({head.file.name}) is not equal to {embedding.name} "
            f"{list(embedding.shape)} ({embedding.file.name}): set tie_word_embeddings to false in "
            "config.json, in its text_config too if there is one, or take the wrong one out"
        )


def assemble(path: str, tensors: list[Tensor], spec: Any) -> Any:
    """A parameter, read from its tensors (one a layer if it is stacked) into its place.

    A stack that goes to host memory is first put together there, so it is there twice for a moment.

    Raises:
        CheckpointError: A weight to quantise cannot be.
    """
    if not paths.is_stacked(path):
        return _cast(_device_put(_read(tensors[0], spec.shape), _sharding(spec)), spec.dtype)
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
    # Waiting keeps the host from running ahead with many tensors in flight.
    return jax.block_until_ready(_insert(stack, on_device, np.int32(index)))


def _sharding(spec: jax.ShapeDtypeStruct) -> Sharding:
    return spec.sharding or SingleDeviceSharding(jax.local_devices()[0])


def _read(tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape == shape:
        return tensor.read()
    values = tensor.read(rows=shape[0])
    rows = tensor.shape[0]
    values[rows:] = values[:rows].mean(axis=0, dtype=np.float32).astype(values.dtype)
    return values


def _device_put(values: np.ndarray, sharding: Sharding) -> Array:
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
        shape: Shape of the whole parameter.
        dtype: The dtype that `read` returns.
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
    shape = spec.shape[1:] if paths.is_stacked(path) else spec.shape
    dtype = common_dtype(tensors)
    return Stored(
        spec.shape, dtype, lambda index: _read(tensors[index], shape).astype(dtype, copy=False)
    )


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

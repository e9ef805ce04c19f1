"""Reads the layers of frozen weights from files, while a compiled loop over the layers runs.

A weight on disk is a pytree without arrays, which takes the place of the weight's stack. A loop
gets each layer from a function of Python, which XLA calls back. This function should read the layer
that is needed next in advance.

An error in this function must not reach XLA: other devices would wait forever for the device whose
layer could not be read, and JAX would print tracebacks. So the error is kept, the layer becomes
NaN, and the host calls `raise_read_errors` before it uses the results.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

Tree = TypeVar("Tree")
"""A tree of arrays and weights on disk."""

Part = tuple[tuple[int, int], ...]
"""First index, and the index after the last one, along each axis of a layer."""

BUFFERED = 2
"""Number of layers of each weight that may be in host memory at the same time: the layer that is
copied to the device, and the next layer."""


@runtime_checkable
class LayerReader(Protocol):
    """Reads the layers of one weight.

    Attributes:
        error: First error with which a compiled loop could not read a layer, or None.
    """

    error: Exception | None

    def read(self, layer: int, part: Part) -> np.ndarray:
        """Returns a part of a layer, which the reader does not keep."""
        ...

    def read_in_order(self, layer: int, part: Part, ahead: int) -> np.ndarray:
        """Returns a part of a layer, and begins to read the same part of the layer `ahead`.

        If there is no layer with the number `ahead`, no layer is needed next.
        """
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class DiskStack:
    """Frozen weight of a stack of blocks, whose layers stay in files.

    Attributes:
        shape: Shape of the weight, [L, out, in].
        dtype: Dtype of a layer.
        sharding: Sharding of the weight; the layer axis is not divided.
        stored: Dtype in which `reader` returns a layer; a device casts it to `dtype`.
        reader: Function that reads a layer; None if the weight is only used to compile a step.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    stored: np.dtype
    reader: LayerReader | None = None

    @property
    def layer_bytes(self) -> int:
        """Size in bytes of the part of a layer that is on one device."""
        return math.prod(self.sharding.shard_shape(self.shape)[1:]) * self.dtype.itemsize

    def layer(self, index: Int[Array, ""], ahead: Int[Array, ""]) -> Array:
        """Returns a layer on the devices, each of which reads its own part.

        A layer that cannot be read is NaN; see `raise_read_errors`.

        Args:
            index: Number of the layer.
            ahead: Number of the layer that is needed next; see `LayerReader`.
        """
        spec = PartitionSpec(*self.sharding.spec[1:])
        shape = self.sharding.shard_shape(self.shape)[1:]

        def read(*layers: Array) -> Array:
            parts = [jax.lax.axis_index(names) if names else np.int32(0) for names in spec]
            result = jax.ShapeDtypeStruct(shape, self.stored)
            return jax.pure_callback(self._read, result, *layers, *parts).astype(self.dtype)

        replicated = (PartitionSpec(),) * 2
        read_all = jax.shard_map(read, in_specs=replicated, out_specs=spec, check_vma=False)
        return read_all(index, ahead)

    def whole_layer(self, index: int) -> np.ndarray:
        """Returns a whole layer as a NumPy array, with the dtype `stored`."""
        return self._reader.read(index, tuple((0, size) for size in self.shape[1:]))

    @property
    def _reader(self) -> LayerReader:
        assert self.reader is not None, "a weight without a reader is only used to compile a step"
        return self.reader

    def _read(self, index: Array, ahead: Array, *positions: Array) -> np.ndarray:
        """Returns the part of a layer that one device has; `positions` are shards by axis."""
        sizes = self.sharding.shard_shape(self.shape)[1:]
        pairs = zip(map(int, positions), sizes, strict=True)
        part = tuple((position * size, (position + 1) * size) for position, size in pairs)
        try:
            return self._reader.read_in_order(int(index), part, int(ahead))
        except Exception as error:
            self._reader.error = self._reader.error or error
            return np.full(sizes, np.nan, self.stored)


def read_layers(tree: Tree, index: Int[Array, ""], ahead: Int[Array, ""]) -> Tree:
    """Returns a tree in which the layer `index` takes the place of each weight on disk.

    Args:
        tree: Layers of a stack; weights on disk are still whole stacks.
        index: Number of the layer.
        ahead: Number of the layer that is needed next; see `LayerReader`.
    """
    is_stack = lambda leaf: isinstance(leaf, DiskStack)
    read = lambda leaf: leaf.layer(index, ahead) if is_stack(leaf) else leaf
    return jax.tree.map(read, tree, is_leaf=is_stack)


def stacks_on_disk(leaves: Iterable[object]) -> list[DiskStack]:
    """Returns the weights on disk among arrays, shapes and other weights."""
    return [leaf for leaf in leaves if isinstance(leaf, DiskStack)]


def raise_read_errors(leaves: Iterable[object]) -> None:
    """Raises the first error of a reader, if there is one.

    This must be called after the results of a step have been computed, and before they are used.

    Args:
        leaves: Parameters of a model.

    Raises:
        CheckpointError: A file has changed since the run began, or has values that are not finite.
        OSError: A file cannot be read.
    """
    for stack in stacks_on_disk(leaves):
        if stack.reader is not None and stack.reader.error is not None:
            raise stack.reader.error


def buffer_bytes(leaves: Iterable[object]) -> int:
    """Returns the host memory, in bytes per device, of the layers that are being read.

    Args:
        leaves: Parameters of a model, or their shapes.
    """
    return BUFFERED * sum(stack.layer_bytes for stack in stacks_on_disk(leaves))

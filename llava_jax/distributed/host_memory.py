"""Arrays in host memory: which may lie there, and the only things that may be done with them.

XLA moves slices of such an array to the device and back; any other operation on it would become
slow work on the host, or stop the compiler (openxla/xla #47362, #47380, #34565).
"""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

Tree = TypeVar("Tree")
"""A tree of arrays."""

PINNED_HOST = "pinned_host"
"""The memory kind of what waits outside the devices, in pages that they reach themselves."""

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

MAX_SLICES, MIN_SLICE = 64, 2**16
"""The most slices in which an array in host memory moves, and the fewest elements of a slice."""

SUBLANES = 8
"""Rows of a float32 matrix that lie together on a TPU: it copies no fewer."""


def slice_size(shape: tuple[int, ...]) -> int:
    """Length along axis 0 of the slices in which an array goes to the device and back."""
    step = SUBLANES if len(shape) == 2 else 1
    fits = lambda size: shape[0] % size == 0 and shape[0] // size <= MAX_SLICES
    return next(filter(fits, range(step, shape[0], step)), shape[0])


def fits_host(shape: tuple[int, ...], sharding: NamedSharding) -> bool:
    """Whether an array may lie in host memory: not if it is small, or cut along its axis 0.

    TPUs do not copy less than a tile, and slices are taken along axis 0.
    """
    if len(shape) < 2 or slice_size(shape) * math.prod(shape[1:]) < MIN_SLICE:
        return False
    return sharding.shard_shape(shape)[0] == shape[0]


def is_for_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array, or a placed shape, is in host memory by its sharding."""
    return leaf.sharding.memory_kind == PINNED_HOST


def is_hosted(x: Array) -> bool:
    """Whether an array of a traced function lies in host memory."""
    return jax.typeof(x).memory_space == HOST


def move(x: Array, space: jax.memory.Space) -> Array:
    """Takes an array to another memory."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def fetch(tree: Tree) -> Tree:
    """Takes what lies in host memory to the device."""
    return jax.tree.map(lambda x: move(x, DEVICE), tree)


def slice_at(x: Array, index: Int[Array, ""], size: int) -> Array:
    """The slice number `index` of those of `size` along axis 0, where x lies."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size)


def write_slice(x: Array, new: Array, index: Int[Array, ""]) -> Array:
    """Puts a slice back into x, where that lies."""
    new = move(new, jax.typeof(x).memory_space)
    return jax.lax.dynamic_update_slice_in_dim(x, new, index * new.shape[0], 0)


def layer_at(stacks: Tree, index: Int[Array, ""]) -> Tree:
    """One layer of stacked arrays, where they lie."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return jax.tree.map(take, stacks)


def write_layer(stacks: Tree, layer: Tree, index: Int[Array, ""]) -> Tree:
    """Puts one layer, from the device, back into stacked arrays."""
    return jax.tree.map(lambda stack, x: write_slice(stack, x[None], index), stacks, layer)


def zeros(leaf: jax.ShapeDtypeStruct) -> Array:
    """Zeros where a placed shape lies; in host memory, they come from the device row by row."""
    if not is_for_host(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    row = lambda _: move(jnp.zeros(leaf.shape[1:], leaf.dtype), HOST)
    return jax.lax.map(row, jnp.arange(leaf.shape[0]))

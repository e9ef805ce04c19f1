"""Keeps arrays in host memory: decides which arrays may be there, and moves their slices.

Use only these functions on arrays in host memory. XLA can move slices of an array in host memory to
the device and back. Any other operation on such an array runs slowly on the host, or the compiler
stops with an error (openxla/xla #47362, #47380, #34565).
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PyTree

Tree = TypeVar("Tree")
"""A tree of arrays."""

Carry = TypeVar("Carry")
"""A tree of arrays that a loop changes."""

PINNED_HOST = "pinned_host"
"""Memory kind of arrays in host memory. The memory is pinned, so that devices can read and write it
directly."""

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

MAX_SLICES, MIN_SLICE = 64, 2**16
"""Largest number of slices in which an array in host memory is moved, and smallest number of
elements in a slice."""

PARTS = 4
"""Number of pieces of a layer in the update of a parameter; see `piece_of`."""

SUBLANES = 8
"""Smallest number of rows of a float32 matrix that a TPU can copy, because a tile has this many
rows."""

CHECKPOINT_PIECE = 2**27
"""Size in bytes of the pieces in which arrays are compressed and written to a checkpoint."""

MIN_CHECKPOINT_BUFFER = 2**28
"""Smallest limit, in bytes, of the arrays that are written to a checkpoint, or read from one, at
the same time. It is an eighth of 2 GiB of state, and enough for several arrays of a small state."""


def slice_size(shape: tuple[int, ...]) -> int:
    """Returns the length along axis 0 of the slices in which an array is moved to or from the host.

    The result is the smallest length that gives at most `MAX_SLICES` equal slices, or otherwise the
    whole length of axis 0. Slices of a matrix have a multiple of `SUBLANES` rows.
    """
    step = SUBLANES if len(shape) == 2 else 1
    fits = lambda size: shape[0] % size == 0 and shape[0] // size <= MAX_SLICES
    return next(filter(fits, range(step, shape[0], step)), shape[0])


def fits_host(shape: tuple[int, ...], sharding: NamedSharding) -> bool:
    """Returns True if an array is allowed to be in host memory.

    An array that is sharded along axis 0 must stay on the device, because slices are taken along
    this axis. A small array must stay there too, because TPUs cannot copy less than a tile.

    Args:
        shape: Shape of the array.
        sharding: Sharding of the array.
    """
    if len(shape) < 2 or slice_size(shape) * math.prod(shape[1:]) < MIN_SLICE:
        return False
    return sharding.shard_shape(shape)[0] == shape[0]


def is_for_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns True if an array or a ShapeDtypeStruct has a sharding in host memory."""
    return leaf.sharding.memory_kind == PINNED_HOST


def shard_bytes(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Returns the size in bytes of the part of an array that is on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def tree_bytes(tree: PyTree, *, on_host: bool) -> int:
    """Returns the bytes per device of the arrays in host memory (`on_host`) or in device memory."""
    return sum(shard_bytes(x) for x in jax.tree.leaves(tree) if is_for_host(x) == on_host)


def checkpoint_buffer(leaves: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Returns how many bytes of a state are written to a checkpoint, or read, at the same time.

    The result is larger than the largest shard, because a shard is not divided.

    Args:
        leaves: Arrays of the state, or their shapes.
    """
    return max(MIN_CHECKPOINT_BUFFER, 1 + max(map(shard_bytes, leaves)))


def is_hosted(x: Array) -> bool:
    """Returns True if an array in a traced function is in host memory."""
    return jax.typeof(x).memory_space == HOST


def move(x: Array, space: jax.memory.Space) -> Array:
    """Returns x moved to the memory `space`, or x itself if x is already in this memory."""
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def fetch(tree: Tree) -> Tree:
    """Returns the tree with all arrays on the device."""
    return jax.tree.map(lambda x: move(x, DEVICE), tree)


def piece_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the pieces in which a parameter is updated in host memory.

    A piece is a slice; see `slice_size`. On one GPU, a layer of a stack is divided into `PARTS`
    pieces, because the loop of the update has two pieces of four arrays on the device. On several
    devices, the next axis may be sharded, so it is not divided. TPUs cannot copy pieces that are
    slices along two axes.

    Args:
        shape: Shape of the parameter.
    """
    size, mesh = slice_size(shape), jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    divides = mesh.size <= 1 and (device is None or device.platform != "tpu")
    if divides and size == 1 and len(shape) > 2 and shape[1] % (PARTS * SUBLANES) == 0:
        return 1, shape[1] // PARTS, *shape[2:]
    return size, *shape[1:]


def count_pieces(shape: tuple[int, ...], piece: tuple[int, ...]) -> int:
    """Returns the number of pieces of a parameter."""
    return math.prod(shape) // math.prod(piece)


def piece_at(x: Array, index: Int[Array, ""], piece: tuple[int, ...]) -> Array:
    """Returns piece number `index`, in the memory of x."""
    start = _start(x.shape, index, piece)
    return jax.lax.dynamic_slice(x, start, piece, allow_negative_indices=False)


def write_piece(x: Array, new: Array, index: Int[Array, ""]) -> Array:
    """Returns x with piece number `index` replaced by `new`, in the memory of x."""
    new = move(new, jax.typeof(x).memory_space)
    start = _start(x.shape, index, new.shape)
    return jax.lax.dynamic_update_slice(x, new, start, allow_negative_indices=False)


def _start(
    shape: tuple[int, ...], index: Int[Array, ""], piece: tuple[int, ...]
) -> tuple[Array | int, ...]:
    """Returns the indices at which a piece begins."""
    if len(shape) < 2:
        return (index * piece[0],)
    parts = jnp.int32(shape[1] // piece[1])
    first, second = jax.lax.div(index, parts), jax.lax.rem(index, parts)
    return first * piece[0], second * piece[1], *[0] * (len(shape) - 2)


def slice_at(x: Array, index: Int[Array, ""], size: int) -> Array:
    """Returns slice number `index` of length `size` along axis 0, in the memory of x."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, allow_negative_indices=False)


def layer_at(stacks: Tree, index: Int[Array, ""]) -> Tree:
    """Returns layer number `index` of stacked arrays, in the memory of the stacks."""
    take = partial(
        jax.lax.dynamic_index_in_dim, index=index, keepdims=False, allow_negative_indices=False
    )
    return jax.tree.map(take, stacks)


def write_layer(stacks: Tree, layer: Tree, index: Int[Array, ""]) -> Tree:
    """Returns stacked arrays with layer number `index` replaced; each stays in its memory."""
    return jax.tree.map(lambda stack, x: write_piece(stack, x[None], index), stacks, layer)


def loop_with_prefetch(
    count: int,
    load: Callable[[Int[Array, ""], Carry], Tree],
    body: Callable[[Int[Array, ""], Tree, Tree, Carry], Carry],
    carry: Carry,
    parts: int = 1,
) -> Carry:
    """Runs `carry = body(index, here, ahead, carry)` for each index, with `here` loaded ahead.

    The arrays of the next index begin to load before the arrays of an index are used in a
    computation, so that copies from host memory run beside the computation. The loaded arrays are
    in device memory twice.

    Args:
        count: Number of indices, a multiple of `parts`.
        load: Function of (index, carry) that copies the arrays of an index to the device. It gets
            the carry before the previous index, so it must not read what `body` writes there.
        body: Function that computes one index from its arrays `here`; `ahead` are the arrays of the
            next index. A body that writes to an array of which `load` reads slices must use
            `write_after`.
        carry: Arrays before the first index.
        parts: Number of indices in one iteration of the compiled loop. The offset of a slice must
            increase by the same number of bytes in each iteration; see `STREAMING_OPTIONS`.
    """

    def step(iteration: Int[Array, ""], both: tuple[Carry, Tree]) -> tuple[Carry, Tree]:
        carry, here = both
        for part in range(parts):
            index = iteration * parts + part
            ahead = load(index + 1, carry)
            carry, here = body(index, here, ahead, carry), ahead
        return carry, here

    first = carry, load(jnp.zeros((), jnp.int32), carry)
    return jax.lax.fori_loop(0, count // parts, step, first)[0]


def add_to(total: Array, x: Array) -> Array:
    """Returns `total` + x in the memory of `total`; x is on the device."""
    if not is_hosted(total):
        return rounded_sum(total, x)
    piece = slice_size(total.shape), *total.shape[1:]
    load = lambda index, total: fetch(piece_at(total, index, piece))

    def body(index: Int[Array, ""], here: Array, ahead: Array, total: Array) -> Array:
        new = rounded_sum(here, piece_at(x, index, piece))
        return write_piece(total, write_after(ahead, new), index)

    return loop_with_prefetch(count_pieces(total.shape, piece), load, body, total)


def rounded_sum(total: Array, x: Array) -> Array:
    """Returns the float32 sum `total` + x, rounded to the dtype of `total`."""
    return (total.astype(jnp.float32) + x.astype(jnp.float32)).astype(total.dtype)


def write_after(ahead: PyTree, new: Tree) -> Tree:
    """Returns `new`, but not before the arrays `ahead` have been loaded.

    If an array could be read and written at the same time, XLA would copy the whole array in every
    iteration.
    """
    return jax.lax.optimization_barrier((ahead, new))[1]


def zeros(tree: PyTree) -> Any:
    """Returns zeros with the shapes, dtypes and memory of ShapeDtypeStructs that have shardings.

    Zeros in host memory are made on the device and moved to the host: a stack layer by layer, and a
    matrix at once.
    """
    leaves, structure = jax.tree.flatten(tree)
    # XLA does not know that these numbers are equal. Otherwise, it would make arrays of one shape
    # only once, and copy them in host memory.
    numbers = jax.lax.optimization_barrier([jnp.zeros((), leaf.dtype) for leaf in leaves])
    return jax.tree.unflatten(structure, map(_filled, leaves, numbers))


def _filled(leaf: jax.ShapeDtypeStruct, number: Array) -> Array:
    if not is_for_host(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)
    if len(leaf.shape) == 2:
        return move(jnp.full(leaf.shape, number), HOST)
    layer = lambda _: move(jnp.full(leaf.shape[1:], number), HOST)
    return jax.lax.map(layer, jnp.arange(leaf.shape[0]))

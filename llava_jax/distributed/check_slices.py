"""Checks on the device that loops get the right slices of arrays in host memory.

XLA:GPU had errors with which such loops compute with wrong layers, without an error message
(openxla/xla #46231). The check runs a small program, which has the loops of this package, and
compares its results with known results.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, SingleDeviceSharding
from jaxtyping import PyTree

from llava_jax.distributed.host_memory import (
    PINNED_HOST,
    fetch,
    layer_at,
    loop_with_prefetch,
    write_layer,
)
from llava_jax.errors import RunError
from llava_jax.jax_compat import compiler_options

LAYERS, ROUNDS = 5, 2


def check_slices() -> None:
    """Runs loops over a small stack in host memory on the first local device.

    The program runs through the layers forwards, with the next layer loaded ahead, and backwards,
    where it also writes the layers of another stack. It does so twice, in a loop, like the
    micro-batches of a step.

    Raises:
        RunError: A loop has read or written a wrong layer.
    """
    device = jax.local_devices()[0]
    on_host = SingleDeviceSharding(device, memory_kind=PINNED_HOST)
    layers = np.arange(1, LAYERS + 1, dtype=np.float32)
    values = np.broadcast_to(layers[:, None, None], (LAYERS, 64, 1024))
    stack = jax.device_put(values, on_host)
    written = jax.device_put(np.zeros_like(values), on_host)
    run = jax.jit(
        lambda *stacks: _both_directions(*stacks),
        donate_argnums=1,
        compiler_options=compiler_options(device.platform, uses_host=True),
        out_shardings=(SingleDeviceSharding(device), SingleDeviceSharding(device), on_host),
    )
    mesh = jax.make_mesh((1,), ("device",), (AxisType.Auto,), devices=[device])
    with jax.set_mesh(mesh):  # a run's mesh may have other devices too
        forwards, backwards, written = run(stack, written)
    expected = (
        (forwards, [[x, min(x + 1, LAYERS)] for x in layers] * ROUNDS),
        (backwards, [*reversed(layers)] * ROUNDS),
        (written, values * ROUNDS * (ROUNDS + 1) / 2),
    )
    if all(np.array_equal(np.asarray(x).ravel(), np.ravel(y)) for x, y in expected):
        return
    raise RunError(
        f"{device.device_kind} reads or writes wrong slices of arrays in host memory, so the "
        "results would be wrong. This is an error of XLA, like openxla/xla #46231. Install another "
        "version of jax, or keep all arrays on the device with --memory.plan manual"
    )


def _both_directions(
    stack: jax.Array, written: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what the loops read, forwards and backwards, and the stack that they have written."""
    corner = lambda layer: layer[-1, -1]

    def once(
        written: jax.Array, number: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def forwards(ahead: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            here, ahead = fetch(layer_at(stack, index)), fetch(layer_at(stack, index + 1))
            return ahead, jnp.stack([corner(here), corner(ahead)])

        indices: PyTree = np.arange(LAYERS, dtype=np.int32)
        first = fetch(layer_at(stack, jnp.zeros((), jnp.int32)))
        read = jax.lax.scan(forwards, first, indices)[1]
        load = lambda done, _: fetch(layer_at(stack, LAYERS - 1 - done))

        def backwards(
            done: jax.Array, here: jax.Array, _ahead: jax.Array, carry: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            written, found = carry
            index = LAYERS - 1 - done
            new = fetch(layer_at(written, index)) + number * here
            return write_layer(written, new, index), found.at[done].set(corner(here))

        written, found = loop_with_prefetch(LAYERS, load, backwards, (written, jnp.zeros(LAYERS)))
        return written, (read, found)

    written, (read, found) = jax.lax.scan(once, written, jnp.arange(1.0, ROUNDS + 1))
    return read, found, written

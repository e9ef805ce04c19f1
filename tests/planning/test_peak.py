"""The largest arrays at the peak of a compiled step, by name and shape."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from llava_jax.planning.peak import dump_options, largest_arrays
from llava_jax.planning.usage import Usage, largest_table


def step(trainable: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    with jax.named_scope("attention"):
        y = jnp.sin(x @ trainable["first.weight"])
    with jax.named_scope("feed_forward"):
        # A loop's carry is one array, however many values have its place.
        y = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ trainable["second.weight"]), y)
    return jnp.sum(y[::2])


def test_arrays_are_named_and_counted_once(tmp_path: Path):
    state = {"first.weight": jnp.ones((128, 256)), "second.weight": jnp.ones((256, 256))}
    lowered = jax.jit(step).lower(state, jnp.ones((512, 128)))
    compiled = lowered.compile(dump_options(tmp_path))
    arrays = largest_arrays(tmp_path, compiled.as_text() or "")
    stats = compiled.memory_analysis()
    assert stats is not None
    sizes = [array.size for array in arrays]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) <= stats.argument_size_in_bytes + stats.temp_size_in_bytes + 2**12
    carries = [array for array in arrays if array.shape == "f32[512,256]"]
    assert 1 <= len(carries) <= 2
    assert all(array.name.startswith("forward") for array in carries)
    assert ("f32[256,256]", "second.weight") in {(x.shape, x.name) for x in arrays}
    assert len(largest_arrays(tmp_path, compiled.as_text() or "", count=2)) == 2
    usage = Usage({}, {}, 0, 0, 0, 0, None, largest=arrays)
    assert re.search(r"0\.00 GiB  f32\[256,256\] +second\.weight", largest_table(usage))


def test_without_the_files_nothing_is_known(tmp_path: Path):
    assert largest_arrays(tmp_path, "") == ()
    for name in ("x-buffer-assignment.txt", "x-live-range.txt"):
        (tmp_path / name).write_text("another form\n")
    assert largest_arrays(tmp_path, "") == ()

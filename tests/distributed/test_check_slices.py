"""A device that gets wrong layers is noticed before a run."""

import jax
import jax.numpy as jnp
import pytest

from llava_jax.distributed import check_slices, host_memory
from llava_jax.errors import RunError


def test_right_slices_pass():
    check_slices.check_slices()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda index: index - 1,  # the prefetched layer is the current one
        lambda index: jnp.maximum(index, 1),  # the first layer is never read
        lambda index: jnp.zeros_like(index),  # openxla/xla #46231
    ],
)
def test_wrong_slices_are_an_error(wrong, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        check_slices,
        "layer_at",
        lambda stack, index: host_memory.layer_at(stack, wrong(jnp.asarray(index))),
    )
    with pytest.raises(RunError, match="wrong slices of arrays in host memory"):
        check_slices.check_slices()


def test_wrong_writes_are_an_error(monkeypatch: pytest.MonkeyPatch):
    write = lambda stack, new, index: host_memory.write_layer(stack, new, jax.lax.max(index, 1))
    monkeypatch.setattr(check_slices, "write_layer", write)
    with pytest.raises(RunError):
        check_slices.check_slices()

"""The options that the programs of a run are compiled with."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_training import CONFIG, MODEL, change

from llava_jax.distributed import host_memory
from llava_jax.distributed.sharding import make_mesh
from llava_jax.jax_compat import OVERLAP_OPTIONS, STREAMING_OPTIONS
from llava_jax.models import stack
from llava_jax.pretrained import save
from llava_jax.train_step import program

STREAMED = {"stream_weights": True, "offload_optimizer": True}
Options = dict[str, Any] | None


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Options]]:
    """What is handed to `jax.jit` from here on, as if the devices were GPUs."""
    asked: list[tuple[str, Options]] = []
    jit, options_for = jax.jit, program.compiler_options

    def note(f: Callable, compiler_options: Options = None, **options: Any) -> Callable:
        asked.append((f.__name__, compiler_options))
        return jit(f, **options)

    for module in (program, stack):
        monkeypatch.setattr(
            module, "compiler_options", lambda _, **given: options_for("gpu", **given)
        )
        monkeypatch.setattr(module, "jax", types.SimpleNamespace(**vars(jax) | {"jit": note}))
    return asked


@pytest.mark.parametrize(
    ("memory", "devices", "expected"),
    [
        ({}, 1, None),
        (STREAMED, 1, STREAMING_OPTIONS | OVERLAP_OPTIONS),
        ({"offload_activations": True}, 2, STREAMING_OPTIONS | OVERLAP_OPTIONS),
        ({}, 2, OVERLAP_OPTIONS),
    ],
)
def test_both_steps_have_the_same_options(
    compiled: list[tuple[str, Options]],
    monkeypatch: pytest.MonkeyPatch,
    memory: dict,
    devices: int,
    expected: Options,
):
    """The eval step reads streamed weights too, in loops of the same kind."""
    monkeypatch.setattr(host_memory, "MIN_SLICE", 100)
    config = change(CONFIG, memory=memory)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program.build_program(config, MODEL, 9, mesh)
    assert compiled == [("train_step", expected), ("eval_step", expected)]


def test_an_export_reads_host_memory_with_these_options(compiled: list[tuple[str, Options]]):
    taken = save._take._jitted.__wrapped__("gpu")(jnp.arange(6.0).reshape(3, 2), 1)
    assert taken.tolist() == [2.0, 3.0]
    assert compiled == [("_take", STREAMING_OPTIONS | OVERLAP_OPTIONS)]

"""What a run says at its start."""

import dataclasses

import jax
import pytest
from tiny_training import CONFIG, MODEL

from llava_jax.config import MeshConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.training import run


@pytest.mark.parametrize(("dtype", "lines"), [("bfloat16", 2), ("float32", 1)])
def test_a_run_says_that_a_gpu_has_no_bfloat16(
    dtype: str, lines: int, monkeypatch: pytest.MonkeyPatch
):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert len(list(run._describe_devices(config, MODEL, mesh))) == 1
    monkeypatch.setattr(run, "capability_here", lambda: "7.0")
    said = list(run._describe_devices(config, MODEL, mesh))
    assert said[0].startswith("devices: 1 x ")
    assert len(said) == lines
    assert all("has no bfloat16 units" in line for line in said[1:])

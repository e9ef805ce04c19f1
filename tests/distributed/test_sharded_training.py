"""Eight fake devices against one: the same losses, and really sharded state."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, MODEL, change, run

from llava_jax.config import LLAVA_7B, MeshConfig, TuneConfig
from llava_jax.distributed.sharding import (
    PARAMETER_RULES,
    array_spec,
    logical_axes,
    make_mesh,
    shard_map_tokens,
    to_spec,
)
from llava_jax.errors import ConfigError
from llava_jax.models.build import build_model, quantised_shapes
from llava_jax.models.quant import dequantise, quantise
from llava_jax.train_step.step import accumulation_steps

STEPS = 10


@pytest.fixture(scope="module")
def one_device() -> list[dict[str, float]]:
    return run(CONFIG, devices=1, steps=STEPS)[0]


def losses(rows: list[dict[str, float]]) -> np.ndarray:
    return np.array([row["loss"] for row in rows])


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(MeshConfig(1, 8, 1), id="fsdp8", marks=pytest.mark.slow),
        pytest.param(MeshConfig(2, 2, 2), id="data2-fsdp2-tensor2"),
    ],
)
def test_eight_devices_train_as_one(one_device: list[dict[str, float]], mesh: MeshConfig):
    rows, program, state = run(dataclasses.replace(CONFIG, mesh=mesh), devices=8, steps=STEPS)
    np.testing.assert_allclose(losses(rows), losses(one_device), rtol=1e-5)
    leaves = jax.tree.leaves((state.trainable, state.opt_state))
    arrays = [leaf for leaf in leaves if leaf.ndim]
    assert len(arrays) == 3 * len(program.trainable)
    for array in arrays:
        shard = math.prod(array.addressable_shards[0].data.shape)
        assert shard * mesh.fsdp <= array.size, array.sharding


def test_norms_of_heads_train_on_eight_devices_as_on_one():
    config = dataclasses.replace(
        change(CONFIG, optimizer={"learning_rate": 1e-3}),
        model=dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, model_type="qwen3")),
        tune=TuneConfig(llm="full", vision="frozen", projector="full"),
    )
    expected, _, whole = run(config, devices=1, steps=4)
    rows, _, state = run(dataclasses.replace(config, mesh=MeshConfig(2, 2, 2)), 8, 4)
    np.testing.assert_allclose(losses(rows), losses(expected), rtol=1e-5)
    for name in ("q_norm", "k_norm"):
        path = f"llm.layers.self_attn.{name}.weight"
        ours, theirs = (np.asarray(x.trainable[path]) for x in (state, whole))
        assert (theirs != 1).all()  # they start from ones
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_accumulation_equals_the_larger_batch(one_device: list[dict[str, float]]):
    """With dropout, too: a sample's mask does not depend on its micro-batch."""
    rows, program, _ = run(change(CONFIG, batch={"micro_size": 8}), devices=1, steps=STEPS)
    assert program.accumulation == 2
    np.testing.assert_allclose(losses(rows), losses(one_device), rtol=1e-6)


@pytest.mark.slow  # short: accumulation on one device, and eight devices without
def test_sharded_accumulation_equals_the_larger_batch(one_device: list[dict[str, float]]):
    config = change(CONFIG, batch={"micro_size": 1}, mesh={"fsdp": 8})
    rows, program, _ = run(config, devices=8, steps=4)
    assert program.accumulation == 2
    # Adam's first steps divide by the gradient's size, so rounding shows more than in the loss.
    np.testing.assert_allclose(losses(rows)[:1], losses(one_device)[:1], rtol=1e-6)


@pytest.mark.slow  # short: the parity test of these adapters on one device
def test_adapters_of_different_scales_are_the_same_on_several_devices():
    patterns = {"rank_pattern": {"linear_1": 4}, "alpha_pattern": {r"layers\.1\..*": 5.0}}
    config = change(CONFIG, lora=patterns, tune={"projector": "lora", "vision": "frozen"})
    one, _, _ = run(config, devices=1, steps=2)
    several, _, _ = run(change(config, mesh={"fsdp": 8}), devices=8, steps=2)
    np.testing.assert_allclose(losses(several), losses(one), rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    config = change(CONFIG, batch={"micro_size": 3})
    with pytest.raises(ConfigError, match=r"global_size 16 is not a multiple .* 3 x 8"):
        accumulation_steps(config.batch, make_mesh(config.mesh))


def test_a_mesh_of_another_size_than_the_machine_is_refused():
    with pytest.raises(ConfigError, match="12 devices, but there are 8"):
        make_mesh(MeshConfig(3, 4, 1))
    with pytest.raises(ConfigError, match=r"sequence 64 .* needs 64 devices, but there are 8"):
        make_mesh(MeshConfig(sequence=64))


def test_every_rule_puts_a_dimension_on_fsdp():
    mesh = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    for pattern, axes in PARAMETER_RULES:
        spec = to_spec(axes, (4,) * len(axes), mesh)
        assert "fsdp" in str(spec), pattern


def test_what_the_axes_do_not_divide_is_on_fewer():
    mesh = {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 2}
    specs = [to_spec(("split_outputs", "whole"), (size, 3), mesh)[0] for size in (16, 8, 6, 5)]
    assert specs == [("tensor", "fsdp", "sequence"), ("tensor", "fsdp"), "tensor", None]


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(LookupError, match=r"0 rules .* match llm\.layers\.surprise"):
        logical_axes("llm.layers.surprise")


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    with pytest.raises(ValueError, match="do not fit"):
        to_spec(("model", "rank"), (8, 8), {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 1})


@pytest.mark.parametrize("fsdp", [8, 64])
def test_all_arrays_of_nf4_weights_are_divided(fsdp: int):
    """`down_proj` of 7B has 11008 inputs: 172 blocks, and 1376 numbers of eight codes."""
    mesh = {"data": 1, "fsdp": fsdp, "sequence": 1, "tensor": 1}
    weights = quantised_shapes(build_model(LLAVA_7B, {})[1], "nf4")
    assert len(weights) == 7
    for path, weight in weights.items():
        for array in jax.tree.leaves(weight):
            assert "fsdp" in str(array_spec(logical_axes(path), weight, array.shape, mesh)), path


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "int8"])
def test_quantised_weights_are_the_same_once_gathered(kind):
    """Their scales stay float32, whatever is computed in."""
    weight = np.random.default_rng(0).standard_normal((128, 128), np.float32)
    params = {"weight": jax.tree.map(jnp.asarray, quantise(weight, kind))}
    rows = jnp.zeros((8, 1, 128), jnp.bfloat16)
    add = lambda params, x: x + dequantise(params["weight"], x.dtype)[None]
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):
        gather = jax.jit(
            lambda *args: shard_map_tokens(add, {"weight": ("split_outputs", "whole")}, *args)
        )
        gathered = gather(params, rows)
    np.testing.assert_array_equal(gathered, add(params, rows))

"""AdamW with moments of 8 bits: learns like AdamW, where equally spaced codes would not."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_training import CONFIG, MODEL, change, random_batch, run

from llava_jax.cli import train
from llava_jax.config import MeshConfig, OptimizerConfig, TuneConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.train_step.adamw_8bit import BLOCK, Moment, scale_by_adam_8bit
from llava_jax.train_step.optimizer import make_optimizer
from llava_jax.train_step.step import abstract_state

ROOT = Path(__file__).parents[2]


def affine(x: jax.Array) -> jax.Array:
    """Rounds each block to 256 numbers with equal distances, from 0 to its largest."""
    blocks = x.reshape(-1, BLOCK)
    largest = jnp.max(blocks, axis=1, keepdims=True)
    return (jnp.round(blocks / largest * 255) / 255 * largest).reshape(x.shape)


def scale_by_affine() -> optax.GradientTransformation:
    """Adam whose second moment has equally spaced codes."""
    adam = optax.scale_by_adam()

    def update(grads, state, params=None):
        scaled, state = adam.update(grads, state, params)
        return scaled, state._replace(nu=jax.tree.map(affine, state.nu))

    return optax.GradientTransformation(adam.init, update)


def final_loss(scaling: optax.GradientTransformation) -> float:
    """Loss of a linear model after 300 steps; its inputs have very different magnitudes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((512, 64)) * np.logspace(-2, 0, 64), jnp.float32)
    y = x @ jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    optimizer = optax.chain(scaling, optax.scale(-1e-2))
    loss = lambda weight, rows: jnp.mean((x[rows] @ weight.T - y[rows]) ** 2)

    @jax.jit
    def step(done: tuple, seed: jax.Array) -> tuple:
        weight, state = done
        rows = jax.random.randint(jax.random.key(seed), (32,), 0, len(x))
        updates, state = optimizer.update(jax.grad(loss)(weight, rows), state, weight)
        return (optax.apply_updates(weight, updates), state), None

    weight = jnp.zeros((64, 64))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counters with floats
        (weight, _), _ = jax.lax.scan(step, (weight, optimizer.init(weight)), jnp.arange(300))
    return float(loss(weight, slice(None)))


def test_equally_spaced_codes_diverge():
    """Most second moments of a block become 0, so the steps become far too large."""
    start = final_loss(optax.scale(0.0))
    adam, eight_bit, equal = map(
        final_loss, (optax.scale_by_adam(), scale_by_adam_8bit(), scale_by_affine())
    )
    assert adam < 0.1 * start
    assert eight_bit < 1.2 * adam
    assert equal > start


WIDE = dataclasses.replace(
    MODEL, llm=dataclasses.replace(MODEL.llm, hidden_size=64, intermediate_size=128)
)
FULL = dataclasses.replace(CONFIG, model=WIDE, tune=TuneConfig("full", "frozen", "full"))


@pytest.mark.parametrize("name", ["adamw_8bit", "bfloat16"])
def test_a_model_learns_as_with_adamw(name: str):
    fields: dict[str, object] = {"name": "adamw_8bit", "learning_rate": 1e-3}
    if name == "bfloat16":
        fields |= {"weight_dtype": "bfloat16", "gradient_dtype": "bfloat16"}
    losses = {}
    for optimizer in ({"learning_rate": 1e-3}, fields):
        rows, _, state = run(
            change(FULL, optimizer=optimizer), steps=40, make=lambda _: random_batch(0)
        )
        losses[optimizer.get("name", "adamw")] = rows[-1]["loss"]
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.uint32]
        assert bool(moments) == ("name" in optimizer)
    assert losses["adamw"] < 0.8 * rows[0]["loss"]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.02)


def test_moments_take_a_byte_beside_an_absmax():
    state = scale_by_adam_8bit().init({"w": jnp.zeros((64, 256)), "norm": jnp.zeros(256)})
    assert isinstance(state.mu["w"], Moment)
    assert state.mu["w"].codes.nbytes == 64 * 256
    assert state.mu["w"].absmax.nbytes == 4 * 64
    assert state.mu["norm"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("llm.embed_tokens.weight", (64, 4096), (None, "fsdp")),
        ("llm.layers.mlp.up_proj.weight", (2, 512, 1024), (None, "fsdp", None)),
        ("llm.layers.mlp.up_proj.lora_b", (2, 4096, 8), (None, "fsdp", None)),
        ("llm.layers.input_layernorm.weight", (2, 4096), (None, "fsdp")),
    ],
)
def test_an_update_needs_no_other_device(path: str, shape: tuple, spec: tuple):
    """On whichever axis a parameter is sharded: no array is gathered."""
    mesh = make_mesh(MeshConfig(fsdp=8), jax.devices())
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    params = {path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    tx = make_optimizer(OptimizerConfig(name="adamw_8bit"), 10)
    state = abstract_state(params, tx, mesh, offload=False).opt_state
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.sharding.spec for x in moments} == {sharding.spec}
    results = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        compiled = jax.jit(tx.update, out_shardings=results).lower(params, state, params).compile()
    text = compiled.as_text()
    assert not any(f" {name}" in text for name in ("all-", "collective-", "reduce-scatter"))


def test_codes_go_to_host_memory_and_small_arrays_to_the_device():
    """Also if the parameters are in host memory. XLA:TPU needs codes of 32 bits there."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    host = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    shapes = {"k_proj": (8, 1024, 4096), "up_proj": (8, 11008, 4096)}
    params = {
        f"llm.layers.mlp.{name}.weight": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=host)
        for name, shape in shapes.items()
    }
    tx = make_optimizer(OptimizerConfig(name="adamw_8bit"), 10)
    found = {}
    for leaf in jax.tree.leaves(abstract_state(params, tx, mesh, offload=True).opt_state):
        if leaf.ndim:
            found[leaf.shape] = leaf.dtype, leaf.sharding.memory_kind == "pinned_host"
    assert found == {
        (8, 1024, 1024): (jnp.uint32, True),
        (8, 1024, 16): (jnp.float32, False),
        (8, 11008, 1024): (jnp.uint32, True),
        (8, 11008, 16): (jnp.float32, True),
    }


@pytest.mark.slow  # short: test_a_model_learns_as_with_adamw
def test_a_whole_run_learns_as_with_adamw(tmp_path: Path):
    command = ["--config", str(ROOT / "configs" / "tiny_lora.py"), "--output-dir", str(tmp_path)]
    command += ["--tune.llm", "full", "--optimizer.learning-rate", "3e-4", "--steps", "300"]
    eight_bit = ["--optimizer.name", "adamw_8bit"]
    small = [f"--optimizer.{name}-dtype=bfloat16" for name in ("weight", "gradient")]
    losses = []
    for name, options in (("adamw", []), ("8bit", eight_bit), ("small", [*eight_bit, *small])):
        assert train.train([*command, "--name", name, *options]) == 0
        rows = (tmp_path / name / "evaluations.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0][-1] < 0.5 * losses[0][0]
    for other in losses[1:]:
        assert other[-1] == pytest.approx(losses[0][-1], rel=0.01)

"""Learning rates and the optimizer, against torch's and Hugging Face's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from xla_flags import EXACT

from llava_jax.config import OptimizerConfig
from llava_jax.train_step.optimizer import (
    apply_gradients,
    clip_scale,
    global_norm,
    group_of,
    learning_rates,
    make_optimizer,
)

TOTAL = 40
SCHEDULES = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
}

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_hugging_faces(name: str):
    config = OptimizerConfig(learning_rate=0.5, schedule=name, warmup_ratio=0.06)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
    theirs = SCHEDULES[name](optimizer, num_warmup_steps=3, num_training_steps=TOTAL)
    ours = learning_rates(config, TOTAL)["lora"]
    for step in range(TOTAL):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], abs=1e-7)
        optimizer.step()
        theirs.step()


def test_each_group_has_its_rate():
    config = OptimizerConfig(
        learning_rate=1.0, projector_learning_rate=0.1, schedule="constant", warmup_ratio=0.0
    )
    rates = {name: float(rate(5)) for name, rate in learning_rates(config, TOTAL).items()}
    assert rates == pytest.approx({"lora": 1.0, "llm": 1.0, "vision": 1.0, "projector": 0.1})
    assert group_of("llm.layers.mlp.up_proj.lora_a") == "lora"
    assert group_of("llm.layers.mlp.up_proj.weight") == "llm"
    assert group_of("vision.encoder.layers.mlp.fc1.lora_a") == "vision"
    assert group_of("vision.encoder.layers.mlp.fc1.weight") == "vision"
    assert group_of("projector.linear_1.bias") == "projector"


@pytest.mark.parametrize("clip", [None, 0.1])
def test_updates_are_torchs_adamw(clip: float | None):
    names = {
        "llm.layers.mlp.up_proj.lora_a": (3, 4),
        "projector.linear_1.weight": (4, 2),
        "projector.linear_1.bias": (4,),
        "llm.norm.weight": (4,),
    }
    config = OptimizerConfig(
        learning_rate=0.1,
        projector_learning_rate=0.01,
        schedule="linear",
        weight_decay=0.2,
        warmup_ratio=0.1,
        clip_norm=clip,
    )
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    groups = [
        {
            "params": [tensor],
            "lr": 0.01 if name.startswith("projector") else 0.1,
            "weight_decay": 0.0 if name.endswith("bias") or "norm" in name else 0.2,
        }
        for name, tensor in tensors.items()
    ]
    theirs = torch.optim.AdamW(groups)
    schedule = transformers.get_linear_schedule_with_warmup(theirs, 1, 10)
    params = {name: jnp.asarray(value) for name, value in values.items()}
    tx = make_optimizer(config, 10)
    state = tx.init(params)
    for _ in range(10):
        grads = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in names.items()}
        scale = clip_scale(global_norm(grads), clip)
        params, state = apply_gradients(tx, grads, scale, state, params, jnp.array(True), KEY)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(np.asarray(grads[name]))
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        theirs.step()
        schedule.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_an_optimizer_on_the_host_is_optax_bit_for_bit():
    """With jax 0.10; newer ones fuse a slice's operations otherwise, and round otherwise."""
    exact = jax.__version__.startswith("0.10.")
    names = {"llm.layers.mlp.up_proj.weight": (6, 8, 4), "projector.linear_1.weight": (66, 4)}
    rng = np.random.default_rng(0)
    draw = lambda: {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in names.items()}
    tx = make_optimizer(OptimizerConfig(learning_rate=0.01, weight_decay=0.1), 10)
    host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    params = draw()
    state, their_params = tx.init(params), params
    with jax.numpy_dtype_promotion("standard"):
        their_state = tx.init(params)
    state = jax.tree.map(lambda x: jax.device_put(x, host) if x.ndim else x, state)
    jit = partial(jax.jit, compiler_options=EXACT)
    update = jit(lambda g, s, p: apply_gradients(tx, g, None, s, p, jnp.array(True), KEY))

    @jit
    def their_update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        grads = draw()
        params, state = update(grads, state, params)
        their_params, their_state = their_update(grads, their_state, their_params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.sharding.memory_kind for x in moments} == {"pinned_host"}
    for path in names:
        rtol = 0 if exact else 1e-6
        np.testing.assert_allclose(params[path], their_params[path], rtol=rtol)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("on_host", [False, True])
def test_an_update_may_be_left_out(on_host: bool, name: str):
    values = {"llm.layers.mlp.up_proj.weight": jnp.ones((4, 64, 96))}
    tx = make_optimizer(OptimizerConfig(name, learning_rate=0.01, warmup_ratio=0.0), 10)
    state = tx.init(values)
    if name == "adamw_8bit":
        values = jax.tree.map(lambda x: x.astype(jnp.bfloat16), values)
        assert "uint32" in {x.dtype.name for x in jax.tree.leaves(state)}
    if on_host:
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        state = jax.tree.map(lambda x: jax.device_put(x, host) if x.ndim else x, state)
    update = jax.jit(lambda g, s, p, apply: apply_gradients(tx, g, None, s, p, apply, KEY))
    bad = jax.tree.map(lambda x: x * jnp.nan, values)
    kept, kept_state = update(bad, state, values, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, (kept, kept_state), (values, one_step_on(state)))
    new, new_state = update(values, kept_state, kept, jnp.array(True))
    first, first_state = update(values, one_step_on(state), values, jnp.array(True))
    jax.tree.map(np.testing.assert_array_equal, (new, new_state), (first, first_state))
    assert (new["llm.layers.mlp.up_proj.weight"] != 1).all()


def one_step_on(state: optax.OptState) -> optax.OptState:
    """The state with its schedules one step further, and with no other change."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    on = lambda x: type(x)(x.count + 1) if is_schedule(x) else x
    return jax.tree.map(on, state, is_leaf=is_schedule)


@pytest.mark.parametrize("on_host", [False, True])
def test_steps_that_are_left_out_do_not_stretch_the_schedule(on_host: bool):
    """With equal gradients, Adam's update is the rate itself if its moments count updates only."""
    path = "llm.layers.mlp.up_proj.weight"
    config = OptimizerConfig(learning_rate=0.5, schedule="linear", warmup_ratio=0.2)
    rate = learning_rates(config, 10)["llm"]
    tx = make_optimizer(config, 10)
    params = {path: jnp.ones((4, 8, 4))}
    grads, state = params, tx.init(params)
    if on_host:
        host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
        state = jax.tree.map(lambda x: jax.device_put(x, host) if x.ndim else x, state)
    update = jax.jit(lambda g, s, p, apply: apply_gradients(tx, g, None, s, p, apply, KEY))
    for step in range(10):
        applies = step not in (2, 3, 6)
        given = jax.tree.map(lambda x, ok=applies: x if ok else x * jnp.nan, grads)
        new, state = update(given, state, params, jnp.array(applies))
        used = params[path] - new[path]
        np.testing.assert_allclose(used, float(rate(step)) if applies else 0.0, rtol=1e-4)
        params = new


def test_the_state_begins_with_zeros():
    """As `train_step.step.init_state` makes it."""
    tx = make_optimizer(OptimizerConfig(weight_decay=0.1), 10)
    state = tx.init({"llm.norm.weight": jnp.ones(3), "projector.linear_1.weight": jnp.ones((2, 3))})
    assert len(jax.tree.leaves(state)) > 4
    assert not any(leaf.any() for leaf in jax.tree.leaves(state))

"""Adapters: what gets one, what trains, what merging and dropout do."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG, MODEL

from llava_jax.config import LoraConfig, TuneConfig
from llava_jax.errors import ConfigError
from llava_jax.models import adapter_settings, lora
from llava_jax.models.build import build_model
from llava_jax.models.dropout import dropout, fold_in
from llava_jax.models.layers import Adapter, Linear, merge, parameter, split
from llava_jax.models.llava import whole_images
from llava_jax.models.paths import LLM, VISION, is_adapter, is_trainable


def adapters(**targets: tuple[str, ...]) -> lora.Adapters:
    parts = {"llm": LLM, "vision": VISION}
    configs = {parts[part]: LoraConfig(rank=2, targets=names) for part, names in targets.items()}
    return adapter_settings.expand(configs, MODEL)


def test_only_targets_get_adapters():
    _, abstract = build_model(MODEL, adapters(llm=("q_proj", "down_proj")))
    got = {path: leaf.shape for path, leaf in abstract.items() if is_adapter(path)}
    assert got == {
        "llm.layers.self_attn.q_proj.lora_a": (2, 2, 48),
        "llm.layers.self_attn.q_proj.lora_b": (2, 64, 2),
        "llm.layers.mlp.down_proj.lora_a": (2, 2, 96),
        "llm.layers.mlp.down_proj.lora_b": (2, 48, 2),
    }


def test_vision_layers_behind_the_feature_get_none():
    _, abstract = build_model(MODEL, adapters(vision=("q_proj", "fc2")))
    got = {path for path in abstract if is_adapter(path)}
    assert len(got) == 4
    assert all(path.startswith("vision.encoder.layers.") for path in got)


def test_an_unknown_target_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match=r"q_prj.*are down_proj, gate_proj, k_proj"):
        build_model(MODEL, adapters(llm=("q_prj",)))


@pytest.mark.parametrize(
    ("tune", "trains"),
    [
        (TuneConfig("frozen", "frozen", "full"), {"projector"}),
        (TuneConfig("full", "frozen", "frozen"), {"llm"}),
        (TuneConfig("full", "full", "full"), {"llm", "projector", "vision"}),
        (TuneConfig("frozen", "frozen", "frozen"), set()),
    ],
)
def test_what_trains_in_full(tune: TuneConfig, trains: set[str]):
    _, abstract = build_model(MODEL, {})
    trainable = {path for path in abstract if is_trainable(path, tune)}
    assert {path.split(".")[0] for path in trainable} == trains
    assert not any("tail" in path or "post_layernorm" in path for path in trainable)


def test_dropout_of_a_token_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(0), (4, 64))
    x = jnp.ones((4, 64, 31))
    dropped = dropout(x, 0.25, keys)
    np.testing.assert_array_equal(dropout(x[2:3], 0.25, keys[2:3])[0], dropped[2])
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
    assert abs(float(jnp.mean(dropped == 0)) - 0.25) < 0.02
    assert not np.array_equal(dropped[0], dropped[1])
    assert not np.array_equal(dropped[0, 0], dropped[0, 1])


def test_the_linears_of_a_block_drop_different_elements():
    linear = Linear(8, 4, bias=False)
    linear.lora_a, linear.lora_b = parameter(2, 8), parameter(4, 2)
    linear.adapter = Adapter((2,), (2.0,), dropout=0.5)
    x, keys = jnp.ones((1, 16, 8)), jax.random.split(jax.random.key(0), (1, 16))
    outputs = []
    for index in range(2):
        linear.lora_index = index
        graphdef, shapes = split(linear)
        params = {path: jnp.ones(leaf.shape) for path, leaf in shapes.items()}
        outputs.append(merge(graphdef, params)(x, keys))
    assert not np.array_equal(*outputs)


def test_merging_computes_the_same_and_leaves_no_adapter():
    settings = adapter_settings.adapter_configs(CONFIG.tune, CONFIG.lora, CONFIG.vision_lora)
    graphdef, abstract = build_model(MODEL, adapter_settings.expand(settings, MODEL))
    key = jax.random.key(0)
    params = {
        path: 0.1 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, (path, leaf) in enumerate(abstract.items())
    }
    model = merge(graphdef, params)
    ids = jnp.array([[1, 60, 60, 60, 60, 5, 6]], jnp.int32)
    pixels = jax.random.normal(key, (1, 3, 28, 28))
    images = whole_images(MODEL, ids, pixels)
    logits = lambda graphdef, params: merge(graphdef, params).logits(ids, None, images)
    run = lambda graphdef, params: jax.jit(partial(logits, graphdef))(params)
    before = run(graphdef, params)
    lora.merge_adapters(model)
    assert not any(is_adapter(path) for path in split(model)[1])
    after = run(*split(model))
    np.testing.assert_allclose(after, before, atol=2e-5 * float(jnp.abs(before).max()))


def test_gradients_see_the_dropout_of_the_forward_pass():
    linear = Linear(7, 4, bias=False)
    linear.lora_a, linear.lora_b = parameter(2, 7), parameter(4, 2)
    linear.adapter = Adapter((2,), (4.0,), dropout=0.5)
    graphdef, shapes = split(linear)
    keys = jax.random.split(jax.random.key(0), (3, 5))
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
    params = {path: draw(i, leaf.shape) for i, (path, leaf) in enumerate(shapes.items())}

    def plain(params: Any, x: jax.Array) -> jax.Array:
        low = dropout(x, 0.5, fold_in(keys, 0)) @ params["lora_a"].T
        return jnp.sum(jnp.sin(x @ params["weight"].T + 2.0 * low @ params["lora_b"].T))

    ours = lambda params, x: jnp.sum(jnp.sin(merge(graphdef, params)(x, keys)))
    found, expected = (jax.grad(f, (0, 1))(params, draw(9, (3, 5, 7))) for f in (ours, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize("alpha", [2.0, 1.005])
def test_the_scale_is_not_rounded_to_bfloat16(alpha: float):
    """The powers of two that A and B have keep every product exact."""
    linear = Linear(8, 4, bias=False)
    linear.lora_a, linear.lora_b = parameter(1, 8), parameter(4, 1)
    linear.adapter = Adapter((1,), (alpha,))
    graphdef, shapes = split(linear)
    ones = {path: jnp.ones(leaf.shape, jnp.bfloat16) for path, leaf in shapes.items()}
    params = ones | {"weight": jnp.zeros((4, 8), jnp.bfloat16)}
    x = jnp.full((1, 1, 8), 127 / 128, jnp.bfloat16)
    got = merge(graphdef, params)(x)
    expected = jnp.asarray(alpha * 8 * 127 / 128, jnp.bfloat16)
    np.testing.assert_array_equal(got, jnp.full_like(got, expected))

"""The kernels for accelerators compute what attention written out computes."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from tiny_training import CONFIG

from llava_jax.config import LLAVA_7B, MeshConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models import attention
from llava_jax.models.attention import (
    attend_to_rows,
    attention_implementation,
    flash_attention,
    plain_attention,
    splash_attention,
)

HEAD = 64
LENGTH = 300
ROWS = {  # lengths of each row's segments; what is left of it is padding
    "padded": [(200,), (1,), (256,), (LENGTH,)],
    "packed": [(100, 200), (7, 283), (128, 128), (299, 1)],
}


KERNELS = {"splash": splash_attention, "flash": flash_attention}


@pytest.fixture(autouse=True)
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    for module, name in (
        (splash, "make_splash_mha_single_device"),
        (attention, "segment_attention"),
    ):
        interpreted = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, interpreted)


def segments(name: str) -> jax.Array:
    ids = np.zeros((4, LENGTH), np.int32)
    for row, lengths in zip(ids, ROWS[name], strict=True):
        filled = np.repeat(np.arange(len(lengths)) + 1, lengths)
        row[: len(filled)] = filled
    return jnp.asarray(ids)


def operands(length: int, heads: int, key_heads: int, size: int = HEAD) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(4, length, n, size) for n in (heads, key_heads, key_heads)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def results(attend: Callable, qkv: list[jax.Array], ids: jax.Array | None) -> list[jax.Array]:
    """What attention gives, and its gradients, where there are tokens."""
    real = jnp.ones(qkv[0].shape[:2]) if ids is None else (ids > 0).astype(jnp.float32)

    def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attend(*qkv, ids) * real[:, :, None]
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return [out, *grads]


def assert_alike(found: list[jax.Array], expected: list[jax.Array]):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_plain_attention(kernel: str, rows: str, key_heads: int):
    qkv, ids = operands(LENGTH, 4, key_heads), segments(rows)
    assert_alike(results(KERNELS[kernel], qkv, ids), results(plain_attention, qkv, ids))


def test_only_blocks_of_a_segment_are_computed():
    """What lies in the others may be anything: here, what would spoil all that it meets."""
    length, block = 4 * attention.BLOCK, attention.BLOCK
    ids = jnp.repeat(jnp.array([[1, 2, 2, 3]]), block, axis=1)
    qkv = [x[:1] for x in operands(length, 2, 2)]
    spoiled = [x.at[:, :block].set(jnp.nan).at[:, 3 * block :].set(jnp.nan) for x in qkv]
    middle = lambda arrays: [x[:, block : 3 * block] for x in arrays]
    expected = results(plain_attention, qkv, ids)
    assert_alike(middle(results(flash_attention, spoiled, ids)), middle(expected))


@pytest.mark.parametrize("size", [HEAD, 72])
def test_without_segments_all_tokens_see_all(size: int):
    qkv = operands(37, 2, 2, size)
    assert_alike(results(splash_attention, qkv, None), results(plain_attention, qkv, None))


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_share_rows_and_heads(kernel: str, key_heads: int):
    """A single key head cannot be shared: each device of `tensor` then computes all heads."""
    qkv, ids = operands(LENGTH, 4, key_heads), segments("packed")
    expected = results(plain_attention, qkv, ids)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        assert_alike(results(KERNELS[kernel], qkv, ids), expected)


@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_devices_share_the_tokens_of_rows(kernel: str, key_heads: int):
    """A single key head is repeated for the devices."""
    qkv, ids = operands(LENGTH, 4, key_heads), segments("packed")
    expected = results(plain_attention, qkv, ids)
    attend = functools.partial(attend_to_rows, KERNELS[kernel])
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, tensor=2, sequence=2))):
        assert_alike(results(attend, qkv, ids), expected)


@pytest.mark.parametrize(
    ("platform", "capability", "change", "kind", "packed"),
    [
        ("tpu", "", {}, "splash", "splash"),
        ("tpu", "", {"head_dim": 72}, "splash", "splash"),
        ("gpu", "8.0", {}, "cudnn", "flash"),
        ("gpu", "10.0", {}, "cudnn", "flash"),
        ("gpu", "7.5", {}, "plain", "plain"),
        ("gpu", "8.6", {"head_dim": 96}, "cudnn", "plain"),
        ("gpu", "8.6", {"head_dim": 256}, "plain", "plain"),
        ("cpu", "", {}, "plain", "plain"),
    ],
)
def test_the_device_decides_the_kind(
    platform: str, capability: str, change: dict, kind: str, packed: str
):
    model = dataclasses.replace(LLAVA_7B, llm=dataclasses.replace(LLAVA_7B.llm, **change))
    for packing, expected in ((False, kind), (True, packed)):
        data = dataclasses.replace(CONFIG.data, packing=packing)
        run = dataclasses.replace(CONFIG, dtype="bfloat16", data=data)
        assert attention_implementation(run, model, platform, capability) == expected
        exact = dataclasses.replace(run, dtype="float32")
        assert attention_implementation(exact, model, platform, capability) == "plain"


def test_plain_attention_trains_in_bfloat16_too():
    """XLA's CPU backend lacks some products of bfloat16."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 40, heads, 16)).astype(jnp.bfloat16)
        for i, heads in enumerate((4, 2, 2))
    )
    segments = jnp.ones((2, 40), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(plain_attention(q, k, v, segments).astype(jnp.float32) ** 2)

    narrow, wide = (
        jax.jit(jax.grad(loss, (0, 1, 2)))(*(x.astype(kind) for x in (q, k, v)))
        for kind in (jnp.bfloat16, jnp.float32)
    )
    for ours, exact in zip(narrow, wide, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ours.astype(jnp.float32), exact, atol=0.05 * jnp.abs(exact).max()
        )

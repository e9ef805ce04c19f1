"""Quantised weights by their definition, and as pytrees: stacked, sliced, scanned, sharded."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_jax.config import MeshConfig, ModelConfig, Quantisation
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.build import build_model
from llava_jax.models.quant import (
    BLOCK,
    CHUNK,
    DYNAMIC,
    NF4,
    Int8Weight,
    NestedAbsmax,
    Nf4Weight,
    QuantisationError,
    Quantised,
    abstract,
    dequantise,
    is_quantised,
    quantise,
)

KINDS = get_args(Quantisation)
DTYPES = ("float32", "bfloat16", "float16")
jitted = jax.jit(dequantise, static_argnums=1)


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(jnp.dtype(dtype))


def blockwise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix as blocks in float64, and their absmax."""
    blocks = weight.astype(np.float64).reshape(-1, BLOCK)
    return blocks, np.abs(blocks).max(axis=1, keepdims=True)


def unpack(codes: np.ndarray) -> np.ndarray:
    """The NF4 codes [out, in] of packed codes [in / 8, out]."""
    parts = codes.T.reshape(-1, 1, 8) >> np.arange(0, 32, 4)[:, None] & 15
    return parts.reshape(codes.shape[1], -1)


def unpack_nested(codes: np.ndarray) -> np.ndarray:
    """The codes of absmaxes, [groups, 256], of packed codes."""
    return (codes >> np.arange(0, 32, 8)[:, None, None] & 255).reshape(-1, 256)


def leaves(tree: Quantised) -> list[tuple[str, tuple[int, ...], str]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in flat]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_a_code_is_the_nearest(dtype: str, seed: int):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 40)), BLOCK * int(rng.integers(1, 9))
    spread = 10.0 ** rng.uniform(-2, 2, (rows, 1)) * rng.standard_t(2, (rows, columns))
    weight = spread.astype(jnp.dtype(dtype))
    quantised = quantise(weight, "nf4")
    blocks, absmax = blockwise(weight)
    np.testing.assert_array_equal(quantised.absmax.T.reshape(-1, 1), absmax)
    apart = np.abs(blocks[:, :, None] - NF4.astype(np.float64) * absmax[:, :, None])
    codes = unpack(quantised.codes).reshape(blocks.shape)
    chosen = np.take_along_axis(apart, codes[:, :, None].astype(int), axis=2)[:, :, 0]
    assert (chosen <= apart.min(axis=2) + 1e-6 * absmax).all()
    got = np.asarray(jitted(quantised, "float32"))
    np.testing.assert_allclose(got, (NF4[codes] * absmax).reshape(got.shape), rtol=1e-6)


def test_the_first_8_codes_of_a_block_are_in_the_lowest_bits():
    weight = np.repeat(np.float32([1.0, 0.0, -1.0]), [8, 48, 8])[None]
    assert quantise(weight, "nf4").codes.tolist() == [[0x0777777F]] * 8


@pytest.mark.parametrize("rows", [1, 3, 256, 257])
def test_absmaxes_are_nested_in_blocks_of_256(rows: int):
    weight = normal(rows, 3 * BLOCK) * 10.0 ** np.random.default_rng(1).uniform(-1, 1, (rows, 1))
    weight = weight.astype(np.float32)
    plain, double = quantise(weight, "nf4"), quantise(weight, "nf4_double")
    np.testing.assert_array_equal(plain.codes, double.codes)
    nested = double.absmax
    assert isinstance(nested, NestedAbsmax)
    np.testing.assert_allclose(nested.offset, plain.absmax.mean(dtype=np.float64), rtol=1e-7)
    centred = (plain.absmax.T - nested.offset).ravel()
    codes = unpack_nested(nested.codes)
    of_values = codes.ravel()[: rows * 3]
    assert not nested.absmax[-(-rows * 3 // 256) :].any()
    for index, largest in enumerate(nested.absmax[: -(-rows * 3 // 256)]):
        block = slice(256 * index, 256 * (index + 1))
        assert largest == np.abs(centred[block]).max()
        apart = np.abs(centred[block, None] - DYNAMIC[None].astype(np.float64) * largest)
        chosen = np.take_along_axis(apart, of_values[block, None].astype(int), 1)[:, 0]
        assert (chosen <= apart.min(axis=1) + 1e-6 * largest).all()
    assert len(nested.absmax) == -(-rows * 3 // 512) * 2
    absmax = DYNAMIC[codes] * nested.absmax[:, None] + nested.offset
    absmax = absmax.ravel()[: rows * 3].reshape(rows, 3)
    values = NF4[unpack(double.codes)] * np.repeat(absmax, BLOCK, axis=1)
    np.testing.assert_allclose(jitted(double, "float32"), values, rtol=1e-5, atol=1e-7)


def test_the_dynamic_map():
    assert DYNAMIC.shape == (256,)
    assert (np.diff(DYNAMIC) > 0).all()
    assert (DYNAMIC[127], DYNAMIC[255]) == (0, 1)
    np.testing.assert_array_equal(DYNAMIC[:127], -DYNAMIC[128:255][::-1])
    np.testing.assert_allclose(DYNAMIC[128], 0.55e-6, rtol=1e-6)  # the middle of [1e-7, 1e-6]
    # The first 256 of 512 codes are the lowest and second bytes.
    low, high = np.arange(256, dtype=np.uint32).reshape(2, 128)
    absmax = NestedAbsmax((high << 8 | low)[None], np.ones(2, np.float32), np.float32(0))
    ones = Nf4Weight(np.full((BLOCK // 8, 256), 2**32 - 1, np.uint32), absmax)
    np.testing.assert_allclose(jitted(ones, "float32")[:, 0], DYNAMIC, rtol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_within_half_a_step(dtype: str):
    weight = normal(33, 100, dtype=dtype)
    weight[5] = 0
    quantised = quantise(weight, "int8")
    assert np.abs(quantised.codes).max(axis=1).tolist() == [127] * 5 + [0] + [127] * 27
    apart = np.abs(jitted(quantised, "float32") - weight.astype(np.float32))
    assert (apart <= 0.5001 * quantised.scale).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scale", [0.0, 1e-42, 1e-38, 1e-30, 1e30, 1e38], ids=lambda scale: f"{scale:.0e}"
)
def test_extremes_stay_finite_and_near(kind: Quantisation, scale: float):
    shape = np.random.default_rng(0).uniform(-1, 1, (5, 2 * BLOCK))
    weight = (scale * shape).astype(np.float32)
    got = np.asarray(jitted(quantise(weight, kind), "float32")).astype(np.float64)
    assert np.isfinite(got).all()
    # XLA takes what is below 1e-38 for zero, and 1 / absmax must be finite.
    assert np.abs(got - weight).max() <= 0.16 * np.abs(weight).max() + 2e-38


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_among_others_stay_zeros(kind: Quantisation):
    weight = normal(4, 4 * BLOCK)
    weight[1] = 0
    weight[2, BLOCK : 2 * BLOCK] = -0.0
    got = np.asarray(jitted(quantise(weight, kind), "bfloat16"))
    assert not got[weight == 0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_show(kind: Quantisation, dtype: str):
    weight = normal(2 * CHUNK // 192 + 3, 192, dtype=dtype)
    whole = quantise(weight, kind)
    rows = slice(CHUNK // 192 - 1, CHUNK // 192 + 3)
    part = quantise(weight[rows], kind)
    of_part = whole.codes[rows] if kind == "int8" else whole.codes[:, rows]
    np.testing.assert_array_equal(of_part, part.codes)
    for other in (np.asfortranarray(weight), weight.astype(np.float32)):
        jax.tree.map(np.testing.assert_array_equal, whole, quantise(other, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_rounded_once(kind: Quantisation):
    quantised = quantise(normal(8, 2 * BLOCK), kind)
    for dtype in ("bfloat16", "float16"):
        got = jitted(quantised, dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, jitted(quantised, "float32").astype(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (300, 64), (300, 128)])
def test_planned_shapes_are_the_real_ones(kind: Quantisation, shape: tuple[int, int]):
    quantised = quantise(normal(*shape), kind)
    assert leaves(quantised) == leaves(abstract(kind, shape))
    stacked = jax.tree.map(lambda *layers: np.stack(layers), *[quantised] * 3)
    assert leaves(stacked) == leaves(abstract(kind, (3, *shape)))
    assert (quantised.shape, stacked.shape) == (shape, (3, *shape))
    assert jax.eval_shape(lambda q: dequantise(q, "bfloat16"), abstract(kind, shape)).shape == shape


def test_bits_a_weight():
    size = lambda kind: sum(
        leaf.size * leaf.dtype.itemsize * 8 for leaf in jax.tree.leaves(abstract(kind, shape))
    )
    shape = 11008, 4096
    bits = [round(size(kind) / (11008 * 4096), 3) for kind in KINDS]
    assert bits == [4.5, 4.127, 8.008]


@pytest.fixture(params=KINDS)
def stack(request: pytest.FixtureRequest) -> tuple[Quantised, list[np.ndarray]]:
    """Three layers as one stacked weight, on the device, and what each is dequantised."""
    layers = [quantise(normal(24, 2 * BLOCK, seed=seed), request.param) for seed in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.asarray(np.stack(xs)), *layers)
    return stacked, [np.asarray(jitted(layer, "float32")) for layer in layers]


def test_a_layer_of_a_stack_is_a_weight(stack):
    stacked, expected = stack

    @jax.jit
    def one(stacked: Quantised, index: jax.Array) -> jax.Array:
        take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
        return dequantise(jax.tree.map(take, stacked), "float32")

    for index, layer in enumerate(expected):
        np.testing.assert_array_equal(one(stacked, jnp.int32(index)), layer)


def test_a_stack_is_scanned_and_the_input_has_a_gradient(stack):
    stacked, expected = stack
    x = jnp.asarray(normal(4, 2 * BLOCK, seed=9)) * 50

    def run(x: jax.Array) -> jax.Array:
        apply = lambda total, layer: (
            total + jnp.sum(jnp.einsum("BD,FD->BF", x, dequantise(layer, "float32")) ** 2),
            None,
        )
        return jax.lax.scan(apply, jnp.float32(0), stacked)[0]

    value, grad = jax.jit(jax.value_and_grad(run))(x)
    outputs = [np.asarray(x) @ layer.T for layer in expected]
    np.testing.assert_allclose(value, sum((y**2).sum() for y in outputs), rtol=1e-5)
    exact = sum(2 * y @ layer for y, layer in zip(outputs, expected, strict=True))
    np.testing.assert_allclose(grad, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "fsdp")], ids=["out", "in"])
def test_what_shards_the_weight_shards_its_arrays(stack, spec):
    stacked, expected = stack
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])

    def place(x: jax.Array) -> jax.Array:
        axes = (None, *spec) if x.ndim == 3 else ()
        axes = [a if size % 2 == 0 else None for a, size in zip(axes, x.shape, strict=False)]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    placed = jax.tree.map(place, stacked)
    local = [shard.data.size for shard in placed.codes.addressable_shards]
    assert local == [placed.codes.size // 2] * 2
    layer = jax.tree.map(lambda x: x[1], placed)
    np.testing.assert_array_equal(jitted(layer, "float32"), expected[1])


def test_only_the_decoders_linears_are_quantised():
    _, params = build_model(ModelConfig(), {})
    chosen = {path for path in params if is_quantised(path)}
    attention = {f"llm.layers.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert chosen == attention | {f"llm.layers.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert not is_quantised("llm.layers.self_attn.q_proj.lora_a")


@pytest.mark.parametrize(
    ("weight", "kind", "message"),
    [
        (
            normal(4, 100),
            "nf4",
            r"nf4 needs a multiple of 64 inputs, but the weight \[4, 100\] has 100 inputs",
        ),
        (normal(4, 100), "nf4_double", "nf4_double needs a multiple of 64 inputs"),
        (normal(64), "nf4", r"expected a matrix.*float32 \[64\]"),
        (normal(2, 4, 64), "int8", r"expected a matrix.*float32 \[2, 4, 64\]"),
        (np.zeros((4, 64), np.int8), "int8", r"found int8 \[4, 64\]"),
        (np.zeros((4, 64), np.float64), "nf4", r"found float64 \[4, 64\]"),
        (np.full((4, 64), np.nan, np.float32), "nf4", "NaN"),
        (np.full((4, 64), np.inf, np.float16), "int8", "infinity"),
    ],
)
def test_what_cannot_be_quantised_is_refused(weight: np.ndarray, kind: Quantisation, message: str):
    with pytest.raises(QuantisationError, match=message):
        quantise(weight, kind)


def test_int8_takes_any_number_of_inputs():
    assert isinstance(quantise(normal(4, 100), "int8"), Int8Weight)

"""NF4 and int8 are bitsandbytes': the same codes, and values within a bfloat16 step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llava_jax.models.quant import (
    BLOCK,
    CHUNK,
    DYNAMIC,
    NF4,
    NestedAbsmax,
    Nf4Weight,
    dequantise,
    quantise,
)

pytestmark = pytest.mark.parity("quantisation", "bitsandbytes")

GOLDEN = Path(__file__).parent.parent / "nf4_bitsandbytes.npz"  # bitsandbytes 0.50.2
jitted = jax.jit(dequantise, static_argnums=1)


def steps_apart(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """How many bfloat16 numbers lie between, both rounded to these."""

    def place(x: np.ndarray) -> np.ndarray:
        bits = np.asarray(x).astype(jnp.bfloat16).view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return np.abs(place(ours) - place(theirs))


def packed_as_theirs(codes: np.ndarray) -> np.ndarray:
    """Our codes [in / 8, out], with two consecutive codes of a row in each byte."""
    pairs = (codes.T.reshape(-1, 1, 8) >> np.arange(0, 32, 4)[:, None] & 15).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def packed_as_ours(packed: np.ndarray, rows: int) -> np.ndarray:
    """Their codes of a matrix with `rows` rows in our order, [in / 8, out]."""
    codes = np.stack([packed.ravel() >> 4, packed.ravel() & 15], axis=1).astype(np.uint32)
    parts = codes.reshape(-1, 8, 8) << np.arange(0, 32, 4, np.uint32)[:, None]
    return np.bitwise_or.reduce(parts, axis=1).reshape(rows, -1).T


def nested_codes(absmax: NestedAbsmax, count: int) -> np.ndarray:
    """The codes of `count` absmaxes, one by one."""
    return (absmax.codes >> np.arange(0, 32, 8)[:, None, None] & 255).ravel()[:count]


def test_golden_nf4():
    golden = np.load(GOLDEN)
    ours = quantise(golden["weight"], "nf4")
    np.testing.assert_array_equal(NF4, golden["code"])
    np.testing.assert_array_equal(packed_as_theirs(ours.codes), golden["packed"].ravel())
    np.testing.assert_array_equal(ours.absmax.T.ravel(), golden["absmax"])
    np.testing.assert_array_equal(jitted(ours, "float32"), golden["dequantized"])


def test_golden_double():
    golden = np.load(GOLDEN)
    ours = quantise(golden["weight"], "nf4_double")
    np.testing.assert_array_equal(packed_as_theirs(ours.codes), golden["packed"].ravel())
    theirs = golden["double_quant_dequantized"]
    np.testing.assert_allclose(jitted(ours, "float32"), theirs, rtol=1e-6)
    assert steps_apart(jitted(ours, "bfloat16"), theirs).max() == 0


def with_zeros(rng: np.random.Generator) -> np.ndarray:
    weight = rng.normal(size=(8, 4 * BLOCK))
    weight[3], weight[5, BLOCK : 2 * BLOCK] = 0, -0.0
    return weight


def at_midpoints(rng: np.random.Generator) -> np.ndarray:
    weight = np.tile(rng.permutation(((NF4[:-1] + NF4[1:]) / 2).repeat(5))[:BLOCK], (4, 2))
    weight[:, ::BLOCK] = 1
    return weight


CASES = {
    "normal": lambda rng: rng.normal(0, 0.02, (128, 256)),
    "one_block": lambda rng: rng.normal(0, 0.02, (1, BLOCK)),
    "odd_rows": lambda rng: rng.normal(0, 0.02, (33, 3 * BLOCK)),
    "blocks_257": lambda rng: rng.normal(0, 0.02, (257, BLOCK)),
    "chunks": lambda rng: rng.normal(0, 0.02, (2 * CHUNK // 192 + 5, 192)),
    "outliers": lambda rng: rng.standard_t(2, (64, 128)),
    "zeros": with_zeros,
    "midpoints": at_midpoints,
    "large": lambda rng: rng.normal(0, 1e4, (16, 128)),
    "tiny": lambda rng: rng.normal(0, 1e-5, (16, 128)),
    "extremes": lambda rng: rng.normal(size=(16, 128)) * 10.0 ** rng.uniform(-30, 30, (16, 1)),
}
DTYPES = ("float32", "bfloat16", "float16")
VALUES = "values, in steps of bfloat16"
Pair = tuple[np.ndarray, torch.Tensor]


@pytest.fixture(scope="session")
def functional():
    return pytest.importorskip("bitsandbytes").functional


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, dtype: str) -> Pair:
    """One weight, for us and for them."""
    largest = float(jnp.finfo(dtype).max)
    weight = CASES[request.param](np.random.default_rng(0)).clip(-largest, largest)
    weight = weight.astype(jnp.dtype(dtype))
    return weight, torch.from_numpy(weight.astype(np.float32)).to(getattr(torch, dtype))


def test_nf4(pair: Pair, dtype: str, functional, assert_parity):
    weight, tensor = pair
    ours = quantise(weight, "nf4")
    packed, state = functional.quantize_4bit(tensor, blocksize=BLOCK, quant_type="nf4")
    np.testing.assert_array_equal(packed_as_theirs(ours.codes), packed.numpy().ravel())
    np.testing.assert_array_equal(ours.absmax.T.ravel(), state.absmax.numpy())
    theirs = functional.dequantize_4bit(packed, state).float().numpy()
    assert_parity(VALUES, steps_apart(jitted(ours, dtype), theirs).max(), 1, case=dtype)


def test_double_quantisation(pair: Pair, dtype: str, functional, assert_parity):
    """Against bitsandbytes' plain PyTorch kernel, which rounds to the nearest, as on a GPU."""
    weight, tensor = pair
    ours = quantise(weight, "nf4_double")
    packed, state = functional.quantize_4bit(tensor, blocksize=BLOCK, quant_type="nf4")
    np.testing.assert_array_equal(packed_as_theirs(ours.codes), packed.numpy().ravel())
    offset = torch.tensor(ours.absmax.offset)  # the mean of float32 depends on the order of sums
    np.testing.assert_allclose(offset, state.absmax.mean(), rtol=2e-7)
    codes, nested = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(
        torch._C.DispatchKey.CompositeExplicitAutograd,
        state.absmax - offset,
        functional.create_dynamic_map(),
        256,
    )
    largest = ours.absmax.absmax[: len(nested)]
    np.testing.assert_allclose(largest, nested, rtol=1e-6, atol=1e-38)  # their floor
    np.testing.assert_array_equal(nested_codes(ours.absmax, codes.numel()), codes)
    state.absmax = functional.dequantize_blockwise(
        codes, absmax=nested, code=functional.create_dynamic_map(), blocksize=256
    )
    state.absmax += offset
    theirs = functional.dequantize_4bit(packed, state).float().numpy()
    assert_parity(VALUES, steps_apart(jitted(ours, dtype), theirs).max(), 1, case=dtype)


def test_double_quantisation_on_a_cpu(pair: Pair, dtype: str, functional, assert_parity):
    """Its compiled CPU kernel seems to round to about 2^-15 first: so near are its codes."""
    weight, tensor = pair
    ours = quantise(weight, "nf4_double").absmax
    _, state = functional.quantize_4bit(
        tensor, blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    plain = quantise(weight, "nf4").absmax.T.ravel().astype(np.float64) - float(ours.offset)
    scale = np.repeat(ours.absmax, 256)[: plain.size]
    free = scale == 0  # where all absmaxes are the mean, any code will do, and it takes any
    apart = [
        np.abs(plain / np.where(free, 1, scale) - DYNAMIC[codes])[~free]
        for codes in (nested_codes(ours, plain.size), state.absmax.numpy())
    ]
    assert (apart[0] <= apart[1] + 1e-6).all()
    farther = (apart[1] - apart[0]).max(initial=0)
    assert_parity("how much farther their scales are, of the largest", farther, 2**-14, case=dtype)


def test_what_bitsandbytes_quantised_is_read(pair: Pair, dtype: str, functional, assert_parity):
    weight, tensor = pair
    packed, state = functional.quantize_4bit(
        tensor, blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    rows = len(weight)
    nested = state.state2.absmax.numpy()
    nested = np.pad(nested, (0, len(nested) % 2))
    codes = np.zeros(256 * len(nested), np.uint32)
    codes[: state.absmax.numel()] = state.absmax.numpy()
    codes = np.bitwise_or.reduce(
        codes.reshape(4, -1, 128) << np.arange(0, 32, 8, np.uint32)[:, None, None]
    )
    absmax = NestedAbsmax(codes, nested, state.offset.numpy())
    ours = Nf4Weight(packed_as_ours(packed.numpy(), rows), absmax)
    theirs = functional.dequantize_4bit(packed, state).float().numpy()
    assert_parity(VALUES, steps_apart(jitted(ours, dtype), theirs).max(), 1, case=dtype)


def test_dynamic_map(functional):
    np.testing.assert_allclose(DYNAMIC, functional.create_dynamic_map(), rtol=1.2e-7)


def test_int8(pair: Pair, dtype: str, functional, assert_parity):
    weight, tensor = pair
    ours = quantise(weight, "int8")
    codes, absmax, _ = functional.int8_vectorwise_quant(tensor)
    filled = absmax.numpy() > 0  # where a row is zeros bitsandbytes divides by zero
    np.testing.assert_array_equal(ours.codes[filled], codes.numpy()[filled])
    assert not ours.codes[~filled].any()
    theirs = functional.int8_vectorwise_dequant(codes, absmax).numpy()
    apart = steps_apart(jitted(ours, "float32")[filled], theirs[filled])
    assert_parity(VALUES, apart.max(), 1, case=dtype)

"""The count of a module's matrix products, against hand derivations and XLA's own count."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_training import CONFIG, MODEL, change

from llava_jax.config import Remat, TuneConfig
from llava_jax.jax_compat import bounded_loop
from llava_jax.planning.flops import matmul_flops
from llava_jax.planning.measure import measure_here
from llava_jax.planning.model_flops import full_row, model_flops

ROWS, WIDTH, LAYERS = 8, 16, 5
DOT = 2 * ROWS * WIDTH * WIDTH
X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
W = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)


def count(function: Callable, *args: Any) -> int:
    return matmul_flops(jax.jit(function).lower(*args).compile().as_text())


def layers(x: jax.Array, w: jax.Array, block: Callable = lambda x, w: jnp.sin(x @ w)) -> jax.Array:
    return jax.lax.scan(lambda x, w: (block(x, w), None), x, w)[0]


def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, x: layers(x @ x.T @ x, w), x)


def forwards(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(1, LAYERS, lambda i, x: jnp.sin(x @ w[i]), x)


def backwards(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, LAYERS, lambda i, x: jnp.sin(x @ w[LAYERS - 1 - i]), x)


def branches(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, lambda: layers(x, w), lambda: x @ w[0])


def gradient(x: jax.Array, w: jax.Array, wrap: Callable = lambda f: f) -> Any:
    block = wrap(lambda x, w: jnp.sin(x @ w))
    return jax.grad(lambda *args: jnp.sum(layers(*args, block)), argnums=(0, 1))(x, w)


PROGRAMS = {
    "product": (lambda x, w: x @ w[0], DOT),
    "batched": (lambda x, w: jnp.einsum("LIO,LJO->LIJ", w, w) + x[0, 0], 2 * LAYERS * WIDTH**3),
    "scan": (layers, LAYERS * DOT),
    "nested": (nested, 3 * (LAYERS * DOT + 2 * 2 * ROWS * ROWS * WIDTH)),
    "forwards": (forwards, (LAYERS - 1) * DOT),
    "backwards": (backwards, LAYERS * DOT),
    "branches": (branches, LAYERS * DOT),
    "gradient": (gradient, 3 * LAYERS * DOT),
    "remat": (functools.partial(gradient, wrap=jax.checkpoint), 4 * LAYERS * DOT),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_known_counts(name: str):
    function, expected = PROGRAMS[name]
    assert count(function, X, W) == expected


def test_a_loop_of_unknown_length_is_an_error_only_if_it_multiplies():
    grow = lambda f: lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9.0, lambda x: f(x, w), x)
    assert count(grow(lambda x, w: x + w[0, 0, 0]), X, W) == 0
    with pytest.raises(ValueError, match="unknown length"):
        count(grow(lambda x, w: x @ w[0]), X, W)


def test_a_loop_of_unknown_length_counts_as_long_as_it_is_said_to_be():
    def grow(x: jax.Array, turn: Callable) -> jax.Array:
        return jax.lax.while_loop(lambda x: x[0, 0] < 9.0, turn, x)

    def said(x: jax.Array, w: jax.Array) -> jax.Array:
        with bounded_loop(3):
            return grow(x, lambda x: x @ w[0])

    def half_said(x: jax.Array, w: jax.Array) -> jax.Array:
        with bounded_loop(3):
            return grow(x, lambda x: grow(x, lambda x: x @ w[0]))

    assert count(said, X, W) == 3 * DOT
    with pytest.raises(ValueError, match="unknown length"):
        count(half_said, X, W)


def test_no_module_is_an_error():
    with pytest.raises(ValueError, match="compiled module"):
        matmul_flops("")


@pytest.mark.parametrize(
    "window",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 3), "padding": ((3, 0), (1, 2)), "rhs_dilation": (2, 1)},
        {"window_strides": (4, 3), "padding": ((0, 1), (2, 2)), "lhs_dilation": (5, 4)},
        {"window_strides": (1, 2), "padding": "VALID", "feature_group_count": 3},
    ],
)
def test_convolutions_as_xla_counts_them(window: dict[str, Any]):
    groups = window.get("feature_group_count", 1)
    image, kernel = jnp.ones((2, 6, 9, 8)), jnp.ones((12, 6 // groups, 4, 3))
    convolve = functools.partial(jax.lax.conv_general_dilated, **window)
    compiled = jax.jit(convolve).lower(image, kernel).compile()
    text = compiled.as_text()
    assert " convolution(" in text
    assert matmul_flops(text) == compiled.cost_analysis()["flops"]


LIBRARY_CALLS = """HloModule step, is_scheduled=true

%body (p: (s32[], bf16[40,8])) -> (s32[], bf16[40,8]) {
  %p = (s32[], bf16[40,8]{1,0:T(8,128)}) parameter(0)
  %a = bf16[40,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %b = bf16[16,8]{1,0} constant({...})
  %q = bf16[2,5,4,8]{3,2,1,0} constant({...})
  %gemm = (bf16[40,16]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %fwd = (bf16[2,4,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "5", "7"]}}}
  %bwd = (bf16[2,4,5,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "5", "7"]}}}
  ROOT %out = (s32[], bf16[40,8]{1,0:T(8,128)}) tuple(%i, %a)
}

%condition (p.1: (s32[], bf16[40,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  %p.1 = (s32[], bf16[40,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (x: bf16[40,8]) -> (s32[], bf16[40,8]) {
  %x = bf16[40,8]{1,0} parameter(0)
  %start = (s32[], bf16[40,8]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], bf16[40,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""  # noqa: E501 - as compilers print them, shortened


def test_library_calls_of_gpus_and_loops_of_tpus():
    gemm, attention = 2 * 40 * 16 * 8, 2 * 2 * 4 * 5 * 7 * 8
    assert matmul_flops(LIBRARY_CALLS) == 6 * (gemm + 2 * attention + 5 * attention)
    with pytest.raises(ValueError, match=r"__cublas\$new"):
        matmul_flops(LIBRARY_CALLS.replace("__cublas$lt$matmul", "__cublas$new"))


def train_step_flops(tune: TuneConfig, remat: Remat) -> int:
    """Of the tiny step on one of eight devices, by hand."""
    llm, vision = MODEL.llm, MODEL.vision
    samples, length, images, rank = 2, 20, 2, CONFIG.lora.rank
    width, hidden, heads = llm.hidden_size, llm.intermediate_size, llm.num_attention_heads
    inner, keys = heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    linears = {
        "q": (width, inner),
        "k": (width, keys),
        "v": (width, keys),
        "o": (inner, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    weights = sum(a * b for a, b in linears.values())
    adapters = sum(rank * (a + b) for a, b in linears.values()) if tune.llm == "lora" else 0
    logits = 2 * length * inner  # QK and PV, for each token

    once = weights + adapters + logits
    backward = weights + 2 * adapters + (weights if tune.llm == "full" else 0)
    backward += 2 * logits
    if remat != "full":
        backward += length * inner  # QK is made again, as it is where the whole block is
    if remat == "dots":
        backward += length * inner  # and PV, for attention is none of the kept products
    # A block's result is not needed again: neither its last product nor its adapter's last.
    last_adapter = rank * width if adapters else 0
    again = once - hidden * width - last_adapter if remat == "full" else 0
    blocks = llm.num_hidden_layers * (once + backward + again)
    head = (3 if tune.llm == "full" else 2) * llm.vocab_size * width

    patches, tokens = vision.num_patches, vision.num_patches + 1
    size = vision.hidden_size
    attend = 2 * tokens * size
    tower = tokens * (4 * size**2 + 2 * size * vision.intermediate_size + attend)
    tower = MODEL.used_vision_layers * tower + patches * 3 * vision.patch_size**2 * size
    projector = patches * (3 * size * width + 3 * width**2)  # linear_1 forwards, again, backwards
    return 2 * samples * (length * (blocks + head) + images * (tower + projector))


@pytest.mark.parametrize(
    ("llm", "remat"),
    [
        ("lora", "full"),
        pytest.param("lora", "dots", marks=pytest.mark.slow),
        pytest.param("full", "dots", marks=pytest.mark.slow),
        pytest.param("full", "full", marks=pytest.mark.slow),
        pytest.param("lora", "none", marks=pytest.mark.slow),
        pytest.param("full", "none", marks=pytest.mark.slow),
    ],
)
def test_the_train_step(llm: Any, remat: Remat):
    tune = TuneConfig(llm, "frozen", "full")
    config = dataclasses.replace(
        change(CONFIG, memory={"remat": remat}, data={"max_length": 20}), tune=tune
    )
    usage = measure_here(config, MODEL, slots=2, capacity=2**30)
    assert usage.flops == train_step_flops(tune, remat)
    needed = 2 * model_flops(config, MODEL, full_row(config, slots=2))
    assert needed <= usage.flops <= 1.10 * needed


SPLASH_CALLS = """HloModule step, is_scheduled=true

ENTRY %main (b: s8[1,4,4], q: bf16[6,16,8], k: bf16[2,24,8]) -> bf16[6,16,8] {
  %b = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[6,16,8]{2,1,0:T(8,128)(2,1)} parameter(1)
  %k = bf16[2,24,8]{2,1,0:T(8,128)(2,1)} parameter(2)
  %splash_mha_fwd_segmented_no_residuals.2 = (f32[16,128]{1,0}, bf16[6,16,8]{2,1,0}) custom-call(%b, %b, %q, %k, %k, /*index=5*/%b), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  %splash_mha_dkv_segmented_no_residuals.1 = (f32[24,8]{1,0}, bf16[2,24,8]{2,1,0}) custom-call(%b, %b, %q, %k, %k, /*index=5*/%b), custom_call_target="tpu_custom_call"
  %splash_mha_dq_segmented_no_residuals.1 = (f32[16,8]{1,0}, bf16[6,16,8]{2,1,0}) custom-call(%b, %b, %q, %k, %k, /*index=5*/%b), custom_call_target="tpu_custom_call"
  ROOT %out = bf16[6,16,8]{2,1,0} get-tuple-element(%splash_mha_fwd_segmented_no_residuals.2), index=1
}
"""  # noqa: E501


FLASH_CALLS = """HloModule step, is_scheduled=true

ENTRY %main (q: bf16[3,16,2,4,8], k: bf16[3,16,2,8], s: s32[3,16]) -> bf16[3,16,2,4,8] {
  %q = bf16[3,16,2,4,8]{4,3,2,1,0} parameter(0)
  %k = bf16[3,16,2,8]{3,2,1,0} parameter(1)
  %s = s32[3,16]{1,0} parameter(2)
  %pallas_call.1 = (bf16[3,16,2,4,8]{4,3,2,1,0}, f32[3,2,4,16]{3,2,1,0}) custom-call(%q, %k, %k, %s, %s), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/jvp()/flash_forward/pallas_call"}, backend_config={grid_x = 32 : i32}
  %pallas_call.2 = (bf16[3,16,2,8]{3,2,1,0}, bf16[3,16,2,8]{3,2,1,0}) custom-call(%q, %k, %k, %s, %s, /*index=5*/%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/transpose(jvp())/flash_keys/pallas_call"}, backend_config={grid_x = 32 : i32}
  ROOT %pallas_call.3 = bf16[3,16,2,4,8]{4,3,2,1,0} custom-call(%q, %k, %k, %s, %s, /*index=5*/%q), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/transpose(jvp())/flash_queries/pallas_call"}, backend_config={grid_x = 32 : i32}
}
"""  # noqa: E501


def test_flash_attention_of_gpus():
    assert matmul_flops(FLASH_CALLS) == (2 + 4 + 3) * 2 * 3 * (2 * 4) * 16 * 16 * 8
    with pytest.raises(ValueError, match=r"xla\.gpu\.triton"):
        matmul_flops(FLASH_CALLS.replace("flash_keys", "another"))


def test_splash_attention_of_tpus():
    assert matmul_flops(SPLASH_CALLS) == (2 + 4 + 3) * 2 * 6 * 16 * 24 * 8
    with pytest.raises(ValueError, match="tpu_custom_call"):
        matmul_flops(SPLASH_CALLS.replace("splash_mha_dq", "another"))

"""The checks of `llava-jax gpu-check`: gradients, attention kernels and planned memory."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import (
    LLAVA_7B,
    AttentionImplementation,
    BatchConfig,
    DataConfig,
    LlmConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.data.batch import Batch
from llava_jax.data.images import ImageTransform
from llava_jax.distributed.environment import GIB, RESERVE_SHARE
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.attention import ATTENTION
from llava_jax.models.build import initialise
from llava_jax.planning import search
from llava_jax.planning.measure import attention_here, compile_here
from llava_jax.train_step.program import build_program
from llava_jax.train_step.step import init_state, placed_zeros

COMMAND = (sys.executable, "-m", "llava_jax", "gpu-check")
STEPS = 2  # the second starts from what the first left, in its place
LENGTH = 1024  # tokens of a sample whose step is measured
MAX_ERROR = 0.05  # of a planned peak
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest difference of one array, relative to its norm: some roundings of TF32 (2^-11) and of
bfloat16 (2^-9) fall otherwise where XLA fuses otherwise. A wrong layer's weights give about 1."""

KERNELS: dict[AttentionImplementation, tuple] = {
    "cudnn": ((700,), (LENGTH,)),
    "flash": ((700,), (3, 500, LENGTH - 503)),
}
"""What is checked, on rows of segments of these lengths."""

RESIDENT = MemoryConfig()
HOSTED = MemoryConfig(offload_optimizer=True, stream_weights=True, offload_activations=True)
INPUTS_HOSTED = MemoryConfig(offload_activations=True)

# The smallest whose layers may all lie in host memory, see `distributed.host_memory.MIN_SLICE`.
SMALL = ModelConfig(
    VisionConfig(56, 14, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                 num_attention_heads=4),
    LlmConfig(512, hidden_size=256, intermediate_size=512, num_hidden_layers=6,
              num_attention_heads=4, num_key_value_heads=4, head_dim=64),
    image_token_id=500,
    pad_token_id=501,
)  # fmt: skip
LLAVA_1B = dataclasses.replace(
    LLAVA_7B,
    llm=LlmConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16,
                  num_attention_heads=16, num_key_value_heads=16),
)  # fmt: skip
FULL = TrainConfig("full", tune=TuneConfig("full", "frozen", "full"))
LORA = TrainConfig("LoRA", tune=TuneConfig("lora", "frozen", "full"))
QLORA = dataclasses.replace(LORA, name="QLoRA", quantize="nf4_double")
RECIPES = (FULL, LORA, QLORA)
MEASURED = {"1B full": (LLAVA_1B, FULL), "7B LoRA": (LLAVA_7B, LORA), "7B QLoRA": (LLAVA_7B, QLORA)}


def check_all(*, small: bool) -> bool:
    """Whether all is well; without the peaks where it is `small`."""
    well = [check_gradients(recipe, dtype) for recipe in RECIPES for dtype in TOLERANCE]
    well += [check_gradients(LORA, dtype, INPUTS_HOSTED) for dtype in TOLERANCE]
    if jax.default_backend() == "cpu":
        print("attention by kernels: not checked")
    else:
        well += [check_attention(kind, rows) for kind, rows in KERNELS.items()]
    if jax.default_backend() == "cpu" or small:
        print("peaks of memory: not measured")
    else:
        well += check_peaks()
    return all(well)


def check_gradients(recipe: TrainConfig, dtype: Any, hosted: MemoryConfig = HOSTED) -> bool:
    """Whether moments and parameters after a step agree, in host memory or out of it."""
    config = dataclasses.replace(
        recipe,
        lora=LoraConfig(rank=16),
        batch=BatchConfig(global_size=4, micro_size=2),
        optimizer=OptimizerConfig(schedule="constant", warmup_ratio=0.0),
        dtype=dtype,
    )
    there, here = (state_after_a_step(config, memory) for memory in (hosted, RESIDENT))
    differences = {path: difference(there[path], here[path]) for path in here}
    path, worst = max(differences.items(), key=lambda item: item[1])
    passed = worst <= TOLERANCE[dtype]
    shown = f"at most {worst:.1e}, in {path}" if worst else "none, bit for bit"
    print(f"gradients, {recipe.name}, {dtype}: {'pass' if passed else 'FAIL'}; difference {shown}")
    return passed


def check_attention(kind: AttentionImplementation, rows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether a kernel and attention written out agree in results and gradients, where there are
    tokens; `rows` are the lengths of each row's segments.
    """
    rng = np.random.default_rng(0)
    shapes = [(len(rows), LENGTH, heads, 128) for heads in (4, 2, 2, 4)]
    *qkv, grad = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    filled = [np.repeat(np.arange(len(row)) + 1, row) for row in rows]
    ids = jnp.asarray([np.pad(row, (0, LENGTH - len(row))) for row in filled], jnp.int32)
    grad = jnp.where(ids[:, :, None] > 0, grad.reshape(len(rows), LENGTH, -1), 0)

    def results(attend: Any, dtype: Any) -> list[jax.Array]:
        wide = [x.astype(dtype) for x in qkv]
        out, pull = jax.vjp(lambda *args: attend(*args, ids), *wide)
        return [jnp.where(ids[:, :, None] > 0, out, 0), *pull(grad.astype(dtype))]

    found, expected = results(ATTENTION[kind], jnp.bfloat16), results(ATTENTION["plain"], "float32")
    worst = max(
        difference(np.asarray(x, np.float32), np.asarray(y))
        for x, y in zip(found, expected, strict=True)
    )
    passed = worst <= TOLERANCE["bfloat16"]
    print(f"attention, {kind}: {'pass' if passed else 'FAIL'}; difference at most {worst:.1e}")
    return passed


def state_after_a_step(config: TrainConfig, memory: MemoryConfig) -> dict[str, np.ndarray]:
    """Parameters, and moments: after the first step these are multiples of the gradients."""
    config = dataclasses.replace(config, memory=memory)
    device = jax.devices()[0]
    implementation = attention_here(config, SMALL)
    program = build_program(
        config, SMALL, STEPS, make_mesh(config.mesh, [device]), implementation=implementation
    )
    params = initialise(program.abstract, config.seed)
    trainable = {path: params.pop(path) for path in program.trainable}
    state = init_state(program.state, trainable, config.seed)
    with jax.set_mesh(program.mesh):
        state, _ = program.train_step(state, params, program.device_put(make_batch(4, 64)))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def make_batch(size: int, length: int) -> Batch:
    """Samples of an image and random words, of which the second half is learned; some padding."""
    rng, image = np.random.default_rng(0), (SMALL.vision.image_size,) * 2
    input_ids = rng.integers(3, SMALL.image_token_id, (size, length), np.int32)
    input_ids[:, 1 : 1 + SMALL.image_tokens] = SMALL.image_token_id
    loss_mask = np.broadcast_to(np.arange(length) >= length // 2, (size, length))
    pixels = rng.integers(0, 256, (size, 1, 3, *image), np.uint8)
    scale = np.tile(np.array(ImageTransform().scale, np.float32), (size, 1, 1))
    is_real = np.arange(length) < length - np.arange(size)[:, None]
    segment_ids = np.where(is_real, 1 + np.arange(size, dtype=np.int32)[:, None], 0)
    return Batch(input_ids, loss_mask & is_real, segment_ids, pixels, scale)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Relative to the norm of `other`; infinite where something is not finite."""
    apart = np.linalg.norm(one - other)
    relative = apart / max(np.linalg.norm(other), np.finfo(np.float32).tiny)
    return float(relative) if np.isfinite(relative) else np.inf


def check_peaks() -> list[bool]:
    """Whether each plan takes what was planned. A peak is never reset: a process for each."""
    well = []
    print(f"{'run':8} {'planned':>11} {'measured':>12} {'error':>7}  plan")
    for name in MEASURED:
        for level in range(len(list(search.levels(RESIDENT)))):
            child = subprocess.run(
                [*COMMAND, "--measure", name, str(level)],
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"},
                stdout=subprocess.PIPE,
                text=True,
            )
            line, passed = judge(child.stdout if child.returncode == 0 else "")
            print(f"{name:8} {line}", flush=True)
            well.append(passed)
    return well


def judge(output: str) -> tuple[str, bool]:
    """A line of the table, and whether the plan may be believed."""
    if not output:
        return "FAIL: stopped, see above", False
    found = json.loads(output.splitlines()[-1])
    planned, measured = found["planned"], found["measured"]
    if measured is None:
        return f"{planned / GIB:7.2f} GiB  does not fit, not run   {found['plan']}", True
    error = measured / planned - 1
    passed = abs(error) <= MAX_ERROR
    line = f"{planned / GIB:7.2f} GiB {measured / GIB:8.2f} GiB {error:+7.1%}  {found['plan']}"
    return line if passed else f"{line}: FAIL", passed


def measure_peak(name: str, level: int) -> dict[str, Any]:
    """Compiles a plan and, if it fits, runs it; bytes planned and bytes taken."""
    model, recipe = MEASURED[name]
    config = dataclasses.replace(
        recipe,
        data=DataConfig(max_length=LENGTH),
        batch=BatchConfig(global_size=2 * jax.device_count()),
    )
    chosen = search.Plan(1, list(search.levels(RESIDENT))[level])
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 64 * GIB)
    config = chosen.apply(config)
    program, step, usage = compile_here(config, model, 1, int(limit / (1 - RESERVE_SHARE)))
    found = {"plan": str(chosen), "planned": usage.total, "measured": None}
    if usage.fits:
        batch = program.abstract_batch(config.batch.global_size, LENGTH, 1)
        frozen = {path: program.abstract[path] for path in program.frozen}
        state, frozen, batch = placed_zeros((program.state, frozen, batch))
        for _ in range(STEPS):
            state, _ = jax.block_until_ready(step(state, frozen, batch))
        found["measured"] = peak_bytes()
    return found


def peak_bytes() -> int:
    """Most bytes that were ever in use on the first device."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

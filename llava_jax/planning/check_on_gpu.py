"""Checks gradients, attention kernels and planned memory on a GPU (`llava-jax gpu-check`)."""

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
from llava_jax.distributed.environment import GIB, POOL_SHARE
from llava_jax.distributed.sharding import make_mesh
from llava_jax.jax_compat import PREALLOCATE
from llava_jax.models.attention import ATTENTION
from llava_jax.models.build import initialise
from llava_jax.planning import search
from llava_jax.planning.measure import attention_here, compile_here
from llava_jax.train_step.program import build_program
from llava_jax.train_step.step import init_state, placed_zeros

COMMAND = (sys.executable, "-m", "llava_jax", "gpu-check")
STEPS = 2  # the first step overwrites its input state, and the second step starts from the result
LENGTH = 1024  # number of tokens in a row, in measured steps and in the checks of attention
MAX_ERROR = 0.05  # largest allowed difference from the planned peak, relative to the planned peak
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest allowed difference between two arrays, relative to the norm of the expected array.

XLA fuses the compared programs differently, which changes some roundings of TF32 (2^-11) and of
bfloat16 (2^-9). The weights of a wrong layer give a difference of about 1.
"""

KERNELS: dict[AttentionImplementation, tuple] = {
    "cudnn": ((700,), (LENGTH,)),
    "flash": ((700,), (3, 500, LENGTH - 503)),
}
"""Attention kernels to check, each with a batch: for every row, the lengths of its segments."""

RESIDENT = MemoryConfig()
HOSTED = MemoryConfig(offload_optimizer=True, stream_weights=True, offload_activations=True)
INPUTS_HOSTED = MemoryConfig(offload_activations=True)

# The smallest model whose layers are all large enough to be kept in host memory; see
# `distributed.host_memory.MIN_SLICE`.
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
    """Runs all checks, prints their results, and returns True if all of them pass.

    On a CPU, only the gradients are checked.

    Args:
        small: Whether to skip the check of the planned memory.
    """
    well = [check_gradients(recipe, dtype) for recipe in RECIPES for dtype in TOLERANCE]
    well += [check_gradients(LORA, dtype, INPUTS_HOSTED) for dtype in TOLERANCE]
    if jax.default_backend() == "cpu":
        print("attention kernels: not checked")
    else:
        well += [check_attention(kind, rows) for kind, rows in KERNELS.items()]
    if jax.default_backend() == "cpu" or small:
        print("peak memory: not measured")
    else:
        well += check_peaks()
    return all(well)


def check_gradients(recipe: TrainConfig, dtype: Any, hosted: MemoryConfig = HOSTED) -> bool:
    """Checks that keeping arrays in host memory does not change the state after one train step.

    Args:
        recipe: Recipe to train with.
        dtype: Dtype of the computation, "float32" or "bfloat16".
        hosted: Plan that keeps arrays in host memory; it is compared with a plan that keeps all
            arrays on the device.

    Returns:
        True if no array of the train state differs by more than `TOLERANCE[dtype]`.
    """
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
    shown = f"difference at most {worst:.1e}, in {path}" if worst else "no difference, bit for bit"
    print(f"gradients, {recipe.name}, {dtype}: {'pass' if passed else 'FAIL'}; {shown}")
    return passed


def check_attention(kind: AttentionImplementation, rows: tuple[tuple[int, ...], ...]) -> bool:
    """Checks results and gradients of a bfloat16 attention kernel against plain attention.

    Plain attention is computed in float32. Positions of padding are not compared.

    Args:
        kind: Kernel to check.
        rows: Lengths of the segments of each row. Each row is padded to `LENGTH` tokens.

    Returns:
        True if no array differs by more than `TOLERANCE["bfloat16"]`.
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
    """Trains the model `SMALL` for one step, and returns its train state in float64, by path.

    The state contains the optimizer's first moments, which are then multiples of the gradients.

    Args:
        config: Config of the run.
        memory: Plan to use instead of `config.memory`.
    """
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
    """Makes a batch for the model `SMALL`: one random image and random tokens in each sample.

    The tokens in the second half of a sample have a loss. Sample i ends with i tokens of padding.

    Args:
        size: Number of samples.
        length: Number of tokens per sample, with image tokens and padding.
    """
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
    """Returns |one - other| / |other| with Euclidean norms; infinity if a value is not finite."""
    apart = np.linalg.norm(one - other)
    relative = apart / max(np.linalg.norm(other), np.finfo(np.float32).tiny)
    return float(relative) if np.isfinite(relative) else np.inf


def check_peaks() -> list[bool]:
    """Compares the planned and the measured peak memory of each plan of each run in `MEASURED`.

    Every plan is measured in its own process, because a device never resets its peak.

    Returns:
        For each plan, True if the measured peak is as planned, or if the plan does not fit into
        device memory.
    """
    well = []
    print(f"{'run':8} {'planned':>11} {'measured':>12} {'error':>7}  plan")
    for name in MEASURED:
        for level in range(len(list(search.levels(RESIDENT)))):
            child = subprocess.run(
                [*COMMAND, "--measure", name, str(level)],
                env={**os.environ, PREALLOCATE: "true"},
                stdout=subprocess.PIPE,
                text=True,
            )
            line, passed = judge(child.stdout if child.returncode == 0 else "")
            print(f"{name:8} {line}", flush=True)
            well.append(passed)
    return well


def judge(output: str) -> tuple[str, bool]:
    """Returns a line for the table of peaks, and True if the check of the plan passes.

    Args:
        output: Standard output of the measuring process, whose last line is the result of
            `measure_peak` as JSON; empty if the process failed.
    """
    if not output:
        return "FAIL: the measuring process failed; its error is printed above", False
    found = json.loads(output.splitlines()[-1])
    planned, measured = found["planned"], found["measured"]
    if measured is None:
        return f"{planned / GIB:7.2f} GiB  does not fit, not run   {found['plan']}", True
    error = measured / planned - 1
    passed = abs(error) <= MAX_ERROR
    line = f"{planned / GIB:7.2f} GiB {measured / GIB:8.2f} GiB {error:+7.1%}  {found['plan']}"
    return line if passed else f"{line}: FAIL", passed


def measure_peak(name: str, level: int) -> dict[str, Any]:
    """Compiles the train step of a run with one plan and, if the plan fits, runs the step.

    Args:
        name: Key of the run in `MEASURED`.
        level: Index of the plan among `search.levels`.

    Returns:
        Dict with the plan as text ("plan"), the planned peak memory in bytes ("planned") and the
        measured peak memory in bytes ("measured"), which is None if the plan does not fit.
    """
    model, recipe = MEASURED[name]
    config = dataclasses.replace(
        recipe,
        data=DataConfig(max_length=LENGTH),
        batch=BatchConfig(global_size=2 * jax.device_count()),
    )
    chosen = search.Plan(1, list(search.levels(RESIDENT))[level])
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 64 * GIB)
    config = chosen.apply(config)
    program, step, usage = compile_here(config, model, 1, int(limit / POOL_SHARE))
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
    """Returns the peak memory of the first device since this process started, in bytes."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]

"""Checks the results of train steps, evaluation steps and attention kernels on the device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llava_jax.config import (
    AttentionImplementation,
    BatchConfig,
    LoraConfig,
    MemoryConfig,
    TrainConfig,
)
from llava_jax.distributed.sharding import make_mesh
from llava_jax.gpu_check.cases import RESIDENT, SMALL, SMALL_TEXT, batch_of, sizes_here
from llava_jax.gpu_check.results import Figure
from llava_jax.models.attention import ATTENTION
from llava_jax.models.build import initialise
from llava_jax.models.layers import Params
from llava_jax.planning.compile import attention_here
from llava_jax.speed.case import Case
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import init_state

TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest allowed difference between two arrays, relative to the norm of the expected array.

XLA fuses the compared programs differently, which changes some roundings of TF32 (2^-11) and of
bfloat16 (2^-9). The weights of a wrong layer give a difference of about 1.
"""

SEGMENTS = {"cudnn": ((0.7,), (1.0,)), "flash": ((0.7,), (0.003, 0.5, 0.497))}
"""Rows to check, each with the lengths of its segments as fractions of the row. Kernels that are
not in the dict are checked with both batches. cuDNN allows one segment per row."""


def gradients() -> Iterator[Figure]:
    """Checks that keeping arrays in host memory does not change the state after one train step.

    XLA:GPU may compute wrong gradients without an error (openxla/xla #46231).
    """
    for recipe, dtype, memory in sizes_here().compared:
        config = small_config(recipe, dtype)
        here = state_after_a_step(config, RESIDENT)
        there = state_after_a_step(config, memory)
        yield compared(f"{recipe.name}, {dtype}, {describe(memory)}", there, here, dtype)


def evaluation() -> Iterator[Figure]:
    """Checks that keeping arrays in host memory does not change the losses of the eval step."""
    for recipe, dtype, memory in sizes_here().evaluated:
        config = small_config(recipe, dtype)
        there, here = (eval_losses(config, x) for x in (memory, RESIDENT))
        yield compared(f"{recipe.name}, {dtype}, {describe(memory)}", there, here, dtype)


def small_config(recipe: TrainConfig, dtype: str) -> TrainConfig:
    """Returns the config of a run of the model `SMALL` with two micro-batches per step."""
    return dataclasses.replace(
        recipe, lora=LoraConfig(rank=16), batch=BatchConfig(4, 2), dtype=dtype
    )


def describe(memory: MemoryConfig) -> str:
    """Returns the names of the fields of a plan that move arrays to host memory."""
    moved = ("offload_optimizer", "stream_weights", "offload_activations")
    return " + ".join(name for name in moved if getattr(memory, name))


def state_after_a_step(config: TrainConfig, memory: MemoryConfig) -> dict[str, np.ndarray]:
    """Trains the model `SMALL` for one step, and returns its train state in float64, by path.

    The state contains the optimizer's first moments, which are then multiples of the gradients.

    Args:
        config: Config of the run.
        memory: Plan to use instead of `config.memory`.
    """
    program, trainable, frozen = _start(config, memory)
    state = init_state(program.state, trainable, config.seed)
    batch = program.device_put(batch_of(Case(config, SMALL, SMALL_TEXT)))
    with jax.set_mesh(program.mesh):
        state, _ = program.train_step(state, frozen, batch)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def eval_losses(config: TrainConfig, memory: MemoryConfig) -> dict[str, np.ndarray]:
    """Returns the losses of the model `SMALL` from the eval step; see `state_after_a_step`."""
    program, trainable, frozen = _start(config, memory)
    batch = program.device_put(batch_of(Case(config, SMALL, SMALL_TEXT)), to_train=False)
    with jax.set_mesh(program.mesh):
        result = program.eval_step(trainable, frozen, batch)
    return {"nll": np.asarray(result.nll, np.float64)}


def _start(config: TrainConfig, memory: MemoryConfig) -> tuple[Program, Params, Params]:
    """Returns the program of a run of the model `SMALL`, and its trainable and frozen weights."""
    config = dataclasses.replace(config, memory=memory)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    implementation = attention_here(config, SMALL)
    program = build_program(config, SMALL, 1, mesh, implementation=implementation)
    params = initialise(program.abstract, config.seed)
    trainable = {path: params.pop(path) for path in program.trainable}
    return program, trainable, params


def compared(
    name: str, found: dict[str, np.ndarray], expected: dict[str, np.ndarray], dtype: str
) -> Figure:
    """Returns a figure with the largest difference between arrays of the same path."""
    differences = {path: difference(found[path], expected[path]) for path in expected}
    path, worst = max(differences.items(), key=lambda item: item[1])
    most = TOLERANCE[dtype]
    where = f"{name}; largest in {path}" if worst else f"{name}; bit for bit"
    return Figure(where, worst, "relative", f"at most {most:g}", worst <= most)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Returns |one - other| / |other| with Euclidean norms; infinity if a value is not finite."""
    apart = np.linalg.norm(one - other)
    relative = apart / max(np.linalg.norm(other), np.finfo(np.float32).tiny)
    return float(relative) if np.isfinite(relative) else float("inf")


def attention() -> Iterator[Figure]:
    """Checks results and gradients of attention against attention that is written out in float32.

    Positions of padding are not compared.
    """
    sizes = sizes_here()
    for name in sizes.kernels:
        yield check_attention(cast("AttentionImplementation", name), sizes.tokens)


def check_attention(kind: AttentionImplementation, tokens: int) -> Figure:
    """Returns a figure with the largest difference of a kernel from `written_out`, in bfloat16.

    Args:
        kind: Kernel to check.
        tokens: Number of tokens per row.
    """
    rows = SEGMENTS.get(kind, (*SEGMENTS["cudnn"], *SEGMENTS["flash"]))
    rng = np.random.default_rng(0)
    shapes = [(len(rows), tokens, heads, 128) for heads in (4, 2, 2, 4)]
    *qkv, grad = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    ids = np.zeros((len(rows), tokens), np.int32)
    for row, fractions in zip(ids, rows, strict=True):
        ends = np.rint(np.cumsum(fractions) * tokens).astype(int)
        for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            row[start:end] = number + 1
    filled = ids[:, :, None] > 0
    grad = jnp.where(filled, grad.reshape(len(rows), tokens, -1), 0)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def results(
        attend: Callable[..., jax.Array], dtype: str, ids: jax.Array, grad: jax.Array, *qkv: Array
    ) -> list[jax.Array]:
        wide = [x.astype(dtype) for x in qkv]
        out, pull = jax.vjp(lambda *args: attend(*args, ids), *wide)
        return [jnp.where(filled, out, 0), *pull(grad.astype(dtype))]

    found = results(ATTENTION[kind], "bfloat16", jnp.asarray(ids), grad, *qkv)
    # On the CPU, float32 is never replaced by TF32, and no time is spent on tuning kernels.
    inputs = jax.device_put((jnp.asarray(ids), grad, *qkv), jax.local_devices(backend="cpu")[0])
    expected = results(written_out, "float32", *inputs)
    worst = max(
        difference(np.asarray(x, np.float32), np.asarray(y))
        for x, y in zip(found, expected, strict=True)
    )
    most = TOLERANCE["bfloat16"]
    name = f"{kind}, bfloat16, {tokens} tokens"
    return Figure(name, worst, "relative", f"at most {most:g}", worst <= most)


def written_out(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """Computes causal attention within segments, with all logits in memory."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    sees = jnp.tril(same)[:, None]
    shares = jax.nn.softmax(jnp.where(sees, logits, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", shares, v).reshape(*q.shape[:2], -1)

"""What `size_check.py` measures."""

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from llava_jax import LlavaModel
from llava_jax.config import LLAVA_7B, BatchConfig, MeshConfig, ModelConfig, TrainConfig, TuneConfig
from llava_jax.data.batch import Batch
from llava_jax.data.images import ImageTransform
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models import paths
from llava_jax.models.build import build_model
from llava_jax.pretrained import layouts
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.model_config import read_model_config, write_model_config
from llava_jax.pretrained.safetensors import Specs, open_tensors, write_sharded
from llava_jax.train_step.program import build_program
from llava_jax.train_step.step import init_state

COMMAND = Path(__file__).with_name("size_check.py")
WORDS = 64
ABOVE_WEIGHTS = 3 * GIB  # what an import may take beside them
MACHINE = 24 * 10**9  # what a step may take
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NORMAL = np.random.default_rng(0).standard_normal(1_000_003, np.float32)  # a prime: rows differ


def check_all(directory: Path, layers: int) -> bool:
    """Whether all is within its limit; first writes a checkpoint where there is none."""
    if not (directory / "config.json").is_file():
        llm = dataclasses.replace(LLAVA_7B.llm, num_hidden_layers=layers)
        start = time.perf_counter()
        write_checkpoint(directory, dataclasses.replace(LLAVA_7B, llm=llm))
        print(f"wrote {directory} in {time.perf_counter() - start:.0f} s", flush=True)
    weights = sum(tensor.size for tensor in open_tensors(directory).values())
    limits = {"import": weights + ABOVE_WEIGHTS, "LoRA step": MACHINE}
    passed = [measure(directory, what, weights, limit) for what, limit in limits.items()]
    return all(passed)


def measure_here(directory: Path, what: str) -> dict[str, float]:
    """What `measure` asks of a new process."""
    found = MEASURES[what](directory)
    return {"peak GiB": peak_bytes() / GIB} | found


def write_checkpoint(directory: Path, model: ModelConfig) -> None:
    """Layout A in bfloat16, of values as large as an initialisation's; a tensor at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    specs: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for path, leaf in build_model(model, {})[1].items():
        if paths.is_stacked(path):
            for layer in range(leaf.shape[0]):
                name = layouts.HF_4_36.file_name(paths.unstacked(path, layer, model))
                specs[name] = leaf.shape[1:], BFLOAT16
        else:
            specs[layouts.HF_4_36.file_name(path)] = leaf.shape, BFLOAT16
    write_sharded(directory, specs, lambda name: random_values(name, specs))
    write_model_config(model, directory)  # last: who sees it finds the weights whole


def random_values(name: str, specs: Specs) -> np.ndarray:
    shape, dtype = specs[name]
    if name.endswith(".bias"):
        return np.zeros(shape, dtype)
    if "norm" in name.rsplit(".", 2)[-2]:
        return np.ones(shape, dtype)
    scale = 0.02 if "embed" in name else math.prod(shape[1:] or shape) ** -0.5
    return np.resize((scale * NORMAL).astype(dtype), shape)


def measure(directory: Path, what: str, weights: int, limit: int) -> bool:
    """Measures in a new process, which has had no other peak; whether that is within the limit."""
    command = [sys.executable, COMMAND, str(directory), "--measure", what]
    child = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        print(f"{what}: FAIL: stopped with {child.returncode}, see above")
        return False
    found = json.loads(child.stdout.splitlines()[-1])
    passed = found["peak GiB"] <= limit / GIB
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    print(f"{what}: {'pass' if passed else 'FAIL'}; {numbers}", flush=True)
    if file := os.environ.get("PARITY_ROWS"):  # set by tools/parity_report.py
        row = {"group": "sizes", "what": what, "case": f"{weights / GIB:.1f} GiB of bfloat16"}
        limits = {"peak GiB": limit / GIB}
        with open(file, "a") as lines:
            for name, value in found.items():
                numbers = {"measured": name, "largest": value, "limit": limits.get(name)}
                lines.write(json.dumps(row | {"against": ""} | numbers) + "\n")
    return passed


def measure_import(directory: Path) -> dict[str, float]:
    start = time.perf_counter()
    _ = LlavaModel.from_pretrained(directory, dtype="bfloat16")
    return {"seconds": time.perf_counter() - start}


def measure_step(directory: Path) -> dict[str, float]:
    """One step as `train.py` makes it, with all of the model in place."""
    config = TrainConfig(
        "size", tune=TuneConfig("lora", "frozen", "full"), batch=BatchConfig(global_size=1)
    )
    model = read_model_config(directory)
    program = build_program(config, model, 1, make_mesh(MeshConfig(), jax.devices()[:1]))
    params = load_weights(directory, model, program.abstract, seed=0)
    trainable = {path: params.pop(path) for path in program.trainable}
    state = init_state(program.state, trainable, seed=0)
    batch = program.device_put(make_batch(model))
    start = time.perf_counter()
    with jax.set_mesh(program.mesh):
        step = program.train_step.lower(state, params, batch).compile()
    compiled = time.perf_counter()
    _, metrics = jax.block_until_ready(step(state, params, batch))
    seconds = time.perf_counter() - compiled
    loss = metrics["loss"].item()
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    return {"seconds": seconds, "seconds to compile": compiled - start, "loss": loss}


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "import": measure_import,
    "LoRA step": measure_step,
}


def make_batch(model: ModelConfig) -> Batch:
    """An image and words, all of which are learned."""
    rng = np.random.default_rng(0)
    words = rng.integers(3, model.image_token_id, WORDS, np.int32)
    image = np.full(model.image_tokens, model.image_token_id, np.int32)
    ids = np.concatenate([words[:1], image, words[1:]])[None]
    side = model.vision.image_size
    return Batch(
        input_ids=ids,
        loss_mask=ids != model.image_token_id,
        segment_ids=np.ones_like(ids),
        pixel_values=rng.integers(0, 256, (1, 1, 3, side, side), np.uint8),
        pixel_scale=np.array([ImageTransform().scale], np.float32),
    )


def peak_bytes() -> int:
    """Most memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

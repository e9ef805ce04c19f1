"""Makes the measurements of `tools/size_check.py`."""

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
import numpy as np

from llava_jax import LlavaModel
from llava_jax.config import LLAVA_7B, BatchConfig, MeshConfig, ModelConfig, TrainConfig, TuneConfig
from llava_jax.data.batch import Batch
from llava_jax.data.images import ImageTransform
from llava_jax.data.tiles import index_whole_images
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.sharding import make_mesh
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.model_config import read_model_config
from llava_jax.pretrained.safetensors import open_tensors
from llava_jax.speed.random_checkpoint import write_checkpoint
from llava_jax.train_step.program import build_program
from llava_jax.train_step.step import init_state

COMMAND = Path(__file__).parent.parent / "size_check.py"
WORDS = 64
ABOVE_WEIGHTS = 3 * GIB  # bytes that loading a checkpoint may need in addition to the weights
MACHINE = 24 * 10**9  # bytes that a train step may need


def check_all(directory: Path, layers: int) -> bool:
    """Makes all measurements, prints them and returns True if all peaks are below their limits.

    Args:
        directory: Directory of the checkpoint, which is written if there is no checkpoint.
        layers: Number of decoder layers of a new checkpoint.
    """
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
    """Makes a measurement in this process and returns its results by name.

    Args:
        directory: Directory of the checkpoint.
        what: Name of the measurement in `MEASURES`.
    """
    found = MEASURES[what](directory)
    return {"peak GiB": peak_bytes() / GIB} | found


def measure(directory: Path, what: str, weights: int, limit: int) -> bool:
    """Makes a measurement in a new process, so that earlier work does not raise its peak memory.

    Args:
        directory: Directory of the checkpoint.
        what: Name of the measurement in `MEASURES`.
        weights: Size of the checkpoint's weights in bytes.
        limit: Largest allowed peak memory in bytes.

    Returns:
        True if the process succeeds and its peak is at most `limit`.
    """
    command = [sys.executable, COMMAND, str(directory), "--measure", what]
    child = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    )
    if child.returncode:
        print(f"{what}: FAIL; the process ended with status {child.returncode}, its error is above")
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
    """Loads the checkpoint in bfloat16 and returns the loading time in seconds."""
    start = time.perf_counter()
    _ = LlavaModel.from_pretrained(directory, dtype="bfloat16")
    return {"seconds": time.perf_counter() - start}


def measure_step(directory: Path) -> dict[str, float]:
    """Makes one train step as in a run, and returns the loss and the times in seconds.

    Raises:
        ArithmeticError: The loss is infinite or NaN.
    """
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
        raise ArithmeticError(f"the loss of the train step is {loss}; it must be finite")
    return {"seconds": seconds, "seconds to compile": compiled - start, "loss": loss}


MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "import": measure_import,
    "LoRA step": measure_step,
}


def make_batch(model: ModelConfig) -> Batch:
    """Returns a batch of one sample with an image and random text; the loss covers all the text."""
    rng = np.random.default_rng(0)
    words = rng.integers(3, model.image_token_id, WORDS, np.int32)
    image = np.full(model.image_tokens, model.image_token_id, np.int32)
    ids = np.concatenate([words[:1], image, words[1:]])[None]
    side = model.vision.image_size
    return Batch(
        input_ids=ids,
        loss_mask=ids != model.image_token_id,
        segment_ids=np.ones_like(ids),
        **index_whole_images(ids, model, 1),
        pixel_values=rng.integers(0, 256, (1, 1, 3, side, side), np.uint8),
        pixel_scale=np.array([ImageTransform().scale], np.float32),
    )


def peak_bytes() -> int:
    """Returns the peak memory of this process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

"""Checks that a killed run resumes bit for bit, and how much memory a save takes."""

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from PIL import Image

from llava_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    TrainConfig,
)
from llava_jax.config.presets import TINY_LLAVA
from llava_jax.distributed.environment import GIB
from llava_jax.distributed.host_memory import PINNED_HOST
from llava_jax.errors import RunError
from llava_jax.gpu_check.cases import FULL, HOSTED, SMALL
from llava_jax.gpu_check.machine import MemoryWatch
from llava_jax.gpu_check.results import Figure
from llava_jax.train_step.step import TrainState
from llava_jax.training.checkpoints import Checkpoints

SAMPLES, TOTAL_STEPS, EVERY, KILLED_AFTER = 16, 16, 4, 4
"""Number of samples, of steps, of steps between checkpoints, and the step of the checkpoint after
which the run is killed."""

POLL_SECONDS = 0.005
SAVED_BYTES, SAVED_ARRAYS = 2**31, 8
MAX_SAVE_SHARE = 0.25
"""Largest additional host memory that a save or a restore may take, relative to the state."""


def kill_and_resume() -> Iterator[Figure]:
    """Trains a run to its end, and a copy that is killed and resumed; both must be equal.

    This process must not start a device, because it would then reserve the memory of the runs.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory)
        whole, killed = (write_run(directory, x) for x in ("whole", "killed"))
        start = time.perf_counter()
        _train(whole)
        yield Figure("first run, with compilation", time.perf_counter() - start, "s")
        step = _kill(killed, directory / "killed" / "checkpoints" / str(KILLED_AFTER))
        yield Figure("step at which the run was killed", float(step))
        start = time.perf_counter()
        _train(killed)
        yield Figure("resumed run", time.perf_counter() - start, "s")
        losses = [_losses(directory / x) for x in ("whole", "killed")]
        same = sum(x == y for x, y in zip(*losses, strict=True))
        expected = f"all {TOTAL_STEPS}"
        yield Figure("equal losses", float(same), "", expected, same == TOTAL_STEPS)
        weights = [_weights(directory / x) for x in ("whole", "killed")]
        equal = weights[0] == weights[1]
        yield Figure("exported weights", "equal" if equal else "differ", "", "bit for bit", equal)


def write_data(directory: Path) -> None:
    """Writes images of random pixels, and data.json with a question about each image."""
    rng, records = np.random.default_rng(0), []
    for i in range(SAMPLES):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
        talk = [
            {"from": "human", "value": "<image>\nWhat is the color of the circle?"},
            {"from": "gpt", "value": ("red", "green", "blue")[i % 3]},
        ]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": talk})
    (directory / "data.json").write_text(json.dumps(records))


def write_run(directory: Path, name: str) -> Path:
    """Writes the config of a run, and returns the path of the config.

    The run trains all weights of the decoder of `SMALL`, from random weights and with all state in
    host memory.

    Args:
        directory: Directory that contains the data, and will contain the run.
        name: Name of the run.
    """
    config: TrainConfig = dataclasses.replace(
        FULL,
        name=name,
        output_dir=str(directory),
        steps=TOTAL_STEPS,
        model=SMALL,
        processor=str(TINY_LLAVA),
        data=DataConfig(
            path=str(directory / "data.json"),
            image_root=str(directory),
            max_length=128,
            workers=0,
        ),
        batch=BatchConfig(4, 2),
        memory=HOSTED,
        checkpoint=CheckpointConfig(every=EVERY),
    )
    file = directory / f"{name}.py"
    file.write_text(f"from llava_jax.config import *\nconfig = {config!r}\n")
    return file


def _start(config: Path) -> subprocess.Popen:
    """Starts a run in a process, which prints to this process's streams."""
    command = [sys.executable, "-m", "llava_jax", "train", "--config", str(config)]
    return subprocess.Popen(command)


def _train(config: Path) -> None:
    """Trains a run to its end.

    Raises:
        RunError: The process of the run has failed.
    """
    status = _start(config).wait()
    if status:
        raise RunError(f"the run of {config.name} ended with status {status}")


def _kill(config: Path, checkpoint: Path) -> int:
    """Starts a run, kills it when a checkpoint is complete, and returns the last recorded step.

    Raises:
        RunError: The run ended before it could be killed.
    """
    process = _start(config)
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(POLL_SECONDS)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RunError(f"the run of {config.name} ended before it was killed")
    return len(_losses(checkpoint.parent.parent))


def _losses(run_dir: Path) -> list[float]:
    """Returns the loss of each step of a run."""
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows]


def _weights(run_dir: Path) -> dict[str, bytes]:
    """Returns the exported safetensors files of a run by path."""
    files = sorted(run_dir.rglob("*.safetensors"))
    return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}


def save_memory() -> Iterator[Figure]:
    """Measures the host memory that a save and a restore of state in pinned host memory take."""
    on_device = SingleDeviceSharding(jax.devices()[0])
    on_host = SingleDeviceSharding(jax.devices()[0], memory_kind=PINNED_HOST)
    # Random values, because zeros would be compressed to nothing.
    draw = jax.jit(lambda key: jax.random.normal(key, (SAVED_BYTES // SAVED_ARRAYS // 4096, 1024)))
    keys = jax.random.split(jax.random.key(0), SAVED_ARRAYS)
    arrays = {f"moment{i}": jax.device_put(draw(key), on_host) for i, key in enumerate(keys)}
    step = jax.device_put(jnp.ones((), jnp.int32), on_device)
    state = TrainState(step, arrays, (), jax.random.key_data(keys[0]))
    del arrays
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    expected = _checksums(jax.block_until_ready(state))
    yield Figure("state", SAVED_BYTES / GIB, "GiB")
    with (
        tempfile.TemporaryDirectory() as name,
        Checkpoints(Path(name) / "checkpoints", CheckpointConfig()) as saved,
    ):
        start = time.perf_counter()
        with MemoryWatch() as memory:
            saved.save(state, {})
            saved.wait()
        yield from _taken("save", memory, time.perf_counter() - start)
        start = time.perf_counter()
        with MemoryWatch() as memory:
            jax.tree.map(lambda x: x.delete(), state)  # the restored state takes its place
            state, _ = saved.restore(abstract)
            jax.block_until_ready(state)
        yield from _taken("restore", memory, time.perf_counter() - start)
    equal = _checksums(state) == expected
    yield Figure("restored state", "equal" if equal else "differs", "", "bit for bit", equal)


def _checksums(state: TrainState) -> list[int]:
    """Returns a checksum of each array, which is computed on the device."""
    add = jax.jit(lambda x: jnp.sum(jax.lax.bitcast_convert_type(x, jnp.uint32)))
    on_device = SingleDeviceSharding(jax.devices()[0])
    return [int(add(jax.device_put(x, on_device))) for x in jax.tree.leaves(state)]


def _taken(what: str, memory: MemoryWatch, seconds: float) -> Iterator[Figure]:
    """Yields the duration of a save or a restore, and the memory that it takes."""
    yield Figure(what, seconds, "s")
    grown, expected = memory.resident / SAVED_BYTES, f"at most {MAX_SAVE_SHARE:g}"
    name = f"{what}: growth of the resident memory, relative to the state"
    yield Figure(name, grown, "", expected, grown <= MAX_SAVE_SHARE)
    name = f"{what}: decrease of MemAvailable, relative to the state"
    yield Figure(name, memory.taken / SAVED_BYTES)

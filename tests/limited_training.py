"""Trains on a checkpoint larger than the memory: `limited_training.py MEBIBYTES DIRECTORY`."""

import dataclasses
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_training import CONFIG, MODEL, change, random_batch

from llava_jax.config import LoraConfig, MemoryConfig, ModelConfig, TuneConfig
from llava_jax.distributed.sharding import make_mesh
from llava_jax.models.build import build_model
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.model import load_weights
from llava_jax.pretrained.save import save_params
from llava_jax.train_step.program import Program, build_program
from llava_jax.train_step.step import init_state

STEPS = 3


def model(layers: int, width: int) -> ModelConfig:
    llm = dataclasses.replace(
        MODEL.llm, num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width
    )
    return dataclasses.replace(MODEL, llm=llm)


def write(config: ModelConfig, directory: Path) -> int:
    """Writes random weights, one layer at a time; returns their bytes."""

    def stored(shape: tuple[int, ...], *, is_stack: bool) -> Stored:
        own = shape[1:] if is_stack else shape
        scale = np.float32(own[-1] ** -0.5)
        read = lambda index: scale * np.random.default_rng(index).standard_normal(own, np.float32)
        return Stored(shape, np.dtype(np.float32), read)

    shapes = {path: leaf.shape for path, leaf in build_model(config, {})[1].items()}
    stacks = {path for path in shapes if ".layers." in path or ".tail." in path}
    params = {path: stored(shape, is_stack=path in stacks) for path, shape in shapes.items()}
    save_params(params, directory, config)
    return 4 * sum(map(math.prod, shapes.values()))


def load(config: ModelConfig, directory: Path, *, on_disk: bool) -> tuple[Program, dict[str, Any]]:
    run = dataclasses.replace(
        change(CONFIG, batch={"global_size": 2}),
        model=config,
        init_from=str(directory),
        tune=TuneConfig("lora", "frozen", "frozen"),
        lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj",)),
        memory=MemoryConfig(plan="manual", weights_on_disk=on_disk),
    )
    program = build_program(run, config, STEPS, make_mesh(run.mesh, jax.devices()))
    params = load_weights(directory, config, program.abstract, seed=1, adapters=program.adapters)
    return program, params


def train(config: ModelConfig, directory: Path, *, on_disk: bool) -> list[float]:
    program, params = load(config, directory, on_disk=on_disk)
    trainable = {path: params.pop(path) for path in program.trainable}
    state, losses = init_state(program.state, trainable, 1), []
    with jax.set_mesh(program.mesh):
        for step in range(STEPS):
            batch = program.device_put(random_batch(step, size=2))
            state, metrics = program.train_step(state, params, batch)
            losses.append(metrics["loss"].sum().item())
    return losses


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.RLIM_INFINITY))


def private() -> int:
    """The private memory of this process, which the limit is about, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))


def main(allowed: int, directory: Path) -> None:
    """Prints the losses with weights on disk and a limit, and with all weights and no limit."""
    small, large = model(2, 64), model(44, 512)
    write(small, directory / "small")
    found: dict[str, Any] = {"bytes": write(large, directory / "large"), "refused": False}
    train(small, directory / "small", on_disk=True)
    limit(private() + allowed)
    found["limited"] = train(large, directory / "large", on_disk=True)
    try:
        load(large, directory / "large", on_disk=False)
    except (MemoryError, jax.errors.JaxRuntimeError):
        found["refused"] = True
    limit(resource.RLIM_INFINITY)
    found["unlimited"] = train(large, directory / "large", on_disk=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) * 2**20, Path(sys.argv[2]))

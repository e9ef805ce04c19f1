"""Builds and compiles the train step of a run, from shapes and without weights.

The device does not have to be attached. For an absent GPU, the compiler gets a description from
`planning.devices.GPUS`, and for an absent TPU a topology from libtpu. For absent devices, call
`distributed.environment.prepare_for_planning` before JAX is imported.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from llava_jax.config import AttentionImplementation, ModelConfig, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.packing import slots_in_row
from llava_jax.data.tiles import max_slots
from llava_jax.distributed.host_memory import tree_bytes
from llava_jax.distributed.sharding import make_mesh
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import (
    PLANNING_OPTIONS,
    bytes_of_too_large,
    compile_for_topology,
    compiler_options,
    lowering_for_gpu,
)
from llava_jax.models.attention import attention_implementation
from llava_jax.planning.devices import GPUS, TPUS, Gpu, Tpu
from llava_jax.planning.gpu_compiler import target_config
from llava_jax.planning.peak import LargeArray, dump_options, largest_arrays
from llava_jax.train_step.program import Program, build_program

TOTAL_STEPS = 1000  # length of schedules if config.steps is None; it does not affect the memory


class CompiledStep(NamedTuple):
    """What the compiler says about a train step.

    Attributes:
        total: Bytes in device memory, per device: arguments, results and temporaries.
        host_total: Bytes in host memory, per device.
        text: Text of the compiled module; "" if it is unknown.
        largest: Largest arrays at the peak of device memory; empty if they are unknown.
    """

    total: int
    host_total: int
    text: str
    largest: tuple[LargeArray, ...] = ()


def find_device(name: str) -> Gpu | Tpu:
    """Returns the device with this name in `planning/devices.py`.

    Raises:
        ConfigError: There is no device with this name.
    """
    known: dict[str, Gpu | Tpu] = {**GPUS, **TPUS}
    if name not in known:
        raise ConfigError(f"there is no device {name!r}; choose from {', '.join(known)}")
    return known[name]


def compile_for(
    config: TrainConfig, model: ModelConfig, device: str, count: int
) -> tuple[Program, CompiledStep]:
    """Builds and compiles a run's train step for absent devices.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        device: Name of a device in `planning/devices.py`.
        count: Number of devices.

    Raises:
        ConfigError: The device is unknown, its compiler is not installed, or the config cannot be
            used with this number of devices.
    """
    target = find_device(device)
    implementation = attention_for(config, model, target)
    if isinstance(target, Gpu):
        return _compile_for_gpus(config, model, target, count, implementation)
    return _compile_for_tpus(config, model, target, count, implementation)


def attention_for(
    config: TrainConfig, model: ModelConfig, target: Gpu | Tpu
) -> AttentionImplementation:
    """Returns the implementation of attention that a run uses on a device of `devices.py`."""
    capability = target.capability if isinstance(target, Gpu) else ""
    return attention_implementation(config, model, target.platform, capability)


def attention_here(config: TrainConfig, model: ModelConfig) -> AttentionImplementation:
    """Returns the implementation of attention that a run uses on the attached devices."""
    platform = jax.devices()[0].platform
    return attention_implementation(config, model, platform, capability_here())


def capability_here() -> str:
    """Returns the compute capability of the attached GPUs, such as "8.6"; "" without a GPU."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def program_here(
    config: TrainConfig,
    model: ModelConfig,
    slots: int,
    devices: list[jax.Device] | None = None,
) -> tuple[Program, Batch]:
    """Builds the program of a run for the attached devices; see `measure_here` for the arguments.

    Returns:
        The program, and the shapes of a batch.
    """
    implementation = attention_here(config, model)
    devices = jax.devices() if devices is None else devices
    program = _program(config, model, devices, implementation)
    return program, program.abstract_batch(config.batch.global_size, config.data.max_length, slots)


def program_for(config: TrainConfig, model: ModelConfig, device: str, count: int) -> Program:
    """Builds the program of a run for absent devices, without compiling it.

    The devices of the program's mesh are CPU devices.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        device: Name of a device in `planning/devices.py`.
        count: Number of devices.
    """
    target = find_device(device)
    implementation = attention_for(config, model, target)
    return _program(config, model, jax.devices("cpu")[:count], implementation, target.platform)


def _program(
    config: TrainConfig,
    model: ModelConfig,
    devices: list[jax.Device],
    implementation: AttentionImplementation,
    platform: str | None = None,
) -> Program:
    """Builds the program of a run; see `build_program` for `platform`."""
    mesh = make_mesh(config.mesh, devices)
    return build_program(
        config,
        model,
        config.steps or TOTAL_STEPS,
        mesh,
        implementation=implementation,
        platform=platform,
    )


def largest_batch(program: Program, config: TrainConfig) -> Batch:
    """Returns the shapes of the largest train batch that the config allows."""
    slots = slots_per_row(config, program.model_config)
    return program.abstract_batch(config.batch.global_size, config.data.max_length, slots)


def slots_per_row(config: TrainConfig, model: ModelConfig) -> int:
    """Returns the largest number of image slots in a row. `data.max_images` None counts as 1.

    Args:
        config: Config of the run.
        model: Sizes of the model.
    """
    data = config.data
    images = 1 if data.max_images is None else data.max_images
    media = np.array([min(images, 1), images, 0])  # one image, several, or a video
    most = max_slots(model, media, data.max_length, np.array([0, 0, data.max_frames])).max()
    return slots_in_row(data, model, int(most))


def _compile_for_gpus(
    config: TrainConfig,
    model: ModelConfig,
    target: Gpu,
    count: int,
    implementation: AttentionImplementation,
) -> tuple[Program, CompiledStep]:
    """Compiles for absent GPUs, after lowering for CPU devices, which also have memory kinds."""
    described = target_config(target)
    if len(jax.devices("cpu")) < count:
        raise ConfigError(
            f"planning for {count} GPUs needs {count} CPU devices, but JAX has started with fewer; "
            "set jax_num_cpu_devices before JAX starts"
        )
    program = _program(config, model, jax.devices("cpu")[:count], implementation, target.platform)
    batch = largest_batch(program, config)
    with lowering_for_gpu(target.capability):
        lowered = program.trace_train_step(batch).lower(lowering_platforms=("cuda",))
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="target",
        target_config=described,
        topology=f"1x1x{count}",
    )
    options = compiler_options(target.platform, uses_host=program.uses_host, devices=count)
    options = PLANNING_OPTIONS | (options or {})
    with tempfile.TemporaryDirectory() as folder:
        dumping = options | dump_options(Path(folder))
        stats, text = compile_for_topology(lowered, topology.devices, dumping)
        largest = largest_arrays(Path(folder), text)
    return program, CompiledStep(*_totals(stats), text, largest)


def _compile_for_tpus(
    config: TrainConfig,
    model: ModelConfig,
    target: Tpu,
    count: int,
    implementation: AttentionImplementation,
) -> tuple[Program, CompiledStep]:
    """Compiles for absent TPUs, which are described by a topology from libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("planning for TPUs needs the TPU compiler: pip install 'llava_jax[tpu]'")
    if count not in target.chips:
        known = ", ".join(map(str, target.chips))
        raise ConfigError(
            f"there is no {target.topology} slice of {count} chips; choose from {known} chips"
        )
    topology = topologies.get_topology_desc(**target.slice_of(count))
    program = _program(config, model, list(topology.devices), implementation)
    return program, compile_program(program, largest_batch(program, config))


def compile_program(program: Program, batch: Batch) -> CompiledStep:
    """Compiles a train step for the devices of its mesh.

    If the step does not fit, the compiler for TPUs raises an error. Then the bytes in device memory
    come from the error message, and the text is empty.

    Args:
        program: Program of the run.
        batch: Shapes of the batch.
    """
    lowered = program.trace_train_step(batch).lower()
    try:
        return read_compiled(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_of_too_large(str(error))
        if needed is None:
            raise
        return CompiledStep(needed, sum(argument_bytes(program)[1].values()), "")


def read_compiled(compiled: jax.stages.Compiled) -> CompiledStep:
    """Returns what the compiler says about a compiled step."""
    return CompiledStep(*_totals(compiled.memory_analysis()), compiled.as_text() or "")


def _totals(stats: Any) -> tuple[int, int]:
    """Returns the bytes of arguments, results and temporaries in device memory and host memory."""
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    host_total = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    return total, host_total


def argument_bytes(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bytes per device of each term except `REST`: in device memory, in host memory."""
    terms = _terms(program)
    device = {name: tree_bytes(tree, on_host=False) for name, tree in terms.items()}
    return device, {name: tree_bytes(tree, on_host=True) for name, tree in terms.items()}


def _terms(program: Program) -> dict[str, object]:
    """Returns the shapes of the arrays that belong to each term of a `Usage`, except `REST`."""
    abstract = program.abstract
    return {
        "frozen weights": {path: abstract[path] for path in program.frozen},
        "trainables": {path: abstract[path] for path in program.trainable},
        "optimizer": jax.tree.leaves(program.state.opt_state),
        "gradients": program.gradients,
    }

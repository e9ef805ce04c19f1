"""Compiles the train step of a run, and reads from the compiler how much memory the step needs.

The step is lowered and compiled from shapes, without weights. The device does not have to be
attached. For an absent GPU, the compiler gets a description from `planning.devices.GPUS`, and for
an absent TPU a topology from libtpu. For absent devices, call
`distributed.environment.prepare_for_planning` before JAX is imported.
"""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

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
    Options,
    bytes_of_too_large,
    compile_for_topology,
    compiler_options,
    is_out_of_memory,
    lowering_for_gpu,
)
from llava_jax.models.attention import attention_implementation
from llava_jax.planning.beside import device_beside, devices_of_process, host_beside, outside_pool
from llava_jax.planning.devices import GPUS, TPUS, Gpu, Tpu, rates_of, shares_host
from llava_jax.planning.disk import copied_from_disk, read_from_disk
from llava_jax.planning.flops import matmul_flops
from llava_jax.planning.forecast import Forecast, forecast
from llava_jax.planning.gpu_compiler import target_config
from llava_jax.planning.usage import REST, Usage
from llava_jax.train_step.program import Program, build_program

TOTAL_STEPS = 1000  # length of schedules if config.steps is None; it does not affect the memory


def find_device(name: str) -> Gpu | Tpu:
    """Returns the device with this name in `planning/devices.py`.

    Raises:
        ConfigError: There is no device with this name.
    """
    known: dict[str, Gpu | Tpu] = {**GPUS, **TPUS}
    if name not in known:
        raise ConfigError(f"there is no device {name!r}; choose from {', '.join(known)}")
    return known[name]


def measure(
    config: TrainConfig, model: ModelConfig, device: str, count: int, capacity: int | None = None
) -> Usage:
    """Compiles a run's train step for absent devices, and returns its memory use.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        device: Name of a device in `planning/devices.py`.
        count: Number of devices.
        capacity: Memory of one device, in bytes; None takes the size in `planning/devices.py`.

    Raises:
        ConfigError: The device is unknown, its compiler is not installed, or the config cannot be
            used with this number of devices.
    """
    target = find_device(device)
    capacity = target.memory if capacity is None else capacity
    program, totals, text = compile_for(config, model, device, count)
    batch = largest_batch(program, config)
    return usage_of(program, config, batch, totals, text, capacity, target.platform, device)


def compile_for(
    config: TrainConfig, model: ModelConfig, device: str, count: int
) -> tuple[Program, tuple[int, int], str]:
    """Compiles a run's train step for absent devices; see `measure` for arguments and errors.

    Returns:
        The program; the bytes that the step needs in device memory and in host memory, per device;
        and the text of the compiled module, which is empty if the step does not fit into a TPU.
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


def measure_here(config: TrainConfig, model: ModelConfig, slots: int, capacity: int) -> Usage:
    """Compiles a run's train step for the attached devices, and returns its memory use.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        slots: Number of image slots per row.
        capacity: Memory of one device, in bytes.
    """
    program, batch = program_here(config, model, slots)
    try:
        totals, text = _compiled(program, batch)
    except jax.errors.JaxRuntimeError as error:
        # Compilers for GPUs execute kernels to choose the fastest ones, which needs memory.
        if not is_out_of_memory(str(error)):
            raise
        least = max(_named(program, on_host=False), capacity)
        totals = least, _named(program, on_host=True)
        usage = _usage_here(program, config, batch, totals, "", capacity)
        return dataclasses.replace(usage, out_of_memory=True)
    return _usage_here(program, config, batch, totals, text, capacity)


def compile_here(
    config: TrainConfig,
    model: ModelConfig,
    slots: int,
    capacity: int,
    devices: list[jax.Device] | None = None,
    options: Options | None = None,
) -> tuple[Program, jax.stages.Compiled, Usage]:
    """Compiles a run's train step for attached devices, and returns the compiled step too.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        slots: Number of image slots per row.
        capacity: Memory of one device, in bytes.
        devices: Devices to compile for; None takes all attached devices.
        options: Options of XLA's compiler, which take precedence over the options of the run.

    Returns:
        The program, the compiled train step, and its memory use.
    """
    program, batch = program_here(config, model, slots, devices)
    compiled = program.trace_train_step(batch).lower().compile(options)
    return program, compiled, _usage_here(program, config, batch, *_read(compiled), capacity)


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


def _compile_for_gpus(
    config: TrainConfig,
    model: ModelConfig,
    target: Gpu,
    count: int,
    implementation: AttentionImplementation,
) -> tuple[Program, tuple[int, int], str]:
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
    stats, text = compile_for_topology(
        lowered, topology.devices, PLANNING_OPTIONS | (options or {})
    )
    return program, _totals(stats), text


def _compile_for_tpus(
    config: TrainConfig,
    model: ModelConfig,
    target: Tpu,
    count: int,
    implementation: AttentionImplementation,
) -> tuple[Program, tuple[int, int], str]:
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
    return program, *_compiled(program, largest_batch(program, config))


def _compiled(program: Program, batch: Batch) -> tuple[tuple[int, int], str]:
    """Returns the bytes of a step in device memory and in host memory, and the module's text.

    If the step does not fit, the compiler for TPUs raises an error. Then the bytes in device memory
    come from the error message, and the text is empty.
    """
    lowered = program.trace_train_step(batch).lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = bytes_of_too_large(str(error))
        if needed is None:
            raise
        return (needed, _named(program, on_host=True)), ""
    return _read(compiled)


def _named(program: Program, *, on_host: bool) -> int:
    """Returns the bytes of all terms except `REST`, in host memory or in device memory."""
    return sum(tree_bytes(tree, on_host=on_host) for tree in _terms(program).values())


def _read(compiled: jax.stages.Compiled) -> tuple[tuple[int, int], str]:
    """Returns the bytes of a compiled step in device memory and host memory, and its text."""
    return _totals(compiled.memory_analysis()), compiled.as_text() or ""


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


def _usage_here(
    program: Program,
    config: TrainConfig,
    batch: Batch,
    totals: tuple[int, int],
    text: str,
    capacity: int,
) -> Usage:
    """Returns the memory use of a step for the attached devices; see `usage_of`."""
    device = program.mesh.devices.flat[0]
    platform, name = device.platform, device.device_kind
    return usage_of(program, config, batch, totals, text, capacity, platform, name)


def usage_of(
    program: Program,
    config: TrainConfig,
    batch: Batch,
    totals: tuple[int, int],
    text: str,
    capacity: int,
    platform: str,
    name: str,
) -> Usage:
    """Divides the compiler's totals into terms, and adds what a run needs beside a step.

    Args:
        program: Program of the run.
        config: Config of the run.
        batch: Shapes of the batch.
        totals: Bytes of the step in device memory and in host memory.
        text: Text of the compiled module, or "".
        capacity: Memory of one device, in bytes.
        platform: "gpu", "tpu" or "cpu".
        name: Name of the device.
    """
    total, host_total = totals
    device, host = argument_bytes(program)
    if host_total == 0:  # XLA's CPU backend counts host memory as device memory
        host_total = sum(host.values())
        total -= host_total
    device[REST] = total - sum(device.values())
    host[REST] = max(host_total - sum(host.values()), 0)
    activations = host[REST] if config.memory.offload_activations else 0
    micros = program.accumulation
    flops, guess = _costs(text, platform, name, read_from_disk(program, micros))
    return Usage(
        device,
        host,
        total,
        host_total,
        pcie_bytes(host, micros, activations) + copied_from_disk(program, micros),
        capacity,
        flops,
        device_beside=device_beside(program, config, batch, device[REST]),
        host_beside=host_beside(program, batch),
        outside=outside_pool(platform, name, program.mesh.size),
        pooled=devices_of_process(program.mesh) if platform == "gpu" else 0,
        forecast=guess,
        shares_host=shares_host(name),
    )


def _costs(text: str, platform: str, name: str, disk: int) -> tuple[int | None, Forecast | None]:
    """Returns the FLOPs and the forecast of a compiled step, or None if they cannot be read.

    Args:
        text: Text of the compiled module, or "".
        platform: Platform of the device. Only steps for GPUs are forecast.
        name: Name of the device.
        disk: Bytes that the step reads from files.
    """
    if not text:
        return None, None
    try:
        flops, rates = matmul_flops(text), rates_of(name)
        return flops, forecast(text, rates, disk) if platform == "gpu" and rates else None
    except (ValueError, LookupError) as error:  # no plan depends on these figures
        logging.getLogger(__name__).warning("%s", error)
        return None, None


def pcie_bytes(host: Mapping[str, int], micros: int, activations: int) -> int:
    """Returns the bytes that cross PCIe in one optimizer step, in both directions together.

    In every micro-batch, weights go to the device twice (forward and backward pass), gradients go
    to the device and back, and offloaded activations go to the host and back. The gradient norm
    and the update each read the gradients; the update also reads and writes the trained weights and
    the optimizer's state.

    Args:
        host: Bytes of each term in host memory, from `argument_bytes`.
        micros: Number of micro-batches in the step.
        activations: Bytes of the activations of a micro-batch in host memory.
    """
    weights = host["frozen weights"] + host["trainables"]
    gradients = host["gradients"]
    moved = micros * 2 * (weights + gradients + activations) + 2 * gradients
    return moved + 2 * (host["trainables"] + host["optimizer"])


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

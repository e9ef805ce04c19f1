"""Measures how much memory a run's train step needs, by compiling it; see `planning/compile.py`."""

import dataclasses
import logging
from collections.abc import Mapping

import jax

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.jax_compat import Options, is_out_of_memory
from llava_jax.planning.beside import device_beside, devices_of_process, host_beside, outside_pool
from llava_jax.planning.compile import (
    CompiledStep,
    argument_bytes,
    compile_for,
    compile_program,
    find_device,
    largest_batch,
    program_here,
    read_compiled,
)
from llava_jax.planning.devices import rates_of, shares_host
from llava_jax.planning.disk import copied_from_disk, read_from_disk
from llava_jax.planning.flops import matmul_flops
from llava_jax.planning.forecast import Forecast, forecast
from llava_jax.planning.usage import REST, Usage
from llava_jax.train_step.program import Program


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
    program, step = compile_for(config, model, device, count)
    batch = largest_batch(program, config)
    return usage_of(program, config, batch, step, capacity, target.platform, device)


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
        step = compile_program(program, batch)
    except jax.errors.JaxRuntimeError as error:
        # Compilers for GPUs execute kernels to choose the fastest ones, which needs memory.
        if not is_out_of_memory(str(error)):
            raise
        device, host = (sum(terms.values()) for terms in argument_bytes(program))
        least = CompiledStep(max(device, capacity), host, "")
        usage = _usage_here(program, config, batch, least, capacity)
        return dataclasses.replace(usage, out_of_memory=True)
    return _usage_here(program, config, batch, step, capacity)


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
    return program, compiled, _usage_here(program, config, batch, read_compiled(compiled), capacity)


def _usage_here(
    program: Program,
    config: TrainConfig,
    batch: Batch,
    step: CompiledStep,
    capacity: int,
) -> Usage:
    """Returns the memory use of a step for the attached devices; see `usage_of`."""
    device = program.mesh.devices.flat[0]
    platform, name = device.platform, device.device_kind
    return usage_of(program, config, batch, step, capacity, platform, name)


def usage_of(
    program: Program,
    config: TrainConfig,
    batch: Batch,
    step: CompiledStep,
    capacity: int,
    platform: str,
    name: str,
) -> Usage:
    """Divides the compiler's totals into terms, and adds what a run needs beside a step.

    Args:
        program: Program of the run.
        config: Config of the run.
        batch: Shapes of the batch.
        step: Compiled step.
        capacity: Memory of one device, in bytes.
        platform: "gpu", "tpu" or "cpu".
        name: Name of the device.
    """
    total, host_total = step.total, step.host_total
    device, host = argument_bytes(program)
    if host_total == 0:  # XLA's CPU backend counts host memory as device memory
        host_total = sum(host.values())
        total -= host_total
    device[REST] = total - sum(device.values())
    host[REST] = max(host_total - sum(host.values()), 0)
    activations = host[REST] if config.memory.offload_activations else 0
    micros = program.accumulation
    flops, guess = _costs(step.text, platform, name, read_from_disk(program, micros))
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
        largest=step.largest,
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

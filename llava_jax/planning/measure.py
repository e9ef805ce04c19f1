"""Compiles the train step of a run, and reads from the compiler how much memory the step needs.

The step is lowered and compiled from shapes; no weights are loaded, and nothing is executed. The
device does not have to be attached. For an absent GPU, the compiler gets a description from
`planning.devices.GPUS`, and for an absent TPU a topology from libtpu. For absent devices, call
`distributed.environment.prepare_for_planning` before JAX is imported.
"""

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from llava_jax.config import AttentionImplementation, ModelConfig, Parts, TrainConfig
from llava_jax.data.batch import Batch
from llava_jax.data.packing import images_in_row
from llava_jax.distributed.environment import GIB, RESERVE_SHARE
from llava_jax.distributed.host_memory import is_for_host
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
from llava_jax.planning.devices import GPUS, TPUS, Gpu, Rates, Tpu, rates_of
from llava_jax.planning.flops import matmul_flops
from llava_jax.planning.forecast import Forecast, forecast
from llava_jax.planning.gpu_compiler import target_config
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.resolve import resolve
from llava_jax.train_step.program import Program, build_program

TOTAL_STEPS = 1000  # length of schedules if config.steps is None; it does not affect the memory


REST = "activations and temporaries"  # the term of a `Usage` for all other memory


@dataclasses.dataclass(frozen=True)
class Usage:
    """Memory, transfers and FLOPs of a plan, per device. All values are in bytes except `flops`.

    Attributes:
        device: Device memory by term, for example "gradients"; the terms add up to `total`.
        host: Pinned host memory by term.
        total: Peak of the device memory, from the compiler: arguments, results and temporaries.
        host_total: Peak of the pinned host memory, from the compiler.
        pcie: Bytes that cross PCIe in one optimizer step, in both directions together.
        capacity: Size of the device's memory.
        flops: FLOPs of the matrix products of one optimizer step, as compiled; None if they could
            not be counted.
        host_capacity: Host memory that may be pinned for this device; None if it is unknown.
        forecast: Forecast of the step's duration; None for devices other than GPUs, or if the
            compiled step could not be read.
    """

    device: dict[str, int]
    host: dict[str, int]
    total: int
    host_total: int
    pcie: int
    capacity: int
    flops: int | None
    host_capacity: int | None = None
    forecast: Forecast | None = None

    @property
    def fits(self) -> bool:
        """Returns True if the plan fits into device memory and into host memory (if known)."""
        return self.headroom >= 0 and self.host_headroom >= 0

    @property
    def reserve(self) -> int:
        """Returns the bytes of device memory that are reserved for the runtime."""
        return int(RESERVE_SHARE * self.capacity)

    @property
    def headroom(self) -> int:
        """Returns the unused bytes of device memory; negative if the plan does not fit."""
        return self.capacity - self.reserve - self.total

    @property
    def host_headroom(self) -> int:
        """Returns the unused bytes of host memory; 0 if the size of host memory is unknown."""
        return 0 if self.host_capacity is None else self.host_capacity - self.host_total


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
    capacity = find_device(device).memory if capacity is None else capacity
    program, totals, text = compile_for(config, model, device, count)
    return usage_of(program, config, totals, text, capacity, _gpu_rates(find_device(device)))


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


def measure_here(config: TrainConfig, model: ModelConfig, images: int, capacity: int) -> Usage:
    """Compiles a run's train step for the attached devices, and returns its memory use.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        images: Number of image slots per sample.
        capacity: Memory of one device, in bytes.
    """
    config, program, batch = program_here(config, model, images)
    return usage_of(program, config, *_compiled(program, batch), capacity, _rates_here())


def compile_here(
    config: TrainConfig, model: ModelConfig, images: int, capacity: int
) -> tuple[Program, jax.stages.Compiled, Usage]:
    """Compiles a run's train step for the attached devices; see `measure_here` for the arguments.

    Returns:
        The program, the compiled train step, and its memory use.
    """
    config, program, batch = program_here(config, model, images)
    compiled = program.trace_train_step(batch).lower().compile()
    usage = usage_of(program, config, *_read(compiled), capacity, _rates_here())
    return program, compiled, usage


def _gpu_rates(device: Gpu | Tpu) -> Rates | None:
    """Returns the peak rates of a GPU; None for a TPU, whose compiled steps are not forecast."""
    return device.rates if isinstance(device, Gpu) else None


def _rates_here() -> Rates | None:
    """Returns the peak rates of the attached GPUs; None if the devices are no GPUs."""
    device = jax.local_devices()[0]
    return rates_of(device.device_kind) if device.platform == "gpu" else None


def program_here(
    config: TrainConfig, model: ModelConfig, images: int
) -> tuple[TrainConfig, Program, Batch]:
    """Builds the program of a run for the attached devices; see `measure_here` for the arguments.

    Returns:
        The config with `max_images` set, the program, and the shapes of a batch.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_images=images))
    implementation = attention_here(config, model)
    return config, *_program(config, model, jax.devices(), implementation, donate=False)


def program_for(config: TrainConfig, model: ModelConfig, device: str, count: int) -> Program:
    """Builds the program of a run for absent devices, without compiling it.

    The devices of the program's mesh are CPU devices.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        device: Name of a device in `planning/devices.py`.
        count: Number of devices.
    """
    implementation = attention_for(config, model, find_device(device))
    return _program(config, model, jax.devices("cpu")[:count], implementation, donate=True)[0]


def _program(
    config: TrainConfig,
    model: ModelConfig,
    devices: list[jax.Device],
    implementation: AttentionImplementation,
    *,
    donate: bool,
) -> tuple[Program, Batch]:
    """Returns a program and the shapes of its batch; see `build_program` for `donate`."""
    mesh = make_mesh(config.mesh, devices)
    program = build_program(
        config,
        model,
        config.steps or TOTAL_STEPS,
        mesh,
        implementation=implementation,
        donate=donate,
    )
    images = images_per_row(config, model)
    batch = program.abstract_batch(config.batch.global_size, config.data.max_length, images)
    return program, batch


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
    program, batch = _program(
        config, model, jax.devices("cpu")[:count], implementation, donate=True
    )
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
    program, batch = _program(config, model, list(topology.devices), implementation, donate=True)
    return program, *_compiled(program, batch)


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
        hosted = (_bytes(tree, on_host=True) for tree in _terms(program).values())
        return (needed, sum(hosted)), ""
    return _read(compiled)


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
    device = {name: _bytes(tree, on_host=False) for name, tree in terms.items()}
    return device, {name: _bytes(tree, on_host=True) for name, tree in terms.items()}


def _terms(program: Program) -> dict[str, object]:
    """Returns the shapes of the arrays that belong to each term of a `Usage`, except `REST`."""
    abstract = program.abstract
    return {
        "frozen weights": {path: abstract[path] for path in program.frozen},
        "trainables": {path: abstract[path] for path in program.trainable},
        "optimizer": jax.tree.leaves(program.state.opt_state),
        "gradients": program.gradients,
    }


def usage_of(
    program: Program,
    config: TrainConfig,
    totals: tuple[int, int],
    text: str,
    capacity: int,
    rates: Rates | None,
) -> Usage:
    """Divides the compiler's totals into terms, and reads FLOPs and a forecast from the module.

    Args:
        program: Program of the step.
        config: Config of the run.
        totals: Bytes that the step needs in device memory and in host memory.
        text: The compiled module as text, or "".
        capacity: Memory of one device, in bytes.
        rates: Peak rates of a device; None makes no forecast.
    """
    total, host_total = totals
    device, host = argument_bytes(program)
    if host_total == 0:  # XLA's CPU backend counts host memory as device memory
        host_total = sum(host.values())
        total -= host_total
    device[REST] = total - sum(device.values())
    host[REST] = max(host_total - sum(host.values()), 0)
    activations = host[REST] if config.memory.offload_activations else 0
    pcie = pcie_bytes(host, program.accumulation, activations)
    flops = guess = None
    try:
        flops = matmul_flops(text) if text else None
        guess = forecast(text, rates) if text and rates else None
    except ValueError as error:  # no plan depends on these figures
        logging.getLogger(__name__).warning("%s", error)
    usage = Usage(device, host, total, host_total, pcie, capacity, flops)
    return dataclasses.replace(usage, forecast=guess)


def _bytes(tree: object, *, on_host: bool) -> int:
    """Returns the bytes per device of the arrays in host memory (`on_host`) or in device memory."""
    leaves = [x for x in jax.tree.leaves(tree) if is_for_host(x) == on_host]
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    return sum(map(size, leaves))


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


def images_per_row(config: TrainConfig, model: ModelConfig) -> int:
    """Returns the number of image slots in a row of a batch. `data.max_images` None counts as 1.

    Args:
        config: Config of the run.
        model: Sizes of the model.
    """
    images = 1 if config.data.max_images is None else config.data.max_images
    return images_in_row(config.data, model, images)


def sizes(config: TrainConfig) -> ModelConfig:
    """Returns the sizes of a run's model.

    The sizes come from the checkpoint `init_from`. If the checkpoint does not exist yet, the sizes
    come from `config.model`.

    Raises:
        ConfigError: Neither `init_from` nor `model` is set.
    """
    source = config.init_from
    base = source.llm if isinstance(source, Parts) else source
    if source is not None and (config.model is None or Path(str(base)).exists()):
        return read_config(resolve(source).base)
    if config.model is None:
        raise ConfigError(
            "init_from and model are both None; set model, or set init_from to a checkpoint"
        )
    return config.model


def usage_table(usage: Usage) -> str:
    """Returns a table, as text, of the memory by term, the totals, and the cost of a step."""
    lines = [f"{'':32}{'device GiB':>11}{'host GiB':>11}"]
    for term in usage.device:
        device, host = usage.device[term] / GIB, usage.host[term] / GIB
        lines.append(f"{term:32}{device:11.2f}{host:11.2f}")
    lines.append(f"{'sum':32}{usage.total / GIB:11.2f}{usage.host_total / GIB:11.2f}")
    known = usage.host_capacity is not None
    host = f"{(usage.host_capacity or 0) / GIB:11.2f}" if known else f"{'not given':>11}"
    left = f"{usage.host_headroom / GIB:11.2f}" if known else ""
    lines.append(f"{'memory':32}{usage.capacity / GIB:11.2f}{host}")
    lines.append(f"{'reserve for the runtime':32}{usage.reserve / GIB:11.2f}")
    lines.append(f"{'headroom':32}{usage.headroom / GIB:11.2f}{left}")
    lines.append(f"PCIe: {usage.pcie / GIB:.1f} GiB per optimizer step, in both directions")
    flops = "not counted" if usage.flops is None else f"{usage.flops:.3e}"
    lines.append(f"FLOPs: {flops} per device and optimizer step, in matrix products")
    verdict = "fits" if usage.fits else "does not fit"
    return "\n".join(
        [*lines, verdict if known else f"{verdict}; the size of host memory is not given"]
    )

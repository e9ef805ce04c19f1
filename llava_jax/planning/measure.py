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
from llava_jax.jax_compat import Options, bytes_of_too_large, compile_for_topology
from llava_jax.models.attention import attention_implementation
from llava_jax.planning.devices import GPUS, TPUS, Gpu, Tpu
from llava_jax.planning.flops import matmul_flops
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
    """

    device: dict[str, int]
    host: dict[str, int]
    total: int
    host_total: int
    pcie: int
    capacity: int
    flops: int | None
    host_capacity: int | None = None

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
    return _usage(program, config, totals, text, capacity)


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
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return attention_implementation(config, model, device.platform, capability)


def measure_here(config: TrainConfig, model: ModelConfig, images: int, capacity: int) -> Usage:
    """Compiles a run's train step for the attached devices, and returns its memory use.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        images: Number of image slots per sample.
        capacity: Memory of one device, in bytes.
    """
    config, program, batch = _program_here(config, model, images)
    return _usage(program, config, *_compiled(program, batch), capacity)


def compile_here(
    config: TrainConfig,
    model: ModelConfig,
    images: int,
    capacity: int,
    devices: list[jax.Device] | None = None,
    options: Options | None = None,
) -> tuple[Program, jax.stages.Compiled, Usage]:
    """Compiles a run's train step for attached devices, and returns the compiled step too.

    Args:
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        images: Number of image slots per sample.
        capacity: Memory of one device, in bytes.
        devices: Devices to compile for; None takes all attached devices.
        options: Options of XLA's compiler, which take precedence over the options of the run.

    Returns:
        The program, the compiled train step, and its memory use.
    """
    config, program, batch = _program_here(config, model, images, devices)
    compiled = program.trace_train_step(batch).lower().compile(options)
    return program, compiled, _usage(program, config, *_read(compiled), capacity)


def _program_here(
    config: TrainConfig,
    model: ModelConfig,
    images: int,
    devices: list[jax.Device] | None = None,
) -> tuple[TrainConfig, Program, Batch]:
    """Returns the config with `max_images` set, the program, and the shapes of a batch."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_images=images))
    implementation = attention_here(config, model)
    devices = jax.devices() if devices is None else devices
    return config, *_program(config, model, devices, implementation, donate=False)


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
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError(
            "planning for GPUs needs the GPU compiler: pip install 'llava_jax[cuda12]'"
        )
    if len(jax.devices("cpu")) < count:
        raise ConfigError(
            f"planning for {count} GPUs needs {count} CPU devices, but JAX has started with fewer; "
            "set jax_num_cpu_devices before JAX starts"
        )
    program, batch = _program(
        config, model, jax.devices("cpu")[:count], implementation, donate=True
    )
    lowered = program.trace_train_step(batch).lower(lowering_platforms=("cuda",))
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="target",
        target_config=target.target_config,
        topology=f"1x1x{count}",
    )
    stats, text = compile_for_topology(lowered, topology.devices)
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


def _terms(program: Program) -> dict[str, object]:
    """Returns the shapes of the arrays that belong to each term of a `Usage`, except `REST`."""
    abstract = program.abstract
    return {
        "frozen weights": {path: abstract[path] for path in program.frozen},
        "trainables": {path: abstract[path] for path in program.trainable},
        "optimizer": jax.tree.leaves(program.state.opt_state),
        "gradients": program.gradients,
    }


def _usage(
    program: Program, config: TrainConfig, totals: tuple[int, int], text: str, capacity: int
) -> Usage:
    """Divides the compiler's totals into terms; `text` is the compiled module as text, or ""."""
    total, host_total = totals
    terms = _terms(program)
    device = {name: _bytes(tree, on_host=False) for name, tree in terms.items()}
    host = {name: _bytes(tree, on_host=True) for name, tree in terms.items()}
    if host_total == 0:  # XLA's CPU backend counts host memory as device memory
        host_total = sum(host.values())
        total -= host_total
    device[REST] = total - sum(device.values())
    host[REST] = max(host_total - sum(host.values()), 0)
    pcie = _pcie_bytes(program, host, config)
    flops = _flops(text) if text else None
    return Usage(device, host, total, host_total, pcie, capacity, flops)


def _flops(text: str) -> int | None:
    """Returns the matrix-product FLOPs of a module; logs a warning if they cannot be counted."""
    try:
        return matmul_flops(text)
    except ValueError as error:  # no plan depends on the FLOPs
        logging.getLogger(__name__).warning("%s", error)
        return None


def _bytes(tree: object, *, on_host: bool) -> int:
    """Returns the bytes per device of the arrays in host memory (`on_host`) or in device memory."""
    leaves = [x for x in jax.tree.leaves(tree) if is_for_host(x) == on_host]
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    return sum(map(size, leaves))


def _pcie_bytes(program: Program, host: Mapping[str, int], config: TrainConfig) -> int:
    """Returns the bytes that cross PCIe in one optimizer step, in both directions together.

    In every micro-batch, weights go to the device twice (forward and backward pass), gradients go
    to the device and back, and offloaded activations go to the host and back. The gradient norm
    and the update each read the gradients; the update also reads and writes the trained weights and
    the optimizer's state.
    """
    micros = program.accumulation
    weights = host["frozen weights"] + host["trainables"]
    gradients = host["gradients"]
    moved = micros * (2 * weights + 2 * gradients) + 2 * gradients
    moved += 2 * (host["trainables"] + host["optimizer"])
    if config.memory.offload_activations:
        moved += 2 * micros * host[REST]
    return moved


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

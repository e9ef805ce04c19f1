"""Compiles a run for a device that need not be here, and reads its memory from the compiler.

The real train step is lowered and compiled from shapes alone; nothing is loaded or executed. A GPU
is described to the compiler by `devices.GPUS`; a TPU by the topology that libtpu knows. The process
must have been prepared by `environment.prepare_for_planning` before JAX was imported.
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
from llava_jax.jax_compat import bytes_of_too_large, compile_for_topology
from llava_jax.models.attention import attention_implementation
from llava_jax.planning.devices import GPUS, TPUS, Gpu, Tpu
from llava_jax.planning.flops import matmul_flops
from llava_jax.pretrained.model_config import read_config
from llava_jax.pretrained.resolve import resolve
from llava_jax.train_step.program import Program, build_program

TOTAL_STEPS = 1000  # a schedule's length, which decides nothing about memory


REST = "activations and temporaries"  # what no other term of a Usage names


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a plan needs on each device; all are bytes except `flops`.

    Attributes:
        device: Bytes on the device by term; they add up to the compiler's total.
        host: Bytes in the host's pinned memory by term.
        total: The compiler's peak on the device: arguments, results and temporaries.
        host_total: The compiler's peak in host memory.
        pcie: Bytes over PCIe in an optimizer step, both ways together.
        capacity: The device's memory.
        flops: Floating-point operations of an optimizer step's matrix products, as compiled.
        host_capacity: The host's memory that may be pinned for a device, where it is known.
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
        return self.headroom >= 0 and self.host_headroom >= 0

    @property
    def reserve(self) -> int:
        """Bytes of the device that are left to the runtime."""
        return int(RESERVE_SHARE * self.capacity)

    @property
    def headroom(self) -> int:
        """Bytes left on the device."""
        return self.capacity - self.reserve - self.total

    @property
    def host_headroom(self) -> int:
        """Bytes left in host memory, where its size is known; else 0."""
        return 0 if self.host_capacity is None else self.host_capacity - self.host_total


def find_device(name: str) -> Gpu | Tpu:
    """A device of `planning.devices.py`.

    Raises:
        ConfigError: There is no device of this name.
    """
    known: dict[str, Gpu | Tpu] = {**GPUS, **TPUS}
    if name not in known:
        raise ConfigError(f"device {name!r}; there are {', '.join(known)}")
    return known[name]


def measure(
    config: TrainConfig, model: ModelConfig, device: str, count: int, capacity: int | None = None
) -> Usage:
    """Compiles a run's train step for `count` devices and reads its memory.

    Args:
        config: The run, its plan resolved.
        model: The model's sizes.
        device: A name in `planning.devices.py`.
        count: Devices.
        capacity: Bytes of one device; None takes the table's.

    Raises:
        ConfigError: The device is unknown, its compiler is not installed, or the config does not
            fit so many devices.
    """
    capacity = find_device(device).memory if capacity is None else capacity
    program, totals, text = compile_for(config, model, device, count)
    return _usage(program, config, totals, text, capacity)


def compile_for(
    config: TrainConfig, model: ModelConfig, device: str, count: int
) -> tuple[Program, tuple[int, int], str]:
    """As `measure`; the program, its bytes on a device and in host memory, and the module."""
    target = find_device(device)
    implementation = attention_for(config, model, target)
    if isinstance(target, Gpu):
        return _compile_for_gpus(config, model, target, count, implementation)
    return _compile_for_tpus(config, model, target, count, implementation)


def attention_for(
    config: TrainConfig, model: ModelConfig, target: Gpu | Tpu
) -> AttentionImplementation:
    """How a device of the table would compute attention."""
    capability = target.capability if isinstance(target, Gpu) else ""
    return attention_implementation(config, model, target.platform, capability)


def attention_here(config: TrainConfig, model: ModelConfig) -> AttentionImplementation:
    """How the attached devices compute attention."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return attention_implementation(config, model, device.platform, capability)


def measure_here(config: TrainConfig, model: ModelConfig, images: int, capacity: int) -> Usage:
    """Compiles a run's train step for the attached devices and reads its memory.

    Args:
        config: The run, its plan resolved.
        model: The model's sizes.
        images: Image slots of a sample.
        capacity: Bytes of one device.
    """
    config, program, batch = _program_here(config, model, images)
    return _usage(program, config, *_compiled(program, batch), capacity)


def compile_here(
    config: TrainConfig, model: ModelConfig, images: int, capacity: int
) -> tuple[Program, jax.stages.Compiled, Usage]:
    """As `measure_here`, with the program and its train step, ready to run."""
    config, program, batch = _program_here(config, model, images)
    compiled = program.trace_train_step(batch).lower().compile()
    return program, compiled, _usage(program, config, *_read(compiled), capacity)


def _program_here(
    config: TrainConfig, model: ModelConfig, images: int
) -> tuple[TrainConfig, Program, Batch]:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_images=images))
    implementation = attention_here(config, model)
    return config, *_program(config, model, jax.devices(), implementation, donate=False)


def _program(
    config: TrainConfig,
    model: ModelConfig,
    devices: list[jax.Device],
    implementation: AttentionImplementation,
    *,
    donate: bool,
) -> tuple[Program, Batch]:
    """A program and its batch's shapes; `donate` is for devices that stand for others."""
    mesh = make_mesh(config.mesh, devices)
    program = build_program(
        config,
        model,
        config.steps or TOTAL_STEPS,
        mesh,
        implementation=implementation,
        donate=donate,
    )
    images = 1 if config.data.max_images is None else config.data.max_images
    images = images_in_row(config.data, model, images)
    batch = program.abstract_batch(config.batch.global_size, config.data.max_length, images)
    return program, batch


def _compile_for_gpus(
    config: TrainConfig,
    model: ModelConfig,
    target: Gpu,
    count: int,
    implementation: AttentionImplementation,
) -> tuple[Program, tuple[int, int], str]:
    """Lowers on fake CPU devices, which have memory kinds, and compiles for absent GPUs."""
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ConfigError("planning for GPUs needs their compiler: pip install 'llava_jax[cuda12]'")
    if len(jax.devices("cpu")) < count:
        raise ConfigError(f"{count} devices were asked for after JAX had started with fewer")
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
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("planning for TPUs needs their compiler: pip install 'llava_jax[tpu]'")
    if count not in target.chips:
        known = ", ".join(map(str, target.chips))
        raise ConfigError(f"{count} chips of {target.topology}; slices have {known}")
    topology = topologies.get_topology_desc(**target.slice_of(count))
    program, batch = _program(config, model, list(topology.devices), implementation, donate=True)
    return program, *_compiled(program, batch)


def _compiled(program: Program, batch: Batch) -> tuple[tuple[int, int], str]:
    """Bytes that a step takes on a device and in host memory, and the compiled module.

    A step that does not fit is not compiled for TPUs: of it there is what the compiler says, and no
    module.
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
    return _totals(compiled.memory_analysis()), compiled.as_text() or ""


def _totals(stats: Any) -> tuple[int, int]:
    """Arguments, results and temporaries on the device, and in host memory."""
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
    total, host_total = totals
    terms = _terms(program)
    device = {name: _bytes(tree, on_host=False) for name, tree in terms.items()}
    host = {name: _bytes(tree, on_host=True) for name, tree in terms.items()}
    if host_total == 0:  # XLA's CPU backend counts host memory as the device's
        host_total = sum(host.values())
        total -= host_total
    device[REST] = total - sum(device.values())
    host[REST] = max(host_total - sum(host.values()), 0)
    pcie = _pcie_bytes(program, host, config)
    flops = _flops(text) if text else None
    return Usage(device, host, total, host_total, pcie, capacity, flops)


def _flops(text: str) -> int | None:
    try:
        return matmul_flops(text)
    except ValueError as error:  # decides nothing about a run
        logging.getLogger(__name__).warning("%s", error)
        return None


def _bytes(tree: object, *, on_host: bool) -> int:
    """Bytes on one device (or its share of host memory) of placed shapes."""
    leaves = [x for x in jax.tree.leaves(tree) if is_for_host(x) == on_host]
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
    return sum(map(size, leaves))


def _pcie_bytes(program: Program, host: Mapping[str, int], config: TrainConfig) -> int:
    """Weights go to the device forwards and backwards, gradients there and back, in every
    micro-batch; the update reads everything once and writes what changed; so does the norm.
    """
    micros = program.accumulation
    weights = host["frozen weights"] + host["trainables"]
    gradients = host["gradients"]
    moved = micros * (2 * weights + 2 * gradients) + 2 * gradients
    moved += 2 * (host["trainables"] + host["optimizer"])
    if config.memory.offload_activations:
        moved += 2 * micros * host[REST]
    return moved


def sizes(config: TrainConfig) -> ModelConfig:
    """The sizes of a run's model: its checkpoint's, or the config's where there is none yet.

    Raises:
        ConfigError: There is neither.
    """
    source = config.init_from
    base = source.llm if isinstance(source, Parts) else source
    if source is not None and (config.model is None or Path(str(base)).exists()):
        return read_config(resolve(source).base)
    if config.model is None:
        raise ConfigError("set init_from to a checkpoint, or model")
    return config.model


def usage_table(usage: Usage) -> str:
    """Device and host bytes by term, what they come to, and what a step costs."""
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
    lines.append(f"PCIe: {usage.pcie / GIB:.1f} GiB an optimizer step, both ways together")
    flops = "not counted" if usage.flops is None else f"{usage.flops:.3e}"
    lines.append(f"FLOPs: {flops} a device and optimizer step, of matrix products")
    verdict = "fits" if usage.fits else "does not fit"
    return "\n".join([*lines, verdict if known else f"{verdict}; the host's memory is not given"])

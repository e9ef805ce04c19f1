"""Compiles a run for a device that need not be here, and reads its memory from the compiler.

The real train step is lowered and compiled from shapes alone; nothing is loaded or executed. A GPU
is described to the compiler by `devices.GPUS`; a TPU by the topology that libtpu knows. The process
must have been prepared by `prepare_environment` before JAX was imported.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from llava_jax.config import BatchConfig, ConfigError, MemoryConfig, ModelConfig, TrainConfig
from llava_jax.devices import GPUS, RESERVE, TPUS, Gpu, Tpu
from llava_jax.program import Program, attention_kind, build_program
from llava_jax.sharding import HOST, data_parallel_size, make_mesh

STREAMING_FLAG = "--xla_disable_hlo_passes=dynamic-slice-annotator"
"""XLA:GPU may compute wrong gradients where a loop slices host memory backwards (openxla/xla
#46231, seen with jaxlib 0.11.0): the pass that it switches off annotates such slices wrongly."""

PLANNING_FLAGS = (
    # Without a GPU nothing can be tuned, and some products then find no Triton tiling.
    "--xla_gpu_enable_triton_gemm=false",
    STREAMING_FLAG,
)
TOTAL_STEPS = 1000  # a schedule's length, which decides nothing about memory


def prepare_environment() -> None:
    """Lets this process compile for devices that are not here; call it before importing JAX."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *PLANNING_FLAGS])
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run fits: all that may change without changing what is learned."""

    micro_size: int
    memory: MemoryConfig

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The same recipe by this plan."""
        memory = dataclasses.replace(self.memory, plan="manual")
        batch = dataclasses.replace(config.batch, micro_size=self.micro_size)
        return dataclasses.replace(config, batch=batch, memory=memory)

    def __str__(self) -> str:
        memory = self.memory
        parts = [f"micro-batch {self.micro_size}", f"remat {memory.remat}"]
        parts += ["optimizer on host"] if memory.offload_optimizer else []
        parts += ["weights streamed"] if memory.stream_weights else []
        parts += ["activations on host"] if memory.offload_activations else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a plan takes, in bytes for each device.

    Attributes:
        device: On the device by term; they add up to the compiler's total.
        host: In the host's pinned memory by term.
        total: The compiler's peak on the device: arguments, results and temporaries.
        host_total: The same in host memory.
        pcie: Bytes over PCIe in an optimizer step, both ways together.
        flops: The compiler's count of an optimizer step's operations.
        capacity: The device's memory.
    """

    device: dict[str, int]
    host: dict[str, int]
    total: int
    host_total: int
    pcie: int
    flops: float
    capacity: int

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def headroom(self) -> int:
        """Bytes left, after what is reserved for the runtime."""
        return self.capacity - RESERVE - self.total


def find_device(name: str) -> Gpu | Tpu:
    """A device of `devices.py`.

    Raises:
        ConfigError: None is called so.
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
        device: A name in `devices.py`.
        count: Devices.
        capacity: Bytes of one device; None takes the table's.

    Raises:
        ConfigError: The device is unknown, its compiler is not installed, or the config does not
            fit so many devices.
    """
    target = find_device(device)
    capacity = target.memory if capacity is None else capacity
    if isinstance(target, Gpu):
        program, stats, flops = _compile_for_gpus(config, model, target, count)
    else:
        program, stats, flops = _compile_for_tpus(config, model, target, count)
    return _usage(program, config, stats, flops, capacity)


def _program(
    config: TrainConfig, model: ModelConfig, devices: list[Any], capability: str
) -> tuple[Program, Any]:
    mesh = make_mesh(config.mesh, devices)
    kind = attention_kind(config, model, capability)
    program = build_program(config, model, TOTAL_STEPS, mesh, kind=kind, donate=True)
    images = 1 if config.data.max_images is None else config.data.max_images
    batch = program.abstract_batch(config.batch.global_size, config.data.max_length, images)
    return program, batch


def _compile_for_gpus(
    config: TrainConfig, model: ModelConfig, target: Gpu, count: int
) -> tuple[Program, Any, float]:
    """Lowers on fake CPU devices, which have memory kinds, and compiles for absent GPUs."""
    if importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ConfigError("planning for GPUs needs their compiler: pip install 'llava_jax[cuda12]'")
    from jax._src import compiler  # no public way takes a module and a topology
    from jax._src.lib import xla_client

    if len(jax.devices("cpu")) < count:
        raise ConfigError(f"{count} devices were asked for after JAX had started with fewer")
    program, batch = _program(config, model, jax.devices("cpu")[:count], target.capability)
    module = program.trace_train_step(batch).lower(lowering_platforms=("cuda",))
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="target",
        target_config=target.target_config,
        topology=f"1x1x{count}",
    )
    client = topology.devices[0].client
    options = compiler.get_compile_options(
        1, count, device_assignment=np.arange(count).reshape(1, count), backend=client
    )
    executable = client.compile(
        module.compiler_ir("stablehlo"),
        executable_devices=xla_client.DeviceList(tuple(topology.devices)),
        compile_options=options,
    )
    flops = sum(_module_flops(m) for m in executable.hlo_modules())
    return program, executable.get_compiled_memory_stats(), flops


def _compile_for_tpus(
    config: TrainConfig, model: ModelConfig, target: Tpu, count: int
) -> tuple[Program, Any, float]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("planning for TPUs needs their compiler: pip install 'llava_jax[tpu]'")
    if count not in target.chips:
        known = ", ".join(map(str, target.chips))
        raise ConfigError(f"{count} chips of {target.topology}; slices have {known}")
    topology = topologies.get_topology_desc(
        f"{target.topology}:{target.chips[count]}", platform="tpu"
    )
    program, batch = _program(config, model, list(topology.devices)[:count], "")
    compiled = program.trace_train_step(batch).lower().compile()
    return program, compiled.memory_analysis(), _flops(compiled.cost_analysis())


def _flops(analysis: Any) -> float:
    first = analysis[0] if isinstance(analysis, list) else analysis
    return float((first or {}).get("flops", 0.0))


def _usage(
    program: Program, config: TrainConfig, stats: Any, flops: float, capacity: int
) -> Usage:
    state, abstract = program.state, program.abstract
    trainable = {path: abstract[path] for path in program.trainable}
    terms = {
        "frozen weights": {path: abstract[path] for path in program.frozen},
        "trainables": trainable,
        "optimizer": [x for x in jax.tree.leaves(state.opt_state)],
        "gradients": trainable,
    }
    device = {name: _bytes(tree, on_host=False) for name, tree in terms.items()}
    host = {name: _bytes(tree, on_host=True) for name, tree in terms.items()}
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
    device["activations and temporaries"] = total - sum(device.values())
    host["activations and temporaries"] = max(host_total - sum(host.values()), 0)
    return Usage(
        device, host, total, host_total, _pcie_bytes(program, host, config), flops, capacity
    )


def _bytes(tree: Any, *, on_host: bool) -> int:
    """Bytes on one device (or its share of host memory) of placed shapes."""
    leaves = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == HOST) == on_host]
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
        moved += 2 * micros * host["activations and temporaries"]
    return moved


def candidates(config: TrainConfig, devices: int) -> Iterator[Plan]:
    """Plans for a recipe, the cheapest first.

    Each level (nothing given up; optimizer on host; weights streamed; activations on host) is tried
    with ever smaller micro-batches; less is computed again only where nothing has been given up.

    Args:
        config: The recipe; a `micro_size` that it sets is kept.
        devices: Data-parallel devices.
    """
    per_device = max(config.batch.global_size // devices, 1)
    sizes = [size for size in range(per_device, 0, -1) if per_device % size == 0 and size <= 16]
    sizes = [config.batch.micro_size] if config.batch.micro_size else sizes[:1] + sizes[1:]
    base = dataclasses.replace(
        config.memory,
        offload_optimizer=False,
        stream_weights=False,
        offload_activations=False,
        remat="full",
    )
    for remat in ("none", "dots"):
        yield Plan(sizes[-1], dataclasses.replace(base, remat=remat))
    levels = [
        {},
        {"offload_optimizer": True},
        {"offload_optimizer": True, "stream_weights": True},
        {"offload_optimizer": True, "stream_weights": True, "offload_activations": True},
    ]
    for level in levels:
        for size in sizes:
            yield Plan(size, dataclasses.replace(base, **level))


def devices_of(config: TrainConfig, count: int) -> int:
    """Data-parallel devices of a config on so many devices."""
    tensor = config.mesh.tensor
    return count // tensor if tensor > 0 else 1


__all__ = ["BatchConfig", "Plan", "Usage", "candidates", "data_parallel_size", "measure"]


def _module_flops(m):
    from jax._src.lib import xla_client
    try:
        cpu = jax.devices("cpu")[0].client
        a = xla_client._xla.hlo_module_cost_analysis(cpu, m)
        return a.get("flops", 0.0)
    except Exception as e:
        print("cost:", type(e), str(e)[:200])
        return 0.0

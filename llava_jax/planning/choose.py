"""Chooses the memory plan of a run for the attached devices, before any weight is loaded."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.distributed.environment import (
    GIB,
    POOL_SHARE,
    available_memory,
    host_memory_share,
)
from llava_jax.distributed.multihost import (
    all_gather_values,
    is_main_process,
    processes_of_machine,
    say,
)
from llava_jax.distributed.sharding import data_parallel_size
from llava_jax.errors import ConfigError
from llava_jax.planning.beside import outside_pool
from llava_jax.planning.cache import measure_once
from llava_jax.planning.compile import program_here
from llava_jax.planning.devices import GPUS, rates_of, shares_host
from llava_jax.planning.estimate import make_estimator
from llava_jax.planning.search import (
    MAX_CPU_TRIALS,
    Capacity,
    Plan,
    Trial,
    choose_plan,
    find_cpu_plan,
    find_plan,
    least_devices,
    write_trial,
)
from llava_jax.planning.usage import reserve_of


def plan_for_attached(
    config: TrainConfig,
    model: ModelConfig,
    steps: int,
    mesh: Mesh,
    slots: int,
    begun: Plan | None = None,
) -> TrainConfig:
    """Returns the config of a run with the fastest plan that fits into the attached devices.

    The config is returned unchanged if the run does not search for a plan; see
    `TrainConfig.searches_plan`. Otherwise, plan.json in the run's directory shows the chosen plan.
    All processes of the run must call this function.

    On a CPU, a plan may use the available memory of the machine. If `memory.limit_gib` is set, the
    CPU is planned for like an accelerator that has this memory.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        steps: Number of train steps of the run.
        mesh: Mesh of the run.
        slots: Number of image slots per row.
        begun: Plan that a resumed run began with, which is kept if it fits.

    Raises:
        ConfigError: No plan fits; the message names the plan that is closest to fitting. Or an
            accelerator does not report its memory, and `memory.limit_gib` is None.
    """
    if is_main_process():
        write_trial(config.run_dir, None)
    if not config.searches_plan:
        return config
    on_cpu = config.memory.limit_gib is None and jax.default_backend() == "cpu"
    processes = processes_of_machine()
    devices = processes * jax.local_device_count()
    own = available_memory() // devices if on_cpu else _device_memory(config)
    device = jax.local_devices()[0]
    is_shared = on_cpu or shares_host(device.device_kind)
    capacity = min(all_gather_values(own))
    known = Path(config.output_dir) / ".plans"
    for_host = min(all_gather_values(host_memory_share(processes) // jax.local_device_count()))
    # Plans are compiled with the run's number of steps. If the run pads to `data.max_length`, JAX
    # later finds the step in its compilation cache.
    as_run = dataclasses.replace(config, steps=steps)
    measure = lambda plan: dataclasses.replace(
        measure_once(known, plan.apply(as_run), model, slots, capacity),
        host_capacity=for_host,
        shares_host=is_shared,
    )
    size = data_parallel_size(mesh)
    if begun is not None and (kept := Trial(begun, measure(begun))).usage.fits:
        say(f"plan: {begun} (as when the run began)")
        if is_main_process():
            write_trial(config.run_dir, kept)
        return begun.apply(config)
    if begun is not None:
        say(
            f"{begun}, the plan that the run began with, no longer fits. With another plan, the "
            "losses are the same except for rounding, not bit for bit."
        )
    if on_cpu:
        chosen = choose_plan(find_cpu_plan(config, size, measure), MAX_CPU_TRIALS)
    else:
        rates = rates_of(device.device_kind) or GPUS["rtx3090"].rates  # used to rank plans
        build = lambda config: program_here(config, model, slots)[0]
        estimate = make_estimator(config, model, rates, build, slots)
        outside = outside_pool(device.platform, device.device_kind, mesh.size)
        free = capacity - reserve_of(capacity, outside)
        room = Capacity(free, for_host, is_shared)
        chosen = choose_plan(find_plan(config, size, measure, estimate, room))
    if not chosen.usage.fits:
        raise ConfigError(_describe_misfit(chosen, mesh.size, for_host, on_cpu=on_cpu))
    if is_main_process():
        write_trial(config.run_dir, chosen)
    return chosen.plan.apply(config)


def _describe_misfit(closest: Trial, devices: int, for_host: int, *, on_cpu: bool) -> str:
    """Returns an error message for a run that no plan fits.

    Args:
        closest: Trial of the plan that is closest to fitting.
        devices: Number of devices of the run.
        for_host: Host memory that may be used for a device, in bytes.
        on_cpu: Whether the run uses the available memory of the machine.
    """
    usage = closest.usage
    enough = None if on_cpu else least_devices(usage, devices)
    reserve = f"{usage.reserve / GIB:.1f} GiB of this are reserved for the runtime"
    room = f"{usage.capacity / GIB:.1f} GiB per device ({reserve})"
    room += "" if on_cpu else f" and {for_host / GIB:.1f} GiB of host memory"
    need = f"{usage.device_needed / GIB:.2f} GiB per device"
    need += "" if on_cpu else f" and {usage.host_needed / GIB:.2f} GiB of host memory"
    return (
        f"no plan fits into {room}; the closest plan is {closest.plan}; it needs {need}; use "
        + ("more host memory, or " if usage.host_headroom < 0 else "")
        + (f"at least {enough} such devices, or " if enough else "")
        + "a smaller model or a smaller data.max_length"
    )


def _device_memory(config: TrainConfig) -> int:
    """Returns a device's memory in bytes, from the config or from JAX.

    Raises:
        ConfigError: Neither of them knows the memory.
    """
    if config.memory.limit_gib is not None:
        return int(config.memory.limit_gib * GIB)
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ConfigError(
            f"memory.plan is 'auto', but {device.device_kind} does not report the size of its "
            "memory; set memory.limit_gib to this size in GiB (for example, "
            "--memory.limit-gib 24), or set memory.plan to 'manual' and choose the plan yourself"
        )
    # JAX reports the memory of its pool; see `prepare_for_training`.
    return int(limit / POOL_SHARE)

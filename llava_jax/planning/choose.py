"""Chooses the memory plan of a run for the attached devices, before any weight is loaded."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.distributed.environment import GIB, POOL_SHARE, host_memory_share
from llava_jax.distributed.multihost import all_gather_values, is_main_process, processes_of_machine
from llava_jax.distributed.sharding import data_parallel_size
from llava_jax.errors import ConfigError
from llava_jax.planning.cache import measure_once
from llava_jax.planning.search import choose_plan, least_devices, write_trial


def plan_for_attached(
    config: TrainConfig, model: ModelConfig, steps: int, mesh: Mesh, images: int
) -> TrainConfig:
    """Returns the config of a run with the fastest plan that fits into the attached devices.

    The config is returned unchanged if `memory.plan` is "manual", or if the devices do not report
    their memory and `memory.limit_gib` is None. Otherwise, plan.json in the run's directory shows
    the chosen plan. All processes of the run must call this function.

    Args:
        config: Config of the run.
        model: Sizes of the model.
        steps: Number of train steps of the run.
        mesh: Mesh of the run.
        images: Number of image slots per sample.

    Raises:
        ConfigError: No plan fits; the message names the plan that is closest to fitting.
    """
    if is_main_process():
        write_trial(config.run_dir, None)
    if config.memory.plan == "manual":
        return config
    capacity = min(all_gather_values(_device_memory(config)))
    if not capacity:  # CPUs report no memory
        return config
    known = Path(config.output_dir) / ".plans"
    own = host_memory_share(processes_of_machine()) // jax.local_device_count()
    for_host = min(all_gather_values(own))
    # Plans are compiled with the run's number of steps, so that the run later compiles the same
    # step, which JAX then finds in its compilation cache.
    as_run = dataclasses.replace(config, steps=steps)
    measure = lambda plan: dataclasses.replace(
        measure_once(known, plan.apply(as_run), model, images, capacity), host_capacity=for_host
    )
    chosen = choose_plan(config, data_parallel_size(mesh), measure)
    if not chosen.usage.fits:
        usage, devices = chosen.usage, least_devices(chosen.usage, mesh.size)
        raise ConfigError(
            f"no plan fits into {capacity / GIB:.1f} GiB per device ({usage.reserve / GIB:.1f} GiB "
            f"of this are reserved for the runtime) and {for_host / GIB:.1f} GiB of host memory; "
            f"the closest plan is {chosen.plan}; it needs {usage.device_needed / GIB:.2f} GiB per "
            f"device and {usage.host_needed / GIB:.2f} GiB of host memory; use "
            + ("more host memory, or " if usage.host_headroom < 0 else "")
            + (f"at least {devices} such devices, or " if devices else "")
            + "a smaller model, a smaller data.max_length or a smaller lora.rank"
        )
    if is_main_process():
        write_trial(config.run_dir, chosen)
    return chosen.plan.apply(config)


def _device_memory(config: TrainConfig) -> int:
    """Returns a device's memory in bytes, from the config or from JAX; 0 if it is unknown."""
    if config.memory.limit_gib is not None:
        return int(config.memory.limit_gib * GIB)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    # JAX reports the memory of its pool; see `prepare_for_training`.
    return int(limit / POOL_SHARE)

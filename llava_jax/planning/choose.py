"""The plan for the devices that are attached, chosen before a weight is loaded."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from llava_jax.config import ModelConfig, TrainConfig
from llava_jax.distributed.environment import GIB, RESERVE_SHARE, host_memory
from llava_jax.distributed.multihost import all_gather_values, devices_of_machine, is_main_process
from llava_jax.distributed.sharding import data_parallel_size
from llava_jax.errors import ConfigError
from llava_jax.planning.cache import measure_once
from llava_jax.planning.search import choose_plan, least_devices, write_trial


def plan_for_attached(
    config: TrainConfig, model: ModelConfig, steps: int, mesh: Mesh, images: int
) -> TrainConfig:
    """The cheapest plan that fits the attached devices, if asked for, before a weight is loaded.

    Raises:
        ConfigError: No plan fits; the message names the closest one.
    """
    if is_main_process():
        write_trial(config.run_dir, None)
    if config.memory.plan == "manual":
        return config
    capacity = min(all_gather_values(_device_memory(config)))
    if not capacity:  # a CPU without a declared limit
        return config
    known = Path(config.output_dir) / ".plans"
    for_host = min(all_gather_values(int(0.9 * host_memory()) // devices_of_machine()))
    as_run = dataclasses.replace(config, steps=steps)  # so that the step need not compile again
    measure = lambda plan: dataclasses.replace(
        measure_once(known, plan.apply(as_run), model, images, capacity), host_capacity=for_host
    )
    chosen = choose_plan(config, data_parallel_size(mesh), measure)
    if not chosen.usage.fits:
        usage, devices = chosen.usage, least_devices(chosen.usage, mesh.size)
        raise ConfigError(
            f"no plan fits {capacity / GIB:.1f} GiB a device, of which {usage.reserve / GIB:.1f} "
            f"are left to the runtime, and {for_host / GIB:.1f} GiB of host memory a device; the "
            f"closest is {chosen.plan}: {usage.total / GIB:.2f} and {usage.host_total / GIB:.2f}; "
            "take "
            + ("more host memory, or " if usage.host_headroom < 0 else "")
            + (f"at least {devices} such devices, or " if devices else "")
            + "a smaller model, data.max_length or lora.rank"
        )
    if is_main_process():
        write_trial(config.run_dir, chosen)
    return chosen.plan.apply(config)


def _device_memory(config: TrainConfig) -> int:
    """Bytes of one device, as declared or found; 0 if they are neither."""
    if config.memory.limit_gib is not None:
        return int(config.memory.limit_gib * GIB)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    return int(limit / (1 - RESERVE_SHARE))

"""Caches the measured memory of plans on disk, so that each plan is compiled only once."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax

from llava_jax.config import IGNORED_BY_PLANS, ModelConfig, TrainConfig, flatten, to_json
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import hash_code, versions
from llava_jax.distributed.multihost import (
    all_gather_values,
    barrier,
    broadcast_from_main,
    is_main_process,
)
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import COMPILER_VARIABLES
from llava_jax.planning.forecast import Forecast
from llava_jax.planning.measure import measure_here
from llava_jax.planning.peak import LargeArray
from llava_jax.planning.usage import Usage


def measure_once(
    directory: Path, config: TrainConfig, model: ModelConfig, slots: int, capacity: int
) -> Usage:
    """Returns the memory use of a plan, from the cache if possible, else from `measure_here`.

    All processes of a run must call this function with the same arguments.

    Args:
        directory: Directory of the cache, with one JSON file per plan; created if it is missing.
        config: Config of the run; `memory` and `batch.micro_size` are the plan.
        model: Sizes of the model.
        slots: Number of image slots per row.
        capacity: Memory of one device, in bytes.

    Raises:
        ConfigError: This process cannot read the file of the plan.
    """
    file = directory / f"{broadcast_from_main(_key(config, model, slots)):015x}.json"
    # Either all processes must compile, or none of them. Only the main process looks for the file,
    # because a network file system may hide a new file from a process that looked for it earlier.
    if not broadcast_from_main(is_main_process() and _read(file) is not None):
        usage = measure_here(config, model, slots, capacity)
        if any(all_gather_values(usage.out_of_memory)):
            # This is not cached, because another program may have used the memory.
            return dataclasses.replace(usage, out_of_memory=True)
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(dataclasses.asdict(usage), indent=2) + "\n")
        barrier()
    usage = _read(file)
    if usage is None:
        raise ConfigError(f"{file} cannot be read; remove the file, and run the command again")
    return dataclasses.replace(usage, capacity=capacity)


def _read(file: Path) -> Usage | None:
    """Returns the cached memory use, or None if the file is missing or damaged."""
    try:
        found = json.loads(file.read_bytes())
        if found["forecast"] is not None:
            found["forecast"] = Forecast(**found["forecast"])
        found["largest"] = tuple(LargeArray(**array) for array in found["largest"])
        return Usage(**found)
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None


def _key(config: TrainConfig, model: ModelConfig, slots: int) -> int:
    """Returns a 60-bit hash of what affects a plan's memory: config, code, compiler, devices."""
    fields = to_json(dataclasses.replace(config, model=model))
    devices = jax.devices()
    decisive = {
        "config": flatten(fields, IGNORED_BY_PLANS),
        "slots": slots,
        # A plan also counts what an evaluation needs beside a step.
        "evaluation": (config.data.has_eval, config.eval.batch_size),
        "code": hash_code(),
        "versions": versions(),
        "flags": [os.environ.get(name) for name in COMPILER_VARIABLES],
        "compiler": devices[0].client.platform_version,
        "devices": [device.device_kind for device in devices],
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    return int(digest.hexdigest()[:15], 16)

"""What plans take, kept between starts of a run, so that planning again costs nothing."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import jax

from llava_jax.config import IGNORED_BY_PLANS, ModelConfig, TrainConfig, flatten, to_json
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import versions
from llava_jax.distributed.multihost import barrier, broadcast_from_main, is_main_process
from llava_jax.errors import ConfigError
from llava_jax.jax_compat import COMPILER_VARIABLES
from llava_jax.planning.measure import Usage, measure_here


def measure_once(
    directory: Path, config: TrainConfig, model: ModelConfig, images: int, capacity: int
) -> Usage:
    """What `planning.search.measure_here` gives, or gave before.

    Args:
        directory: Where figures are kept, a file each; made when needed.
        config: The run, its plan resolved.
        model: The model's sizes.
        images: Image slots of a sample.
        capacity: Bytes of one device.
    """
    file = directory / f"{broadcast_from_main(_key(config, model, images)):015x}.json"
    # Of several processes all must compile, or none. Only the first looks, because on a shared disk
    # the others might go on not to see what was not there.
    if not broadcast_from_main(is_main_process() and _read(file) is not None):
        usage = measure_here(config, model, images, capacity)
        if is_main_process():
            directory.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(dataclasses.asdict(usage), indent=2) + "\n")
        barrier()
    usage = _read(file)
    if usage is None:
        raise ConfigError(f"{file} cannot be read; remove it, and what plans take is measured anew")
    return dataclasses.replace(usage, capacity=capacity)


def _read(file: Path) -> Usage | None:
    """What was kept; None where it is missing or damaged."""
    try:
        return Usage(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _key(config: TrainConfig, model: ModelConfig, images: int) -> int:
    """A hash of all that decides what a plan takes: recipe, plan, code, compiler and devices."""
    fields = to_json(dataclasses.replace(config, model=model))
    devices = jax.devices()
    decisive = {
        "config": flatten(fields, IGNORED_BY_PLANS),
        "images": images,
        "code": hash_code(),
        "versions": versions(),
        "flags": [os.environ.get(name) for name in COMPILER_VARIABLES],
        "compiler": devices[0].client.platform_version,
        "devices": [device.device_kind for device in devices],
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode())
    return int(digest.hexdigest()[:15], 16)


def hash_code() -> str:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

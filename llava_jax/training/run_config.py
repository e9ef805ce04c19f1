"""config.json and data.json: what a run is. Written at its start, and compared when it resumes."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax

from llava_jax.config import MAY_CHANGE, Json, ModelConfig, TrainConfig, flatten, to_json
from llava_jax.data.digest import data_changes
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import versions
from llava_jax.distributed.multihost import is_main_process
from llava_jax.errors import ConfigError


def describe(
    config: TrainConfig,
    model: ModelConfig,
    steps: int,
    fingerprint: str | None,
    data: Json,
) -> Json:
    """A run's resolved config, the versions of its software, and digests of its weights and data.

    Args:
        config: The run.
        model: Sizes of the model.
        steps: Optimizer steps of the whole run.
        fingerprint: Fingerprint of the base; None without one.
        data: From `Inputs.digest`.
    """
    return {
        "config": to_json(dataclasses.replace(config, steps=steps, model=model)),
        "base_fingerprint": fingerprint,
        "versions": versions(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "data": data,
    }


def write_description(run_dir: Path, description: Json) -> None:
    """Writes config.json, and data.json, which is long. Only the first process writes."""
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        data = description["data"]
        rest = {name: value for name, value in description.items() if name != "data"}
        replace_text(run_dir / "data.json", json.dumps(data, indent=1) + "\n")
        replace_text(run_dir / "config.json", json.dumps(rest, indent=2) + "\n")


class Changes(NamedTuple):
    """Differences between a run and its earlier start.

    Attributes:
        recipe: Lines about the recipe and the base.
        data: Lines about the data.
        sources: Where the training data came from at the earlier start.
    """

    recipe: list[str]
    data: list[str]
    sources: str


def changes(run_dir: Path, description: Json) -> Changes:
    """Compares a run's recipe, base and data with those of its earlier start.

    Raises:
        ConfigError: The files of the earlier start cannot be read.
    """
    file = run_dir / "config.json"
    try:
        began = json.loads(file.read_text())
        before = flatten(began["config"], MAY_CHANGE)
        base = began["base_fingerprint"]
        data = _data_changes(run_dir, began["config"]["data"], description)
        sources = data_sources(began["config"]["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} or data.json cannot be read ({error}), but there are checkpoints beside it, "
            "which have no copy; put it back, "
            "remove the checkpoints, or give the run a new --name"
        ) from error
    now = flatten(description["config"], MAY_CHANGE)
    differences = [
        f"  {field}: {before.get(field)!r} there, {now.get(field)!r} here"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    ]
    if base != description["base_fingerprint"]:
        differences.append(
            f"  the base's fingerprint: {base} there, {description['base_fingerprint']} here"
        )
    return Changes(differences, [f"  {line}" for line in data], sources)


def data_sources(data: Json) -> str:
    """Where training data comes from, read from the data group of a config as JSON."""
    return ", ".join(part["path"] for part in data["mixture"]) or str(data["path"])


def _data_changes(run_dir: Path, began: Json, description: Json) -> list[str]:
    """Differences in the data. Evaluation data is compared only if it has the same source."""
    file, now = run_dir / "data.json", description["config"]["data"]
    if not file.exists():  # the run was begun by an older version
        return []
    before = json.loads(file.read_bytes())
    found = [*data_changes(before["train"], description["data"]["train"])]
    if all(began[name] == now[name] for name in ("eval_path", "eval_samples")):
        found += data_changes(before["eval"], description["data"]["eval"], "held-out data")
    return found

"""Writes config.json and data.json when a run starts, and compares them when the run resumes."""

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
    """Returns the description of a run: config, software versions, devices and digests, as JSON.

    Args:
        config: Config of the run.
        model: Sizes and token ids of the model.
        steps: Number of optimizer steps of the whole run.
        fingerprint: Fingerprint of the base; None if there is no base.
        data: Digests of the data, as `Inputs.digest` returns them.
    """
    return {
        "config": to_json(dataclasses.replace(config, steps=steps, model=model)),
        "base_fingerprint": fingerprint,
        "versions": versions(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "data": data,
    }


def write_description(run_dir: Path, description: Json) -> None:
    """Writes a run's description to config.json and data.json. Only the main process writes.

    The digests of the data are in a file of their own, because they are long.

    Args:
        run_dir: Directory of the run, which is created if it does not exist.
        description: Description that `describe` returned.
    """
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
        data = description["data"]
        rest = {name: value for name, value in description.items() if name != "data"}
        replace_text(run_dir / "data.json", json.dumps(data, indent=1) + "\n")
        replace_text(run_dir / "config.json", json.dumps(rest, indent=2) + "\n")


class Changes(NamedTuple):
    """Differences between this start of a run and its earlier start.

    Attributes:
        recipe: One line of text for each difference in the recipe or the base.
        data: One line of text for each difference in the data.
        sources: Paths of the training data at the earlier start, as one text.
    """

    recipe: list[str]
    data: list[str]
    sources: str


def changes(run_dir: Path, description: Json) -> Changes:
    """Compares the recipe, the base and the data of a run with those of its earlier start.

    Args:
        run_dir: Directory of the run, with config.json and data.json of the earlier start.
        description: Description of this start, as `describe` returns it.

    Raises:
        ConfigError: config.json or data.json cannot be read.
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
            f"{file} or data.json cannot be read ({error}), and the checkpoints of the run have no "
            "copy; restore the file, remove the checkpoints, or give the run a new --name"
        ) from error
    now = flatten(description["config"], MAY_CHANGE)
    differences = [
        f"  {field}: {before.get(field)!r} before, {now.get(field)!r} now"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    ]
    if base != description["base_fingerprint"]:
        differences.append(
            f"  the base's fingerprint: {base} before, {description['base_fingerprint']} now"
        )
    return Changes(differences, [f"  {line}" for line in data], sources)


def data_sources(data: Json) -> str:
    """Returns the paths of the training data, separated by commas.

    Args:
        data: The group `data` of a config, as JSON.
    """
    return ", ".join(part["path"] for part in data["mixture"]) or str(data["path"])


def _data_changes(run_dir: Path, began: Json, description: Json) -> list[str]:
    """Returns the differences in the data; for eval data, only if its fields are unchanged."""
    file, now = run_dir / "data.json", description["config"]["data"]
    if not file.exists():  # an older version started the run
        return []
    before = json.loads(file.read_bytes())
    found = [*data_changes(before["train"], description["data"]["train"])]
    if all(began[name] == now[name] for name in ("eval_path", "eval_samples")):
        found += data_changes(before["eval"], description["data"]["eval"], "held-out data")
    return found

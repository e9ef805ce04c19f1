"""Writes config.json and data.json, the description of a run, when the run starts."""

import dataclasses
import datetime
import json
import shlex
import sys
from pathlib import Path

import jax

from llava_jax.config import Json, ModelConfig, TrainConfig, to_json
from llava_jax.disk import replace_text
from llava_jax.distributed.environment import versions
from llava_jax.distributed.multihost import is_main_process


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
        fingerprint: Fingerprint of the base model; None if there is no base model.
        data: Digests of the data, from `Inputs.digest`.
    """
    return {
        "config": to_json(dataclasses.replace(config, steps=steps, model=model)),
        "base_fingerprint": fingerprint,
        "versions": versions(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "data": data,
    }


def describe_start(parameters: dict[str, int], began: Json | None = None) -> Json:
    """Returns what the report shows about the start of a run, as further fields of config.json.

    Args:
        parameters: Numbers of parameters, from `Program.count_parameters`.
        began: Content of config.json from the first start of the run; None if this is the first
            start.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    started = now if began is None else began.get("started", now)
    return {"started": started, "command": this_command(), "parameters": parameters}


def this_command() -> str | None:
    """Returns the command that started this process, for a shell; None if Python code started it.

    `python -m llava_jax.train` is written as `llava-jax train`, which is the same command.
    """
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.parts[-2:] == ("llava_jax", "train.py"):
        arguments = ["train", *arguments]
    elif program.name != "llava-jax" and program.parts[-2:] != ("llava_jax", "__main__.py"):
        return None
    return shlex.join(["llava-jax", *arguments]) if arguments[:1] == ["train"] else None


def write_description(run_dir: Path, description: Json) -> None:
    """Writes a run's description to config.json and data.json. Only the main process writes.

    The digests of the data are long, so they are written to a separate file, data.json.

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

"""Finds the weights that a run starts from, and compares a resumed run's config and data.

A run can only be resumed with the recipe and the data that it began with.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

from llava_jax.config import MAY_CHANGE, Json, MemoryConfig, TrainConfig, flatten, to_json
from llava_jax.data.digest import data_changes
from llava_jax.data.padding import Buckets
from llava_jax.distributed.multihost import broadcast_from_main, is_main_process, say
from llava_jax.errors import ConfigError
from llava_jax.planning.search import Plan
from llava_jax.pretrained.resolve import Checkpoint, adapter_in, resolve_start
from llava_jax.training.checkpoints import Checkpoints


def follow_adapter(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Finds the checkpoint that a run starts from, and its adapter if there is one.

    If `init_from` is the directory of an earlier run that trained an adapter, the run starts from
    the base model and the adapter of the earlier run.

    Args:
        config: Config of the run.

    Returns:
        The config, whose `init_adapter` is the path of the adapter to start from, and the
        checkpoint. The checkpoint is None if the model is trained from scratch.

    Raises:
        ConfigError: The checkpoint or the adapter does not exist, or does not fit `tune`.
        CheckpointError: The checkpoint cannot be used.
    """
    if (source := config.init_from) is None:
        if config.tune.has_adapters:
            raise ConfigError("tune 'lora' needs a base model; set init_from to a checkpoint")
        return config, None
    if config.init_adapter is not None:
        adapter = str(adapter_in(config.init_adapter))
        config = dataclasses.replace(config, init_adapter=adapter)
    found = resolve_start(source)
    if found.adapter is None:
        return config, found
    if config.init_adapter is not None:
        raise ConfigError(
            f"init_from {config.init_from} already contains the adapter {found.adapter}, so "
            f"init_adapter {config.init_adapter} cannot be added; leave init_adapter out, or set "
            f"init_from to the base model {found.name}"
        )
    if not config.tune.has_adapters:
        raise ConfigError(
            f"init_from {config.init_from} contains the adapter {found.adapter}, but this run does "
            "not train adapters; merge the adapter first (LlavaModel.merge_adapter and "
            "save_pretrained), and start from the merged model"
        )
    return dataclasses.replace(config, init_adapter=str(found.adapter)), found


def check_begun(
    config: TrainConfig,
    saved: Checkpoints,
    description: Json,
    identity: Json,
) -> None:
    """Checks that a run resumes with the recipe and the data that it began with.

    If the recipe or the data has changed before any step was trained, no error is raised, and the
    files of the earlier start are removed.

    Args:
        config: Config of the run.
        saved: Checkpoints of the run, at least one.
        description: Description of this start, as returned by `run_config.describe`.
        identity: Values that determine the order of the samples, from `EpochOrder.identity`.

    Raises:
        ConfigError: Steps were trained, and the recipe or the data differs. With
            `checkpoint.accept_changes`, only a different order of the samples is an error.
    """
    found = changes(config.run_dir, description)
    position = saved.position()
    fixed = [name for name, value in identity.items() if position.get(name) != value]
    if not (found.recipe or found.data or fixed):
        return
    rows = config.run_dir / "metrics.jsonl"
    if saved.latest == 0 and not (rows.exists() and rows.stat().st_size):
        saved.clear()
        for name in ("evaluations.jsonl", "wandb.json"):
            (config.run_dir / name).unlink(missing_ok=True)
        for name in ("examples", "tensorboard"):
            shutil.rmtree(config.run_dir / name, ignore_errors=True)
        return
    if fixed:
        name, now = fixed[0], data_sources(description["config"]["data"])
        raise _cannot_change(
            config.run_dir, name, position.get(name), identity[name], (found.sources, now)
        )
    what, other = ("recipe", "another recipe") if found.recipe else ("data", "other data")
    both = " and other data" if found.recipe and found.data else ""
    lines = [f"the run in {config.run_dir} began with {other}{both}:", *found.recipe, *found.data]
    if not config.checkpoint.accept_changes:
        lines += [
            f"To continue with the changed {what}, add --checkpoint.accept-changes. To start a new "
            "run, give another --name."
        ]
        raise ConfigError("\n".join(lines))
    say("\n".join([*lines, "These changes are accepted."]))


def begun_plan(config: TrainConfig) -> Plan | None:
    """Returns the plan that a resumed run began with; all processes must call this function.

    Args:
        config: Config of the run, whose run directory has the config.json of the earlier start.

    Returns:
        The plan; None if the size of its micro-batches is unknown.
    """
    text = (config.run_dir / "config.json").read_text() if is_main_process() else ""
    began = json.loads(broadcast_from_main(text))["config"]
    size = began["batch"]["micro_size"]
    # Older versions had no `stream_adapters`, and kept adapters on the device.
    began["memory"].setdefault("stream_adapters", False)
    return None if size is None else Plan(size, MemoryConfig(**began["memory"]))


def begun_buckets(config: TrainConfig) -> Buckets | None:
    """Returns the row lengths and the numbers of image slots that a resumed run began with.

    Args:
        config: Config of the run, whose run directory has the config.json of the earlier start.

    Returns:
        The buckets; None if the run began with another `data.packing` or another `data.max_length`,
        for which the buckets were not chosen. Older versions had only one number of image slots.
    """
    began = json.loads((config.run_dir / "config.json").read_text())["config"]["data"]
    now = {"packing": config.data.packing, "max_length": config.data.max_length}
    if not now.items() <= began.items():
        return None
    return Buckets(tuple(began["buckets"]), tuple(began.get("image_buckets", ())))


def _cannot_change(
    run_dir: Path, name: str, before: object, now: object, sources: tuple[str, str]
) -> ConfigError:
    """Returns the error for a changed value that determines the order of the samples."""
    what = {
        "records": "number of training records",
        "weights": "weights of data.mixture",
        "batch_size": "batch.global_size",
        "seed": "seed",
        "group": "number of samples in a group (data.group_by_modality_length, batch.loss_group)",
    }[name]
    text = f"{run_dir} was trained with {what} {before}; this command gives {now}"
    mend = "Give the old value"
    if name == "records":
        count = lambda counts: " + ".join(map(str, counts or [0]))  # one count per data set
        text = f"{run_dir} was trained on {count(before)} records of {sources[0]}; "
        text += f"this command gives {count(now)} ({sources[1]})"
        mend = "Restore the old data"
    return ConfigError(
        f"{text}. The {what} cannot change during a run, even with "
        f"--checkpoint.accept-changes. {mend}, or start a new run with another --name."
    )


def refuse_to_replace(config: TrainConfig) -> None:
    """Raises ConfigError if a run has an export but no checkpoint to resume from.

    All processes must call this.

    Args:
        config: Config of a run without checkpoints.

    Raises:
        ConfigError: The directory of the export exists.
    """
    if broadcast_from_main(config.export_dir.exists()):
        raise ConfigError(
            f"{config.export_dir} exists, but {config.run_dir} has no checkpoints to continue "
            "from; move the export to another directory, or give the run a new --name"
        )


class Changes(NamedTuple):
    """Differences between this start of a run and its earlier start.

    Attributes:
        recipe: One line of text for each difference in the recipe or the base model.
        data: One line of text for each difference in the data.
        sources: Paths of the training data at the earlier start, as one text.
    """

    recipe: list[str]
    data: list[str]
    sources: str


_EARLIER: Json = {"data.exif_orientation": False}
"""Values that runs of older versions had, if their config.json lacks a field whose default value
means something else than what they did."""


_ROPE = "model.llm.rope_scaling"


def changes(run_dir: Path, description: Json) -> Changes:
    """Compares the recipe, the base model and the data of this start with the earlier start.

    Args:
        run_dir: Directory of the run, with config.json and data.json of the earlier start.
        description: Description of this start, as returned by `run_config.describe`.

    Raises:
        ConfigError: config.json or data.json cannot be read.
    """
    file = run_dir / "config.json"
    try:
        began = json.loads(file.read_text())
        before = flatten(to_json(TrainConfig("default")), MAY_CHANGE) | _EARLIER
        before |= flatten(began["config"], MAY_CHANGE)
        if f"{_ROPE}.factor" in before:  # older versions had no other kind
            before.setdefault(f"{_ROPE}.rope_type", "llama3")
        base = began["base_fingerprint"]
        data = _data_changes(run_dir, began["config"]["data"], description)
        sources = data_sources(began["config"]["data"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} or data.json cannot be read ({error}), and the checkpoints of the run have no "
            "copy of it; restore the file, remove the checkpoints, or give the run a new --name"
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
    """Returns the differences in the data; skips eval data if its config fields have changed."""
    file, now = run_dir / "data.json", description["config"]["data"]
    if not file.exists():  # an older version started the run
        return []
    before = json.loads(file.read_bytes())
    found = [*data_changes(before["train"], description["data"]["train"])]
    if all(began[name] == now[name] for name in ("eval_path", "eval_samples")):
        found += data_changes(before["eval"], description["data"]["eval"], "eval data")
    return found

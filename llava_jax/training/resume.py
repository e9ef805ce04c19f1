"""Starting in a run's directory: a run resumes only with the recipe and data that it began with."""

import dataclasses
import shutil
from pathlib import Path

from llava_jax.config import Json, TrainConfig
from llava_jax.distributed.multihost import (
    broadcast_from_main,
    say,
)
from llava_jax.errors import ConfigError
from llava_jax.pretrained.resolve import Checkpoint, adapter_in, resolve_start
from llava_jax.training.checkpoints import Checkpoints
from llava_jax.training.export import export_dir
from llava_jax.training.run_config import (
    changes,
    data_sources,
)


def follow_adapter(config: TrainConfig) -> tuple[TrainConfig, Checkpoint | None]:
    """Finds the weights to start from. A run's directory brings its base and its adapter.

    Returns:
        The config, with the adapter that `init_from` brings as its `init_adapter`, and the
        checkpoint; None trains from scratch.

    Raises:
        ConfigError: What is found does not fit to what trains.
    """
    if (source := config.init_from) is None:
        if "lora" in (config.tune.llm, config.tune.vision):
            raise ConfigError("tune 'lora' needs a base to adapt: set init_from to a checkpoint")
        return config, None
    if config.init_adapter is not None:
        adapter = str(adapter_in(config.init_adapter))
        config = dataclasses.replace(config, init_adapter=adapter)
    found = resolve_start(source)
    if found.adapter is None:
        return config, found
    if config.init_adapter is not None:
        raise ConfigError(
            f"init_from {config.init_from} brings the adapter {found.adapter}, so init_adapter "
            f"{config.init_adapter} is one too many; name its base {found.name} in init_from"
        )
    if "lora" not in (config.tune.llm, config.tune.vision):
        raise ConfigError(
            f"init_from {config.init_from} brings the adapter {found.adapter}, but this run trains "
            "none; merge it first (LlavaModel: merge_adapter, save_pretrained), start from that"
        )
    return dataclasses.replace(config, init_adapter=str(found.adapter)), found


def check_begun(
    config: TrainConfig,
    saved: Checkpoints,
    description: Json,
    identity: Json,
) -> None:
    """Checks that a run has the recipe and the data that it began with.

    If no step was trained yet, the earlier start is removed instead.

    Args:
        config: The run.
        saved: Its checkpoints, of which there is at least one.
        description: From `describe`.
        identity: Identity of the order of the samples.

    Raises:
        ConfigError: The recipe or the data differ, and steps were trained.
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
            f"To go on with the changed {what}, add --checkpoint.accept-changes. To train anew, "
            "give another --name."
        ]
        raise ConfigError("\n".join(lines))
    say("\n".join([*lines, "These changes are accepted."]))


def _cannot_change(
    run_dir: Path, name: str, before: object, now: object, sources: tuple[str, str]
) -> ConfigError:
    """The error for an order of the samples that differs from the one of the earlier steps."""
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
        count = lambda counts: " + ".join(map(str, counts or [0]))  # one for each data set
        text = f"{run_dir} was trained on {count(before)} records of {sources[0]}; "
        text += f"this command gives {count(now)} ({sources[1]})"
        mend = "Restore the old data"
    return ConfigError(
        f"{text}. The {what} cannot change while a run goes on, even with "
        f"--checkpoint.accept-changes. {mend}, or start a new run with another --name."
    )


def refuse_to_replace(config: TrainConfig) -> None:
    """Refuses to start a run where a result is but no checkpoint.

    Raises:
        ConfigError: There is a result.
    """
    if broadcast_from_main(export_dir(config).exists()):
        raise ConfigError(
            f"{export_dir(config)} exists, but {config.run_dir} has no checkpoints to continue "
            "from; move it away, or give the run a new name"
        )

"""Finds the weights and the data of a run that do not exist, before anything is downloaded."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava_jax.config import DataSet, Parts, TrainConfig, format_source, load_config
from llava_jax.config.presets import preset_names
from llava_jax.errors import ConfigError
from llava_jax.pretrained.resolve import is_local


def check_sources(config: TrainConfig) -> None:
    """Checks that the local files and directories that a config names exist.

    Hub ids, URLs and file patterns are not checked.

    Args:
        config: Config of a run.

    Raises:
        ConfigError: A file or a directory does not exist. The message lists all of them, and says
            how to continue without the weights of a preset's earlier stage.
    """
    weights = [*_missing_weights(config)]
    missing = [*weights, *_missing_data(config)]
    if config.processor is not None and not os.path.exists(config.processor):
        missing.insert(len(weights), f"processor {config.processor!r}: no such directory")
    if not missing:
        return
    text = missing[0]
    if len(missing) > 1:
        text = "\n  ".join(["this run needs files that do not exist:", *missing])
    if weights and (suggestions := [*_suggestions(config)]):
        text = "\n  ".join([f"{text}\nTo continue without these weights:", *suggestions])
    raise ConfigError(text)


def _missing_weights(config: TrainConfig) -> Iterator[str]:
    """Yields a line of text for each local source of weights that does not exist."""
    start = config.init_from
    if start is None and config.model is None:
        yield (
            "init_from and model are both None; set init_from to a checkpoint, or set model to "
            "train from scratch"
        )
    parts = [start.llm, start.vision, start.projector] if isinstance(start, Parts) else [start]
    named = [("init_from", name) for name in parts]
    for field, name in (*named, ("init_adapter", config.init_adapter)):
        # A run of this output_dir is no hub id, even if its path looks like one.
        is_run = name is not None and Path(name).parent == Path(config.output_dir)
        if name is not None and (is_run or is_local(name)) and not os.path.exists(name):
            yield f"{field} {name!r}: no such directory"


def _missing_data(config: TrainConfig) -> Iterator[str]:
    """Yields a line of text for each local data file or directory that does not exist."""
    data = config.data
    used = [("data.mixture", part) for part in data.mixture]
    for field, part in used or [("data", DataSet(data.path, data.image_root))]:
        if not part.path:
            yield f"{field}.path is not set; set it to a data file"
        elif not _exists(part.path):
            yield f"data file {part.path}: No such file or directory; check {field}.path"
        if part.image_root and not _exists(part.image_root):
            yield f"directory {part.image_root} does not exist; check {field}.image_root"
    if not data.eval_path:
        return
    if not _exists(data.eval_path):
        yield f"data file {data.eval_path}: No such file or directory; check data.eval_path"
    if data.eval_image_root and not _exists(data.eval_image_root):
        yield f"directory {data.eval_image_root} does not exist; check data.eval_image_root"
    if data.mixture and data.uses_image_root_for_eval and not _exists(data.image_root or "."):
        yield f"directory {data.image_root} does not exist; check data.image_root"


def _exists(path: str) -> bool:
    """Returns True if a path exists, or is no plain path: a URL, a named data set or a pattern."""
    is_plain = not re.match(r"\w+:", path) and not re.search(r"[*?\[]", path)
    return not is_plain or os.path.exists(path)


def _suggestions(config: TrainConfig) -> Iterator[str]:
    """Yields what to do if a run starts from a run of stage 1 that does not exist."""
    start = config.init_from
    stage1 = Path(start).name if isinstance(start, str) else ""
    if stage1 not in preset_names():
        return
    size = stage1.partition("_pretrain")[0]
    task = f"{size}_task_lora" if config.tune.llm == "lora" else f"{size}_task"
    if task in preset_names():
        published = format_source(load_config(task).init_from)
        yield f"--init-from {published} starts from the published model"
        yield f"--config {task} trains the published model on your own data"
    yield f"`llava-jax train --config {stage1}` writes {start} (stage 1)"

"""Lists everything that answers depend on, so that no answer is used again after a change.

The settings are written to settings.json, beside the answers. The files of images are compared
image by image, because only the questions about a changed image must be asked again; see
`identify_images`.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llava_jax.config import Parts, format_source
from llava_jax.disk import Json, open_regular, replace_text
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import Question
from llava_jax.generation.sampling import GREEDY, Sampling
from llava_jax.pretrained.resolve import Checkpoint, model_name

_WEIGHTS = ".safetensors"
_READ = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the small files in a checkpoint: configs, tokenizer, processor and templates."""
_SHOWN = 300  # maximum number of characters of a difference that an error shows


class GenerationSettings(NamedTuple):
    """Settings for generating the answers, which are arguments of `Assistant.answer_all`.

    Attributes:
        max_new_tokens: Maximum number of tokens of an answer.
        sampling: Sampling settings.
        stop: Texts that end an answer.
    """

    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()


def describe(
    task: str,
    questions: Sequence[Question],
    how: GenerationSettings,
    source: str | Path | Parts,
    checkpoint: Checkpoint,
    **options: object,
) -> Json:
    """Returns the content of settings.json: everything that all answers depend on.

    Args:
        task: Name of the benchmark.
        questions: All questions of the benchmark.
        how: Settings of the generation.
        source: Source of the weights, as the user gives it.
        checkpoint: Checkpoint that `pretrained.resolve` finds for `source`.
        options: Further options that the answers depend on, such as the dtype.
    """
    digest = hashlib.sha256()
    for question in questions:
        # repr() distinguishes numbers from texts in ids, and paths from contents in images.
        digest.update(repr((question.id, question.turns, question.images)).encode())
    settings = {
        "task": task,
        "model": model_name(source),
        "checkpoint": _full_path(source),
        "base_model": checkpoint.name,
        "llava_jax": importlib.metadata.version("llava_jax"),
        **options,
        "max_new_tokens": how.max_new_tokens,
        **dataclasses.asdict(how.sampling),
        "stop": how.stop,
        "questions": digest.hexdigest(),
        "files": _identify_files(checkpoint),
    }
    # The result is compared with a file, so it must consist of JSON's types.
    return json.loads(json.dumps(settings, default=str))


def _full_path(source: str | Path | Parts) -> str:
    """Returns a source with absolute paths for what exists on this machine; keeps hub ids."""
    if isinstance(source, Parts):
        given = {name: _full_path(value) for name, value in vars(source).items() if value}
        return format_source(Parts(**given))
    return str(Path(source).resolve()) if Path(source).exists() else str(source)


def _identify_files(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns a text that identifies the content of each file of a checkpoint, by its name.

    Weights are identified by size and modification time, because reading them takes long; all other
    files by a digest of their content.
    """
    base = checkpoint.base
    places = {n: Path(v) for n, v in vars(base).items() if v} if isinstance(base, Parts) else {}
    places |= {"base": base} if isinstance(base, Path) else {}
    places |= {"adapter": checkpoint.adapter} if checkpoint.adapter is not None else {}
    return {
        f"{name}/{file.name if file == place else file.relative_to(place)}": _identify(file)
        for name, place in places.items()
        for file in _files_of(place)
    }


def _files_of(place: Path) -> list[Path]:
    """Returns the files that belong to a checkpoint: a file, or files in a directory.

    The parts of XTuner's exports are in folders with weights, and named templates are in a folder
    too. Other folders, such as results and the checkpoints of a trainer, do not belong to it.
    """
    if place.is_file():
        return [place]
    parts = {file.parent for file in place.glob(f"*/*{_WEIGHTS}")}
    folders = [place, place / "additional_chat_templates"]
    folders += [part for part in parts if not part.name.startswith("checkpoint")]
    inner = (file for folder in folders for file in folder.glob("*") if file.is_file())
    return sorted(file for file in inner if file.suffix in (_WEIGHTS, *_READ))


def _identify(file: Path) -> str:
    """Returns a text that changes if a file of a checkpoint changes."""
    if file.suffix not in _READ:
        status = file.stat()
        return f"{status.st_size} bytes, modified {status.st_mtime_ns}"
    with open_regular(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def identify_images(question: Question) -> list[str | None]:
    """Returns a text that changes if an image file of a question changes, for each image.

    The text is None for an image without a local file. The digest of the questions contains the
    content of such an image, or its address.
    """
    return [_identify_image(image) for image in question.images]


def _identify_image(image: str | bytes) -> str | None:
    if isinstance(image, bytes):
        return None
    try:
        status = os.stat(image)
    except (OSError, ValueError):
        return None
    return f"{status.st_size} bytes, modified {status.st_mtime_ns}"


def check_settings(path: Path, settings: Json, answers: Path) -> None:
    """Checks that settings.json has the same settings; writes it if there are no answers yet.

    Args:
        path: Path of settings.json.
        settings: Settings from `describe`.
        answers: Path of the answers.

    Raises:
        ConfigError: There are answers with other settings, or settings.json cannot be read.
    """
    if not answers.exists():
        replace_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        there = _flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give another --output") from None
    now = _flat(settings)
    lines = [
        f"  {name}: {there.get(name)} before, {now.get(name)} now"
        for name in there | now
        if there.get(name) != now.get(name)
    ]
    if lines:
        raise ConfigError(
            f"{answers} contains answers with other settings; delete this file or give another "
            "--output. These settings differ:\n" + "\n".join(line[:_SHOWN] for line in lines)
        )


def _flat(settings: Json) -> Json:
    """Returns the settings with one entry for each file of the checkpoint."""
    rest = {name: value for name, value in settings.items() if name != "files"}
    return rest | {f"file {name}": value for name, value in settings.get("files", {}).items()}

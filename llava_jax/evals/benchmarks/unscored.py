"""Reads questions without expected answers: LLaVA's question files, and directories of images."""

import json
from pathlib import Path

from PIL import Image

from llava_jax.data.forms import CONVERSATIONS
from llava_jax.data.image_file import FORMATS
from llava_jax.data.records import MAX_RECORD_BYTES
from llava_jax.data.sources import SHARDS
from llava_jax.disk import open_regular
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import (
    Question,
    ask,
    category_of,
    check_fields,
    read_json,
    read_lines,
)

_FIELDS: dict[str, type | tuple[type, ...]] = {"question_id": (str, int), "text": str}


def is_question_file(path: Path) -> bool:
    """Returns True if the first record of a file is a question of LLaVA's question files.

    Such a record has the fields "question_id" and "text", and no conversation.
    """
    _, first = _first_record(path)
    return isinstance(first, dict) and _FIELDS.keys() <= first.keys() - {*CONVERSATIONS}


def read_question_file(path: Path, root: Path) -> list[Question]:
    """Reads a question file of LLaVA: JSON lines, or a list, with question_id, text and image.

    Args:
        path: Path of the file.
        root: Directory of the images.

    Raises:
        ConfigError: The file cannot be read, or a record does not have the expected fields.
    """
    is_list, _ = _first_record(path)
    rows = read_json(path) if is_list else read_lines(path, **_FIELDS)
    return [_question(row, f"{path}, record {number}", root) for number, row in enumerate(rows, 1)]


def _question(raw: object, where: str, root: Path) -> Question:
    row = check_fields(raw, where, **_FIELDS)
    image = row.get("image")
    paths = image if isinstance(image, list) else [image]
    if image is not None and not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(
            f'{where}: "image" must be the path of an image or a list of paths, found {image!r:.60}'
        )
    return ask(row["question_id"], row["text"], image, root=root, category=category_of(row))


def read_images(folder: Path, prompt: str) -> list[Question]:
    """Returns the same question about each image in a directory and in the directories below it.

    The id of a question is the path of its image relative to the directory.

    Args:
        folder: Directory of the images. Names that begin with a dot are skipped.
        prompt: Text of the question.

    Raises:
        ConfigError: The directory does not exist or has no images, or the text is empty.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--prompt is the question about each image of a directory, but --data {folder} is not "
            "a directory; leave --prompt out if the file contains the questions"
        )
    if not prompt.strip():
        raise ConfigError("--prompt is empty; give the question about each image")
    names = _images_in(folder)
    if not names:
        raise ConfigError(f"--data {folder} has no images ({', '.join(FORMATS)})")
    return [ask(name, prompt, name, root=folder) for name in names]


def refuse_images(path: Path) -> None:
    """Checks that a path is not a directory of images, which needs a question.

    Raises:
        ConfigError: The path is a directory with images and without data files.
    """
    if not path.is_dir() or any(file.suffix in SHARDS for file in path.iterdir()):
        return
    if names := _images_in(path):
        raise ConfigError(
            f"--data {path} is a directory of {len(names):,} images; give the question about each "
            'image with --prompt "..."'
        )


def _images_in(folder: Path) -> list[str]:
    """Returns the paths of the images below a directory, relative to it and sorted."""
    suffixes = {end for end, form in Image.registered_extensions().items() if form in FORMATS}
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(
        path.as_posix()
        for path in paths
        if path.suffix.lower() in suffixes and not any(p.startswith(".") for p in path.parts)
    )


def _first_record(path: Path) -> tuple[bool, object]:
    """Returns whether a file is a JSON list, and its first record; None if there is no record."""
    if not path.is_file():
        return False, None
    with open_regular(path) as file:
        text = file.read(MAX_RECORD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    is_list = text.startswith("[")
    try:
        return is_list, json.JSONDecoder().raw_decode(text[is_list:].lstrip())[0]
    except (ValueError, RecursionError):
        return is_list, None

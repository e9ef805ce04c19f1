"""Reads questions without expected answers: LLaVA's question files, and directories of images."""

import json
import re
from pathlib import Path

from PIL import Image

from llava_jax.data.forms import CONVERSATIONS
from llava_jax.data.image_file import FORMATS
from llava_jax.data.records import MAX_RECORD_BYTES
from llava_jax.data.sources import SHARDS
from llava_jax.errors import ConfigError
from llava_jax.evals.questions import (
    Question,
    category_of,
    check_fields,
    make_question,
    open_text,
    read_json,
    read_lines,
)

_FIELDS: dict[str, type | tuple[type, ...]] = {"question_id": (str, int), "text": str}

_RECORD = re.compile(r"\s*(?=\{)")
_MEMBER = r'"[^"]*"\s*:\s*'
_IN_LIST = re.compile(rf"\s*(?:\{{\s*(?:{_MEMBER}[^\[\]{{}},]*,\s*)*{_MEMBER})?\[\s*(?=\{{)")
"""Text before the first record: of a file with one record per line; of a list, also in an object
such as {"version": 1, "data": [...]}."""


def is_question_file(path: Path) -> bool:
    """Returns True if the first record of a file is a question of LLaVA's question files.

    Such a record has the fields "question_id" and "text", and no conversation.
    """
    if not path.is_file():
        return False
    with open_text(path, errors="replace") as file:
        text = file.read(MAX_RECORD_BYTES)
    starts = (found.end() for found in (_RECORD.match(text), _IN_LIST.match(text)) if found)
    return any(_is_question(_decode(text, start)) for start in starts)


def _decode(text: str, start: int) -> object:
    """Returns the JSON value that begins at an index of a text; None if it is not complete."""
    try:
        return json.JSONDecoder().raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def _is_question(record: object) -> bool:
    return isinstance(record, dict) and _FIELDS.keys() <= record.keys() - {*CONVERSATIONS}


def read_question_file(path: Path, root: Path) -> list[Question]:
    """Reads a question file of LLaVA: records with question_id, text and image.

    The file is in UTF-8 or UTF-16, and contains JSON lines, a list, or an object with a list.

    Args:
        path: Path of the file.
        root: Directory of the images.

    Raises:
        ConfigError: The file cannot be read, or a record does not have the expected fields.
    """
    try:
        rows = read_json(path)
    except ConfigError:  # several lines are not a JSON value
        rows = read_lines(path, **_FIELDS)
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = [rows] if _is_question(rows) else lists[0]
    return [_question(row, f"{path}, record {number}", root) for number, row in enumerate(rows, 1)]


def _question(raw: object, where: str, root: Path) -> Question:
    row = check_fields(raw, where, **_FIELDS)
    image = row.get("image")
    paths = image if isinstance(image, list) else [image]
    if image is not None and not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(
            f'{where}: "image" must be the path of an image or a list of paths, found {image!r:.60}'
        )
    return make_question(
        row["question_id"],
        row["text"],
        image,
        root=root,
        is_interleaved=True,
        category=category_of(row),
    )


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
    return [make_question(name, prompt, name, root=folder, is_interleaved=True) for name in names]


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

"""Parses and formats sources of weights: one checkpoint, or one checkpoint per model part."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Parts:
    """Source of weights that takes each part of a LLaVA model from a different checkpoint.

    Attributes:
        llm: Directory or hub id of the decoder.
        vision: Directory or hub id of the vision tower.
        projector: File or directory of the projector. None takes the projector in the directory
            `llm`. If that directory has no projector, training initializes a new projector.
    """

    llm: str
    vision: str
    projector: str | None = None


def parse_source(text: str) -> str | Parts:
    """Parses a source: a path, a hub id, or `llm=DIR,vision=DIR[,projector=FILE]`.

    This function is only called where a source enters the package as text: on command lines, in
    arguments of public functions, and in files that name a base model. All other code uses the
    parsed source.

    Raises:
        ConfigError: The text starts with "llm=" but is not a valid list of parts.
    """
    if not text.startswith("llm="):
        return text
    given = {}
    for part in text.split(","):
        name, _, path = part.strip().partition("=")
        given[name] = path
    names = [field.name for field in dataclasses.fields(Parts)]
    unknown = [name for name in given if name not in names]
    if unknown or not given.keys() >= {"llm", "vision"}:
        what = f"unknown part {unknown[0]!r}" if unknown else "llm and vision are required"
        raise ConfigError(f"{text!r}: {what}; the format is llm=DIR,vision=DIR[,projector=FILE]")
    return Parts(**given)


def format_source(source: str | Path | Parts | None) -> str:
    """Formats a source as text; the inverse of `parse_source`."""
    if not isinstance(source, Parts):
        return str(source)
    parts = dataclasses.asdict(source).items()
    return ",".join(f"{name}={value}" for name, value in parts if value)


def absolute_source(source: str) -> str:
    """Makes the local paths in the text of a source absolute; hub ids stay unchanged."""
    parts = parse_source(source)
    if isinstance(parts, Parts):
        paths = {name: path and absolute_source(path) for name, path in vars(parts).items()}
        return format_source(Parts(**paths))
    return str(Path(source).absolute()) if Path(source).exists() else source


Source = Annotated[
    str | Parts | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|DIR|HUB-ID|llm=DIR,vision=DIR[,projector=FILE]",
        instance_from_str=lambda words: None if words[0] == "None" else parse_source(words[0]),
        is_instance=lambda value: value is None or isinstance(value, str | Parts),
        str_from_instance=lambda source: [format_source(source)],
    ),
]
"""Type of a field that says where weights come from; None means new weights."""

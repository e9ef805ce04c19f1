"""Checks the values of a checkpoint's config.json against the types of config dataclasses."""

from pathlib import Path
from typing import get_args, get_type_hints

from llava_jax.config.fields import has_type
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError

_MAX_LAYERS = 1000
_MAX = 2**24  # larger than any size in a model


def check_object(file: Path, raw: Json, name: str, default: Json) -> Json:
    """Returns the JSON object in a field of a config; `default` if the field is missing or null.

    Raises:
        CheckpointError: The field is not an object.
    """
    value = raw.get(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name} is {value!r:.80}; it must be an object")
    return default if value is None else value


def check_types(file: Path, part: str, kind: type, values: Json) -> None:
    """Checks the values of a config against the type annotations of the dataclass `kind`.

    Args:
        file: The config.json, for messages.
        part: Name of the part of the model, for messages; "" or a text with a space at its end.
        kind: Dataclass of the config.
        values: Values by the names of the dataclass's fields. Fields that are dataclasses are not
            checked.

    Raises:
        CheckpointError: A field has the wrong type, or a number outside the allowed range.
    """
    for name, hint in get_type_hints(kind).items():
        value = values.get(name)
        if value is None or name in ("rope_scaling", "tiling", "video"):
            continue
        takes_bool = bool in (hint, *get_args(hint))
        if not has_type(value, hint) or (isinstance(value, bool) and not takes_bool):
            wanted = getattr(hint, "__name__", hint)
            raise CheckpointError(f"{file}: {part}{name} is {value!r:.80}; it must be {wanted}")
        if isinstance(value, bool | str) or name == "vision_feature_layer":
            continue
        least = 0 if name.endswith("token_id") else 1 if isinstance(value, int) else 1e-30
        most = _MAX_LAYERS if name == "num_hidden_layers" else _MAX
        if not least <= value <= most:
            raise CheckpointError(
                f"{file}: {part}{name} is {value!r:.80}; it must be between {least} and {most}"
            )


def require(file: Path, name: str, value: object, supported: tuple[object, ...]) -> None:
    """Checks that a field has one of the supported values.

    Raises:
        CheckpointError: It has another value.
    """
    if value not in supported:
        known = " or ".join(repr(choice) for choice in supported)
        raise CheckpointError(f"{file}: {name} is {value!r:.80}; supported: {known}")

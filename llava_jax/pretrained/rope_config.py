"""Reads the settings of a decoder's RoPE from config.json, and writes them."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

from llava_jax.config import LlmConfig, RopeScaling
from llava_jax.disk import Json
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained.config_checks import check_object, check_types, require

ROPE_THETA = 10_000.0
"""Default of transformers for the base of the frequencies."""

_LENGTH = "original_max_position_embeddings"
_KINDS = get_args(get_type_hints(RopeScaling)["rope_type"])


def read_rope(file: Path, values: Json, head_dim: int) -> tuple[float, RopeScaling | None]:
    """Returns RoPE's base and scaling, from `rope_parameters` (transformers 5) or older fields.

    Args:
        file: The config.json, for messages.
        values: Settings of the decoder.
        head_dim: Width of an attention head.

    Raises:
        CheckpointError: The settings are not supported or have bad values.
    """
    old, new = (check_object(file, values, f"rope_{end}", {}) for end in ("scaling", "parameters"))
    if old and new:  # transformers ignores `rope_parameters`, also its base
        raise CheckpointError(
            f"{file}: the decoder has both rope_scaling and rope_parameters; move the fields of "
            "rope_scaling into rope_parameters and remove rope_scaling"
        )
    rope = old or new
    theta = rope.get("rope_theta", values.get("rope_theta", ROPE_THETA))
    check_types(file, "the decoder's ", LlmConfig, {"rope_theta": theta})
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(file, "the decoder's rope type", kind, ("default", *_KINDS))
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    require(file, "the decoder's partial_rotary_factor", partial, (1.0,))
    if kind == "default":
        return float(theta), None
    if kind in ("dynamic", "yarn") and (theta <= 1 or head_dim <= 2):
        raise CheckpointError(
            f"{file}: the {kind} RoPE scaling needs a rope_theta above 1 and heads of a size above "
            f"2, but rope_theta is {theta:g} and the size is {head_dim}"
        )
    needed = ("factor", *(("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()))
    absent = [name for name in needed if rope.get(name) is None]
    if absent:
        raise CheckpointError(f"{file}: the {kind} RoPE scaling lacks {', '.join(absent)}")
    check_types(file, "the decoder's RoPE scaling: ", RopeScaling, {**rope, "rope_type": kind})
    names = {field.name for field in dataclasses.fields(RopeScaling)} - {"rope_type"}
    given: Json = {name: rope[name] for name in names if name in rope}
    for name, value in given.items():
        if type(value) is int and name != _LENGTH:  # JSON may contain integers in place of floats
            given[name] = float(value)
    try:
        scaling = RopeScaling(kind, **given)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return float(theta), scaling


def scaling_settings(scaling: RopeScaling | None) -> Json | None:
    """Returns the field `rope_scaling` of a decoder's config.json.

    For "linear" and "dynamic", the field that names the kind is "type", because transformers before
    4.43 and LLaVA's code accept only this name. For newer kinds, it is "rope_type".
    """
    if scaling is None:
        return None
    given = {name: x for name, x in dataclasses.asdict(scaling).items() if x is not None}
    kind = given.pop("rope_type")
    return {"type" if kind in ("linear", "dynamic") else "rope_type": kind, **given}

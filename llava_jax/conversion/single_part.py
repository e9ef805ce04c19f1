"""Rewrites a decoder or a vision tower as a safetensors directory for transformers.

This is a part of `llava-jax convert`. Some decoders, for example Vicuna, are published only as
pickles, and training does not read pickles.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llava_jax.config import ModelConfig, Parts
from llava_jax.conversion.convert import check_free, unfinished
from llava_jax.conversion.tensor_formats import open_any
from llava_jax.disk import copy_regular
from llava_jax.errors import ConfigError
from llava_jax.models.build import build_model
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.image_processor import write_json
from llava_jax.pretrained.load import Stored, find_tensors, stored
from llava_jax.pretrained.model_config import (
    read_json_config,
    read_llm_config,
    read_vision_config,
    tower_settings,
)
from llava_jax.pretrained.resolve import resolve
from llava_jax.pretrained.save import save_params

_WEIGHTS = ("*.bin", "*.bin.index.json", "*.safetensors", "*.safetensors.index.json")


@dataclasses.dataclass(frozen=True)
class Part:
    """A decoder or a vision tower that was opened and checked, but whose weights were not read.

    Attributes:
        path: Directory of the part.
        config: Sizes of a LLaVA with this part; the sizes of the other parts have no meaning.
        layout: Layout of the tensor names that transformers uses for the part.
        params: Parameters of the part; their values are still in the files.
    """

    path: Path
    config: ModelConfig
    layout: Layout
    params: dict[str, Stored]


def open_part(source: str | Parts, say: Callable[[str], None] = print) -> Part | None:
    """Opens a source that is only a decoder or only a vision tower, and prints which of them it is.

    Args:
        source: Path, hub id or parts. The kind of a source is recognized by its tensors.
        say: Function that prints a line.

    Returns:
        The part, or None if the source is something else.

    Raises:
        ConfigError: There is no such source, or it is only a projector.
        CheckpointError: The source cannot be read, or its tensors do not fit its config.
    """
    found = resolve(source, open_any)
    if isinstance(found.base, Parts) or found.adapter is not None:
        return None
    path, tensors = found.base, open_any(found.base)
    alone = (
        layouts.LLAMA,
        layouts.CLIP,
        layouts.CLIP_BARE,
        *layouts.PROJECTOR_LAYOUTS,
    )
    try:
        own = layouts.recognise(tensors, (*layouts.LLAVA_LAYOUTS, *alone))
    except layouts.LayoutError:
        return None  # `convert.open_source` then says what is wrong
    parts = own.parts(tensors)
    if parts == {"projector"}:
        raise ConfigError(
            f"{path} is only a projector; also give its decoder and its vision tower: "
            f"llm=DIR,vision=DIR,projector={path}"
        )
    if parts == {"llm"}:
        known, layout, what = layouts.LLM_LAYOUTS, layouts.LLAMA, "a decoder"
        config = ModelConfig(llm=read_llm_config(path))
    elif parts == {"vision"}:
        known, layout, what = (
            layouts.VISION_LAYOUTS,
            layouts.CLIP,
            "a vision tower",
        )
        config = ModelConfig(vision=read_vision_config(path), vision_feature_layer=-1)
    else:
        return None
    own = layouts.recognise(tensors, known)
    _, abstract = build_model(config, {})
    specs = {path: spec for path, spec in abstract.items() if layout.holds(path)}
    paths = find_tensors(str(path), [(tensors, own)], config, specs)
    say(f"{path}: only {what} ({own.name})")
    return Part(path, config, layout, {p: stored(p, t, specs[p]) for p, t in paths.items()})


def convert_part(part: Part, destination: Path, dtype: str | None = None) -> None:
    """Writes a part as a directory for transformers, and copies its tokenizer and other files.

    Args:
        part: Part from `open_part`.
        destination: Directory that does not exist or is empty.
        dtype: Dtype of the weights; None keeps the dtype of each weight.

    Raises:
        ConfigError: The destination exists and is not an empty directory.
    """
    check_free(destination)
    with unfinished(destination) as directory:
        weights = {file for pattern in _WEIGHTS for file in part.path.glob(pattern)}
        beside = (*part.path.glob("*.json"), *part.path.glob("*.jinja"))
        for file in {*beside, *part.path.glob("*.model"), *part.path.glob("*.txt")} - weights:
            copy_regular(file, directory / file.name)
        save_params(part.params, directory, part.config, layout=part.layout, dtype=dtype)
        own = read_json_config(part.path)[1]
        if part.layout is layouts.CLIP:  # a CLIPModel's config describes a text model too
            own = tower_settings(part.config.vision)
        said = dtype or str(next(iter(part.params.values())).dtype)
        own.pop("dtype", None)  # the name of torch_dtype in transformers 5
        write_json(directory / "config.json", own | {"torch_dtype": said})

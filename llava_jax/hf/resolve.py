"""From what a user calls a checkpoint to where its files lie."""

from pathlib import Path
from typing import NamedTuple

from llava_jax.config import ConfigError, Parts, format_source, parse_source
from llava_jax.hf import layouts, official
from llava_jax.hf.model_config import read_json_config
from llava_jax.hf.tensorfile import open_tensors
from llava_jax.hf.trained import is_trained, named_base
from llava_jax.hf.weights import Reader


class Checkpoint(NamedTuple):
    """Where weights come from.

    Attributes:
        name: What its user calls the base.
        base: Where the base lies.
        adapter: What was trained on it, in a form of `hf.trained`.
    """

    name: str
    base: Path | Parts
    adapter: Path | None = None


def resolve(source: str | Path | Parts, read: Reader = open_tensors) -> Checkpoint:
    """Finds a checkpoint: a directory of any kind, a run's, parts, or a hub id's snapshot.

    Args:
        source: What it is called.
        read: Opens a file or directory of tensors.

    Raises:
        ConfigError: There is nothing of the kind.
        CheckpointError: What is there cannot be used.
    """
    try:
        return _resolve(source, read)
    except OSError as error:  # a name too long, a file that may not be read
        raise ConfigError(f"{format_source(source):.200}: {error.strerror}") from error


def _resolve(source: str | Path | Parts, read: Reader) -> Checkpoint:
    if isinstance(source, Parts):
        return Checkpoint(format_source(source), _resolve_parts(source))
    path = _in_run(Path(source))
    if path.exists() and is_trained(path):
        return _resolve_trained(path, read)
    if path.is_dir():
        return Checkpoint(str(path.resolve()), _as_parts(path, read))
    local = _local(str(source))
    return Checkpoint(str(source), _as_parts(local, read))


def adapter_in(place: str | Path) -> Path:
    """The adapter that a run has made, if `place` is a run's directory; else the place itself."""
    inner = Path(place) / "adapter"
    return inner if inner.is_dir() else Path(place)


def _in_run(path: Path) -> Path:
    """What a run has made, if `path` is a run's directory."""
    if (path / "model").is_dir():
        return path / "model"
    if (adapter := adapter_in(path)) != path:
        return adapter
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{path} is a run that is not finished; run its command again first")
    return path


def _local(name: str) -> Path:
    """A directory, or the snapshot of a hub id."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or len(path.parts) != 2 or name.startswith((".", "/")):
        raise ConfigError(
            f"{name!r}: no such directory; a checkpoint is a directory, that of a run included, "
            "or a hub id"
        )
    return _download(name)


def _resolve_parts(parts: Parts) -> Parts:
    llm = _local(parts.llm)
    projector = parts.projector
    if projector is None and _is_export(llm):
        projector = str(llm / "projector")
    return Parts(str(llm), str(_local(parts.vision)), projector)


def _resolve_trained(place: Path, read: Reader) -> Checkpoint:
    """What was trained, and the base that it names."""
    if place.name in ("llm_adapter", "visual_encoder_adapter") and _is_export(place.parent):
        raise ConfigError(f"{place} is a part of what XTuner exported; name {place.parent}")
    base = named_base(place)
    if base in (None, "", "None"):
        raise ConfigError(
            f"{place} does not say which base it belongs to; name that too: --base when it is "
            "converted, --init-from beside --init-adapter when it is trained"
        )
    try:
        found = parse_source(base) or base
        inner = None if isinstance(found, Parts) else _in_run(Path(found))
        if inner is not None and inner.exists() and is_trained(inner):
            raise ConfigError("that is itself something trained; merge it first")
        return _resolve(found, read)._replace(adapter=place)
    except ConfigError as error:
        raise ConfigError(f"{place} was trained on {base:.200}: {error}") from error


def _is_export(directory: Path) -> bool:
    """Whether a directory is as XTuner exports them."""
    return (directory / "projector").is_dir()


def _as_parts(path: Path, read: Reader) -> Path | Parts:
    """A directory of LLaVA's or XTuner's own as separate parts; others as they are."""
    if _is_export(path):
        vision = path / "visual_encoder"
        if not vision.is_dir():
            raise ConfigError(
                f"{path} has a decoder and a projector, as XTuner exports them, but no vision "
                f"tower; name its directory too: llm={path},vision=DIRECTORY"
            )
        return Parts(str(path), str(vision), str(path / "projector"))
    try:
        layout = layouts.recognise(tensors := read(path))
    except layouts.LayoutError:
        return path  # reading it will say what is amiss
    if layout.name != layouts.E.name:
        return path
    has_tower = "vision" in layout.parts(tensors)
    return official.as_parts(path, *read_json_config(path), has_tower=has_tower)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # only for those who name a hub id

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            )
        )
    except Exception as error:  # the hub's client has many, and no common base
        raise ConfigError(
            f"{hub_id!r} is no directory (is the run that makes it finished?), and the hub does "
            f"not give it: {error}"
        ) from error

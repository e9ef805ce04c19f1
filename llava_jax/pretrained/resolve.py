"""Finds the files of a checkpoint that a user names by a path, a hub id or separate parts."""

import contextlib
import difflib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from llava_jax.config import Parts, Quantisation, absolute_source, format_source, parse_source
from llava_jax.config.presets import TINY_MODELS
from llava_jax.disk import read_regular
from llava_jax.errors import CheckpointError, ConfigError
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained import llava_directory
from llava_jax.pretrained.adapters import (
    check_readable,
    is_adapter_checkpoint,
    named_base,
    stored_fingerprint,
)
from llava_jax.pretrained.load import Reader
from llava_jax.pretrained.model_config import read_json_config
from llava_jax.pretrained.safetensors import MAX_JSON_BYTES, open_tensors
from llava_jax.pretrained.unsupported import BESIDE, refuse_pointers


class Checkpoint(NamedTuple):
    """Location of a model's weights.

    Attributes:
        name: Name of the base: its absolute path, hub id or parts.
        base: Directory or parts of the base.
        adapter: Path of an adapter checkpoint that was trained on the base, in a format of
            `pretrained.adapters`; None if the checkpoint is a whole model.
    """

    name: str
    base: Path | Parts
    adapter: Path | None = None


def resolve(
    source: str | Path | Parts,
    read: Reader = open_tensors,
    *,
    base: str | Path | Parts | None = None,
) -> Checkpoint:
    """Finds a checkpoint; for an adapter checkpoint, also finds the base. Downloads hub ids.

    Args:
        source: Path of a checkpoint or of a run, hub id, or parts. A text with parts must be parsed
            by `parse_source` first.
        read: Function that opens a file or directory and returns its tensors by name. The weights
            may be pickles unless `read` is `open_tensors`.
        base: Base that `source` was trained on; None uses the base that `source` names, if any.

    Raises:
        ConfigError: There is no such checkpoint, or `source` and `base` do not fit together.
        CheckpointError: The checkpoint cannot be read or is not supported.
    """
    try:
        if base is None:
            return _resolve(source, read)
        found = _resolve(base, read)
        if found.adapter is not None or isinstance(source, Parts):
            given = f"{format_source(source)} and --base {format_source(base)}"
            raise ConfigError(
                "the source must be an adapter or a trained part, and the base must be a model: "
                f"{given}"
            )
        return found._replace(adapter=adapter_in(source, read))
    except OSError as error:  # for example, the name is too long
        raise ConfigError(f"{format_source(source):.200}: {error.strerror}") from error


def resolve_start(source: str | Parts) -> Checkpoint:
    """Calls `resolve` for the field `init_from` of a config, and names the field in errors."""
    try:
        return resolve(source)
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from error


def _resolve(
    source: str | Path | Parts,
    read: Reader,
    *,
    is_base: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    if isinstance(source, Parts):
        return Checkpoint(format_source(source), _resolve_parts(source, read))
    is_here = Path(source).exists()
    path = Path(source) if is_here else _local(str(source), read, revision)
    refuse_pointers(path)
    path = _in_run(path)
    if is_adapter_checkpoint(path):
        if is_base:
            raise ConfigError(
                "the base is itself an adapter or a trained part; merge it into its own base first"
            )
        return _resolve_trained(path, read)
    name = str(path.resolve()) if is_here else str(source)
    _refuse_pickles(name, path, read)
    return Checkpoint(name, _as_parts(path, read))


def model_name(source: str | Path | Parts) -> str:
    """Returns a short name for a model: its hub id, or the name of its directory or run.

    For separate parts, this is the name of the decoder.
    """
    if isinstance(source, Parts):
        return model_name(source.llm)
    path = Path(source)
    if not path.exists():
        return str(source)
    path = path.resolve()
    if path.name == "adapter" and path.parent.parent.name == "checkpoints":
        return f"{path.parents[2].name}-{path.parent.name}"  # the adapter of a run's checkpoint
    is_made = path.name in ("adapter", "model") and (path.parent / "config.json").is_file()
    return path.parent.name if is_made else path.name


def adapter_in(name: str | Path, read: Reader = open_tensors) -> Path:
    """Finds an adapter checkpoint: a file, a directory, a run's adapter, or a hub id's snapshot.

    Args:
        name: Path or hub id.
        read: Function that opens a file or directory of tensors, as in `resolve`.

    Raises:
        ConfigError: There is no such path or hub id.
    """
    path = Path(name) if Path(name).exists() else _local(str(name), read)
    inner = path / "adapter"
    return inner if inner.is_dir() and _is_run(path) else path


def _in_run(path: Path) -> Path:
    """Returns the model or adapter in a run directory; returns any other path unchanged."""
    if not _is_run(path):
        return path
    for made in ("model", "adapter"):
        if (path / made).is_dir():
            return path / made
    raise ConfigError(
        f"the run in {path} is not finished; start its command again to finish it, then retry"
    )


def _is_run(path: Path) -> bool:
    """Returns True for a run directory; its config.json has other keys than a checkpoint's."""
    if not (path / "config.json").is_file():
        return (path / "checkpoints").is_dir()
    return {"config", "base_fingerprint"} <= read_json_config(path)[1].keys()


def _local(name: str, read: Reader, revision: str | None = None) -> Path:
    """Returns the directory at a path, or else downloads a revision of a hub id."""
    path = Path(name)
    if path.is_dir():
        return path
    if name in TINY_MODELS:
        return TINY_MODELS[name]
    if path.exists() or is_local(name):
        near = None if path.exists() else _similar_directory(name)
        meant = "" if near is None else f"did you mean {near!r}? Otherwise, "
        raise ConfigError(
            f"{name!r}: no such directory; {meant}give the directory of a checkpoint or of a run, "
            f"a hub id, or {' or '.join(TINY_MODELS)} (the models that come with llava_jax)"
        )
    return _download(name, revision, pickles=_reads_pickles(read))


_LOCAL = ("runs", "checkpoints", "data")
"""Directories in which the presets look for weights and data. They are not names of hub users."""

_FILES = (".safetensors", ".bin", ".pth", ".pt", ".json")


def is_local(name: str) -> bool:
    """Returns True if a name cannot be a hub id, which has the form USER/MODEL.

    Args:
        name: Path or hub id; it does not have to exist.
    """
    parts = Path(name).parts
    if name in TINY_MODELS:
        return False
    is_path = name.startswith((".", "/", "~")) or name.endswith(_FILES)
    return is_path or len(parts) != 2 or parts[0] in _LOCAL


def _reads_pickles(read: Reader) -> bool:
    return read is not open_tensors


def _resolve_parts(parts: Parts, read: Reader) -> Parts:
    llm, vision = (_find_part(name, read) for name in (parts.llm, parts.vision))
    projector = parts.projector
    if projector is None and _is_export(llm):
        projector = str(llm / "projector")
    return Parts(str(llm), str(vision), projector)


def _find_part(name: str, read: Reader) -> Path:
    directory = _local(name, read)
    refuse_pointers(directory)
    _refuse_pickles(name, directory, read)
    return directory


def _refuse_pickles(name: str, directory: Path, read: Reader) -> None:
    """Raises CheckpointError if there are only pickles and `read` does not read pickles.

    The snapshot of a hub id then has no weights at all, because `_download` leaves out pickles.
    """
    is_snapshot, pickles = not Path(name).exists(), sorted(directory.glob("*.bin"))
    if _reads_pickles(read) or any(directory.glob("*.safetensors")) or not (is_snapshot or pickles):
        return
    has = "no safetensors file" if is_snapshot else f"only {pickles[0].name}"
    rewritten = f"{Path(name).name}-safetensors"
    raise CheckpointError(
        f"{name} has {has}, and only `llava-jax convert` reads pickles: run `llava-jax convert "
        f"{name} {rewritten} --to hf`, then use {rewritten} instead of {name}"
    )


def _resolve_trained(directory: Path, read: Reader) -> Checkpoint:
    """Returns an adapter checkpoint, and the base that the adapter checkpoint names."""
    if directory.name in ("llm_adapter", "visual_encoder_adapter") and _is_export(directory.parent):
        raise ConfigError(
            f"{directory} is only a part of an XTuner export; give the directory of the export: "
            f"{directory.parent}"
        )
    base, revision = named_base(directory)
    if base in (None, "", "None"):
        check_readable(directory, read)
        raise ConfigError(f"{directory} does not name the base it was trained on; {_NAME_BASE}")
    try:
        source = parse_source(base)
        if revision and isinstance(source, Parts):
            raise ConfigError(f"one of its parts is the revision {revision:.80}; download it first")
        found = _resolve(source, read, is_base=True, revision=revision)
        return found._replace(adapter=directory)
    except ConfigError as error:
        raise ConfigError(
            f"{directory} was trained on {base:.200}, which cannot be used; {_NAME_BASE} ({error})"
        ) from error


_NAME_BASE = (
    "give the base with --base; to train the adapter further, give the base with --init-from and "
    "the adapter with --init-adapter"
)


def _is_export(directory: Path) -> bool:
    """Returns True if a directory has the layout that XTuner's export script writes."""
    return (directory / "projector").is_dir()


def _as_parts(path: Path, read: Reader) -> Path | Parts:
    """Returns the parts in a directory of LLaVA's own code or XTuner; otherwise returns `path`."""
    if _is_export(path):
        vision = path / "visual_encoder"
        if not vision.is_dir():
            raise ConfigError(
                f"{path} has the decoder and the projector of an XTuner export, but no vision "
                f"tower; also give the directory of the tower: llm={path},vision=DIRECTORY"
            )
        return Parts(str(path), str(vision), str(path / "projector"))
    try:
        layout = layouts.recognise(tensors := read(path))
    except layouts.LayoutError:
        return path  # loading the directory raises a clear error
    if layout.name != layouts.LLAVA.name:
        return path
    file, raw = read_json_config(path)
    parts = layout.parts(tensors)
    if parts == {"llm"} and "mm_vision_tower" not in raw:
        return path  # a decoder alone has the same tensor names
    find = partial(_find_part, read=read)
    return llava_directory.as_parts(path, file, raw, find, has_tower="vision" in parts)


_BESIDE_WEIGHTS = ("*.json", "*.model", "*.jinja", "*.txt")


def _download(hub_id: str, revision: str | None, *, pickles: bool) -> Path:
    """Downloads the snapshot of a hub id; None as revision means the newest commit.

    With `pickles`, pickles are downloaded too if there is no safetensors file.
    """
    from huggingface_hub import snapshot_download  # imported only if it is needed

    # LLaVA's code writes trained parameters into the pickles in BESIDE, so they are always needed.
    patterns = [*_BESIDE_WEIGHTS, "*.safetensors", *(f"{name}.bin" for name in BESIDE)]
    download = lambda patterns: Path(
        snapshot_download(hub_id, revision=revision, allow_patterns=patterns)
    )
    try:
        directory = download(patterns)
        if pickles and not any(directory.rglob("*.safetensors")):
            directory = download([*patterns, "*.bin"])
    except Exception as error:  # the client's errors have no common class
        near = _similar_directory(hub_id)
        meant = "if a run writes it, check that the run is finished"
        if near is not None:
            meant = f"did you mean {near!r}?"
        raise ConfigError(
            f"{hub_id!r} is not a directory ({meant}), and it cannot be downloaded from the hub: "
            f"{error}"
        ) from error
    return directory


def _similar_directory(path: str) -> str | None:
    """Returns the path of an existing directory whose path differs by a few letters, or None."""
    found = Path()
    for name in Path(path).parts:
        if not (found / name).is_dir():
            names = [other.name for other in found.iterdir() if other.is_dir()]
            name = next(iter(difflib.get_close_matches(name, names, 1)), None)
            if name is None:
                return None
        found /= name
    return str(found)


def quantisation_of(source: Path | Parts) -> Quantisation | None:
    """Returns the quantization that a run used for its base; None if the base was not quantized.

    Args:
        source: Run directory, the directory `adapter` or `model` in a run directory, or the adapter
            of a checkpoint of a run. For any other source, the result is None.
    """
    return None if isinstance(source, Parts) else _run_quantisation(source)[1]


def _run_quantisation(source: Path) -> tuple[bool, Quantisation | None]:
    """Returns whether a run wrote the source, and the quantization of the run's base."""
    for run_dir in (source, *source.absolute().parents[:3]):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(read_regular(run_dir / "config.json", MAX_JSON_BYTES))
            if "base_fingerprint" in found:
                bits = found["config"]["quantize"]
                return True, bits if bits in get_args(Quantisation) else None
    return False, None


def base_warnings(adapter: Path, base: Checkpoint, quantize: Quantisation | None) -> list[str]:
    """Returns a sentence for each sign that an adapter was trained on something else than a base.

    An adapter that has a fingerprint of its base is compared with the base when it is loaded.

    Args:
        adapter: Path of the adapter checkpoint.
        base: Base that the adapter is added to.
        quantize: Quantization of the base.

    Raises:
        CheckpointError: The settings of the adapter cannot be used.
    """
    named, lines = named_base(adapter).name, []
    local = lambda name: str(Path(name).resolve()) if Path(name).exists() else absolute_source(name)
    if named and stored_fingerprint(adapter) is None and local(named) != local(base.name):
        lines.append(
            f"{adapter} names {named:.200} as its base, but it is added to {base.name}; it has no "
            "fingerprint of its base, so make sure that both have the same weights"
        )
    is_run, trained = _run_quantisation(adapter)
    if is_run and trained != quantize:
        lines.append(
            f"{adapter} was trained with quantize {trained}, but the base is loaded with quantize "
            f"{quantize}; its answers may differ"
        )
    return lines

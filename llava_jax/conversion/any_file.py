"""Tensors in files of every kind: safetensors, pickles, and DeepSpeed's directories.

For `llava-jax convert`; training opens `tensorfile.open_tensors` alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.conversion.deepspeed import open_zero, zero_directory
from llava_jax.conversion.torch_pickle import open_pickle
from llava_jax.disk import open_regular
from llava_jax.errors import CheckpointError
from llava_jax.pretrained.safetensors import INDEX, SINGLE, Tensor, open_indexed, open_tensors

_INDEX, _SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_MAX_NAMED, _MAX_NAME = 20, 100  # entries in a message, and characters of each
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")


def open_any(path: str | Path) -> dict[str, Tensor]:
    """As `tensorfile.open_tensors`, also for pickles: by what a file holds, not how it is called.

    Raises:
        CheckpointError: Nothing there to read, it is damaged, or a tensor is of a class that is
            not known; names its global.
    """
    path = Path(path)
    if path.is_file():
        return _state_dict(path) if _is_pickle(path) else open_tensors(path)
    if path.is_dir() and (directory := zero_directory(path)) is not None:
        return open_zero(directory)
    has_safetensors = any(path.glob("*.safetensors"))
    if not has_safetensors and (path / _INDEX).is_file():
        return open_indexed(path / _INDEX, open_any)
    if not has_safetensors and (path / _SINGLE).is_file():
        return open_any(path / _SINGLE)
    if path.is_dir() and not any((path / name).is_file() for name in (SINGLE, INDEX)):
        raise CheckpointError(_what_is_there(path))
    return open_tensors(path)


def _what_is_there(directory: Path) -> str:
    """Of a directory without weights of its own, what in it may have been meant."""
    may_be = [entry.name for entry in sorted(directory.iterdir()) if _may_be_weights(entry)]
    if may_be:
        return f"{directory} is no checkpoint itself; name what in it is one: {', '.join(may_be)}"
    found = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
    return f"{directory} has no weights, {SINGLE} or {_SINGLE} for example (found: {found})"


def _may_be_weights(path: Path) -> bool:
    if path.is_file():
        return path.suffix in _ENDINGS
    files = (file for pattern in ("*.*", "*/*.*") for file in path.glob(pattern))
    return any(file.suffix in _ENDINGS for file in files)


def _is_pickle(path: Path) -> bool:
    """Whether it is one and no safetensors file.

    Raises:
        CheckpointError: It is neither.
    """
    with open_regular(path) as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # after a length of 8 bytes, which may be any
    is_pickle = start[:2] == b"PK" or (start[:1] == b"\x80" and not is_safetensors)
    if not (is_pickle or is_safetensors):
        raise CheckpointError(
            f"{path} is neither a safetensors file nor a pickle as torch saves it"
        )
    return is_pickle


def _state_dict(path: Path) -> dict[str, Tensor]:
    """A file's named tensors: its root, or what XTuner and DeepSpeed keep beside other things."""
    root = open_pickle(path)
    if not isinstance(root, dict):
        what = getattr(root, "origin", type(root).__name__)
        raise CheckpointError(f"{path} holds no tensors by name, but a {what}")
    for name in ("state_dict", "module", "model"):
        if isinstance(root.get(name), dict):
            root = root[name]
    return _check(root, path)


def _check(named: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Refuses what is no tensor.

    Raises:
        CheckpointError: Names each, and its global.
    """
    origin = lambda value, other: str(getattr(value, "origin", other))[:_MAX_NAME]
    odd = {
        name: origin(value, type(value).__name__)
        for name, value in named.items()
        if not isinstance(value, Tensor)
    }
    if odd:
        listed = [f"\n  {origin(name, name)}: {what}" for name, what in [*odd.items()][:_MAX_NAMED]]
        lines = "".join(listed) + ("\n  ..." if len(odd) > _MAX_NAMED else "")
        raise CheckpointError(f"{path} holds {len(odd)} entries that are no plain tensors:{lines}")
    return {str(name): tensor for name, tensor in named.items()}

"""Tensors in files of every kind: safetensors, pickles, and DeepSpeed's directories.

For tools/convert.py; training opens `tensorfile.open_tensors` alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_jax.hf.pickles import open_pickle
from llava_jax.hf.tensorfile import CheckpointError, Tensor, open_indexed, open_tensors
from llava_jax.hf.zero import open_zero, zero_directory

_INDEX, _SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"


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
    return open_tensors(path)


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # after a length of 8 bytes, which may be any
    return start[:2] == b"PK" or (start[:1] == b"\x80" and not is_safetensors)


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
    odd = {
        name: getattr(value, "origin", type(value).__name__)
        for name, value in named.items()
        if not isinstance(value, Tensor)
    }
    if odd:
        lines = "".join(f"\n  {name}: {what}" for name, what in odd.items())
        raise CheckpointError(f"{path} holds {len(odd)} entries that are no plain tensors:{lines}")
    return {str(name): tensor for name, tensor in named.items()}

"""Opens the tensors of a checkpoint in any file format: safetensors, pickle or DeepSpeed.

Only `llava-jax convert` reads all these formats. Training reads only safetensors files, with
`pretrained.safetensors.open_tensors`.
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
_MAX_NAMED, _MAX_NAME = 20, 100  # limits for a message: entries, and characters of an entry
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")


def open_any(path: str | Path) -> dict[str, Tensor]:
    """Opens the tensors of a file or a directory, without reading their values.

    The format of a file is recognized by its contents, not by its name.

    Args:
        path: safetensors file, pickle of torch.save, directory with such files, or ZeRO checkpoint
            of DeepSpeed.

    Returns:
        The tensors by name.

    Raises:
        CheckpointError: There are no weights, a file is damaged, or an entry of a state dict is
            not a plain tensor; the message names the Python class or function of such an entry.
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
    """Returns the error message for a directory that is not a checkpoint itself."""
    may_be = [entry.name for entry in sorted(directory.iterdir()) if _may_be_weights(entry)]
    if may_be:
        return (
            f"{directory} is not a checkpoint; give the path of a checkpoint in it: "
            f"{', '.join(may_be)}"
        )
    found = ", ".join(sorted(entry.name for entry in directory.iterdir())) or "nothing"
    return f"{directory} has no weights, such as {SINGLE} or {_SINGLE} (found: {found})"


def _may_be_weights(path: Path) -> bool:
    """Returns True if a path is, or contains, a file whose name ends like a file of weights."""
    if path.is_file():
        return path.suffix in _ENDINGS
    files = (file for pattern in ("*.*", "*/*.*") for file in path.glob(pattern))
    return any(file.suffix in _ENDINGS for file in files)


def _is_pickle(path: Path) -> bool:
    """Returns True if a file is a pickle of torch.save, and False if it is a safetensors file.

    Raises:
        CheckpointError: The file is neither of the two.
    """
    with open_regular(path) as file:
        start = file.read(9)
    is_safetensors = start[8:] == b"{"  # the first 8 bytes are a length of any value
    is_pickle = start[:2] == b"PK" or (start[:1] == b"\x80" and not is_safetensors)
    if not (is_pickle or is_safetensors):
        raise CheckpointError(
            f"{path} is neither a safetensors file nor a pickle that torch.save wrote"
        )
    return is_pickle


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a pickle that is or contains a state dict (XTuner, DeepSpeed)."""
    root = open_pickle(path)
    if not isinstance(root, dict):
        what = getattr(root, "origin", type(root).__name__)
        raise CheckpointError(f"{path} contains a {what}; it must contain a dict of tensors")
    for name in ("state_dict", "module", "model"):
        if isinstance(root.get(name), dict):
            root = root[name]
    return _check(root, path)


def _check(named: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Returns a state dict after checking that all its entries are tensors.

    Raises:
        CheckpointError: Some entries are not tensors; the message names the Python class or
            function of these entries.
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
        raise CheckpointError(f"{path} has {len(odd)} entries that are not plain tensors:{lines}")
    return {str(name): tensor for name, tensor in named.items()}

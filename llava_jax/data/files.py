"""Data files by their paths: on disks, or wherever fsspec reads (gs://, s3://, https://)."""

import glob
import os
from typing import Any

from llava_jax.disk import open_regular
from llava_jax.errors import ConfigError


def is_remote(path: str) -> bool:
    """Whether a path is fsspec's rather than the operating system's."""
    return "://" in path


def open_file(path: str) -> Any:
    """Opens a file to be read, in binary.

    Raises:
        OSError: It cannot be, or is a folder, a pipe or a device.
        ConfigError: What reads such paths is not installed.
    """
    if not is_remote(path):
        return open_regular(path)
    return _file_system(path).open(path, "rb")


def file_size(path: str) -> int:
    """Bytes of a file."""
    return _file_system(path).size(path) if is_remote(path) else os.path.getsize(path)


def is_folder(path: str) -> bool:
    return _file_system(path).isdir(path) if is_remote(path) else os.path.isdir(path)


def list_folder(path: str) -> list[str]:
    """The paths of what is in a folder."""
    if is_remote(path):
        system = _file_system(path)
        return [system.unstrip_protocol(name) for name in system.ls(path, detail=False)]
    return [os.path.join(path, name) for name in os.listdir(path)]


def find_files(pattern: str) -> list[str]:
    """The paths that a pattern such as "data/train-*.parquet" stands for, in order."""
    if is_remote(pattern):
        system = _file_system(pattern)
        return sorted(system.unstrip_protocol(name) for name in system.glob(pattern))
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _file_system(path: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)[0]
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error

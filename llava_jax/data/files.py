"""Opens and lists local data files, and remote data files (gs://, s3://, https://) with fsspec."""

import codecs
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from llava_jax.disk import open_regular
from llava_jax.errors import ConfigError


def is_remote(path: str) -> bool:
    """Returns True if the path is a URL that fsspec reads, such as "s3://bucket/file"."""
    return "://" in path


def open_file(path: str) -> Any:
    """Opens a file for reading in binary mode.

    Raises:
        OSError: The file cannot be opened, or is a directory, a pipe or a device.
        ConfigError: fsspec does not support the URL, or needs a package that is not installed.
    """
    if not is_remote(path):
        return open_regular(path)
    with _file_system(path) as system:
        return system.open(path, "rb")


class Encoding(NamedTuple):
    """Encoding of a text file.

    Attributes:
        name: Name of the encoding for Python.
        unit: Size of a code unit in bytes.
        start: Offset in bytes of the text, after a byte order mark.
    """

    name: str
    unit: int
    start: int


def detect_encoding(start: bytes) -> Encoding:
    """Returns the encoding of a text file, which is UTF-8 or UTF-16, with a byte order mark or not.

    Args:
        start: First bytes of the file. The first character is assumed to be ASCII.
    """
    if start.startswith(codecs.BOM_UTF8):
        return Encoding("utf-8", 1, len(codecs.BOM_UTF8))
    for mark, name in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if start.startswith(mark) and len(start) > len(mark):
            return Encoding(name, 2, len(mark))
    if len(start) >= 2 and (start[0] == 0) != (start[1] == 0):
        return Encoding("utf-16-be" if start[0] == 0 else "utf-16-le", 2, 0)
    return Encoding("utf-8", 1, 0)


def check_size(path: str, size: int) -> None:
    """Raises ConfigError if a data file no longer has the size that it had when it was opened.

    Args:
        path: Path of the file.
        size: Size in bytes of the file when it was opened.
    """
    if file_size(path) != size:
        raise ConfigError(f"data file {path} changed while it was in use; start the command again")


def file_size(path: str) -> int:
    """Returns the size of a file in bytes."""
    if not is_remote(path):
        return os.path.getsize(path)
    with _file_system(path) as system:
        return system.size(path)


def is_folder(path: str) -> bool:
    """Returns True if the path is a directory."""
    if not is_remote(path):
        return os.path.isdir(path)
    with _file_system(path) as system:
        return system.isdir(path)


def list_folder(path: str) -> list[str]:
    """Returns the paths of all files and directories in a directory."""
    if not is_remote(path):
        return [os.path.join(path, name) for name in os.listdir(path)]
    with _file_system(path) as system:
        return [system.unstrip_protocol(name) for name in system.ls(path, detail=False)]


def find_files(pattern: str) -> list[str]:
    """Returns the sorted paths that match a pattern such as "data/train-*.parquet"."""
    if not is_remote(pattern):
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    with _file_system(pattern) as system:
        return sorted(system.unstrip_protocol(name) for name in system.glob(pattern))


@contextmanager
def _file_system(path: str) -> Iterator[Any]:
    """Provides the fsspec file system of a URL, whose errors become OSError in the context.

    Without a network, for example, each file system raises an error of another type.
    """
    import fsspec

    try:
        system = fsspec.core.url_to_fs(path)[0]
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"fsspec cannot open {path}: {error}; check the address, or install the package for it"
        ) from error
    try:
        yield system
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path} cannot be reached ({type(error).__name__}: {error})") from error

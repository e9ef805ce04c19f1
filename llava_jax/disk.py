"""Reads files of unknown type and size, and writes files completely or not at all."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

Json = dict[str, Any]
"""Type of a JSON object."""


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file for reading.

    Other kinds of files are refused: reading a FIFO may block, and reading a device may never end.

    Raises:
        OSError: The file cannot be opened, or it is a FIFO, a socket, a device or a directory.
    """

    def opener(name: str, flags: int) -> int:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer. The type is checked after the
        # file is open, because the path could refer to another file a moment later.
        number = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return number

    return open(path, "rb", opener=opener)


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Reads a regular file whose size is limited.

    Args:
        path: Path of the file.
        max_bytes: Largest size of the file in bytes.

    Raises:
        OSError: The file cannot be opened (see `open_regular`), or has more than `max_bytes` bytes.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return content


def read_if_there(path: Path) -> bytes | None:
    """Reads a regular file, or returns None if the file does not exist.

    Raises:
        OSError: The file exists but cannot be opened; see `open_regular`.
    """
    if not path.exists():
        return None
    with open_regular(path) as file:
        return file.read()


def copy_regular(source: Path, destination: Path) -> None:
    """Copies the contents of a regular file, and replaces `destination` if it exists.

    Raises:
        OSError: The source cannot be opened (see `open_regular`), or the destination cannot be
            written.
    """
    with open_regular(source) as file, open(destination, "wb") as copy:
        shutil.copyfileobj(file, copy)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Adds a path to each OSError that is raised in the `with` block without a file name.

    Python's error contains the file name if the file cannot be opened, but not if a write fails.
    """
    try:
        yield path
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str) -> None:
    r"""Writes a text to a file completely, or leaves the file unchanged if an error occurs.

    UTF-8 cannot encode lone surrogates, which JSON and file names may contain. Lone surrogates are
    written as in JSON, for example as `\ud800`.
    """
    replace_bytes(path, text.encode(errors="backslashreplace"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes bytes to a file completely, or leaves the file unchanged if an error occurs."""
    # The name contains the process id, because other processes may be writing the same file.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with naming(unfinished):
            unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def append_rows(path: Path, rows: Iterable[Json]) -> None:
    """Appends rows to a file of JSON lines."""
    with naming(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def is_deeper(value: object, depth: int) -> bool:
    """Returns True if lists and objects of a JSON value are nested more than `depth` levels."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return False
    return True

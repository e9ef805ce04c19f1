"""Reads files that may be anything, and writes files on disks that may be full."""

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
"""An object of a JSON file."""


def open_regular(path: str | Path) -> BufferedReader:
    """Opens a regular file for reading.

    Everything else is refused: reading a FIFO may block, and reading a device may never end.

    Raises:
        OSError: It cannot be opened, or is a FIFO, a socket, a device or a directory.
    """

    def opener(name: str, flags: int) -> int:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer. The type is checked after the
        # file is open, because the path may refer to another file a moment later.
        number = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return number

    return open(path, "rb", opener=opener)


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """Reads a regular file that is not large.

    Raises:
        OSError: The file cannot be opened by `open_regular`, or has more than `max_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return content


def read_if_there(path: Path) -> bytes | None:
    """Reads a regular file; None if it does not exist. Raises OSError as `open_regular` does."""
    if not path.exists():
        return None
    with open_regular(path) as file:
        return file.read()


def copy_regular(source: Path, destination: Path) -> None:
    """Copies a regular file. Raises OSError as `open_regular` does."""
    with open_regular(source) as file, open(destination, "wb") as copy:
        shutil.copyfileobj(file, copy)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Adds a path to OSErrors that have none.

    Python names the file only if it could not be opened, and not if a write fails later.
    """
    try:
        yield path
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file completely or, if an error occurs, keeps the one that existed before.

    A lone surrogate, which JSON and file names may have but UTF-8 cannot, is written as in JSON:
    `\\ud800`.
    """
    replace_bytes(path, text.encode(errors="backslashreplace"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file completely or keeps the old one, as `replace_text` does."""
    # The name has the process id, because another process may write the same file now.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with naming(unfinished):
            unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def append_rows(path: Path, rows: Iterable[Json]) -> None:
    """Appends rows to a JSON-lines file."""
    with naming(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects of a JSON value are nested more than `depth` levels deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return False
    return True

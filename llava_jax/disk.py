"""Files on disks that may be full, at paths that may be something else than a file."""

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a regular file to be read, in binary.

    Raises:
        OSError: It cannot be, or is something else: a pipe or a device could be read without end.
    """

    def opener(name: str, flags: int) -> int:
        # Without O_NONBLOCK, a pipe is waited for before it can be recognised.
        number = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return number

    return open(path, "rb", opener=opener)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Says in an error what could not be written; Python does so only where a file is opened."""
    try:
        yield path
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or, if that ends in its midst, leaves the one that was there."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`."""
    unfinished = path.with_name(path.name + ".unfinished")
    with naming(unfinished):
        unfinished.write_bytes(data)
    unfinished.replace(path)


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a file of JSON lines."""
    with naming(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

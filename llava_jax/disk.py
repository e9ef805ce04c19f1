"""Files: reading what strangers put there, and writing to disks that may be full."""

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
    """Opens a file for reading; refuses what is none, for a FIFO may block and a device never end.

    Raises:
        OSError: It cannot be opened, or is a FIFO, a socket, a device or a directory.
    """

    def opener(name: str, flags: int) -> int:
        # Without O_NONBLOCK, opening a pipe would wait for a writer. The kind is asked of what was
        # opened, because the name may mean something else a moment later.
        number = os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return number

    return open(path, "rb", opener=opener)


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """All of a file that is not large.

    Raises:
        OSError: As `open_regular`; or the file has more than `max_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"larger than {max_bytes:,} bytes", str(path))
    return content


def read_if_there(path: Path) -> bytes | None:
    """All of a file; None if there is none. Raises OSError as `open_regular` does."""
    if not path.exists():
        return None
    with open_regular(path) as file:
        return file.read()


def copy_regular(source: Path, destination: Path) -> None:
    """Copies a file; raises OSError as `open_regular` does."""
    with open_regular(source) as file, open(destination, "wb") as copy:
        shutil.copyfileobj(file, copy)


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
    """Writes a file whole or, if that ends in its midst, leaves the one that was there.

    Half of a character, which JSON and names of files may have and UTF-8 has not, is written as
    JSON has it: `\\ud800`.
    """
    replace_bytes(path, text.encode(errors="backslashreplace"))


def replace_bytes(path: Path, data: bytes) -> None:
    """As `replace_text`."""
    # Of this process alone: another may write the same file at the same time.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with naming(unfinished):
            unfinished.write_bytes(data)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def append_rows(path: Path, rows: Iterable[Json]) -> None:
    """Adds rows to a file of JSON lines."""
    with naming(path), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects of a JSON value are inside each other more often than `depth`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return False
    return True

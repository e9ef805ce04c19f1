"""What data is known again by: a digest of its records, and of some of its image files."""

import hashlib
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from llava_jax.data.conversation import SampleError
from llava_jax.data.files import is_remote, open_file
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.sources import FileRecords, JoinedRecords, ListRecords, Records
from llava_jax.disk import Json

_BLOCK = 2**16
_BLOCKS = 256
"""Blocks that are read of the Parquet files of a source, all together."""
_THREADS = 32
_NAMED = 5
"""Images that differ and are named; the others are counted."""


def data_digest(records: Records) -> list[Json]:
    """What a run's data is known again by, wherever it lies. Plain JSON.

    It changes when a record is added, removed, moved or edited in a field that is read. Of image
    files, about a thousand are looked at, evenly spread: their sizes, and their first 64 KiB. Times
    and folders do not matter. What it costs is some reads of image files: the records were read
    through when they were opened.

    Args:
        records: All of a run's data, or all that is held out.

    Returns:
        For each source, its "files" as [path, records, digest], and its "images": path -> size and
        checksum.
    """
    parts = records.parts if isinstance(records, JoinedRecords) else [records]
    return [_of_files(part) if isinstance(part, FileRecords) else _of_list(part) for part in parts]


def _of_list(records: ListRecords) -> Json:
    digest = hashlib.sha256()
    for record in records:
        names = [os.path.basename(image) for image in record.images if isinstance(image, str)]
        digest.update(repr((record.turns, record.category, names)).encode())
    return {"files": [["records", len(records), digest.hexdigest()]], "images": {}}


def _of_files(records: FileRecords) -> Json:
    files, tables = records.files, [f for f in records.files if isinstance(f, ParquetFile)]
    with ThreadPoolExecutor(_THREADS) as pool:
        paths = list(dict.fromkeys(path for file in files for path in file.images))
        images = dict(zip(paths, pool.map(lambda path: _image(records, path), paths), strict=True))
        blocks = max(_BLOCKS // max(len(tables), 1), 1)
        inside = pool.map(lambda table: _blocks(table.path, blocks), tables)
        images |= {f"in {os.path.basename(t.path)}": x for t, x in zip(tables, inside, strict=True)}
    return {
        "files": [[file.path, len(file), file.digest] for file in files],
        "images": {path: image for path, image in images.items() if image is not None},
    }


def _image(records: FileRecords, path: str) -> str | None:
    try:
        return _blocks(records.locate_image(path), 1)
    except SampleError:
        return "not in image_root"


def _blocks(path: str, count: int) -> str | None:
    """The size of a file, and a checksum of some blocks of it, evenly spread from its start on.

    None if it cannot be read now: that may pass, and says nothing about the file.
    """
    if not is_remote(path) and not os.path.isfile(path):
        return "missing"
    try:
        with open_file(path) as file:
            size, value = file.seek(0, os.SEEK_END), 0
            for number in range(min(count, -(-size // _BLOCK))):
                file.seek(max(number * _BLOCK, number * size // count))
                value = zlib.crc32(file.read(_BLOCK), value)
    except FileNotFoundError:
        return "missing"
    except Exception:  # fsspec's file systems have errors of many kinds
        return None
    return f"{size} bytes, CRC-32 {value:08x}"


def data_changes(before: list[Json], now: list[Json], kind: str = "training data") -> Iterator[str]:
    """How data differs from what `data_digest` gave before; a line each.

    Of image files, only those are compared that could be read both times.

    Args:
        before: What `data_digest` gave when the run began.
        now: What it gives now.
        kind: What the data is, for the lines.

    Raises:
        KeyError, TypeError, ValueError: `before` is not what `data_digest` gives.
    """
    if len(before) != len(now):
        yield f"{kind}: {len(before)} data sets when the run began, {len(now)} now"
        return
    for old, new in zip(before, now, strict=True):
        if len(old["files"]) != len(new["files"]):
            lengths = len(old["files"]), len(new["files"])
            yield f"{kind}: {lengths[0]} data files when the run began, {lengths[1]} now"
            continue
        for (was, count, digest), (path, *found) in zip(old["files"], new["files"], strict=True):
            name = f"{kind} {path}" if path == was else f"{kind} {path}, before {was}"
            if count != found[0]:
                yield f"{name}: {count} records when the run began, {found[0]} now"
            elif digest != found[1]:
                yield f"{name}: the records ({count}), or their order, changed since the run began"
        known = old["images"]
        other = [path for path, image in new["images"].items() if known.get(path, image) != image]
        for path in other[:_NAMED]:
            images = known[path], new["images"][path]
            yield f"{kind}, image {path}: {images[0]} when the run began, {images[1]} now"
        if len(other) > _NAMED:
            yield f"and {len(other) - _NAMED} more of {len(known)} images that were compared"

"""Identifies the data of a run by digests of all its records and of some of its image files."""

import hashlib
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from llava_jax.data.files import is_remote, open_file
from llava_jax.data.parquet_file import ParquetFile
from llava_jax.data.sources import FileRecords, JoinedRecords, ListRecords, Records
from llava_jax.disk import Json
from llava_jax.errors import SampleError

_BLOCK = 2**16
"""Size of a block in bytes."""
_BLOCKS = 256
"""Total number of blocks that are read from all Parquet files of a source."""
_THREADS = 32
_NAMED = 5
"""Maximum number of changed images that are named; further changed images are only counted."""


def data_digest(records: Records) -> list[Json]:
    """Returns digests that identify the data of a run, independently of where it is stored.

    The digests change if a record is added, removed or moved, or if a field that is used is edited.
    For about a thousand image files, evenly spread over the data, the digests also contain the
    sizes and the checksums of the first 64 KiB. The digests do not depend on modification times or
    directories. This function reads only image files and blocks of Parquet files, because the
    digests of the records were computed when the data was opened.

    Args:
        records: All training records of a run, or all its eval records.

    Returns:
        One dict per source, which can be written as JSON. "files" is a list of [path, number of
        records, digest], and "images" maps paths to texts with size and checksum.
    """
    parts = records.parts if isinstance(records, JoinedRecords) else [records]
    return [_of_files(part) if isinstance(part, FileRecords) else _of_list(part) for part in parts]


def _of_list(records: ListRecords) -> Json:
    digest = hashlib.sha256()
    for record in records:
        names = [os.path.basename(image) for image in record.images if isinstance(image, str)]
        digest.update(repr((record.turns, record.category, names)).encode())
        for video in record.videos:
            sources = video.source if isinstance(video.source, tuple) else (video.source,)
            names = [os.path.basename(source) for source in sources if isinstance(source, str)]
            digest.update(repr(names).encode())
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
    """Returns a text with the size of a file and a checksum of `count` evenly spaced blocks.

    The first block is at the start of the file. Returns "missing" if the file does not exist, and
    None if the path is a directory, or the file cannot be read for another reason, which may be
    temporary.
    """
    if not is_remote(path) and not os.path.isfile(path):
        return None if os.path.isdir(path) else "missing"
    try:
        with open_file(path) as file:
            size, value = file.seek(0, os.SEEK_END), 0
            for number in range(min(count, -(-size // _BLOCK))):
                file.seek(max(number * _BLOCK, number * size // count))
                value = zlib.crc32(file.read(_BLOCK), value)
    except FileNotFoundError:
        return "missing"
    except Exception:  # fsspec's file systems raise errors of many types
        return None
    return f"{size} bytes, CRC-32 {value:08x}"


def data_changes(before: list[Json], now: list[Json], kind: str = "training data") -> Iterator[str]:
    """Yields one line of text for each difference between earlier and current digests.

    Image files are compared only if they could be read both times.

    Args:
        before: Digests that `data_digest` returned when the run began.
        now: Digests that `data_digest` returns now.
        kind: Name of the data, which is used in the lines.

    Raises:
        KeyError, TypeError, ValueError: `before` does not have the format that `data_digest`
            returns.
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
            name = f"{kind} {path}" if path == was else f"{kind} {path} (was {was})"
            if count != found[0]:
                yield f"{name}: {count} records when the run began, {found[0]} now"
            elif digest != found[1]:
                yield (
                    f"{name}: the content or the order of the {count} records changed since the "
                    "run began"
                )
        known = old["images"]
        other = [path for path, image in new["images"].items() if known.get(path, image) != image]
        for path in other[:_NAMED]:
            images = known[path], new["images"][path]
            yield f"{kind}, image {path}: {images[0]} when the run began, {images[1]} now"
        if len(other) > _NAMED:
            yield f"and {len(other) - _NAMED} more changed images, of {len(known)} compared"

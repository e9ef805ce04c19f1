"""Computes the decoding cost of an image file from its bytes, before anything is decoded.

A file of a few kilobytes can keep a decoder busy for an hour or fill the memory, for example with
empty scans of a JPEG, tiny chunks of a PNG or tags of a TIFF. Counting such parts gives the same
result on every machine, unlike a time limit. The limits are based on measurements of Pillow's
decoders: an image within the limits takes at most a few seconds of one core and about a gigabyte of
memory.
"""

import contextlib
import itertools
import math
import re
import struct
from collections.abc import Iterator

from llava_jax.errors import SampleError

MAX_FILE_BYTES = 2**28
"""Maximum number of bytes of an image file."""
MAX_PIXELS = 2**30 // 4 // 3
"""Maximum number of pixels of an image, which is also Pillow's own limit."""

# Limits for headers and metadata. Pillow reads these in Python, in a few microseconds per part.
MAX_HEADER_BYTES = 2**24
"""Maximum number of bytes of a JPEG's header, and of all chunks of a PNG that hold no pixels."""
MAX_JUNK_BYTES = 2**16
"""Maximum number of bytes between the segments of a JPEG's header. Pillow reads such bytes one
by one."""
MAX_SEGMENTS = 4096
"""Maximum number of segments of a JPEG."""
MAX_CHUNKS = 2**16
"""Maximum number of chunks of a PNG."""
MAX_COMPRESSED_CHUNKS = 128
"""Maximum number of compressed texts and color profiles of a PNG, each of which may expand to 1
MiB."""
MAX_GIF_BLOCKS = 2**16
"""Maximum number of blocks before the first picture of a GIF."""
MAX_JOINED_BYTES = 2**20
"""Maximum number of bytes of a GIF's comments and of a JPEG's Exif data, which Pillow
concatenates block by block."""
MAX_TAGS = 1000
"""Maximum number of tags of a TIFF or of Exif data. libtiff sorts all tags again for each tag that
is unknown to libtiff."""
MAX_TAG_NUMBERS = 2**21
"""Maximum number of bytes of the numbers in all tags. Each number becomes a Python object."""

# Limits for pixels.
MAX_JPEG_BYTES = 2**27
"""Maximum number of bytes of a JPEG file."""
MAX_JPEG_BLOCKS = 2**22
"""Maximum number of blocks of a JPEG with several scans. All blocks of such a JPEG, 128 bytes each,
stay in memory until the last scan."""
MAX_JPEG_VISITS = 20_000_000
"""Maximum number of blocks that all scans of a JPEG visit; a block counts once per scan. The scans
of a usual progressive JPEG with three full components visit each block about five times."""
MIN_SCAN_VISITS = 2**14
"""Minimum number of visits that are counted for a scan, because even an empty scan takes time."""
MAX_PNG_BYTES = 2**29
"""Maximum number of bytes of the decompressed pixels of a PNG."""
MAX_RLE_BYTES = 2**22
"""Maximum number of bytes of a BMP file with run-length encoding, which Pillow decodes in
Python."""
MAX_RLE_PIXELS = 2**23
"""Maximum number of pixels of a BMP with run-length encoding."""
MAX_TIFF_TILES = 100_000
"""Maximum number of tiles or strips of a TIFF."""
MAX_TIFF_TILE_BYTES = 2**28
"""Maximum number of bytes of one decoded tile or strip."""
MAX_TIFF_BYTES = 2**30
"""Maximum number of bytes of all decoded tiles or strips, including their parts outside of the
image."""
MAX_WEBP_PIXELS = 50_000_000
"""Maximum number of pixels of a WebP image. libwebp keeps two more copies of the image in memory
while it decodes the image."""


def check_cost(data: bytes) -> None:
    """Checks that decoding an image file does not take too much time or memory.

    Nothing is decoded. Damage that does not affect the cost is not detected here.

    Args:
        data: Content of an image file.

    Raises:
        SampleError: The file exceeds a limit, is truncated, or uses a feature of its format for
            which the cost cannot be computed.
    """
    _limit("bytes", len(data), MAX_FILE_BYTES)
    for magic, check in _CHECKS.items():
        if data.startswith(magic):
            try:
                check(data)
            except (IndexError, struct.error):
                raise _refusal("the file is truncated or damaged") from None


def _refusal(text: str) -> SampleError:
    return SampleError(text, "image")


def _limit(what: str, found: int, most: int) -> None:
    if found > most:
        raise SampleError(
            f"the image has {found:,} {what}; at most {most:,} are allowed", "image cost"
        )


def _check_jpeg(jpeg: bytes) -> None:
    _limit("bytes", len(jpeg), MAX_JPEG_BYTES)
    _check_scans(jpeg)


_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""Matches the marker of a JPEG segment or of the image's end. Other markers have no segment."""
_EOI, _SOS, _EXIF, _MPF = 0xD9, 0xDA, 0xE1, 0xE2
_EXIF_MAGIC = b"Exif\0\0"
_TABLES = {0xC4, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
"""Markers of tables and metadata."""
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
"""Markers that begin a frame. Markers greater than `_PROGRESSIVE` stand for lossless, hierarchical
or arithmetic coding."""
_PROGRESSIVE = 0xC2


def _check_scans(jpeg: bytes) -> int:
    """Checks the segments of a JPEG in the order in which libjpeg reads them.

    Returns the number of blocks that all scans visit; 0 if a single sequential scan has all
    components.
    """
    frame: tuple[int, int, int] | None = None
    visits, exif, sequential = 0, b"", True
    for number, (marker, segment) in enumerate(_segments(jpeg), 1):
        _limit("JPEG segments", number, MAX_SEGMENTS)
        if marker in _FRAMES:
            if marker > _PROGRESSIVE or frame is not None:
                raise _refusal(
                    "the JPEG has arithmetic coding, lossless coding or two frames, which is not "
                    "supported"
                )
            sequential, frame = marker != _PROGRESSIVE, _frame(segment)
        elif marker == _SOS:
            if frame is None:
                raise _refusal("the JPEG has a scan without a frame")
            parts, largest, blocks = frame
            if sequential and segment[0] == parts and not visits:
                break  # libjpeg decodes this scan block by block, and reads nothing after it
            _limit("blocks in a JPEG with several scans", blocks, MAX_JPEG_BLOCKS)
            visits += max(MIN_SCAN_VISITS, segment[0] * largest)
            _limit("blocks in all JPEG scans together", visits, MAX_JPEG_VISITS)
        elif marker == _EXIF and segment.startswith(_EXIF_MAGIC):
            exif += segment[6:]
            _limit("bytes of Exif data", len(exif), MAX_JOINED_BYTES)
        elif marker == _MPF and segment.startswith(b"MPF\0"):
            _check_tags(segment[4:])
        elif marker not in _TABLES:
            raise _refusal(f"the JPEG has a segment with the unknown marker {marker:#x}")
    _check_tags(exif)
    return visits


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the marker and the content of each segment of a JPEG."""
    position, junk, in_head = 2, 0, True
    while (found := _MARKER.search(jpeg, position)) and found[0][1] != _EOI:
        start = found.end()
        stop = start + int.from_bytes(jpeg[start : start + 2])
        if stop < start + 2:
            raise _refusal("the JPEG has a segment without a valid length")
        if in_head:
            junk += found.start() - position
            _limit("bytes between JPEG segments", junk, MAX_JUNK_BYTES)
            _limit("bytes in the JPEG header", stop, MAX_HEADER_BYTES)
        yield found[0][1], jpeg[start + 2 : stop]
        position, in_head = stop, in_head and found[0][1] != _SOS


def _frame(segment: bytes) -> tuple[int, int, int]:
    """Returns the numbers of components, of blocks in the largest component, and of all blocks."""
    height, width, count = struct.unpack_from(">HHB", segment, 1)
    samplings = [divmod(segment[at], 16) for at in range(7, 7 + 3 * count, 3)]
    if not samplings or not all(0 < side < 5 for sampling in samplings for side in sampling):
        raise _refusal("the JPEG has invalid sampling factors")
    across, down = (max(sides) for sides in zip(*samplings, strict=True))
    units = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    return count, units * across * down, units * sum(a * d for a, d in samplings)


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Number of channels for each color type of a PNG."""


def _check_png(png: bytes) -> None:
    """Checks all chunks of a PNG; only the chunks with pixels may be large."""
    at, number, compressed, other = 8, 0, 0, 0
    while at + 8 <= len(png) and number <= MAX_CHUNKS:
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            width, height, depth, colours = struct.unpack_from(">IIBB", png, at + 8)
            pixels = min(width * height, MAX_PIXELS)  # open_checked refuses more pixels
            size = pixels * depth * _CHANNELS.get(colours, 0) // 8
            _limit("bytes of decompressed pixels", size, MAX_PNG_BYTES)
        number += 1
        compressed += kind in (b"zTXt", b"iTXt", b"iCCP")
        other += 0 if kind in (b"IDAT", b"fdAT") else min(length, len(png))
        at += 12 + length
    _limit("PNG chunks", number, MAX_CHUNKS)
    _limit("compressed texts and color profiles", compressed, MAX_COMPRESSED_CHUNKS)
    _limit("bytes in PNG chunks without pixels", other, MAX_HEADER_BYTES)


def _check_gif(gif: bytes) -> None:
    """Checks all blocks of a GIF before the first picture; parses damaged blocks like Pillow."""
    at = 13 + ((3 << (gif[10] & 7) + 1) if gif[10] & 128 else 0)
    blocks = comments = 0

    def next_block() -> int:
        """Skips one block; returns its length, or 0 if there are too many blocks."""
        nonlocal at, blocks
        length, blocks = gif[at], blocks + 1
        at += 1 + length
        return length if blocks <= MAX_GIF_BLOCKS else 0

    while gif[at : at + 1] not in (b",", b";", b"") and blocks <= MAX_GIF_BLOCKS:
        if gif[at] != ord("!"):
            blocks, at = blocks + 1, at + 1
            continue
        start, at = at + 2, at + 2
        length = next_block()
        if gif[start - 1] == 0xFE:
            while length:
                comments += length
                length = next_block()
            continue
        if gif[start - 1] == 0xFF and gif.startswith(b"NETSCAPE2.0", start + 1) and length >= 11:
            next_block()
        while next_block():
            pass
    _limit("GIF blocks before the first picture", blocks, MAX_GIF_BLOCKS)
    _limit("bytes of GIF comments", comments, MAX_JOINED_BYTES)


def _check_bmp(bmp: bytes) -> None:
    size, width, height = struct.unpack_from("<Iii", bmp, 14)
    if size != 12 and struct.unpack_from("<I", bmp, 30)[0] in (1, 2):
        _limit("bytes in a BMP with run-length encoding", len(bmp), MAX_RLE_BYTES)
        _limit("pixels in a BMP with run-length encoding", abs(width * height), MAX_RLE_PIXELS)


def _check_webp(webp: bytes) -> None:
    if webp[8:12] != b"WEBP":
        return
    if webp[12:16] == b"VP8X":
        width, height = (int.from_bytes(webp[at : at + 3], "little") + 1 for at in (24, 27))
    elif webp[12:16] == b"VP8L":
        bits = int.from_bytes(webp[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", webp, 26))
    _limit("pixels in WebP format", width * height, MAX_WEBP_PIXELS)


Entry = tuple[int, int, int]
"""Type of a tag's values, offset of its first value, and number of its values."""

_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Number of bytes of one value of each type."""
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}
"""Format of each integer type in the module `struct`."""
_POINTERS = (34665, 34853, 40965)
"""Tags that point to other tag directories that Pillow reads: Exif, GPS, interoperability."""
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR = 256, 257, 258, 259, 277, 284
_STRIPS, _STRIP_ROWS, _STRIP_BYTES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 322, 323, 324, 325
_ORIENTATION, _IN_JPEG = 274, 7
_COMPRESSIONS = {1, 2, 3, 4, 5, _IN_JPEG, 8, 32773, 32946, 50000}
"""Allowed compressions: none, CCITT's, LZW, JPEG, Deflate, PackBits, Zstandard."""


class _Tags:
    """Reads the tag directories of a TIFF. The limits apply to all directories together.

    Attributes:
        repeated: Tags that occur more than once in the same directory.
        first: Offset of the first directory.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._order = "<" if data[:2] == b"II" else ">"
        self._is_big = data[2] == 43
        self._count = self._numbers = 0
        self.repeated: set[int] = set()
        self.first = self._unpack("Q", 8)[0] if self._is_big else self._unpack("I", 4)[0]

    def read(self, start: int) -> dict[int, Entry]:
        """Returns the tags of the directory at an offset."""
        length, form, count, inline = (20, "HHQ", "Q", 8) if self._is_big else (12, "HHI", "H", 4)
        found: dict[int, Entry] = {}
        first = start + struct.calcsize(count)
        for at in itertools.islice(
            range(first, len(self._data) - length + 1, length), self._unpack(count, start)[0]
        ):
            self._count += 1
            _limit("TIFF or Exif tags", self._count, MAX_TAGS)
            tag, kind, values = self._unpack(form, at)
            if kind not in _UNITS:
                continue
            offset, size = at + length - inline, values * _UNITS[kind]
            if size > inline:
                offset = self._unpack("Q" if self._is_big else "I", offset)[0]
            self._numbers += min(size, len(self._data)) if _UNITS[kind] > 1 else 0
            _limit("bytes of numbers in TIFF or Exif tags", self._numbers, MAX_TAG_NUMBERS)
            self.repeated |= {tag} & found.keys()
            found[tag] = kind, offset, values
        return found

    def integers(self, entry: Entry | None) -> tuple[int, ...]:
        """Returns the values of a tag; an empty tuple if it is missing or has no integers."""
        if entry is None or entry[0] not in _INTEGERS:
            return ()
        kind, offset, count = entry[0], entry[1], min(entry[2], MAX_TIFF_TILES + 1)
        return self._unpack(f"{count}{_INTEGERS[kind]}", offset)

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + form, self._data, at)


_USED = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR, *_POINTERS),
    *(_STRIPS, _STRIP_ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES),
}
"""Tags that affect decoding. A directory must not contain any of these tags twice."""


def _check_tags(data: bytes) -> None:
    """Checks the first tag directory of a JPEG's Exif data, as far as it can be read."""
    data = _without_headers(data)
    if data.startswith(_EXIF_MAGIC):
        raise _refusal("the Exif data has too many headers")
    if data[:2] in (b"II", b"MM"):
        with contextlib.suppress(struct.error):
            tags = _Tags(data)
            _check_values(data, tags.read(tags.first))


def read_orientation(exif: bytes) -> int:
    """Returns the orientation in Exif data, usually 1 to 8; 0 if it is missing or damaged."""
    exif = _without_headers(exif)
    if exif[:2] in (b"II", b"MM"):
        with contextlib.suppress(IndexError, struct.error, SampleError):
            tags = _Tags(exif)
            return _first(tags, tags.read(tags.first), _ORIENTATION, 0)
    return 0


def _without_headers(exif: bytes) -> bytes:
    return re.sub(rb"\A(?:Exif\0\0){1,4}", b"", exif)  # Pillow removes any number of headers


def _check_values(data: bytes, *directories: dict[int, Entry]) -> None:
    """Checks the number of bytes of all tag values, because Pillow copies these values."""
    entries = itertools.chain.from_iterable(found.values() for found in directories)
    size = sum(min(count * _UNITS[kind], len(data)) for kind, _, count in entries)
    _limit("bytes in TIFF or Exif tags", size, len(data) + MAX_TAG_NUMBERS)


def _check_tiff(tiff: bytes) -> None:
    if tiff[:4] not in (b"II*\0", b"MM\0*", b"II+\0"):
        raise _refusal("the TIFF header is invalid")
    tags = _Tags(tiff)
    first = tags.read(tags.first)
    if tags.repeated & _USED:  # Pillow uses the last of them, libtiff the first
        raise _refusal(f"the TIFF has tag {min(tags.repeated & _USED)} twice")
    directories = [first]
    for directory in directories:  # the list grows during the loop, up to the limit of tags
        for pointer in _POINTERS:
            directories += [tags.read(at) for at in tags.integers(directory.get(pointer))]
    _check_values(tiff, *directories)
    compression = _first(tags, first, _COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise _refusal(f"the TIFF has compression {compression}, which is not supported")
    count = _check_tiles(tags, first)
    offsets = tags.integers(first.get(_TILES, first.get(_STRIPS)))
    sizes = tags.integers(first.get(_TILE_BYTES, first.get(_STRIP_BYTES)))
    _limit("TIFF tiles or strips", len(offsets), MAX_TIFF_TILES)
    if len(sizes) < count:  # libtiff then assumes that each tile or strip is as large as the file
        sizes = (len(tiff),) * count
    if compression == 1:
        return
    stored = sum(min(size, len(tiff)) for size in sizes[:count])
    _limit("compressed bytes in TIFF tiles or strips", stored, 2 * len(tiff))
    if compression == _IN_JPEG:
        if len(offsets) < count:
            raise _refusal("the TIFF lacks the offsets of some tiles or strips")
        visits = 0
        for at, size in zip(offsets[:count], sizes, strict=False):
            visits += _check_scans(tiff[at : at + size])
            _limit("blocks in all JPEG scans together", visits, MAX_JPEG_VISITS)


def _check_tiles(tags: _Tags, first: dict[int, Entry]) -> int:
    """Checks the sizes of the decoded tiles or strips; returns the number of tiles or strips."""
    width, height = _first(tags, first, _WIDTH, 0), _first(tags, first, _HEIGHT, 0)
    samples, bits = (
        _first(tags, first, _SAMPLES, 1),
        max(tags.integers(first.get(_BITS)), default=1),
    )
    if not (min(width, height) > 0 and 0 < samples <= 16 and 0 < bits <= 64):
        raise _refusal(
            f"the TIFF has {width} x {height} pixels with {samples} channels of {bits} bits, which "
            "is not supported"
        )
    if {_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES} & first.keys():
        if {_STRIPS, _STRIP_BYTES} & first.keys():
            raise _refusal("the TIFF has both tiles and strips")
        across, down = _first(tags, first, _TILE_WIDTH, 0), _first(tags, first, _TILE_HEIGHT, 0)
    else:
        across, down = width, min(height, _first(tags, first, _STRIP_ROWS, height))
    if across < 1 or down < 1:
        raise _refusal("the TIFF has tiles or strips of size 0")
    is_planar = _first(tags, first, _PLANAR, 1) == 2
    count = math.ceil(width / across) * math.ceil(height / down) * (samples if is_planar else 1)
    size = math.ceil(across * (1 if is_planar else samples) * bits / 8) * down
    _limit("TIFF tiles or strips", count, MAX_TIFF_TILES)
    _limit("bytes in a decoded TIFF tile or strip", size, MAX_TIFF_TILE_BYTES)
    _limit("bytes in all decoded TIFF tiles or strips", count * size, MAX_TIFF_BYTES)
    return count


def _first(tags: _Tags, directory: dict[int, Entry], tag: int, default: int) -> int:
    """Returns the first integer of a tag, or the default if the tag has none."""
    return next(iter(tags.integers(directory.get(tag))), default)


_CHECKS = {
    b"\xff\xd8\xff": _check_jpeg,
    b"\x89PNG\r\n\x1a\n": _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
    b"RIFF": _check_webp,
    b"II": _check_tiff,
    b"MM": _check_tiff,
}

"""Image files that cost their reader far more than their size: one maker for each way we know."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def bits(text: str) -> bytes:
    text += "1" * (-len(text) % 8)
    packed = int(text or "0", 2).to_bytes(len(text) // 8, "big")
    return packed.replace(b"\xff", b"\xff\0")


def jpeg(
    side: int, scans: int, *, frame: int = 0xC2, head: bytes = b"", between: bytes = b""
) -> bytes:
    """A progressive grey JPEG of which each scan but the first has next to no bytes."""
    blocks = (-(-side // 8)) ** 2
    quantizers = segment(0xDB, bytes([0]) + bytes([1] * 64))
    sizes = segment(frame, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    # A code of one bit each: a difference of zero, and a run of 2^14 to 2^15 - 1 empty blocks.
    tables = segment(0xC4, bytes([0x00, 1, *[0] * 15, 0]))
    tables += segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))
    if frame != 0xC2:  # blocks of a zero difference and no run
        tables = segment(0xC4, bytes([0x00, 1, *[0] * 15, 0]) + bytes([0x10, 1, *[0] * 15, 0]))
        scan = segment(0xDA, bytes([1, 1, 0, 0, 63, 0])) + bits("00" * blocks)
        return b"\xff\xd8" + head + quantizers + sizes + tables + scan * scans + b"\xff\xd9"
    start = segment(0xDA, bytes([1, 1, 0, 0, 0, 1])) + bits("0" * blocks)
    runs = bits(("0" + "1" * 14) * -(-blocks // 32767))
    first = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x01])) + runs
    refine = segment(0xDA, bytes([1, 1, 0, 1, 63, 0x10])) + runs
    body = start + first + between + (refine + between) * max(0, scans - 2)
    return b"\xff\xd8" + head + quantizers + sizes + tables + body + b"\xff\xd9"


def three_scans(scans: int, side: int = 4096) -> bytes:
    """A sequential JPEG of three components, of which each scan has one."""
    grey = jpeg(side, 1, frame=0xC0)
    at = grey.index(b"\xff\xda")
    frame = struct.pack(">BHHB", 8, side, side, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0])
    start = grey.index(b"\xff\xc0")
    head = grey[:start] + segment(0xC0, frame) + grey[start + 13 : at]
    data = grey[at + 10 : -2]
    pieces = (segment(0xDA, bytes([1, n % 3 + 1, 0, 0, 63, 0])) + data for n in range(scans))
    return head + b"".join(pieces) + b"\xff\xd9"


def plain_jpeg(head: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    return file.getvalue()[:2] + head + file.getvalue()[2:]


def exif(entries: list[tuple[int, int, int, int]], tail: bytes = b"", first: int = 8) -> bytes:
    """A directory of (tag, type, count, offset or value), and what lies behind it."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", first, len(entries)) + packed + bytes(4) + tail


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(before: bytes = b"", after: bytes = b"", side: int = 16, split: int = 0) -> bytes:
    pixels = zlib.compress(bytes(side * (side + 1)), 0 if split else 9)
    pieces = [pixels[at : at + split] for at in range(0, len(pixels), split)] if split else [pixels]
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)),
        before,
        *(chunk(b"IDAT", piece) for piece in pieces),
        after,
        chunk(b"IEND"),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gif(before: bytes = b"") -> bytes:
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(file, "GIF")
    whole = file.getvalue()
    head = 13 + (3 << (whole[10] & 7) + 1)
    return whole[:head] + before + whole[head:]


def comment(blocks: int, length: int) -> bytes:
    return b"!\xfe" + (bytes([length]) + b"c" * length) * blocks + b"\0"


def bmp(width: int, height: int, codes: bytes, compression: int = 1) -> bytes:
    header = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, 8 // compression, compression, 0, 0, 0, 0, 0
    )
    palette = b"".join(bytes([n, 0, n, 0]) for n in range(256 // compression**4))
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, start) + header + palette + codes


SHORT, LONG, RATIONAL, BYTE = 3, 4, 5, 1


def tiff(
    width: int,
    height: int,
    pieces: list[bytes],
    *,
    compression: int = 1,
    tile: tuple[int, int] | None = None,
    rows: int | None = None,
    repeat: int = 1,
    more: list[tuple[int, int, int, int]] = [],  # noqa: B006 - it is not changed
    tail: bytes = b"",
) -> bytes:
    """Grey pixels in tiles or strips; the pieces may be used again and again."""
    data = b"".join(pieces)
    places = np.cumsum([8] + [len(piece) for piece in pieces[:-1]]).tolist() * repeat
    sizes = [len(piece) for piece in pieces] * repeat
    count, arrays = len(places), 8 + len(data)
    entries = [(256, LONG, 1, width), (257, LONG, 1, height), (258, SHORT, 1, 8)]
    entries += [(259, SHORT, 1, compression), (262, SHORT, 1, 1), (277, SHORT, 1, 1)]
    entries += [(322, LONG, 1, tile[0]), (323, LONG, 1, tile[1])] if tile else []
    entries += [] if tile else [(278, LONG, 1, rows or height)]
    for tag, values, at in (
        (324 if tile else 273, places, arrays),
        (325 if tile else 279, sizes, arrays + 4 * count),
    ):
        entries.append((tag, LONG, count, at if count > 1 else values[0]))
    entries = sorted(entries + more)
    body = data + struct.pack(f"<{2 * count}I", *places, *sizes) + tail
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


EXIF, MPF, XMP = b"Exif\0\0", b"MPF\0", b"Photoshop 3.0\0"
MIB = 2**20


def fill(part: bytes, size: int) -> bytes:
    return part * (size // len(part))


BOMB = zlib.compress(bytes(MIB - 1))
TAGS = [(1000 + n, RATIONAL, 7000, 8) for n in range(4000)]
BYTES = [(1000 + n, BYTE, 60_000, 8) for n in range(5000)]
UNKNOWN = [(40_000 + n, BYTE, 1, 0) for n in range(8000)]

# Each takes about so many bytes; the costs grow with them.
HOSTILE: dict[str, Callable[[int], bytes]] = {
    "jpeg scans": lambda size: jpeg(8192, size // 500),
    "jpeg scans of a small image": lambda size: jpeg(8, size // 14),
    "jpeg scans of three": lambda size: three_scans(size // 2000),
    "jpeg tables between scans": lambda size: jpeg(
        64, 20, between=fill(segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0])), size // 20)
    ),
    "jpeg arithmetic": lambda size: jpeg(8192, size // 500, frame=0xCA),
    "jpeg segments": lambda size: plain_jpeg(fill(segment(0xFE, b""), size)),
    "jpeg junk": lambda size: plain_jpeg(segment(0xFE, b"x") + fill(b"\0", size)),
    "jpeg padding": lambda size: plain_jpeg(fill(b"\xff", size)),
    "jpeg exif": lambda size: plain_jpeg(fill(segment(0xE1, EXIF + b"x"), size)),
    "jpeg exif of many tags": lambda size: plain_jpeg(
        segment(0xE1, EXIF + exif(TAGS, bytes(9000))) + fill(segment(0xFE, b"x" * 65_000), size)
    ),
    "jpeg exif again": lambda size: plain_jpeg(
        segment(0xE1, EXIF) + fill(segment(0xE1, EXIF * 10_000), size)
    ),
    "jpeg directory of pictures": lambda size: plain_jpeg(
        segment(0xE2, MPF + exif(TAGS, bytes(9000)))
    ),
    "jpeg bytes of tags": lambda size: plain_jpeg(segment(0xE1, EXIF + exif(BYTES))),
    "jpeg resources": lambda size: plain_jpeg(
        fill(segment(0xED, XMP + (b"8BIM" + bytes(8)) * 5000), size)
    ),
    "jpeg quantizers": lambda size: plain_jpeg(fill(segment(0xDB, bytes(65 * 1000)), size)),
    "png chunks": lambda size: png(fill(chunk(b"juNk"), size)),
    "png chunks behind": lambda size: png(after=fill(chunk(b"juNk"), size)),
    "png empty pixels": lambda size: png(fill(chunk(b"IDAT"), size)),
    "png tiny pixels": lambda size: png(side=int((size / 13) ** 0.5), split=1),
    "png profiles": lambda size: png(fill(chunk(b"iCCP", b"p\0\0" + BOMB), size)),
    "png texts": lambda size: png(fill(chunk(b"zTXt", b"t\0\0" + BOMB), size)),
    "png international texts": lambda size: png(fill(chunk(b"iTXt", b"\0\1\0\0\0" + BOMB), size)),
    "png metadata": lambda size: png(chunk(b"juNk", bytes(size))),
    "gif blocks": lambda size: gif(b"!\x01" + fill(b"\1x", size) + b"\0"),
    "gif extensions": lambda size: gif(fill(b"!\x01\1x\0", size)),
    "gif comment": lambda size: gif(comment(size // 256, 255)),
    "gif comment of bytes": lambda size: gif(comment(size // 2, 1)),
    "gif comments": lambda size: gif(fill(comment(1, 1), size)),
    "gif junk": lambda size: gif(fill(b"x", size)),
    "bmp runs": lambda size: bmp(8192, 8192, fill(b"\1\7", size)),
    "bmp lines": lambda size: bmp(8192, 8192, fill(b"\1\7\0\0", size)),
    "bmp lines of one pixel": lambda size: bmp(1, 80_000_000, fill(b"\0\0", size)),
    "bmp short runs": lambda size: bmp(8192, 8192, fill(b"\x8c\x17", size), 2),
    "tiff tiles": lambda size: tiff(1000, size // 8000, [b"x"], tile=(1, 1), repeat=size // 8),
    "tiff strips": lambda size: tiff(1, size // 8, [b"x"], rows=1, repeat=size // 8),
    "tiff strips of one piece": lambda size: tiff(
        1, 60_000, [zlib.compress(bytes(1)) + bytes(size)], compression=8, rows=1, repeat=60_000
    ),
    "tiff tall tiles": lambda size: tiff(
        60_000, 1, [zlib.compress(bytes(16 * MIB))], compression=8, tile=(16, MIB), repeat=3750
    ),
    "tiff one large tile": lambda size: tiff(
        16, 16, [zlib.compress(bytes(MIB))], compression=8, tile=(40_000, 40_000)
    ),
    "tiff tags": lambda size: tiff(16, 16, [bytes(256)], more=UNKNOWN),
    "tiff tags for libtiff": lambda size: tiff(
        16, 16, [zlib.compress(bytes(256))], compression=8, more=UNKNOWN
    ),
    "tiff bytes of tags": lambda size: tiff(
        16, 16, [bytes(max(256, size))], more=[(1000 + n, BYTE, size, 8) for n in range(900)]
    ),
    "tiff numbers": lambda size: tiff(
        16, 16, [bytes(max(256, size))], more=[(282, RATIONAL, size // 8, 8)]
    ),
    "tiff numbers of exif": lambda size: tiff(
        16,
        16,
        [exif([(900 + n, RATIONAL, size // 8, 8) for n in range(900)]) + bytes(size)],
        more=[(34665, LONG, 1, 16)],
    ),
    "tiff jpeg": lambda size: tiff(8192, 8192, [jpeg(8192, size // 500)], compression=7),
    "tiff jpegs": lambda size: tiff(512, 512 * 300, [jpeg(512, 20)] * 300, compression=7, rows=512),
    "tiff lzma": lambda size: tiff(16, 16, [bytes(256)], compression=34925),
}

"""Image files of many kinds, each with the upright RGB pixels that a model must get."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

HEIGHT, WIDTH = 13, 21


class Odd(NamedTuple):
    """A file, and its pixels uint8 [H, W, 3] or a pattern of the error's text.

    `deep` and `turned` are what check-data counts.
    """

    data: bytes
    expected: np.ndarray | str
    deep: bool = False
    turned: bool = False


rng = np.random.default_rng(0)
GRAY = (np.add.outer(np.arange(HEIGHT) * 5, np.arange(WIDTH) * 8) + 10).astype(np.uint8)
COLOR = np.stack([GRAY, GRAY[::-1], 255 - GRAY], axis=-1)
ALPHA = np.broadcast_to((np.arange(WIDTH) * 12).astype(np.uint8), GRAY.shape)
BITS = (GRAY > 100).astype(np.uint8)
DEEP = np.linspace(0, 65535, GRAY.size).astype(np.uint16).reshape(GRAY.shape)
"""Gray with all levels of 16 bits."""


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=-1)


def on_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Blends with white as Pillow does."""
    parts = np.dstack([color, np.broadcast_to(alpha, color.shape[:2])])
    white = Image.new("RGBA", parts.shape[1::-1], "white")
    return np.asarray(Image.alpha_composite(white, Image.fromarray(parts)).convert("RGB"))


def to_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    levels = (values.astype(np.float64) - low) * 255 / (high - low)
    return rgb(np.rint(np.clip(levels, 0, 255)))


def file_of(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """The pixels of a lossy file as Pillow decodes them."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def exif(orientation: int, order: str = "<") -> bytes:
    """Exif data with nothing but an orientation."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    tag = struct.pack(order + "HHIHH", 274, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(order + "H", 1) + tag + bytes(4)


UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}
"""What makes stored pixels upright, by the definition of each orientation in the Exif standard."""

XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
         (1, 0, 2, 1))  # fmt: skip
"""First row, first column, and steps of each pass."""


def png(
    pixels: np.ndarray, depth: int, color: int, *, interlaced: bool = False, extra: bytes = b""
) -> bytes:
    """A PNG of `pixels` [H, W] or [H, W, channels], with chunks `extra` before the pixels."""
    height, width = pixels.shape[:2]
    passes = [pixels[a::c, b::d] for a, b, c, d in ADAM7] if interlaced else [pixels]
    rows = b"".join(b"\0" + packed(row, depth) for part in passes if part.size for row in part)
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def packed(row: np.ndarray, depth: int) -> bytes:
    """The numbers of a row with `depth` bits each, the highest bit first."""
    if depth == 16:
        return row.astype(">u2").tobytes()
    places = np.arange(depth)[::-1]
    return np.packbits((row.reshape(-1, 1).astype(int) >> places) & 1).tobytes()


def tiff(
    pixels: bytes, bits: Sequence[int], kind: int, photometric: int, *, order: str = "<",
    extra: int | None = None
) -> bytes:  # fmt: skip
    """An uncompressed TIFF of HEIGHT x WIDTH pixels with one strip. `kind` is its sample format."""
    tags = {256: [WIDTH], 257: [HEIGHT], 258: bits, 259: [1], 262: [photometric], 273: [0],
            277: [len(bits)], 278: [HEIGHT], 279: [len(pixels)], 339: [kind] * len(bits),
            **({} if extra is None else {338: [extra]})}  # fmt: skip
    at = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [at + sum(2 * len(values) for values in tags.values() if len(values) > 2)]
    longer = entries = b""
    for tag, values in sorted(tags.items()):
        short = tag not in (273, 279)
        content = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
        if len(content) > 4:
            content, longer = struct.pack(order + "I", at + len(longer)), longer + content
        entries += struct.pack(order + "HHI", tag, 3 if short else 4, len(values))
        entries += content.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "H", len(tags)) + entries + bytes(4) + longer + pixels


def pngs() -> dict[str, Odd]:
    colored = png(COLOR, 8, 2)
    paletted = Image.fromarray(COLOR).quantize(16)
    of_palette = np.asarray(paletted.convert("RGB"))
    indices = np.asarray(paletted)
    gray_key = chunk(b"tRNS", struct.pack(">H", 50))
    odd16 = (GRAY.astype(np.uint16) << 8) + 7
    color16 = COLOR.astype(np.uint16) * 257
    key16 = chunk(b"tRNS", color16[3, 4].astype(">u2").tobytes())
    is_key = lambda x: np.where((x == x[3, 4]).all(-1, keepdims=True), 255, x)
    hexed = exif(6).hex()
    raw = f"\nexif\n{len(hexed) // 2:8d}\n{hexed}\n"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [Image.fromarray(COLOR[::-1])]
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode())
    return {
        "png": Odd(colored, COLOR),
        "png gray": Odd(png(GRAY, 8, 0), rgb(GRAY)),
        "png 1 bit": Odd(png(BITS, 1, 0), rgb(BITS * 255)),
        "png 2 bits": Odd(png(GRAY >> 6, 2, 0), rgb((GRAY >> 6) * 85)),
        "png 4 bits": Odd(png(GRAY >> 4, 4, 0), rgb((GRAY >> 4) * 17)),
        "png interlaced": Odd(png(COLOR, 8, 2, interlaced=True), COLOR),
        "png interlaced 16 bits": Odd(
            png(DEEP, 16, 0, interlaced=True), to_range(DEEP, 0, 65535), deep=True
        ),
        "png gray alpha": Odd(png(np.dstack([GRAY, ALPHA]), 8, 4), on_white(rgb(GRAY), ALPHA)),
        "png alpha": Odd(png(np.dstack([COLOR, ALPHA]), 8, 6), on_white(COLOR, ALPHA)),
        "png palette": Odd(file_of(paletted, "PNG"), of_palette),
        "png palette, one color transparent": Odd(
            file_of(paletted, "PNG", transparency=3),
            np.where(indices[..., None] == 3, 255, of_palette),
        ),
        "png palette, alpha": Odd(
            file_of(paletted, "PNG", transparency=bytes(range(0, 256, 16))),
            on_white(of_palette, (indices * 16).astype(np.uint8)),
        ),
        "png gray, one level transparent": Odd(
            png(GRAY, 8, 0, extra=gray_key), rgb(np.where(GRAY == 50, 255, GRAY))
        ),
        "png color, one color transparent": Odd(
            png(COLOR, 8, 2, extra=chunk(b"tRNS", COLOR[3, 4].astype(">u2").tobytes())),
            is_key(COLOR),
        ),
        "png 1 bit, black transparent": Odd(
            png(BITS, 1, 0, extra=chunk(b"tRNS", bytes(2))), rgb(np.full_like(BITS, 255))
        ),
        "png 16 bits": Odd(png(DEEP, 16, 0), to_range(DEEP, 0, 65535), deep=True),
        "png 16 bits of a photo": Odd(
            png(GRAY.astype(int) * 257, 16, 0), rgb(GRAY), deep=True
        ),
        "png 12 of 16 bits": Odd(png(DEEP >> 4, 16, 0), to_range(DEEP >> 4, 0, 4095), deep=True),
        "png 14 of 16 bits": Odd(
            png(DEEP >> 2, 16, 0), to_range(DEEP >> 2, 0, 2**14 - 1), deep=True
        ),
        "png 8 of 16 bits": Odd(png(GRAY, 16, 0), rgb(GRAY), deep=True),
        "png 16 bits, black": Odd(png(GRAY * 0, 16, 0), rgb(GRAY * 0), deep=True),
        "png 16 bits, one level transparent": Odd(
            png(odd16, 16, 0, extra=chunk(b"tRNS", struct.pack(">H", int(odd16[2, 3])))),
            np.where(odd16[..., None] == odd16[2, 3], 255, to_range(odd16, 0, 65535)),
            deep=True,
        ),
        "png color 16 bits": Odd(png(color16, 16, 2), COLOR, deep=True),
        "png color 12 of 16 bits": Odd(
            png(color16 >> 4, 16, 2), (color16 >> 12).astype(np.uint8), deep=True
        ),
        "png color 16 bits, one color transparent": Odd(
            png(color16, 16, 2, extra=key16), is_key(COLOR), deep=True
        ),
        "png gray alpha 16 bits": Odd(
            png(np.dstack([GRAY, ALPHA]).astype(int) * 257, 16, 4),
            on_white(rgb(GRAY), ALPHA),
            deep=True,
        ),
        "png alpha 16 bits": Odd(
            png(np.dstack([COLOR, ALPHA]).astype(int) * 257, 16, 6),
            on_white(COLOR, ALPHA),
            deep=True,
        ),
        "png exif": Odd(
            png(COLOR, 8, 2, extra=chunk(b"eXIf", exif(6)[6:])), UPRIGHT[6](COLOR), turned=True
        ),
        "png 16 bits, exif": Odd(
            png(DEEP, 16, 0, extra=chunk(b"eXIf", exif(8)[6:])),
            UPRIGHT[8](to_range(DEEP, 0, 65535)),
            deep=True,
            turned=True,
        ),
        "png alpha, exif": Odd(
            png(np.dstack([COLOR, ALPHA]), 8, 6, extra=chunk(b"eXIf", exif(5, ">")[6:])),
            UPRIGHT[5](on_white(COLOR, ALPHA)),
            turned=True,
        ),
        "png exif as a text": Odd(
            png(COLOR, 8, 2, extra=chunk(b"tEXt", b"Raw profile type exif\0" + raw.encode())),
            UPRIGHT[6](COLOR),
            turned=True,
        ),
        "png xmp": Odd(png(COLOR, 8, 2, extra=text), UPRIGHT[6](COLOR), turned=True),
        "png 2 bits, one level transparent": Odd(
            png(GRAY >> 6, 2, 0, extra=chunk(b"tRNS", struct.pack(">H", 1))),
            rgb(np.where(GRAY >> 6 == 1, 255, (GRAY >> 6) * 85)),
        ),
        "png 4 bits, one level transparent": Odd(
            png(GRAY >> 4, 4, 0, extra=chunk(b"tRNS", struct.pack(">H", 9))),
            rgb(np.where(GRAY >> 4 == 9, 255, (GRAY >> 4) * 17)),
        ),
        "png xmp against exif": Odd(
            png(COLOR, 8, 2, extra=text + chunk(b"eXIf", exif(1)[6:])), COLOR
        ),
        "png color profile": Odd(file_of(COLOR, "PNG", icc_profile=profile), COLOR),
        "png animated": Odd(
            file_of(COLOR, "PNG", save_all=True, append_images=frames), COLOR
        ),
        "png of one pixel": Odd(png(COLOR[:1, :1], 8, 2), COLOR[:1, :1]),
        "png truncated": Odd(colored[:-40], "truncated|broken"),
    }  # fmt: skip


def jpegs() -> dict[str, Odd]:
    plain = file_of(COLOR, "JPEG", quality=95)
    cmyk = file_of(Image.fromarray(255 - np.dstack([COLOR, GRAY]), "CMYK"), "JPEG", quality=95)
    at = cmyk.index(b"Adobe") + 11
    ycck = cmyk[:at] + b"\2" + cmyk[at + 1 :]
    progressive = file_of(COLOR, "JPEG", progressive=True)
    mpo = file_of(COLOR, "MPO", save_all=True, append_images=[Image.fromarray(COLOR[::-1])],
                  exif=exif(3))  # fmt: skip
    gray = file_of(GRAY, "JPEG")
    found = {
        "jpeg": Odd(plain, decoded(plain)),
        "jpeg gray": Odd(gray, decoded(gray)),
        "jpeg progressive": Odd(progressive, decoded(progressive)),
        "jpeg CMYK": Odd(cmyk, decoded(cmyk)),
        "jpeg YCCK": Odd(ycck, decoded(ycck)),
        "mpo": Odd(mpo, UPRIGHT[3](decoded(mpo)), turned=True),
        "jpeg damaged exif": Odd(
            file_of(COLOR, "JPEG", quality=95, exif=b"Exif\0\0?"), decoded(plain)
        ),
        "jpeg unknown orientation": Odd(
            file_of(COLOR, "JPEG", quality=95, exif=exif(9)), decoded(plain)
        ),
        "jpeg xmp": Odd(
            file_of(COLOR, "JPEG", quality=95, xmp=XMP.encode()),
            UPRIGHT[6](decoded(plain)),
            turned=True,
        ),
        "jpeg truncated": Odd(plain[:-200], "[Tt]runcated"),
        "jpeg very wide": Odd(file_of(COLOR[:1].repeat(50, axis=1), "JPEG"),
                              decoded(file_of(COLOR[:1].repeat(50, axis=1), "JPEG"))),
    }  # fmt: skip
    for number, upright in UPRIGHT.items():
        data = file_of(COLOR, "JPEG", quality=95, exif=exif(number, "<>"[number % 2]))
        found[f"jpeg exif {number}"] = Odd(data, upright(decoded(plain)), turned=number > 1)
    return found


def tiffs() -> dict[str, Odd]:
    signed = (DEEP.astype(np.int32) // 16 - 1024).astype(np.int16)
    fraction = (DEEP / 65535).astype(np.float32)
    holes = np.where(DEEP < 9000, np.nan, fraction - 2)
    span = np.nanmin(holes), np.nanmax(holes)
    premultiplied = np.dstack([(COLOR * (ALPHA[..., None] / 255)).astype(np.uint8), ALPHA])
    straight = np.asarray(Image.frombytes("RGBa", (WIDTH, HEIGHT), premultiplied.tobytes())
                          .convert("RGBA"))  # fmt: skip
    twelve = DEEP.astype(np.uint32) >> 4
    pages = [Image.fromarray(COLOR[::-1])]
    jpeg = file_of(COLOR, "TIFF", compression="jpeg")
    cmyk = Image.fromarray(COLOR).convert("CMYK")
    lab = Image.frombytes("LAB", (WIDTH, HEIGHT), COLOR.tobytes())
    full, deep = to_range(DEEP, 0, 65535), {"deep": True}
    return {
        "tiff": Odd(file_of(COLOR, "TIFF"), COLOR),
        "tiff lzw": Odd(file_of(COLOR, "TIFF", compression="tiff_lzw"), COLOR),
        "tiff gray": Odd(file_of(GRAY, "TIFF"), rgb(GRAY)),
        "tiff white is zero": Odd(tiff(GRAY.tobytes(), [8], 1, 0), rgb(255 - GRAY)),
        "tiff 1 bit": Odd(file_of(Image.fromarray(BITS.astype(bool)), "TIFF"), rgb(BITS * 255)),
        "tiff alpha": Odd(file_of(np.dstack([COLOR, ALPHA]), "TIFF"), on_white(COLOR, ALPHA)),
        "tiff premultiplied alpha": Odd(
            tiff(premultiplied.tobytes(), [8] * 4, 1, 2, extra=1),
            on_white(straight[..., :3], ALPHA),
        ),
        "tiff CMYK": Odd(file_of(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        "tiff YCbCr jpeg": Odd(jpeg, decoded(jpeg)),
        "tiff LAB": Odd(file_of(lab, "TIFF"), np.asarray(lab.convert("RGB"))),
        "tiff pages": Odd(file_of(COLOR, "TIFF", save_all=True, append_images=pages), COLOR),
        "tiff exif": Odd(file_of(COLOR, "TIFF", tiffinfo={274: 6}), UPRIGHT[6](COLOR)),
        "tiff 16 bits": Odd(file_of(DEEP, "TIFF"), full, **deep),
        "tiff 16 bits deflate": Odd(file_of(DEEP, "TIFF", compression="tiff_adobe_deflate"), full,
                                    **deep),
        "tiff 16 bits, big-endian": Odd(
            tiff(DEEP.astype(">u2").tobytes(), [16], 1, 1, order=">"), full, **deep
        ),
        "tiff 16 bits, white is zero": Odd(tiff(DEEP.tobytes(), [16], 1, 0), 255 - full, **deep),
        "tiff 12 of 16 bits": Odd(file_of(DEEP >> 4, "TIFF"), to_range(DEEP >> 4, 0, 4095), **deep),
        "tiff 12 bits": Odd(
            tiff(b"".join(packed(row, 12) for row in twelve), [12], 1, 1),
            to_range(twelve, 0, 4095),
            **deep,
        ),
        "tiff int16": Odd(
            tiff(signed.tobytes(), [16], 2, 1), to_range(signed, signed.min(), signed.max()), **deep
        ),
        "tiff int32": Odd(file_of(DEEP.astype(np.int32), "TIFF"), full, **deep),
        "tiff uint32": Odd(
            tiff((DEEP.astype(np.uint32) * 65537).tobytes(), [32], 1, 1), full, **deep
        ),
        "tiff float": Odd(file_of(fraction, "TIFF"), to_range(fraction, 0, 1), **deep),
        "tiff float with holes": Odd(
            file_of(holes.astype(np.float32), "TIFF"),
            np.nan_to_num(to_range(np.nan_to_num(holes, nan=span[0]), *span)),
            **deep,
        ),
        "tiff float, constant": Odd(file_of(fraction * 0 + 1e30, "TIFF"), rgb(GRAY * 0), **deep),
        "tiff float, no number": Odd(
            file_of(fraction * np.float32(np.nan), "TIFF"), "infinite or not a number"
        ),
        "tiff color 16 bits": Odd(
            tiff((COLOR.astype(np.uint16) * 257).tobytes(), [16] * 3, 1, 2), COLOR, **deep
        ),
    }  # fmt: skip


def others() -> dict[str, Odd]:
    paletted = Image.fromarray(COLOR).quantize(16)
    of_palette, indices = np.asarray(paletted.convert("RGB")), np.asarray(paletted)[..., None]
    frames = [Image.fromarray(COLOR[::-1])]
    alpha = np.dstack([COLOR, np.where(ALPHA > 100, ALPHA, 1)])
    webp = {"lossless": True, "exact": True}
    return {
        "gif": Odd(file_of(paletted, "GIF"), of_palette),
        "gif animated": Odd(
            file_of(paletted, "GIF", save_all=True, append_images=frames), of_palette
        ),
        "gif transparent": Odd(
            file_of(paletted, "GIF", transparency=3), np.where(indices == 3, 255, of_palette)
        ),
        "bmp": Odd(file_of(COLOR, "BMP"), COLOR),
        "bmp palette": Odd(file_of(paletted, "BMP"), of_palette),
        "bmp 1 bit": Odd(file_of(Image.fromarray(BITS.astype(bool)), "BMP"), rgb(BITS * 255)),
        "webp": Odd(file_of(COLOR, "WEBP", **webp), COLOR),
        "webp alpha": Odd(
            file_of(alpha, "WEBP", **webp), on_white(COLOR, alpha[..., 3])
        ),
        "webp animated": Odd(
            file_of(COLOR, "WEBP", save_all=True, append_images=frames, **webp), COLOR
        ),
        "webp exif": Odd(
            file_of(COLOR, "WEBP", exif=exif(8), **webp), UPRIGHT[8](COLOR), turned=True
        ),
        "jpeg 2000": Odd(file_of(COLOR, "JPEG2000"), "none of PNG"),
        "avif": Odd(b"\0\0\0\x1cftypavif" + bytes(40), "none of PNG"),
        "heic": Odd(b"\0\0\0\x1cftypheic" + bytes(40), "none of PNG"),
        "svg": Odd(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of PNG"),
        "nothing": Odd(b"", "none of PNG"),
    }  # fmt: skip


ODD = pngs() | jpegs() | tiffs() | others()

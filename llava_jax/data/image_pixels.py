"""Converts an opened image of any kind to the pixels that a model sees: upright, RGB, 8 bits.

Training, chat, serving and evaluation all get their pixels from this module. docs/data.md lists the
kinds of images.
"""

import re

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from llava_jax.data.image_limits import read_orientation
from llava_jax.errors import SampleError

_STRIP_PIXELS = 2**22
"""Number of pixels that are converted at a time. Converting a whole image at once would take up to
eight times the memory of the image."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""For each Exif orientation except 1, the operation that makes the stored image upright."""

_SIDEWAYS = 5
"""Smallest orientation with which height and width of the stored image are exchanged."""

_PHOTOMETRIC, _SAMPLE_FORMAT = 262, 339
"""Tags of a TIFF: whether 0 stands for white (0) or for black (1), and the type of the pixels."""
_UNSIGNED = 1
"""Value of `_SAMPLE_FORMAT` for integers without a sign."""


def to_rgb(image: Image.Image, *, exif_orientation: bool = True) -> Image.Image:
    """Converts an image to upright RGB with 8 bits per channel.

    Transparent parts are blended with white, like in Hugging Face's processor; the original LLaVA
    drops the transparency. Gray pixels of more than 8 bits are scaled to 8 bits: black is 0, and
    white is the largest number that has as many bits as the largest pixel, at least 8. If some
    pixels are negative or not integers, black is the smallest and white the largest pixel. Of
    colors with 16 bits, Pillow keeps the upper 8 bits.

    Args:
        image: Image in any mode of Pillow, which is not changed. If it has several frames, the
            current one is used, which is the first one after opening a file.
        exif_orientation: Whether to turn the image as its Exif orientation says.

    Raises:
        SampleError: The image has no finite pixels.
    """
    key_scale = _key_scale(image)
    image.load()  # some formats report their transparency and orientation only after loading
    orientation = find_orientation(image) if exif_orientation else 1
    if _is_deep_gray(image):
        rgb = _scale(image).convert("RGB")
    elif not _is_transparent(image):
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    else:
        rgb = _blend(image, key_scale)
    if orientation != 1:
        rgb = rgb.transpose(_TRANSPOSE[orientation])
    if rgb is not image:
        rgb.info.clear()  # so that the result is not turned again
    return rgb


def _key_scale(image: Image.Image) -> float:
    """Returns the factor from the transparent color of a PNG to Pillow's 8-bit pixels.

    The file stores this color with the number of bits of its pixels. The file must not be loaded
    yet, because Pillow then forgets this number.
    """
    if is_deep(image):
        return 2**-8
    tiles = getattr(image, "tile", [])
    found = re.search(r"\bL;([24])\b", str(tiles[0].args)) if tiles else None
    return 255 / (2 ** int(found[1]) - 1) if found else 1.0


def is_deep(image: Image.Image) -> bool:
    """Returns True if an image has more than 8 bits per channel; a file must not be loaded yet."""
    if _is_deep_gray(image):
        return True
    # Pillow's mode of a color image does not say how many bits the file has. In a BMP, ";16" is the
    # number of bits of all channels together.
    tiles = getattr(image, "tile", [])
    return image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in tiles)


def _is_deep_gray(image: Image.Image) -> bool:
    return image.mode == "F" or image.mode.startswith("I")


def _is_transparent(image: Image.Image) -> bool:
    has_alpha = not {"A", "a"}.isdisjoint(image.getbands())
    return has_alpha or image.info.get("transparency") is not None


def find_orientation(image: Image.Image) -> int:
    """Returns the Exif orientation of an image, from 1 to 8; 1 stands for upright.

    Like in Pillow, XMP metadata are used if the Exif data have no orientation. The orientation of a
    TIFF is always 1, because Pillow turns a TIFF when the file is loaded.
    """
    if isinstance(image, TiffImageFile):
        return 1
    exif = image.info.get("exif")
    if exif is None and (text := image.info.get("Raw profile type exif")):  # ImageMagick's PNGs
        digits = "".join(str(text).split("\n")[3:])
        exif = bytes.fromhex(digits) if re.fullmatch(r"([0-9a-fA-F]{2})*", digits) else b""
    found = read_orientation(exif or b"")
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    if not found and isinstance(xmp, str | bytes):
        text = xmp if isinstance(xmp, str) else xmp.decode("latin-1")
        match = re.search(r'tiff:Orientation(?:="|>)([0-9])', text)
        found = int(match[1]) if match else 1
    return found if found in _TRANSPOSE else 1


def is_sideways(image: Image.Image) -> bool:
    """Returns True if the stored height of an image is the width of the upright image."""
    return find_orientation(image) >= _SIDEWAYS


def _blend(image: Image.Image, key_scale: float) -> Image.Image:
    """Blends the transparent parts of an image with white.

    Args:
        image: Image with an alpha channel or a transparent color.
        key_scale: Factor from the transparent color, if it is not in a palette, to the pixels.
    """
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple):
        key = tuple(int(value * key_scale) for value in key)
    elif image.mode == "L" and isinstance(key, int):
        key = int(key * key_scale)
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        if key is not None:
            strip.info["transparency"] = key
        if strip.mode in ("La", "RGBa"):  # Pillow cannot convert them to all modes
            strip = strip.convert(strip.mode.replace("a", "A"))
        strip = strip.convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


def _scale(image: Image.Image) -> Image.Image:
    """Scales gray pixels of more than 8 bits to 8 bits; see `to_rgb`."""
    values, tags = np.asarray(image), image.tag_v2 if isinstance(image, TiffImageFile) else {}
    if image.mode == "I" and tags and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
        values = values.view(np.uint32)  # Pillow has no mode for these pixels
    low, high = _find_range(values)
    factor = 255 / (high - low) if high > low else 0.0
    levels = np.empty(values.shape, np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = values[top : top + rows]
        scaled = (strip.astype(np.float64) - low) * factor
        levels[top : top + rows] = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0, 255))
        if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == 0:
            levels[top : top + rows] ^= 255  # Pillow inverts only pixels of up to 8 bits
        if isinstance(key := image.info.get("transparency"), int):
            levels[top : top + rows][strip == key] = 255
    return Image.fromarray(levels)


def _find_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the pixel values that become black and white."""
    if values.dtype.kind != "f":
        low, high = values.min().item(), values.max().item()
        white = 2 ** max(8, high.bit_length()) - 1
        return (0.0, float(white)) if low >= 0 else (float(low), float(high))
    finite = np.isfinite(values)
    if not finite.any():
        raise SampleError("all pixels of the image are infinite or not a number", "image")
    low, high = values.min(where=finite, initial=np.inf), values.max(where=finite, initial=-np.inf)
    return float(low), float(high)

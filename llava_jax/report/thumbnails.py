"""Stores small copies of the eval images, so that the report does not need the data files."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_jax.data.images import open_image
from llava_jax.disk import replace_bytes
from llava_jax.errors import SampleError

MAX_EDGE = 320
"""Largest length of the longer side of a copy, in pixels."""

MAX_IMAGES = 4
"""Largest number of images of one record that are copied."""


def keep_thumbnails(
    directory: Path, index: int, images: Sequence[str | bytes], *, exif_orientation: bool = True
) -> None:
    """Writes small copies of a record's images as JPEG files.

    Args:
        directory: Directory for the copies, which is created when needed.
        index: Index of the record.
        images: Paths or contents of the image files. An image that cannot be read is not copied.
        exif_orientation: Whether images are turned upright as their Exif orientation says.
    """
    for number, image in enumerate(images[:MAX_IMAGES]):
        file = directory / f"{index}-{number}.jpg"
        try:
            copy = open_image(image, exif_orientation=exif_orientation)
        except SampleError:
            file.unlink(missing_ok=True)  # an older copy may show another image
            continue
        directory.mkdir(parents=True, exist_ok=True)
        copy.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        copy.save(written, "JPEG", quality=85, subsampling=0)
        replace_bytes(file, written.getvalue())


def find_thumbnails(directory: Path, index: int) -> list[Path]:
    """Returns the paths of the existing copies of a record's images, in the order of the images."""
    files = (directory / f"{index}-{number}.jpg" for number in range(MAX_IMAGES))
    return [file for file in files if file.is_file()]

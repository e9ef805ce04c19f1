"""Small copies of the eval images that a report shows, so that a report does not need the data."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_jax.data.conversation import SampleError
from llava_jax.data.images import open_image
from llava_jax.disk import replace_bytes

MAX_EDGE = 320
"""Pixels of a copy's longer side, at most."""

MAX_IMAGES = 4
"""Images of one sample that are copied, at most."""


def keep_thumbnails(directory: Path, index: int, images: Sequence[str | bytes]) -> None:
    """Writes the copies of one record's images.

    Args:
        directory: Directory for the copies, which is created when needed.
        index: Index of the record.
        images: Paths or contents of the images. One that cannot be read gets no copy.
    """
    for number, image in enumerate(images[:MAX_IMAGES]):
        file = directory / f"{index}-{number}.jpg"
        try:
            copy = open_image(image)
        except SampleError:
            file.unlink(missing_ok=True)  # an older copy may be of other data
            continue
        directory.mkdir(parents=True, exist_ok=True)
        copy.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        copy.save(written, "JPEG", quality=85, subsampling=0)
        replace_bytes(file, written.getvalue())


def find_thumbnails(directory: Path, index: int) -> list[Path]:
    """The existing copies of one record's images, in the order of the images."""
    files = (directory / f"{index}-{number}.jpg" for number in range(MAX_IMAGES))
    return [file for file in files if file.is_file()]

"""Small copies of a run's held-out images, so that what is shown of it needs its data no more."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from llava_jax.data.conversation import SampleError
from llava_jax.data.images import open_image
from llava_jax.disk import replace_bytes

LONGEST_EDGE = 320
"""Pixels of a copy's longer side, at most."""

MOST = 4
"""Copies of one sample's images."""


def keep_pictures(directory: Path, index: int, images: Sequence[str | bytes]) -> None:
    """Writes the copies of one record's images.

    Args:
        directory: Made when needed.
        index: The record's.
        images: Their paths, or what is in them. One that cannot be read has no copy.
    """
    for number, image in enumerate(images[:MOST]):
        file = directory / f"{index}-{number}.jpg"
        try:
            copy = open_image(image)
        except SampleError:
            file.unlink(missing_ok=True)  # the data may have changed since it was written
            continue
        directory.mkdir(parents=True, exist_ok=True)
        copy.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.LANCZOS)
        written = io.BytesIO()
        copy.save(written, "JPEG", quality=85, subsampling=0)
        replace_bytes(file, written.getvalue())


def find_pictures(directory: Path, index: int) -> list[Path]:
    """The copies of one record's images that are there, in their order."""
    files = (directory / f"{index}-{number}.jpg" for number in range(MOST))
    return [file for file in files if file.is_file()]

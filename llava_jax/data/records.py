"""Reads the records of data files. A record is a sample before it is encoded.

The forms that a record may have are described in `forms`.
"""

import array
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from llava_jax.data.conversation import Turn
from llava_jax.data.forms import NOTES, Parsed, parse
from llava_jax.data.holdout import image_key, video_key
from llava_jax.data.image_paths import is_embedded, locate_image
from llava_jax.data.video_file import Video, locate_video
from llava_jax.errors import ConfigError, SampleError

# These limits prevent a single record from delaying a run for long or filling its memory.
MAX_RECORD_BYTES = 2**22
"""Maximum size in bytes of a record in a JSON file, and of the texts of a record in a Parquet
file."""
MAX_BAD = 2**18
"""A file is refused if more than this number of its records, and more than half of its records,
have an unknown format."""
MAX_DEPTH = 64
"""Maximum depth of nested lists and objects in a record. Python's recursion limit is not used,
because the depth that it allows depends on the functions that are running."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A sample before it is encoded.

    Attributes:
        id: Name of the sample in the data.
        images: Path or content of each image file.
        turns: Turns of the conversation.
        category: Category for which an evaluation computes separate scores; None if the sample has
            no category.
        videos: Videos, of files or of frames.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    category: str | None = None
    videos: tuple[Video, ...] = ()


def read_record(raw: object, number: int, image_root: str, *, follow_links: bool = False) -> Record:
    """Converts a record of a data file to a `Record`.

    Args:
        raw: Dict with a conversation, in any form that `forms` describes. Optional fields are
            "image" or "images" (one image or a list of images), "video" or "videos" (one video or a
            list of videos), "id", "category" and "system". An image is a path, a data URL, bytes,
            or a dict with the keys "bytes" and "path", one of which may be None. A video is the
            same, the path of a directory of frames, or a list of frames, which are images. A turn
            is a dict with the keys "from" and "value", or "role" and "content". The content is a
            text or a list of parts: {"type": "text", "text": text}, {"type": "image"} or
            {"type": "video"}. An image part may contain an image as "image", "path", "url",
            "base64" or "image_url", or the index of an image of the record as "index"; a video part
            likewise. A turn with "loss", "train" or "training" false, or "weight" 0, is not
            learned.
        number: Index of the record, used as its id if the record has no id.
        image_root: Directory that relative paths of images and videos start from.
        follow_links: Whether symbolic links may point to images outside of image_root.

    Raises:
        SampleError: The record has an unknown format, the path of an image or video is outside of
            image_root, or an image or video has neither bytes nor a path.
    """
    parsed = parse(raw)
    name = raw.get("id") if isinstance(raw, dict) else None
    return Record(
        id=str(number if name is None else name),
        images=tuple(locate_image(image, image_root, follow_links) for image in parsed.images),
        turns=tuple(parsed.turns),
        category=_category(raw),
        videos=tuple(locate_video(video, image_root, follow_links) for video in parsed.videos),
    )


def _category(raw: object) -> str | None:
    """Returns the category of a record as a text; None if the record has no category."""
    value = raw.get("category") if isinstance(raw, dict) else None
    if not isinstance(value, str | int | float | None):
        raise SampleError(f'"category" must be a text, a number or a boolean, found {value!r:.60}')
    return value if isinstance(value, str | None) else json.dumps(value)


class Sizes(NamedTuple):
    """Facts about N records that are known without encoding them.

    Attributes:
        images: int32 [N]. Number of images in each record; -1 for a record of an unknown format.
        words: int32 [N]. Number of words in all turns of each record.
        notes: int32 [N]. How each record was changed; see `forms.Parsed.notes`.
        videos: int32 [N]. Number of videos in each record.
    """

    images: Int32[np.ndarray, " N"]
    words: Int32[np.ndarray, " N"]
    notes: Int32[np.ndarray, " N"]
    videos: Int32[np.ndarray, " N"]

    @property
    def most_images(self) -> int:
        """Returns the largest number of images that a single record has."""
        return int(self.images.max(initial=0))

    def describe_notes(self) -> list[str]:
        """Returns one line of text for each way in which records were changed."""
        counts = {text: int((self.notes & flag > 0).sum()) for flag, text in NOTES.items()}
        return [
            f"{count:,} record{'s' * (count > 1)} {text}" for text, count in counts.items() if count
        ]


SAMPLED_IMAGES = 1024
"""Number of image files whose checksums help to identify a data set. They are evenly spread over
the data set, and up to twice as many may be used."""


class Survey(NamedTuple):
    """Results of reading all records of a file once.

    Attributes:
        sizes: Sizes of the records.
        digest: SHA-256, in hexadecimal, of the turns, images, videos and categories of all records,
            in order.
        images: Paths of some files of images and videos, evenly spread over the records.
        image_keys: int64 [K]. Keys of all images and videos in order, the images of each record
            first; see `holdout.image_key`.
    """

    sizes: Sizes
    digest: str
    images: list[str]
    image_keys: Int64[np.ndarray, " K"]


def survey(
    records: Iterable[object],
    path: str,
    image_root: str = "",
    sampled_images: int = SAMPLED_IMAGES,
) -> Survey:
    """Reads all records of a data file once, and returns their sizes, digest and image paths.

    Args:
        records: Records as they are in the file; None for a damaged record. The bytes of their
            images may be missing.
        path: Path of the file, for error messages.
        image_root: Directory that relative image paths start from, for the keys of the images.
        sampled_images: Minimum number of image paths to return; all paths are returned if there are
            fewer.

    Raises:
        ConfigError: Too many records have an unknown format.
    """
    sizes, keys, bad = array.array("i"), array.array("q"), 0
    digest = hashlib.sha256()
    paths: list[str] = []
    count, stride = 0, 1
    root = image_root if "://" in image_root else os.path.abspath(image_root)
    for number, raw in enumerate(records, 1):
        try:
            parsed, category = parse(raw), _category(raw)
        except (SampleError, RecursionError):
            sizes.extend((-1, 0, 0, 0))
            digest.update(b"no known form")
            bad += 1
            if bad > MAX_BAD and 2 * bad > number:
                raise ConfigError(
                    f"data file {path}: {bad:,} of the first {number:,} records have an unknown "
                    "format; check that the file contains training samples"
                ) from None
            continue
        digest.update(_bytes_of(parsed, category))
        words = sum(len(turn.text.split()) for turn in parsed.turns)
        sizes.extend((len(parsed.images), words, parsed.notes, len(parsed.videos)))
        keys.extend(image_key(image, root) for image in parsed.images)
        keys.extend(video_key(video, root) for video in parsed.videos)
        frames = (video if isinstance(video, list) else [video] for video in parsed.videos)
        for image in itertools.chain(parsed.images, *frames):
            name = image.get("path") if isinstance(image, dict) else image
            if count % stride == 0 and isinstance(name, str) and not is_embedded(name):
                paths.append(name)
            count += 1
        if len(paths) > 2 * sampled_images:
            paths, stride = paths[::2], 2 * stride
    found = Sizes(*np.array(sizes, np.int32).reshape(-1, 4).T)
    return Survey(found, digest.hexdigest(), paths, np.array(keys, np.int64))


def _bytes_of(parsed: Parsed, category: str | None) -> bytes:
    """Returns the images, turns, category and videos of a record as bytes, to compute a digest."""
    mark = {True: "", False: "\0unlearned"}
    said = (f"{turn.role}:{turn.text}{mark[turn.learned]}" for turn in parsed.turns)
    # Without videos, the digest is that of versions that did not read videos.
    fields = (parsed.images, category, *([parsed.videos] if parsed.videos else []))
    parts = [repr(fields), *said, ""]
    return "\0".join(parts).encode(errors="surrogatepass")

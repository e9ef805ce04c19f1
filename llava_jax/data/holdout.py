"""Holds out a fraction of the records for evaluation, so that no image is in both parts."""

import hashlib
import logging
import posixpath

import numpy as np
from jaxtyping import Bool, Int32, Int64

from llava_jax.data.image_paths import local_path, read_embedded
from llava_jax.errors import ConfigError, SampleError

logger = logging.getLogger(__name__)

UNKNOWN = 0
"""Key of an image that is known only after its file is read."""


def image_key(image: object, root: str = "") -> int:
    """Returns a 63-bit number that is the same for the same file or the same content of an image.

    Args:
        image: Path, bytes, or a dict with the keys "bytes" and "path". The bytes may be missing.
        root: Absolute directory that relative paths start from, so that the key does not depend on
            how the path of a file is written.
    """
    try:
        image = read_embedded(image)
    except SampleError:
        return UNKNOWN
    if isinstance(image, str):
        path = posixpath.normpath(posixpath.join(root, local_path(image)))
        image = path.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little") >> 1


def video_key(video: object, root: str = "") -> int:
    """Returns a 63-bit number that is the same for the same file or the same frames of a video.

    Args:
        video: Path, bytes, or a dict, as in `image_key`, or a list of frames, which are images.
        root: Absolute directory that relative paths start from.
    """
    if not isinstance(video, list | tuple):
        return image_key(video, root)
    keys = [image_key(frame, root) for frame in video]
    return UNKNOWN if UNKNOWN in keys else image_key(repr(keys).encode())


def hold_out(
    images: Int32[np.ndarray, " N"], keys: Int64[np.ndarray, " K"], fraction: float, seed: int
) -> Bool[np.ndarray, " N"]:
    """Chooses the records to hold out, using only the records and the seed.

    Records that have an image in common, also through other records, are kept together. Records of
    an unknown format are not held out, because a run reports bad records while it trains.

    Args:
        images: Number of images and videos of each record; -1 for a record of an unknown format.
        keys: Keys of all images and videos, from `image_key` and `video_key`, in the order of the
            records.
        fraction: Fraction of the records to hold out.
        seed: Seed of the choice.

    Returns:
        bool [N]. True for each record that is held out. Groups of records are added in a random
        order as long as there is room for them; at least one group is held out.

    Raises:
        ConfigError: No split leaves records in both parts.
    """
    if unknown := int((keys == UNKNOWN).sum()):
        logger.warning(
            "data.eval_fraction: %d images or videos have no path, for example because they are "
            "inside a Parquet file; if the same one is in several records, it may be in both parts",
            unknown,
        )
    group = _groups(np.maximum(images, 0), keys)
    sizes = np.bincount(group[images >= 0], minlength=len(images))
    # The order depends only on the number of records. If a record is corrected later, nearly the
    # same records are therefore held out.
    order = np.random.default_rng(seed).permutation(len(images))
    order = order[sizes[order] > 0].tolist()
    held, count = np.zeros(len(images), bool), 0
    most = min(fraction * sizes.sum() + 0.5, sizes.sum() - 1)
    for number in order:
        if count + sizes[number] <= most:
            held[number], count = True, count + sizes[number]
    if not count and order:
        smallest = min(order, key=lambda number: sizes[number])
        held[smallest], count = True, sizes[smallest]
    if not 0 < count < sizes.sum():
        raise ConfigError(
            f"data.eval_fraction {fraction:g}: the {len(images):,} records cannot be divided into "
            "two parts without a common image; write the eval data to a file and set data.eval_path"
        )
    return held[group] & (images >= 0)


def _groups(images: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the index of the first record in the group of each record, int64 [N]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(images)
    record = np.repeat(np.arange(count), images)[keys != UNKNOWN]
    names, image = np.unique(keys[keys != UNKNOWN], return_inverse=True)
    nodes = count + len(names)
    edges = coo_array((np.ones(len(record), bool), (record, count + image)), shape=(nodes, nodes))
    _, labels = connected_components(edges, directed=False)
    _, first, group = np.unique(labels[:count], return_index=True, return_inverse=True)
    return first[group]

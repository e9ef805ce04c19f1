"""Opens the data sets of a run, and divides them into training records and eval records."""

import dataclasses

import numpy as np

from llava_jax.config import DataConfig, DataSet
from llava_jax.data.holdout import hold_out
from llava_jax.data.sources import JoinedRecords, ListRecords, Records, load_records
from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OpenedData:
    """The opened data of a run.

    Attributes:
        records: All training records.
        counts: Number of training records in each data set.
        weights: Weight of each data set.
        eval_records: All eval records; empty if the run has no eval data.
    """

    records: Records
    counts: tuple[int, ...]
    weights: tuple[float, ...]
    eval_records: Records


def open_data(data: DataConfig, seed: int) -> OpenedData:
    """Opens the training data and the eval data of a run.

    Args:
        data: Config of the data.
        seed: Seed of the choice of the records that are held out for evaluation.

    Raises:
        ConfigError: A data set is missing or malformed, both `path` and `mixture` or both
            `eval_path` and `eval_fraction` are set, or the records cannot be divided.
    """
    mixture = data.mixture or (DataSet(data.path, data.image_root),)
    if data.mixture and data.path:
        raise ConfigError(
            f"data.path {data.path} and data.mixture are both set; set only one of them"
        )
    if data.eval_path is not None and data.eval_fraction:
        raise ConfigError(
            f"data.eval_path {data.eval_path} and data.eval_fraction {data.eval_fraction:g} are "
            "both set; to hold out training records, set data.eval_path to None "
            "(--data.eval-path None)"
        )
    open_set = lambda path, root: load_records(path, root, follow_links=data.follow_links)
    parts = [open_set(part.path, part.image_root) for part in mixture]
    records = parts[0] if len(parts) == 1 else JoinedRecords(parts)
    kept, eval_records = np.arange(len(records)), ListRecords()
    if data.eval_path:
        root = data.image_root if data.eval_image_root is None else data.eval_image_root
        eval_records = open_set(data.eval_path, root)
    elif data.eval_fraction:
        media = records.sizes.images + records.sizes.videos
        held = hold_out(media, records.image_keys, data.eval_fraction, seed)
        kept, eval_records = np.flatnonzero(~held), records.select(np.flatnonzero(held))
        records = records.select(kept)
    starts = np.cumsum([0, *map(len, parts)])
    counts = tuple(np.diff(np.searchsorted(kept, starts)).tolist())
    weights = tuple(part.weight for part in mixture)
    return OpenedData(records, counts, weights, eval_records[: data.eval_samples])

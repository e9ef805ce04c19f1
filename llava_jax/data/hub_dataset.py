"""Reads data sets with Hugging Face's library `datasets`, from the hub or from a directory."""

import hashlib
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from llava_jax.data import forms
from llava_jax.data.parquet_file import Table, read_row, read_rows
from llava_jax.data.records import survey
from llava_jax.disk import Json
from llava_jax.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
"""Start of the name of such a data set in `data.path`."""

SAVED_TO_DISK = ("dataset_dict.json", "state.json")
"""Names of the files that show that `save_to_disk` wrote a directory."""

_CONFIG = re.compile(r"(?:([^:\[]*):)?(.*)", re.DOTALL)
"""What follows the name of a data set: an optional config, and a split."""
_BATCH_ROWS = 256


class HubDataset:
    """The records of one split of a data set, which `datasets` maps from disk into memory.

    A record is read when it is accessed. A data set of the hub is downloaded at its first use.

    Attributes:
        path: Name of the data set with its prefix and its split, for messages.
        sizes: Sizes of the records; see `records.Survey`.
        images: Paths of some image files; see `records.Survey`.
        image_keys: Keys of all images; see `records.Survey`.
        digest: Digest of the records, and of the size in bytes of all columns.
    """

    def __init__(self, source: str, image_root: str = ""):
        """Reads all records once, except for the bytes of their images.

        Args:
            source: "hf:USER/NAME" or "hf:DIRECTORY". A split may follow after a colon, or a config
                and a split, "hf:NAME:CONFIG:SPLIT". Without a split, or if it is empty, the only
                split or the split "train" is read.
            image_root: Directory of the images, for their keys.

        Raises:
            ConfigError: The library is not installed, or it cannot read the data set; there is no
                such split, or the split has no conversations.
        """
        self.path = source
        rows = _load(source)
        if not forms.is_record(rows.column_names):
            raise ConfigError(forms.no_conversation(source, rows.column_names))
        self._rows = rows.select_columns(forms.columns(rows.column_names)).with_format("arrow")
        found = survey(self._scan(), source, image_root)
        self.sizes, records, self.images, self.image_keys = found
        # Images are not read here, but a replaced image changes the number of bytes.
        size = self._rows.data.nbytes
        self.digest = hashlib.sha256(repr((records, size)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> Json:
        """Returns a record as it is in the data set.

        Args:
            number: Index of the record.

        Raises:
            SampleError: The record is too large, or a text is not valid UTF-8.
        """
        table = cast("Table", self._rows[number])
        return read_row(table.to_batches()[0], 0)

    def where(self, number: int) -> str:
        """Returns the location of a record for messages: the data set and the row."""
        return f"{self.path}, row {number}"

    def _scan(self) -> Iterator[Json | None]:
        """Yields all rows, without the bytes of images that also have a path."""
        for start in range(0, len(self), _BATCH_ROWS):
            table = cast("Table", self._rows[start : start + _BATCH_ROWS])
            table = table.cast(_without_bytes(table.schema))
            for batch in table.to_batches():
                yield from read_rows(batch)


def _without_bytes(field: Table) -> Table:
    """Returns a pyarrow schema or type without the bytes of images that also have a path."""
    import pyarrow as pa

    if isinstance(field, pa.Schema):
        return pa.schema([(name, _without_bytes(field.field(name).type)) for name in field.names])
    if pa.types.is_list(field) or pa.types.is_large_list(field):
        make = pa.list_ if pa.types.is_list(field) else pa.large_list
        return make(pa.field(field.value_field.name, _without_bytes(field.value_type)))
    if pa.types.is_struct(field):
        names = [field.field(i).name for i in range(field.num_fields)]
        kept = [name for name in names if name != "bytes" or "path" not in names]
        return pa.struct([(name, _without_bytes(field.field(name).type)) for name in kept])
    return field


def _load(source: str) -> "Dataset":
    """Opens one split of a data set with `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{source} needs the package datasets: pip install 'llava_jax[hf]'"
        ) from error
    name, _, rest = source.removeprefix(PREFIX).partition(":")
    # The colon in a part of a split, as in "train[:90%]", does not end the name of a config.
    config, split = _CONFIG.fullmatch(rest).groups()  # pyright: ignore[reportOptionalMemberAccess]
    name = os.path.expanduser(name)
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise ConfigError(f"{source}: there is no directory {name}; check data.path")
    is_saved = any(os.path.isfile(os.path.join(name, file)) for file in SAVED_TO_DISK)
    try:
        found = (
            datasets.load_from_disk(name)
            if is_saved
            else datasets.load_dataset(name, config, split=split or None)
        )
    # The library raises errors of many types, for example of its file systems and of the hub.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{source}: the package datasets cannot read this data set: {reason:.500}; check the "
            "name, the split and the network, or write the path of a file instead; a data set with "
            f"several configs is written as {PREFIX}{name}:CONFIG:SPLIT"
        ) from error
    if is_saved and config:
        raise ConfigError(f"{source}: a directory of save_to_disk has no configs; remove {config}:")
    if not isinstance(found, dict):
        if is_saved and split not in ("", str(found.split)):
            raise ConfigError(f"{source}: {name} has no splits; write {PREFIX}{name}")
        return cast("Dataset", found)
    chosen = split or ("train" if len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise ConfigError(
            f"{source}: there is no split {chosen!r}; the splits are {', '.join(map(str, found))}; "
            f"write, for example, {PREFIX}{name}:{next(iter(found))}"
        )
    return cast("Dataset", found[chosen])

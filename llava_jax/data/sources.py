"""Where samples come from, by name."""

from collections.abc import Sequence

from llava_jax.data import easy_vqa
from llava_jax.data.records import LlavaJson, Record


def load_records(path: str, image_root: str) -> Sequence[Record]:
    """Opens a source of records.

    Args:
        path: A LLaVA JSON file (see `LlavaJson`), or "easy_vqa:SPLIT[:FORM...]" (see
            `easy_vqa.parse_source`).
        image_root: Folder that a file's image paths are relative to; easy-VQA has its own.

    Raises:
        ConfigError: The source is missing or malformed.
    """
    if path.startswith("easy_vqa:"):
        return easy_vqa.parse_source(path)
    return LlavaJson(path, image_root)

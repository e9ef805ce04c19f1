"""Finds the presets and the tiny models that come with the package.

In a clone, `presets` and `assets` in the package are symbolic links to the directories `configs`
and `assets` of the clone. In an installed wheel, they are directories of the package.
"""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent

PRESETS = _PACKAGE / "presets"
"""Directory of the presets, which are config files."""

TINY_MODELS = {name: _PACKAGE / "assets" / name for name in ("tiny-llava", "tiny-next")}
"""Directories of the tiny models by their names."""

TINY_LLAVA = TINY_MODELS["tiny-llava"]
"""Directory of the tiny model that the preset `tiny_lora` starts from."""


def preset_names() -> list[str]:
    """Returns the names of all presets, sorted."""
    return sorted(file.stem for file in PRESETS.glob("*.py"))


def find_preset(name: str) -> Path | None:
    """Returns the path of the preset with this name, or None if there is no such preset."""
    return PRESETS / f"{name}.py" if name in preset_names() else None


def suggest_preset(path: str) -> str:
    """Returns a sentence that helps a user whose `--config` is neither a file nor a preset.

    Args:
        path: Value of `--config`, for example "7b_lroa" or "configs/7b_lora.py".
    """
    names = preset_names()
    stem = Path(path).stem
    if stem in names:
        return f"to use the preset with this name, write `--config {stem}`"
    if near := difflib.get_close_matches(stem, names, n=1):
        return f"did you mean the preset `--config {near[0]}`?"
    return f"give the path of a config file or the name of a preset: {', '.join(names)}"

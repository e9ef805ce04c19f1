"""The presets and the tiny model that come with the package.

In a clone, `presets` and `assets` in the package are links to the folders `configs` and `assets` of
the clone. In an installed wheel, they are folders of the package.
"""

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent

PRESETS = _PACKAGE / "presets"
"""The folder of the presets, one config file each."""

TINY_LLAVA = _PACKAGE / "assets" / "tiny-llava"
"""The directory of the tiny model from which the preset `tiny_lora` starts."""


def preset_names() -> list[str]:
    """Returns the names that `--config` takes."""
    return sorted(file.stem for file in PRESETS.glob("*.py"))


def find_preset(name: str) -> Path | None:
    """Returns the file of the preset with this name, or None if there is no such preset."""
    return PRESETS / f"{name}.py" if name in preset_names() else None


def suggest_preset(path: str) -> str:
    """Returns a sentence that helps a user whose `--config` names no file.

    Args:
        path: What the user gave, for example "7b_lroa" or "configs/7b_lora.py".
    """
    names = preset_names()
    stem = Path(path).stem
    if stem in names:
        return f"the preset with this name is `--config {stem}`"
    if near := difflib.get_close_matches(stem, names, n=1):
        return f"did you mean the preset `--config {near[0]}`?"
    return f"give a file, or the name of a preset: {', '.join(names)}"

"""Recognizes common checkpoints that cannot be used, and says in one sentence what they are.

Without these checks, the errors would only list tensors that are missing or have odd names.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from llava_jax.disk import Json, open_regular
from llava_jax.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # a pointer has about 130 bytes

BESIDE = ("non_lora_trainables", "mm_projector")
"""Names, without suffix, of the files in which LLaVA's code stores parts trained in full."""

_READ = (
    *("*config.json", "*.index.json", "chat_template*", "*token*", "vocab*", "merges.txt"),
    *("*.model", "model*.safetensors", "adapter_model*", *(f"{stem}.*" for stem in BESIDE)),
)
"""Patterns for the names of the files that are read in the directory of a checkpoint."""

_UNQUANTIZED = (
    "use the model with its original weights; llava_jax can quantize them when it loads them "
    "(quantize 'nf4' or 'int8')"
)
# Names of tensors that other programs write for quantized weights.
_QUANTIZED = {
    r"\.(qweight|qzeros)$": "GPTQ or AWQ",
    r"\.(absmax|nested_absmax|quant_map|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.(weight_scale|weight_scale_inv|weight_packed)$": "FP8 or compressed-tensors",
}


def refuse_pointers(path: Path) -> None:
    """Checks that a file, or the files that are read in a directory, are not pointers of git-lfs.

    After `git clone` without git-lfs, each large file is a small text that points to the real file.

    Raises:
        CheckpointError: A file is a pointer.
    """
    for file in [path] if path.is_file() else _files_read(path):
        if not file.is_file() or file.stat().st_size > _MAX_POINTER_BYTES:
            continue
        with open_regular(file) as opened:
            start = opened.read(len(_POINTER))
        if start == _POINTER:
            raise CheckpointError(
                f"{file} is only a pointer of git-lfs, not the file itself; install git-lfs and "
                f"run `git lfs pull` in {file.parent}, or download the file again"
            )


def _files_read(directory: Path) -> list[Path]:
    """Returns the files of a checkpoint that may be read; other files may be pointers.

    Pickles of whole models are read only if there are no safetensors files.
    """
    patterns = [*_READ]
    if not any(directory.glob("*.safetensors")):
        patterns += ["*.bin", "*.pth"]
    return sorted({file for pattern in patterns for file in directory.glob(pattern)})


def supported_config(file: Path, raw: Json) -> Json:
    """Returns the content of a config.json, unless it describes a model that is not supported.

    Args:
        file: The config.json, for messages.
        raw: Its content.

    Raises:
        CheckpointError: The weights are quantized, or the model is a Video-LLaVA.
    """
    text = raw.get("text_config")
    found = (part.get("quantization_config") for part in (raw, text) if isinstance(part, dict))
    for settings in found:
        if isinstance(settings, dict):
            method = settings.get("quant_method", "bitsandbytes")
            raise CheckpointError(
                f"{file}: the weights are quantized with {method!s:.40}; {_UNQUANTIZED}"
            )
    if raw.get("model_type") == "video_llava" or "mm_video_tower" in raw:
        raise CheckpointError(
            f"{file}: this model is a Video-LLaVA, which has another vision tower and is not "
            "supported; use a LLaVA-1.5 for images, or a LLaVA-NeXT-Video or LLaVA-OneVision for "
            "videos"
        )
    return raw


def refuse_quantized(where: Path, names: Iterable[str]) -> None:
    """Checks that the names of a checkpoint's tensors are not those of quantized weights.

    Args:
        where: File or directory, for messages.
        names: Names of all tensors.

    Raises:
        CheckpointError: There are quantized weights.
    """
    for name in names:
        for pattern, method in _QUANTIZED.items():
            if re.search(pattern, name):
                raise CheckpointError(
                    f"{where}: the weights are quantized with {method} (found: {name:.200}); "
                    f"{_UNQUANTIZED}"
                )

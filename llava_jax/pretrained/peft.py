"""Reads and writes LoRA adapters as PEFT directories.

A PEFT directory has an adapter_config.json and an adapter_model.safetensors. The names of tensors
depend on the version of transformers; the code calls the two conventions era 5 and era 4:

    transformers 5            base_model.model.model.language_model.layers.0.self_attn.q_proj...
    transformers up to 4.51   base_model.model.language_model.model.layers.0.self_attn.q_proj...

Adapters are written for era 5 by default, and both eras are read. PEFT silently ignores tensors
that have the names of the other era. This module instead refuses a file unless every tensor belongs
to the model.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from llava_jax.config import (
    LLM_LINEARS,
    VISION_LINEARS,
    LoraConfig,
    ModelConfig,
    absolute_source,
)
from llava_jax.disk import Json
from llava_jax.distributed.multihost import is_main_process
from llava_jax.errors import CheckpointError
from llava_jax.models.paths import BEHIND_FEATURE, LLM, VISION, is_adapter
from llava_jax.pretrained import checkpoint_layouts as layouts
from llava_jax.pretrained.checkpoint_layouts import Layout
from llava_jax.pretrained.limited_process import LimitedProcess, ProgramError
from llava_jax.pretrained.load import Stored
from llava_jax.pretrained.safetensors import read_json, write_tensors
from llava_jax.pretrained.save import save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"  # not part of PEFT's format; it has the fingerprint of the base's weights

_PREFIX = "base_model.model."
_ERAS = {4: layouts.HF_4_36, 5: layouts.HF_5_MEMORY}
# Patterns that match the module names of a stack's layers in every version of transformers.
_BLOCKS = {
    LLM: r"(model\.)?language_model\.(model\.)?layers",
    VISION: r"(model\.)?vision_tower\.(vision_model\.)?encoder\.layers",
}
# Older versions of PEFT need at least one module name before the match. In era 4, a module name
# starts with the tower's name, so the pattern must not include the tower's name.
_VISION_PATTERN = r"encoder\.layers\..*"
# Names of the parts in PEFT's modules_to_save, which lists the parts that were trained in full.
_MODULES = {"projector.": "multi_modal_projector", "vision.": "vision_tower"}
_KINDS = {
    "base_model_name_or_path": str,
    **{"rank_pattern": dict, "alpha_pattern": dict},
    **{"lora_dropout": int | float, "use_rslora": bool},
}
_MAX = 2**24  # larger than the rank and alpha of any adapter
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)


def save_adapter(
    directory: str | Path,
    params: Mapping[str, jax.Array | Stored],
    adapters: Mapping[str, LoraConfig],
    config: ModelConfig,
    *,
    base_name: str | None,
    fingerprint: str | None,
    era: Literal[4, 5] = 5,
) -> None:
    """Writes an adapter that `peft.PeftModel.from_pretrained` can add to the Hugging Face base.

    All processes of a run must call this function; only the first process writes files.

    Args:
        directory: Directory to write; it is created if it does not exist.
        params: All trained parameters: adapters, and the parameters of parts that were trained in
            full. If the vision tower was trained in full, its frozen parameters must be included,
            because PEFT can only load a complete tower.
        adapters: LoRA settings by stack, `LLM` or `VISION`.
        config: Sizes of the model that was trained.
        base_name: Path, hub id or parts of the base. It is stored for programs that load the
            adapter; local paths are made absolute.
        fingerprint: Fingerprint of the base's weights, or None if it is not known.
        era: Version of transformers whose module names are used: 5 for versions from 4.52 on, 4 for
            versions up to 4.51.

    Raises:
        ValueError: `params` has parameters that a PEFT adapter cannot store, or only a part of the
            vision tower.
    """
    directory = Path(directory)
    whole = [path for path in params if not is_adapter(path)]
    foreign = [path for path in whole if not path.startswith(tuple(_MODULES))]
    if foreign:
        raise ValueError(f"a PEFT adapter cannot store these parameters: {', '.join(foreign)}")
    modules = [name for ours, name in _MODULES.items() if any(p.startswith(ours) for p in whole)]
    if "vision_tower" in modules and not any(path.startswith(BEHIND_FEATURE) for path in whole):
        raise ValueError(
            "PEFT can only load a complete vision tower; also include the layers after the feature "
            "layer"
        )
    base = {"fingerprint": fingerprint}
    named = None if base_name is None else absolute_source(base_name)
    written = _peft_config(adapters, config, modules) | {"base_model_name_or_path": named}
    if is_main_process():
        directory.mkdir(parents=True, exist_ok=True)
    write = lambda specs, fetch: write_tensors(directory / WEIGHTS, specs, fetch)
    save_tensors(params, config, partial(peft_name, _ERAS[era]), write)
    if is_main_process():
        (directory / CONFIG).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        (directory / BASE).write_text(json.dumps(base, indent=2, sort_keys=True) + "\n")


def peft_name(layout: Layout, parameter: str) -> str:
    """Returns the name that the tensor of a parameter has in the file of a PEFT adapter.

    Args:
        layout: Layout of the base's tensor names.
        parameter: Parameter path with the layer index, as `models.paths.unstacked` returns it.
    """
    name = layout.file_name(parameter)
    name = re.sub(r"\.lora_([ab])$", lambda match: f".lora_{match[1].upper()}.weight", name)
    return _PREFIX + name


def _peft_config(
    adapters: Mapping[str, LoraConfig], config: ModelConfig, modules: list[str]
) -> Json:
    """Returns the content of adapter_config.json.

    If the LoRA settings of the vision tower differ from the decoder's, the rank and the alpha of
    the vision tower are stored in `rank_pattern` and `alpha_pattern`.
    """
    first = adapters.get(LLM) or adapters[VISION]
    ranks, alphas = {}, {}
    if VISION in adapters and adapters[VISION] != first:
        ranks[_VISION_PATTERN] = adapters[VISION].rank
        alphas[_VISION_PATTERN] = adapters[VISION].alpha
    targets = [_target_pattern(stack, lora, config) for stack, lora in adapters.items()]
    return lora_settings(first) | {
        "task_type": None,
        "auto_mapping": {
            "base_model_class": "LlavaForConditionalGeneration",
            "parent_library": "transformers.models.llava.modeling_llava",
        },
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": "|".join(targets),
        "modules_to_save": modules or None,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def lora_settings(lora: LoraConfig) -> Json:
    """Returns the fields that adapter_config.json has in PEFT's and in LLaVA's directories."""
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _target_pattern(stack: str, lora: LoraConfig, config: ModelConfig) -> str:
    """Returns a regular expression that matches the linear layers of a stack that have adapters.

    Vision layers after the feature layer are not matched.
    """
    layers = r"\d+"
    if stack == VISION:
        layers = f"({'|'.join(map(str, range(config.used_vision_layers)))})"
    return rf"{_BLOCKS[stack]}\.{layers}\.\w+\.({'|'.join(lora.targets)})"


def read_settings(file: Path) -> Json:
    """Reads an adapter_config.json.

    Raises:
        CheckpointError: The file cannot be read, does not describe LoRA adapters, or has settings
            that are invalid or not supported.
    """
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {settings.get('peft_type')!r:.80}; only 'LORA' is supported"
        )
    odd = [f"{name} = {settings[name]!r:.80}" for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        odd.append(f"bias = {settings['bias']!r:.80}")
    if odd:
        raise CheckpointError(f"{file}: these settings are not supported: {', '.join(odd)}")
    for name, kind in _KINDS.items():
        if not isinstance(settings.get(name), kind | None):
            raise CheckpointError(
                f"{file}: {name} is {settings[name]!r:.80}, which has the wrong type"
            )
    return settings


def plain_name(name: str) -> str:
    """Removes the parts that PEFT adds to a tensor name.

    The resulting name of an adapter ends in `.lora_a` or `.lora_b`, like the adapter's path in this
    package.
    """
    name = name.replace(_PREFIX, "", 1).replace(".base_layer.", ".")
    name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
    return re.sub(
        r"\.lora_([AB])(\.default)?\.weight$", lambda match: f".lora_{match[1].lower()}", name
    )


def stack_settings(directory: Path, settings: Json, stack: str, names: list[str]) -> LoraConfig:
    """Returns the LoRA settings that all adapters of a stack share.

    Args:
        directory: Directory of the adapter, for messages.
        settings: Content of adapter_config.json.
        stack: The stack, `LLM` or `VISION`.
        names: Tensor names of the stack's adapters, as `plain_name` returns them.

    Raises:
        CheckpointError: Adapters of the stack differ in rank or alpha, or a value is invalid.
    """
    modules = sorted({name.rsplit(".", 1)[0] for name in names})
    of_modules = partial(_of_modules, directory / CONFIG, settings, modules)
    ranks = of_modules("r", "rank_pattern", int)
    alphas = of_modules("lora_alpha", "alpha_pattern", int | float)
    if len(ranks) > 1 or len(alphas) > 1:
        raise CheckpointError(
            f"{directory / CONFIG}: the adapters in {stack}* have ranks {sorted(ranks)} and alphas "
            f"{sorted(alphas)}; all of them must have the same rank and the same alpha"
        )
    (rank,), (alpha,) = ranks, alphas
    dropout = settings.get("lora_dropout") or 0.0
    if not 0 <= dropout < 1:
        raise CheckpointError(
            f"{directory / CONFIG}: lora_dropout is {dropout:.5g}; it must be at least 0 and less "
            "than 1"
        )
    if settings.get("use_rslora"):  # rsLoRA scales by alpha / sqrt(rank) instead of alpha / rank
        alpha *= math.sqrt(rank)
    linears = {module.rsplit(".", 1)[1] for module in modules}
    order = LLM_LINEARS if stack == LLM else VISION_LINEARS
    targets = tuple(linear for linear in order if linear in linears)
    return LoraConfig(rank, float(alpha), float(dropout), targets)


def _of_modules(
    file: Path,
    settings: Json,
    modules: list[str],
    name: str,
    pattern_name: str,
    kind: Any,
) -> set[Any]:
    """Returns the different ranks, or the different alphas, of the modules.

    As in PEFT, the first pattern that matches the end of a module's name gives the module's value.
    A module that no pattern matches has the value of the field `name`.
    """
    patterns = settings.get(pattern_name) or {}
    try:
        of = LimitedProcess()("match", patterns=[*patterns], names=modules) if patterns else []
    except ProgramError as error:
        raise CheckpointError(f"{file}: {pattern_name} cannot be used: {error}") from error
    values = [*patterns.values(), settings.get(name)]
    found = [values[-1 if index is None else index] for index in of or [None]]
    for value in found:
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < _MAX:
            raise CheckpointError(
                f"{file}: {name} is {value!r:.80}; r must be a positive integer, and lora_alpha "
                "must be a positive number"
            )
    return {*found}

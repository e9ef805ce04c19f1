"""Reads and writes LoRA adapters as PEFT directories.

A PEFT directory has an adapter_config.json and an adapter_model.safetensors. The names of tensors
depend on the version of transformers; the code calls the two conventions era 5 and era 4:

    transformers 5            base_model.model.model.language_model.layers.0.self_attn.q_proj...
    transformers up to 4.51   base_model.model.language_model.model.layers.0.self_attn.q_proj...

Adapters are written for era 5 by default, and both eras are read. PEFT itself ignores the tensors
of a file of the other era, without an error. Here a file is refused unless every tensor belongs to
the model.
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
BASE = "base.json"  # not a file of PEFT: it identifies the weights of the base

_PREFIX = "base_model.model."
_ERAS = {4: layouts.HF_4_36, 5: layouts.HF_5_MEMORY}
# Patterns that match the module names of a stack's layers in every version of transformers.
_BLOCKS = {
    LLM: r"(model\.)?language_model\.(model\.)?layers",
    VISION: r"(model\.)?vision_tower\.(vision_model\.)?encoder\.layers",
}
# Older PEFT needs at least one module name before the match, and names of era 4 start with the
# tower's name, so the pattern must not include that name.
_VISION_PATTERN = r"encoder\.layers\..*"
# Names in PEFT's modules_to_save of the parts that are trained in full beside adapters.
_MODULES = {"projector.": "multi_modal_projector", "vision.": "vision_tower"}
_KINDS = {
    "base_model_name_or_path": str,
    **{"rank_pattern": dict, "alpha_pattern": dict},
    **{"lora_dropout": int | float, "use_rslora": bool},
}
_MAX = 2**24  # larger than any rank and alpha
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
    """Writes an adapter that `peft.PeftModel.from_pretrained` loads on the Hugging Face base.

    All processes of a run must call this function; the first process writes.

    Args:
        directory: Directory to write; it is created if it does not exist.
        params: All trained parameters: adapters, and the parts trained in full beside them. If the
            vision tower is such a part, also its frozen parameters: PEFT loads only whole towers.
        adapters: LoRA settings by stack, `LLM` or `VISION`.
        config: Sizes of the model that was trained.
        base_name: Path, hub id or parts of the base, stored for programs that load the adapter;
            local paths are made absolute.
        fingerprint: Fingerprint of the base's weights, or None if it is not known.
        era: Version of transformers whose module names are used: 5 for versions from 4.52 on, 4 for
            versions up to 4.51.

    Raises:
        ValueError: `params` has parameters that a PEFT adapter cannot store.
    """
    directory = Path(directory)
    whole = [path for path in params if not is_adapter(path)]
    foreign = [path for path in whole if not path.startswith(tuple(_MODULES))]
    if foreign:
        raise ValueError(f"a PEFT adapter has no room for {', '.join(foreign)}")
    modules = [name for ours, name in _MODULES.items() if any(p.startswith(ours) for p in whole)]
    if "vision_tower" in modules and not any(path.startswith(BEHIND_FEATURE) for path in whole):
        raise ValueError("PEFT loads a vision tower only whole: add the layers after the feature")
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
    """Returns the tensor name in a PEFT adapter's file.

    Args:
        layout: Layout of the module names of the base.
        parameter: Parameter path with the layer index, as `models.paths.unstacked` returns it.
    """
    name = layout.file_name(parameter)
    name = re.sub(r"\.lora_([ab])$", lambda match: f".lora_{match[1].upper()}.weight", name)
    return _PREFIX + name


def _peft_config(
    adapters: Mapping[str, LoraConfig], config: ModelConfig, modules: list[str]
) -> Json:
    """Returns the content of adapter_config.json.

    If the vision tower's rank or alpha differs from the decoder's, it is stored as a pattern.
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
    """Returns the fields of adapter_config.json that PEFT's and LLaVA's directories share."""
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
    """Returns a pattern for the linear layers with adapters, without unused vision layers."""
    layers = r"\d+"
    if stack == VISION:
        layers = f"({'|'.join(map(str, range(config.used_vision_layers)))})"
    return rf"{_BLOCKS[stack]}\.{layers}\.\w+\.({'|'.join(lora.targets)})"


def read_settings(file: Path) -> Json:
    """Reads an adapter_config.json.

    Raises:
        CheckpointError: The file cannot be read, is not for LoRA, or has unsupported settings.
    """
    settings = read_json(file)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type is {settings.get('peft_type')!r:.80}, not 'LORA'")
    odd = [f"{name} = {settings[name]!r:.80}" for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("bias", "none") != "none":
        odd.append(f"bias = {settings['bias']!r:.80}")
    if odd:
        raise CheckpointError(f"{file}: not supported: {', '.join(odd)}")
    for name, kind in _KINDS.items():
        if not isinstance(settings.get(name), kind | None):
            raise CheckpointError(f"{file}: {name} is {settings[name]!r:.80}, of the wrong type")
    return settings


def plain_name(name: str) -> str:
    """Removes PEFT's additions from a tensor name.

    The name of an adapter then ends in `.lora_a` or `.lora_b`, like the paths in this package.
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
            f"{directory / CONFIG}: {stack}* has ranks {sorted(ranks)} and alphas "
            f"{sorted(alphas)}; one of each is supported"
        )
    (rank,), (alpha,) = ranks, alphas
    dropout = settings.get("lora_dropout") or 0.0
    if not 0 <= dropout < 1:
        raise CheckpointError(f"{directory / CONFIG}: lora_dropout {dropout:.5g} is not in [0, 1)")
    if settings.get("use_rslora"):  # its scale is alpha / sqrt(rank) instead of alpha / rank
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
    """Returns the ranks or alphas of the modules.

    As in PEFT, the value is that of the first pattern that matches the end of a module's name.
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
                f"{file}: {name} is {value!r:.80}; r must be a positive integer, lora_alpha a "
                "positive number"
            )
    return {*found}
